"""Every code block of TextBrewer's page on its concepts, through the door."""

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from limbeck.compat.textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from tests.brewing import losses_of

PAGE = Path(__file__).with_name("textbrewer.rst").read_text()


def blocks():
    """What is indented under ``.. code-block:: python`` and ``Example::``, in order."""
    found = re.findall(
        r"^( *)(?:\.\. code-block:: python|Example::)\n\n((?:\1 +.*\n|\s*\n)+)", PAGE + "\n", re.MULTILINE
    )
    return [textwrap.dedent(text) for _, text in found]


LOOP, ADAPTOR, DIFFERENT, CACHED = blocks()


def run(block, **names):
    """Run a block; its ``...`` stands for arguments that a reader fills in."""
    exec(compile(block.replace(", ... )", ", batch_size=8)"), "textbrewer.rst", "exec"), names)
    return names


def test_the_loop_over_batches():
    seen = []
    run(LOOP, dataloader=[(1,), (2,)], batch_postprocessor=lambda batch: seen.append(batch) or batch)
    assert seen == [(1,), (2,)]


class MyModel(nn.Module):
    """What the page describes: logits, states and a loss for input ids, an attention mask and labels."""

    def __init__(self, kept, layers):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.layers, self.kept = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers)), kept

    def forward(self, input_ids, attention_mask, labels):
        sequence_output = [self.embedding(input_ids)]
        for layer in self.layers:
            sequence_output.append(torch.tanh(layer(sequence_output[-1])))
        logits = self.head(sequence_output[-1].mean(dim=1))
        self.kept.outputs = logits, sequence_output, nn.functional.cross_entropy(logits, labels)
        return self.kept.outputs


def distilled(tmp_path, dataloader, teacher, student, adaptor_T, adaptor_S, **options):
    config = TrainingConfig(output_dir=tmp_path, device="cpu")
    distiller = GeneralDistiller(config, DistillationConfig(**options), teacher, student, adaptor_T, adaptor_S)
    losses = losses_of(distiller)
    with distiller:
        distiller.train(torch.optim.Adam(student.parameters(), lr=0.05), dataloader, num_epochs=20)
    return losses


def test_the_adaptor(tmp_path):
    """The page reads hidden states from a ``model`` that keeps its ``outputs``; so does this one."""
    student_kept, teacher_kept = SimpleNamespace(), SimpleNamespace()
    adaptors = [run(ADAPTOR, model=kept)["SimpleAdaptor"] for kept in (teacher_kept, student_kept)]
    torch.manual_seed(0)
    ids, mask = torch.randint(9, (16, 5)), (torch.arange(5) < torch.randint(1, 6, (16, 1))).long()
    data = DataLoader(TensorDataset(ids, mask, torch.randint(3, (16,))), batch_size=8)
    match = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    models = MyModel(teacher_kept, 2), MyModel(student_kept, 1)
    losses = distilled(tmp_path, data, *models, *adaptors, temperature=1, intermediate_matches=[match])
    assert losses[-1] < 0.9 * losses[0]


class Two(nn.Module):
    """Reads both tensors of a batch; counts how often."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.calls = nn.Linear(2 * width, 3), 0

    def forward(self, first, second):
        self.calls += 1
        logits = self.linear(torch.cat([first, second], dim=-1))
        return logits, logits.square().mean()


def adaptor(batch, outputs):
    assert isinstance(batch, (list, tuple))
    return {"logits": outputs[0]}


def test_different_batches_for_student_and_teacher(tmp_path):
    torch.manual_seed(0)
    names = run(DIFFERENT)
    teacher, student = Two(3), Two(2)
    batch = next(iter(names["dataloader"]))
    assert batch["teacher"][0].shape == (8, 3)
    assert batch["student"][0].shape == (8, 2)
    losses = distilled(tmp_path, names["dataloader"], teacher, student, adaptor, adaptor, temperature=1)
    assert (teacher.calls, student.calls, len(losses)) == (80, 80, 80)
    torch.manual_seed(0)
    expected = teacher(*batch["teacher"])[0].softmax(dim=-1)
    fresh = run(DIFFERENT) and Two(3) and Two(2)  # the student as it was at first
    first = -(expected * fresh(*batch["student"])[0].log_softmax(dim=-1)).sum(dim=-1).mean()
    assert losses[0] == pytest.approx(first.item(), rel=1e-5)


def test_cached_values_of_the_teacher(tmp_path):
    torch.manual_seed(0)
    names = run(CACHED)
    teacher, student = Two(3), Two(2)
    losses = distilled(tmp_path, names["dataloader"], teacher, student, adaptor, adaptor, temperature=1)
    assert (teacher.calls, student.calls) == (0, 80)
    assert losses[-1] < losses[0]
    given = torch.stack(names["fake_logits"]).softmax(dim=-1)
    left = student(*names["student_dataset"].tensors)[0].log_softmax(dim=-1)
    assert losses[-4:] == pytest.approx(
        [-(given * left).sum(dim=-1)[i : i + 8].mean().item() for i in range(0, 32, 8)], abs=0.05
    )


def test_all_blocks_are_here():
    assert PAGE.count("code-block:: python") + PAGE.count("Example::") == len(blocks()) == 4
