"""Every block of ModelOpt's quick start runs, in order, with only its import lines changed."""

import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import limbeck.compat.modelopt as mtd
from tests.models import convolutional, hooks, images

DOCUMENT = (Path(__file__).parent / "modelopt.rst").read_text()
IMPORTS = {"import modelopt.torch.distill as mtd": "import limbeck.compat.modelopt as mtd"}
pytestmark = pytest.mark.filterwarnings("ignore:the weights do not sum to 1:UserWarning")


def blocks():
    """The code blocks of the document, with the new imports."""
    found = re.findall(
        r"^\.\. code-block:: python\n((?:[ ]+:.*\n)*)\n((?:[ ]+.*\n|\n)+)", DOCUMENT, flags=re.MULTILINE
    )
    code = "\n\0\n".join(textwrap.dedent(block) for _, block in found)
    for before, after in IMPORTS.items():
        assert code.count(before) == 1
        code = code.replace(before, after)
    return code.split("\0")


@pytest.fixture
def scope(monkeypatch):
    """What the document takes as given: torchvision's models, weights, data and a loss, all small."""
    models = ModuleType("torchvision.models")
    models.resnet18, models.resnet50 = (lambda: convolutional(4)), (lambda: convolutional(8, seed=1))
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    weights = convolutional(8, seed=5).state_dict()
    loader = DataLoader(TensorDataset(*images(12)), batch_size=4)
    return {
        "pretrained_weights": weights,
        "get_train_loader": lambda: loader,
        "train_dataloader": loader,
        "get_user_loss_fn": nn.CrossEntropyLoss,
    }


def test_the_document_has_four_blocks():
    assert [block.split()[0] for block in blocks()] == ["from", "import", "#", "model"]


def test_every_block_runs(scope):
    for block in blocks():
        exec(compile(block, "modelopt.rst", "exec"), scope)
    model, converted = scope["model"], scope["distillation_model"]
    assert isinstance(converted, mtd.DistillationModel)
    assert model is scope["student_model"]
    assert hooks(model) == 0
    assert all(p.grad is not None for p in model.parameters())
    teacher = converted.teacher_model
    assert all(torch.equal(v, scope["pretrained_weights"][k]) for k, v in teacher.state_dict().items())


def test_the_loss_of_the_document_is_half_of_each(scope):
    setting_up, converting, training, _ = blocks()
    for block in (setting_up, converting, training):
        exec(compile(block, "modelopt.rst", "exec"), scope)
    x, labels = scope["input"], scope["labels"]
    student, teacher = scope["student_model"], scope["distillation_model"].teacher_model
    with torch.no_grad():
        ours, theirs = student.train()(x).log_softmax(-1), teacher.eval()(x).softmax(-1)
    kd = nn.functional.kl_div(ours, theirs, reduction="batchmean")
    hard = nn.functional.nll_loss(ours, labels)
    assert scope["loss_total"].item() == pytest.approx(0.5 * (kd + hard).item(), abs=1e-6)


def test_the_script_trains(scope):
    """The smallest whole script around the document's loop: with an optimizer, the loss falls."""
    setting_up, converting, training, _ = blocks()
    exec(compile(setting_up + converting, "modelopt.rst", "exec"), scope)
    scope["losses"] = []
    scope["optimizer"] = torch.optim.Adam(scope["distillation_model"].parameters(), lr=0.02)
    training = training.rstrip() + "\n    optimizer.step()\n    losses.append(loss_total.item())\n"
    for _ in range(20):
        exec(compile(training, "modelopt.rst", "exec"), scope)
    losses = scope["losses"]
    assert len(losses) == 60
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
