"""PyMarlin's names: the formulas against naive code, each correction, recipes, trainer and exact resume."""

import copy
import json
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from limbeck.compat import pymarlin
from limbeck.compat.pymarlin import (
    CustomArgParser,
    DataProcessor,
    DDPTrainerBackend,
    DefaultCheckpointerArguments,
    DistillationArguments,
    DistillRecipe,
    DistributedTrainingArguments,
    HfNERPlugin,
    HfSeqClassificationPlugin,
    ModelArguments,
    ModuleInterface,
    ModuleInterfaceArguments,
    Recipe,
    SingleProcess,
    SingleProcessAmp,
    StatInitArguments,
    Trainer,
    TrainerArguments,
    WriterInitArguments,
    build_distill_module,
    build_trainer_backend,
    distill_utils,
    global_stats,
)
from tests import tiny
from tests.models import bert, text_batch
from tests.test_exactness import largest_difference, run
from tests.workers.pymarlin import trained

WORKER = Path(__file__).parent / "workers" / "pymarlin.py"
LOGITS = (
    torch.randn(5, 4, generator=torch.Generator().manual_seed(1)),
    torch.randn(5, 4, generator=torch.Generator().manual_seed(2)),
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(layers, width=6, length=5, batch=3, seed=0):
    """Hidden states as transformers gives them, the embeddings first."""
    return tuple(random(batch, length, width, seed=seed + i) for i in range(layers + 1))


def attentions(layers, heads=2, length=5, batch=3, seed=0):
    return tuple(random(batch, heads, length, length, seed=seed + i).softmax(-1) for i in range(layers))


# The losses, against PyMarlin's formulas written out.


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_logits_loss_is_pymarlins(temperature, reduction):
    student, teacher = LOGITS
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    values = functional.kl_div(log_q, p, reduction="none")
    theirs = {"batchmean": values.sum() / 5, "mean": values.mean(), "sum": values.sum()}[reduction]
    ours = distill_utils.logits_loss(student, teacher, temperature, reduction)
    scaled = distill_utils.logits_loss(student, teacher, temperature, reduction, scale_loss_by_temp=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(scaled, theirs * temperature**2)


def test_token_logits_do_not_count_the_length():
    """Correction: PyMarlin divides the sum over tokens by the batch alone."""
    student, teacher = random(2, 6, 4, seed=3), random(2, 6, 4, seed=4)
    per_token = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    ours = distill_utils.logits_loss(student, teacher)
    torch.testing.assert_close(ours, per_token.mean())
    twice = distill_utils.logits_loss(student.repeat(1, 2, 1), teacher.repeat(1, 2, 1))
    torch.testing.assert_close(twice, ours)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
def test_representations_loss_is_pymarlins_of_the_right_layers(kind, reduction, normalize, scale):
    made, shift = (states, 1) if kind == "hidden_states" else (attentions, 0)
    student, teacher = made(2, seed=1), made(4, seed=9)
    sides = []
    for layers, chosen in ((student, [0, 1]), (teacher, [1, 3])):
        rows = torch.cat([layers[i + shift] for i in chosen])
        rows = rows.view(rows.size()[0], rows.size()[1], -1)
        sides.append(functional.normalize(rows, dim=-1) if normalize else rows)
    theirs = functional.mse_loss(*sides, reduction=reduction) * (sides[0].size()[-1] if scale else 1)
    ours = distill_utils.representations_loss(
        student, teacher, [0, 1], [1, 3], reduction=reduction, normalize=normalize, scale_loss_by_rep=scale
    )
    torch.testing.assert_close(ours, theirs)
    own = distill_utils.representations_loss(
        student,
        teacher,
        [0, 1],
        [1, 3],
        nn.MSELoss(reduction=reduction),
        normalize=normalize,
        scale_loss_by_rep=scale,
    )
    torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("made", [states, attentions])
def test_the_first_layer_named_is_the_first_compared(made):
    """Correction: PyMarlin always began with the first entry, which of hidden states is the embeddings."""
    student, teacher = made(2, seed=1), made(4, seed=9)
    exact = list(student)
    exact[-1] = teacher[-1]
    assert distill_utils.representations_loss(exact, teacher, [1], [3]).item() == pytest.approx(0, abs=1e-6)
    assert distill_utils.representations_loss(exact, teacher, [-1], [-1]).item() == pytest.approx(0, abs=1e-6)
    assert distill_utils.representations_loss(exact, teacher, [0], [3]).item() > 0.01


def test_labels_are_the_students_own():
    """Correction: PyMarlin's blocks pass two label losses to `representations_loss`, which crashed."""
    own, teachers = torch.tensor(0.7, requires_grad=True), torch.tensor(0.1)
    assert distill_utils.representations_loss(own, teachers, [0], [0]) is own


def test_widths_that_differ_are_refused():
    """Correction: PyMarlin drew a new random projection at every call."""
    student, teacher = states(1, width=4), states(1, width=6, seed=5)
    with pytest.raises(ValueError, match=r"have 4 numbers and the teacher's 6; use DistillRecipe"):
        distill_utils.representations_loss(student, teacher, [0], [0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distill_utils.representations_loss(states(2), states(4), [2], [0]), "no layer 2 among 2"),
        (lambda: distill_utils.representations_loss(states(2), states(4), [0, 1], [0]), "2 layers of the student"),
        (lambda: distill_utils.representations_loss((), states(4), [0], [0]), "attn_implementation='eager'"),
        (lambda: distill_utils.logits_loss(*LOGITS, reduction="none"), "unknown reduction 'none'"),
        (lambda: distill_utils.extract_layers(nn.ModuleList([nn.Linear(1, 1)]), [0, 6]), "6"),
        (lambda: distill_utils.logits_loss(*LOGITS, temperature=0), "temperature"),
    ],
)
def test_wrong_layers_and_reductions_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_extracted_layers_are_copies():
    layers = bert(layers=4).bert.encoder.layer
    taken = distill_utils.extract_layers(layers, [0, 2, -1])
    assert isinstance(taken, nn.ModuleList)
    for ours, place in zip(taken, [0, 2, 3], strict=True):
        assert torch.equal(ours.output.dense.weight, layers[place].output.dense.weight)
        assert ours is not layers[place]


# What is distilled.


def test_default_layers_are_three():
    """Correction: PyMarlin's default was [0 - 6 - 11], which is [-17]."""
    assert DistillationArguments().student_layers == (0, 6, 11)
    found = DistillationArguments(student_layers="[0-6-11]", loss_types="[logits-labels]", loss_weights="[1-0.5]")
    assert found.student_layers == [0, 6, 11]
    assert found.loss_types == ["logits", "labels"]
    assert found.loss_weights == [1.0, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_types": ["logit"]}, "'logits', 'labels', 'hidden_states' or 'attentions' .got 'logit'"),
        ({"loss_weights": [1, 2]}, "1 loss_types and 2 loss_weights"),
        ({"temperature": 0}, "temperature: Input should be greater than 0 .got 0"),
        ({"temprature": 2}, "did you mean 'temperature'"),
    ],
)
def test_wrong_distillation_arguments_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(**options)


class Texts:
    """A data module: a few encoded texts with labels."""

    def __init__(self, size=12, labels=3):
        batch = text_batch(size=size, labels=labels)
        self.examples = [{k: v[i] for k, v in batch.items()} for i in range(size)]

    def get_train_dataset(self):
        return self.examples

    get_val_dataset = get_train_dataset


def trainer_args(folder, **changes):
    checkpoints = DefaultCheckpointerArguments(
        save_dir=str(folder / "checkpoints"),
        model_state_save_dir=None,
        **changes.pop("checkpoints", {}),
    )
    options = {"epochs": 2, "train_batch_size": 4, "val_batch_size": 4, "writers": [], **changes}
    return TrainerArguments(**options, checkpointer_args=checkpoints)


def recipe(teacher=None, student=None, data=None, output=None, **distill):
    args = ModuleInterfaceArguments(max_lr=1e-3, output_dir=output)
    options = {"student_layers": [1, 3], **distill}
    teacher = bert(layers=4, attn_implementation="eager") if teacher is None else teacher
    return DistillRecipe(args, DistillationArguments(**options), data or Texts(), teacher=teacher, student=student)


ALL = {
    "loss_types": ["logits", "labels", "hidden_states", "attentions"],
    "loss_weights": [1.0, 0.5, 2.0, 0.25],
    "temperature": 2.0,
}


def naive_loss(student, teacher, batch):
    """`ALL` in plain PyTorch, for a student of the teacher's layers 1 and 3."""
    ours = student(**batch, output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        theirs = teacher(**batch, output_hidden_states=True, output_attentions=True)
    mask = batch["attention_mask"] == 1
    kl = functional.kl_div(
        (ours.logits / 2).log_softmax(-1), (theirs.logits / 2).softmax(-1), reduction="batchmean"
    )
    hidden = torch.stack(
        [
            (
                functional.normalize(ours.hidden_states[i + 1], dim=-1)
                - functional.normalize(theirs.hidden_states[j + 1], dim=-1)
            )
            .square()
            .sum(-1)[mask]
            .mean()
            for i, j in ((0, 1), (1, 3))
        ]
    ).mean()
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None]
    attention = torch.stack(
        [
            (
                functional.normalize((ours.attentions[i] * pairs).flatten(2), dim=-1)
                - functional.normalize((theirs.attentions[j] * pairs).flatten(2), dim=-1)
            )
            .square()
            .sum(-1)
            .mean()
            for i, j in ((0, 1), (1, 3))
        ]
    ).mean()
    return kl + 0.5 * ours.loss + 2.0 * hidden + 0.25 * attention


def test_training_is_that_of_a_naive_loop(tmp_path):
    """Twelve updates: the same losses as a loop written by hand, for all kinds of loss."""
    made = recipe(**ALL)
    student, teacher = copy.deepcopy(made.model), made.teacher
    losses, expected = [], []
    made.on_end_train_step = lambda step, loss: losses.append(loss.item())
    made.get_train_dataloader = lambda sampler, batch_size: DataLoader(
        made.datamodule.get_train_dataset(), batch_size
    )
    Trainer(made, trainer_args(tmp_path, epochs=4, clip_grads=True, max_grad_norm=0.5)).train()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    rate = [1.0 if step < 1 else 1 - (step - 1) / 15 for step in range(16)]  # 4 estimated steps an epoch
    step = 0
    student.train()
    for _ in range(4):
        for batch in DataLoader(made.datamodule.get_train_dataset(), 4):
            optimizer.param_groups[0]["lr"] = 1e-3 * rate[step]
            loss = naive_loss(student, teacher, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 0.5)
            optimizer.step()
            expected.append(loss.item())
            step += 1
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]


def test_the_teacher_is_left_alone(tmp_path):
    """Correction: PyMarlin's teacher got gradients, was clipped, and stood in every checkpoint."""
    made = recipe(**ALL)
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    Trainer(made, trainer_args(tmp_path)).train()
    teacher = made.teacher
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert {id(p) for p in made.parameters()}.isdisjoint(map(id, teacher.parameters()))
    assert set(made.state_dict()) == {f"model.{name}" for name in made.model.state_dict()}
    assert made.to(torch.float64).teacher.classifier.weight.dtype is torch.float64


def test_the_saved_student_loads_as_it_is(tmp_path):
    """Correction: PyMarlin's student had a config with the teacher's number of layers."""
    made = recipe(output=str(tmp_path / "student"))
    Trainer(made, trainer_args(tmp_path, checkpoints={"checkpoint": False})).train()
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert loaded.config.num_hidden_layers == 2
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


@pytest.mark.parametrize(("share", "heads", "units"), [(0.5, 2, 16), (0.3, 2, 9)])
def test_width_shrinkage_is_the_share_that_stays(tmp_path, share, heads, units):
    """As the GLUE example computes it: heads rounded up, feed-forward units down, heads of the teacher's size."""
    teacher = bert(layers=4, num_attention_heads=4, attn_implementation="eager")
    options = {**ALL, "width_shrinkage": share}
    made = recipe(teacher=teacher, output=str(tmp_path / "student"), **options)
    trainer = Trainer(made, trainer_args(tmp_path, checkpoints={"checkpoint": False}))
    before = [p.clone() for p in made.objective.parameters()]
    trainer.train()
    assert before
    assert not any(torch.equal(p, was) for p, was in zip(made.objective.parameters(), before, strict=True))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert (loaded.config.num_hidden_layers, loaded.config.num_attention_heads) == (2, heads)
    assert loaded.config.hidden_size == heads * teacher.config.hidden_size // 4
    assert loaded.config.intermediate_size == units
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_a_narrower_student_has_a_projection_that_trains(tmp_path):
    student = bert(layers=2, width=8, seed=5)
    made = recipe(student=student, loss_types=["hidden_states"], loss_weights=[1.0])
    trainer = Trainer(made, trainer_args(tmp_path))
    before = {name: p.clone() for name, p in made.objective.named_parameters()}
    assert len(before) >= 2
    trainer.train()
    changed = [not torch.equal(p, before[name]) for name, p in made.objective.named_parameters()]
    assert all(changed)


def test_a_projection_that_no_optimizer_holds_is_refused(tmp_path):
    made = recipe(student=bert(layers=2, width=8), loss_types=["hidden_states"], loss_weights=[1.0])
    made.get_optimizers_schedulers = lambda steps, epochs: ([torch.optim.Adam(made.model.parameters())], [])
    with pytest.raises(ValueError, match=r"projections are in no optimizer; build it of all parameters\(\)"):
        Trainer(made, trainer_args(tmp_path))


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"student_layers": [0, 6, 11]}, "11|6"),
        ({"width_shrinkage": 2.0}, "width_shrinkage"),
    ],
)
def test_students_that_cannot_be_made_are_refused(distill, message):
    with pytest.raises(ValueError, match=message):
        recipe(**distill)


def test_a_student_of_its_own_needs_as_many_layers(tmp_path):
    bert(layers=2, width=8).save_pretrained(tmp_path / "student")
    made = recipe(student_model_path=str(tmp_path / "student"), student_layers=[0, 3])
    assert made.model.config.hidden_size == 8
    with pytest.raises(ValueError, match="the student has 2 layers and 3 of the teacher's are named"):
        recipe(student_model_path=str(tmp_path / "student"), student_layers=[0, 1, 3])


def test_terms_are_logged(tmp_path):
    """Correction: PyMarlin logged the total alone."""

    lines = {}

    def keep(values, step):
        for name, value in values.items():
            lines.setdefault(name, []).append((step, value))

    made = recipe(loss_types=["logits", "labels"], loss_weights=[1.0, 1.0])
    Trainer(made, trainer_args(tmp_path, writers=[keep], gpu_batch_size_limit=2)).train()
    assert [step for step, _ in lines["loss"]] == list(range(1, 7))
    total = [a + b for (_, a), (_, b) in zip(lines["loss/logits"], lines["loss/labels"], strict=True)]
    assert [value for _, value in lines["loss"]] == pytest.approx(total, abs=1e-5)
    assert [step for step, _ in lines["default/val_loss"]] == [3, 6]


def test_numbers_are_learned_as_numbers(tmp_path):
    """Correction: over one logit PyMarlin's divergence is 0, whatever the teacher says."""
    data = Texts(labels=1)
    for example in data.examples:
        example["labels"] = example["labels"].float() + 0.5
    made = recipe(
        teacher=bert(layers=4, labels=1), data=data, loss_types=["logits", "labels"], loss_weights=[1.0, 0.5]
    )
    batch = next(iter(DataLoader(data.examples, 4)))
    ours, theirs = made.model(**batch), made.teacher(**batch)
    expected = (ours.logits - theirs.logits).square().mean() + 0.5 * ours.loss
    torch.testing.assert_close(made.train_step(1, batch, "cpu"), expected)


def test_build_distill_module_can_be_made():
    """Correction: PyMarlin's class read its arguments before it had them."""

    class Task(Recipe):
        def __init__(self, args, data):
            super().__init__(args, data)
            self.setup_models()

        def setup_models(self):
            self.model = bert(layers=4)

    made = build_distill_module(Task)
    made.given = None, bert(layers=4)
    module = made(DistillationArguments(student_layers=[0, 3]), ModuleInterfaceArguments(), Texts())
    assert module.model.config.num_hidden_layers == 2
    assert module.teacher.config.num_hidden_layers == 4


# The trainer, on a module of a script's own.


class Line(ModuleInterface):
    """Learns y = 2x and notes what it is told."""

    def __init__(self, size=10, optimizers=1):
        super().__init__()
        self.net, self.bias = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
        self.data = [(torch.tensor([float(i)]) / size, torch.tensor([2.0 * i]) / size) for i in range(size)]
        self.told, self.optimizers = [], optimizers

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        self.estimated = estimated_global_steps_per_epoch, epochs
        first = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.Adam(self.bias.parameters(), lr=0.01)
        if self.optimizers == 1:
            first.add_param_group({"params": list(self.bias.parameters())})
            return [first], [torch.optim.lr_scheduler.ExponentialLR(first, 0.9)]
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (first, second)]

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size=batch_size, sampler=sampler(self.data))

    def get_val_dataloaders(self, sampler, batch_size):
        return {key: DataLoader(self.data, batch_size, sampler=sampler(self.data)) for key in ("one", "two")}

    def train_step(self, global_step, batch, device):
        inputs, labels = batch
        predicted = self.net(inputs.to(device)) + self.bias(torch.ones_like(inputs))
        self.told.append(("train_step", global_step, self.training))
        return (predicted - labels).square().mean(), labels

    def val_step(self, global_step, batch, device):
        self.told.append(("val_step", global_step, self.training))
        return self.net(batch[0]).detach(), batch[1]

    def on_begin_train_epoch(self, global_step, epoch):
        self.told.append(("begin", global_step, epoch))

    def on_end_train_step(self, global_step, losses, labels):
        self.told.append(("step", global_step, len(losses), len(labels)))

    def on_end_backward(self, global_step, loss_tensor):
        self.told.append(("backward", global_step, loss_tensor.item()))

    def on_end_train_epoch(self, global_step, losses, labels):
        self.told.append(("epoch", global_step, len(losses), len(labels)))

    def on_end_val_epoch(self, global_step, predicted, labels, key="default"):
        self.told.append(("val", global_step, key, tuple(predicted.shape)))

    def on_end_train(self, global_step):
        self.told.append(("end", global_step))


def told(module, *names):
    return [line for line in module.told if line[0] in names]


def test_callbacks_come_in_their_order(tmp_path):
    module = Line()
    Trainer(module, trainer_args(tmp_path, gpu_batch_size_limit=2)).train()
    assert told(module, "begin", "step", "val", "epoch", "end") == [
        ("begin", 0, 0),
        ("step", 1, 2, 4),
        ("step", 2, 2, 4),
        ("step", 3, 1, 2),
        ("val", 3, "one", (10, 1)),
        ("val", 3, "two", (10, 1)),
        ("epoch", 3, 5, 10),
        ("begin", 3, 1),
        ("step", 4, 2, 4),
        ("step", 5, 2, 4),
        ("step", 6, 1, 2),
        ("val", 6, "one", (10, 1)),
        ("val", 6, "two", (10, 1)),
        ("epoch", 6, 5, 10),
        ("end", 6),
    ]
    assert [line[1] for line in told(module, "train_step")] == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]
    assert {line[2] for line in told(module, "train_step")} == {True}
    assert {line[2] for line in told(module, "val_step")} == {False}
    assert len(told(module, "backward")) == 10
    assert module.estimated == (3, 2)


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("clip", [True, False])
def test_updates_are_those_of_a_naive_loop(tmp_path, optimizers, clip):
    module = Line(size=8, optimizers=optimizers)
    naive = copy.deepcopy(module)
    module.get_train_dataloader = lambda sampler, batch_size: DataLoader(module.data, batch_size)
    options = {"clip_grads": clip, "max_grad_norm": 0.2, "gpu_batch_size_limit": 2}
    Trainer(module, trainer_args(tmp_path, epochs=3, **options)).train()
    made, schedulers = naive.get_optimizers_schedulers(1, 1)
    for _ in range(3):
        for batch in DataLoader(naive.data, 4):
            naive.train_step(0, batch, "cpu")[0].backward()
            if clip:
                nn.utils.clip_grad_norm_(naive.parameters(), 0.2)
            for each in (*made, *schedulers):
                each.step()
            naive.zero_grad()
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_a_step_is_given_the_loaders_own_batch(tmp_path):
    """It moves it itself, by whatever methods the batch has."""

    class Batches(Line):
        def get_train_dataloader(self, sampler, batch_size):
            inputs = torch.stack([x for x, _ in self.data])
            return [transformers.BatchEncoding({"x": inputs, "y": 2 * inputs})]

        def train_step(self, global_step, batch, device):
            batch = batch.to(device)
            return super().train_step(global_step, (batch.x, batch.y), device)

    module = Batches()
    Trainer(module, trainer_args(tmp_path)).train()
    assert told(module, "step") == [("step", 1, 1, 10), ("step", 2, 1, 10)]


def test_epochs_end_early_where_told(tmp_path):
    module = Line()
    args = trainer_args(tmp_path, train_batch_size=2, max_train_steps_per_epoch=2, max_val_steps_per_epoch=1)
    Trainer(module, args).train()
    assert told(module, "epoch", "end") == [("epoch", 2, 2, 4), ("epoch", 4, 2, 4), ("end", 4)]
    assert {line[3] for line in told(module, "val")} == {(4, 1)}
    assert module.estimated == (2, 2)


@pytest.mark.parametrize(
    ("size", "limit", "part"), [(6, 1000, 6), (6, 3, 3), (32, 8, 8), (10, 4, 2), (7, 4, 1), (12, 5, 4)]
)
def test_a_batch_is_cut_into_equal_parts(tmp_path, size, limit, part):
    """Correction: PyMarlin halved, so that 7 with a limit of 4 became two parts of 3."""
    trainer = Trainer(Line(), trainer_args(tmp_path, train_batch_size=size, gpu_batch_size_limit=limit))
    assert trainer.train_step_batch_size == part
    assert trainer.gradient_accumulation * part == size


class KilledError(Exception):
    pass


@pytest.mark.parametrize("optimizers", [1, 2])
def test_resume_is_exact(tmp_path, optimizers):
    """Correction: PyMarlin kept no random state. A training that is killed in its third epoch ends the same."""

    def module():
        torch.manual_seed(3)
        return Line(optimizers=optimizers)

    whole = module()
    Trainer(whole, trainer_args(tmp_path / "a", epochs=4)).train()
    broken = module()

    def stop(step, losses, labels):
        if step == 8:
            raise KilledError

    broken.on_end_train_step = stop
    options = {"epochs": 4, "checkpoints": {"load_dir": str(tmp_path / "b" / "checkpoints")}}
    with pytest.raises(KilledError):
        Trainer(broken, trainer_args(tmp_path / "b", **options)).train()
    resumed = module()
    torch.manual_seed(99)
    trainer = Trainer(resumed, trainer_args(tmp_path / "b", **options))
    assert trainer.global_steps_finished == 6
    assert trainer.last_epoch == 1
    trainer.train()
    assert told(resumed, "begin") == [("begin", 6, 2), ("begin", 9, 3)]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    assert sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir()) == ["model", "model-2"]


def test_a_distillation_resumes_exactly(tmp_path):
    """With dropout, examples in a random order, and a projection that trains."""

    def made():
        student = bert(layers=2, width=8, seed=5, hidden_dropout_prob=0.2)
        torch.manual_seed(4)
        return recipe(student=student, loss_types=["logits", "hidden_states"], loss_weights=[1.0, 1.0])

    whole, broken, resumed = made(), made(), made()
    torch.manual_seed(7)
    Trainer(whole, trainer_args(tmp_path / "a", epochs=3)).train()

    def stop(step, loss):
        if step == 5:
            raise KilledError

    broken.on_end_train_step = stop
    options = {"epochs": 3, "checkpoints": {"load_dir": str(tmp_path / "b" / "checkpoints")}}
    torch.manual_seed(7)
    trainer = Trainer(broken, trainer_args(tmp_path / "b", **options))
    with pytest.raises(KilledError):
        trainer.train()
    torch.manual_seed(99)
    trainer = Trainer(resumed, trainer_args(tmp_path / "b", **options))
    assert trainer.global_steps_finished == 3
    trainer.train()
    assert any(name.startswith("objective.") for name in whole.state_dict())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_checkpoints_hold_no_pickle_and_are_kept_apart(tmp_path):
    for _ in range(2):
        Trainer(Line(), trainer_args(tmp_path)).train()
    place = tmp_path / "checkpoints"
    assert sorted(p.name for p in place.iterdir()) == ["model", "model-2"]
    assert {p.suffix for p in place.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert sorted(p.name for p in (place / "model").iterdir()) == ["step-00000003", "step-00000006"]
    Trainer(Line(), trainer_args(tmp_path, checkpoints={"delete_existing_checkpoints": True})).train()
    assert [p.name for p in place.iterdir()] == ["model"]


def test_a_named_checkpoint_begins_a_training_of_its_own(tmp_path):
    first = Line()
    Trainer(first, trainer_args(tmp_path)).train()
    chosen = {"load_dir": str(tmp_path / "checkpoints"), "load_filename": "model/step-00000003"}
    second = Line()
    trainer = Trainer(second, trainer_args(tmp_path, checkpoints=chosen))
    trainer.train()
    assert trainer.global_steps_finished == 6
    assert all(torch.equal(v, second.state_dict()[n]) for n, v in first.state_dict().items())
    with pytest.raises(ValueError, match="there is no checkpoint"):
        Trainer(Line(), trainer_args(tmp_path, checkpoints={**chosen, "load_filename": "model_3.pt"}))
    wrong = {"load_dir": chosen["load_dir"], "delete_existing_checkpoints": True}
    with pytest.raises(ValueError, match="would delete what load_dir"):
        Trainer(Line(), trainer_args(tmp_path, checkpoints=wrong))


def test_training_twice_trains_once(tmp_path):
    module = Line()
    trainer = Trainer(module, trainer_args(tmp_path))
    trainer.train()
    trainer.train()
    assert len(told(module, "step")) == 6
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["model"]


def test_optimizers_may_begin_anew(tmp_path):
    first = Line()
    Trainer(first, trainer_args(tmp_path)).train()
    second = Line()
    load = {"load_dir": str(tmp_path / "checkpoints")}
    args = trainer_args(tmp_path, epochs=3, reset_optimizers_schedulers=True, checkpoints=load)
    trainer = Trainer(second, args)
    assert all(torch.equal(v, second.state_dict()[n]) for n, v in first.state_dict().items())
    assert second.estimated == (4, 1)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    trainer.train()
    assert told(second, "begin", "end") == [("begin", 6, 2), ("end", 9)]


def test_validation_alone_judges_the_checkpoint(tmp_path):
    first = Line()
    Trainer(first, trainer_args(tmp_path)).train()
    load = {"load_dir": str(tmp_path / "checkpoints"), "checkpoint": False}
    second = Line()
    predicted, labels = Trainer(second, trainer_args(tmp_path, checkpoints=load)).validate()
    torch.testing.assert_close(predicted, torch.stack([first.net(x) for x, _ in first.data]).detach())
    assert labels.shape == (10, 1)


def test_a_state_of_its_own_is_refused(tmp_path):
    class Counting(Line):
        def get_state(self):
            return {"seen": 3}

    with pytest.raises(TypeError, match="get_state is not called here; keep tensors as buffers"):
        Trainer(Counting(), trainer_args(tmp_path))


def test_the_module_is_saved_at_the_end(tmp_path):
    args = trainer_args(tmp_path)
    args.checkpointer_args.model_state_save_dir = str(tmp_path / "models")
    Trainer(Line(), args).train()
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["model_model_1.safetensors"]


def test_half_precision_trains(tmp_path):
    made = recipe(loss_types=["logits"])
    seen = []
    inner = made.model.forward
    made.model.forward = lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or inner(*a, **k)
    Trainer(made, trainer_args(tmp_path, epochs=1), trainer_backend=SingleProcessAmp()).train()
    assert seen[-1]


@pytest.mark.parametrize(
    ("name", "precision", "distributed"),
    [("sp", "fp32", False), ("sp-amp", "fp16", False), ("ddp", "fp32", True), ("ddp-amp", "fp16", True)],
)
def test_backends(name, precision, distributed):
    found = build_trainer_backend(name)
    assert (found.precision, found.distributed) == (precision, distributed)
    assert DDPTrainerBackend(SingleProcess()).distributed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "ddp-dp"}, "neither apex nor Opacus"),
        ({"backend": "sp-amp-apex"}, "'sp-amp-apex' is not supported"),
        ({"backend": "spp"}, "did you mean 'sp'"),
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": 0}, "epochs: Input should be greater than 0"),
        ({"writers": ["stdot"]}, "did you mean 'stdout'"),
        ({"amp_backend_apex": True}, "amp_backend_apex: Input should be False"),
        ({"differential_privacy_args": {}}, "differential_privacy_args: Input should be None"),
        ({"distributed_training_args": DistributedTrainingArguments(world_size=2)}, "says 2 ranks"),
    ],
)
def test_what_is_not_there_is_told(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(Line(), trainer_args(tmp_path, **options))


def test_own_backends_are_refused(tmp_path):
    with pytest.raises(TypeError, match="own ones are not supported"):
        Trainer(Line(), trainer_args(tmp_path), trainer_backend=object())


def test_statistics_are_numbers(caplog, tmp_path):
    with pytest.raises(ValueError, match="update_system_stats: Input should be False"):
        StatInitArguments(update_system_stats=True)
    with pytest.raises(ValueError, match="tb_logpath_parent_env: Input should be None"):
        WriterInitArguments(tb_logpath_parent_env="LOGS")
    with pytest.raises(AttributeError, match="use update or update_multi"):
        global_stats.update_image("a", None)
    global_stats.update_multi("outside", {"of a trainer": 1.0})
    logs = WriterInitArguments(tb_log_dir=str(tmp_path / "logs"))
    with caplog.at_level(logging.WARNING):
        Trainer(Line(), trainer_args(tmp_path, writers=["aml", "tensorboard"], writer_args=logs)).train()
    assert "Azure ML is not used" in caplog.text
    assert any((tmp_path / "logs").rglob("events*"))


def test_stdout_shows_the_loss(tmp_path, capsys):
    args = trainer_args(tmp_path, writers=["stdout"], stats_args=StatInitArguments(log_steps=2))
    Trainer(Line(), args).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step = 2", "step = 4", "step = 6"]


def test_names_that_are_gone_say_what_to_use():
    with pytest.raises(ImportError, match="rank_zero_only; use accelerate"):
        from limbeck.compat.pymarlin import rank_zero_only  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'Traner'"):
        _ = pymarlin.Traner


class Squares(DataProcessor):
    def process(self, number, power):
        return [number**power]


def test_data_is_prepared():
    assert Squares().process_data(3, 2) == [9]
    with pytest.raises(ValueError, match="call process_data"):
        Squares().multi_process_data([1, 2, 3], 2)


def test_two_ranks_train_as_one(tmp_path):
    """The same weights, projection included, and a validation that sees every example once."""
    run(tmp_path / "2.safetensors", tmp_path / "two", ranks=2, worker=WORKER)
    alone = trained(tmp_path / "one", ranks=1).state_dict()
    assert any(name.startswith("objective.") for name in alone)
    assert largest_difference(alone, load_file(tmp_path / "2.safetensors")) < 1e-5


# The config.

CONFIG = {
    "distill": {"temperature": 1, "student_layers": [0, 6, 11], "enable": False, "loss_types": ["logits"]},
    "trainer": {"max_grad_norm": 1.0, "max_train_steps_per_epoch": None, "backend": "sp"},
    "ckpt": {"load_dir": None},
}


@pytest.fixture
def parse(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def parsed(*options):
        return CustomArgParser().parse(["--config_path", str(tmp_path / "config.yaml"), *options])

    return parsed


@pytest.mark.parametrize(
    ("options", "section", "key", "value"),
    [
        ([], "distill", "temperature", 1),
        (["--distill.temperature", "2"], "distill", "temperature", 2),
        (["--distill.temperature=2.5"], "distill", "temperature", 2.5),
        (["--distill.student_layers", "0-2"], "distill", "student_layers", [0, 2]),
        (["--distill.student_layers", "[0, 2]"], "distill", "student_layers", [0, 2]),
        (["--distill.student_layers=-1,-2"], "distill", "student_layers", [-1, -2]),
        (["--distill.loss_types", "logits-attentions"], "distill", "loss_types", ["logits", "attentions"]),
        (["--distill.enable"], "distill", "enable", True),
        (["--distill.enable", "no"], "distill", "enable", False),
        (["--trainer.max_grad_norm", "2"], "trainer", "max_grad_norm", 2.0),
        (["--trainer.max_train_steps_per_epoch", "3"], "trainer", "max_train_steps_per_epoch", 3),
        (["--ckpt.load_dir", "runs/a"], "ckpt", "load_dir", "runs/a"),
        (["--params", json.dumps({"--distill.temperature": "4"})], "distill", "temperature", 4),
    ],
)
def test_the_command_line_overrides_the_file(parse, options, section, key, value):
    found = parse(*options)[section][key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distill.temprature", "2"], "did you mean '--distill.temperature'"),
        (["--dummy"], "the YAML file has no '--dummy'"),
        (["--distill.temperature", "hot"], "invalid number value: 'hot'"),
        (["--distill.enable", "fl"], "invalid truth value: 'fl'"),
        (["--distill.temperature"], "expected one argument"),
        (["--distill", "1"], "the YAML file has no '--distill'"),
        (["--distill.student_layers", "0", "6"], "the YAML file has no '6'"),
        (["--params", "{"], "--params"),
    ],
)
def test_mistakes_on_the_command_line_end_it(parse, capsys, options, message):
    """Corrections: PyMarlin ignored unknown options and evaluated lists as Python."""
    with pytest.raises(SystemExit) as stop:
        parse(*options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_lists_are_read_and_not_evaluated(parse):
    text = "[__import__('os').getcwd()]"
    assert parse("--distill.student_layers", text)["distill"]["student_layers"] == [text[1:-1]]


def test_the_file_is_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"there is no recipe .*none.yaml"):
        CustomArgParser().parse(["--config_path", str(tmp_path / "none.yaml")])


# Plugins, from a file alone.


def plugin_config(folder, **changes):
    sections = {
        "trainer": {
            "epochs": 1,
            "train_batch_size": 8,
            "val_batch_size": 8,
            "writers": [],
            "max_train_steps_per_epoch": 3,
        },
        "module": {"max_lr": 1e-3, "output_dir": str(folder / "student")},
        "ckpt": {"save_dir": str(folder / "checkpoints"), "model_state_save_dir": None},
        "distill": {"enable": True, "student_layers": [1], "loss_types": ["logits"], "loss_weights": [1]},
    }
    return {name: {**sections.get(name, {}), **changes.get(name, {})} for name in {**sections, **changes}}


def classification(folder, **changes):
    tiny.save_classifier(folder / "teacher", ["bad", "good"])
    tiny.table(24).to_csv(folder / "data.tsv", sep="\t", index=False, header=False)
    data = {
        "train_filepath": str(folder / "data.tsv"),
        "val_filepath": str(folder / "data.tsv"),
        "labels_list": ["bad", "good"],
        "text_a_col": "0",
        "label_col": "1",
    }
    return plugin_config(folder, data=data, model={"model_path": str(folder / "teacher")}, **changes)


def test_a_plugin_distils(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(classification(tmp_path)))
    arguments = ["train.py", "--config_path", str(tmp_path / "config.yaml"), "--distill.loss_types", "logits"]
    monkeypatch.setattr("sys.argv", arguments)
    plugin = HfSeqClassificationPlugin()
    plugin.setup()
    scores = {}
    plugin.trainer.stats.writers = [lambda values, step: scores.update(values)]
    plugin.trainer.train()
    assert plugin.moduleinterface.model.config.num_hidden_layers == 1
    assert plugin.trainer.global_steps_finished == 3
    assert 0 <= scores["default/val_acc"] <= 1
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 1
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "student")("fine film").input_ids


def test_a_plugin_trains_without_a_teacher(tmp_path):
    plugin = HfSeqClassificationPlugin(classification(tmp_path, distill={"enable": False}))
    losses = []
    trainer = plugin.setup()
    plugin.moduleinterface.on_end_train_step = lambda step, loss: losses.append(loss.item())
    trainer.train()
    assert len(losses) == 3
    assert plugin.moduleinterface.teacher is None


def test_a_config_given_is_the_config(tmp_path):
    """Correction: PyMarlin's plugins read the file even where a config was given."""
    with pytest.raises(TypeError, match="did you mean 'trainer'"):
        HfSeqClassificationPlugin({"trianer": {}})
    wrong = classification(tmp_path)
    wrong["data"]["labels_list"] = ["bad", "god"]
    plugin = HfSeqClassificationPlugin(wrong)
    with pytest.raises(ValueError, match="label 'good' is none of the classes; did you mean 'god'"):
        plugin.setup()


def test_the_document_runs(tmp_path, monkeypatch):
    """Its recipe as it stands, then its file and the plugin's three lines, in a folder with the data it names."""
    page = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
    section = page[page.index("## PyMarlin\n") : page.index("## AutoGluon AutoMM")]
    recipe_block, plugin_block = re.findall(r"```python(?: continued)?\n(.*?)```", section, flags=re.DOTALL)
    exec(compile(recipe_block, "coming-from.md", "exec"), {})
    monkeypatch.chdir(tmp_path)
    (file,) = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    Path("config.yaml").write_text(file)
    tiny.save_classifier(tmp_path / "teacher", ["bad", "good"])
    for name in ("train.tsv", "dev.tsv"):
        tiny.table(16).to_csv(name, sep="\t", index=False, header=False)
    monkeypatch.setattr("sys.argv", ["train.py", "--config_path", "config.yaml", "--distill.temperature", "2"])
    names = {}
    exec(compile(plugin_block, "coming-from.md", "exec"), names)
    assert names["plugin"].distill_args.temperature == 2
    assert transformers.AutoConfig.from_pretrained(tmp_path / "student").num_hidden_layers == 2


def test_words_are_labelled(tmp_path):
    made = tiny.config(vocab_size=200, num_labels=3, id2label=dict(enumerate(["B-X", "I-X", "O"])))
    tiny.save_encoder(tmp_path / "teacher")
    torch.manual_seed(0)
    transformers.BertForTokenClassification(made).save_pretrained(tmp_path / "teacher")
    table = tiny.table(16)
    lines = [f"{text}\t{' '.join(['B-X', *['O'] * (len(text.split()) - 1)])}" for text in table["text"]]
    (tmp_path / "data.tsv").write_text("\n".join(["Sentence\tSlot", *lines]))
    data = {key: str(tmp_path / "data.tsv") for key in ("train_filepath", "val_filepath")}
    data["labels_list"] = ["B-X", "I-X", "O"]
    config = plugin_config(tmp_path, data=data, model={"model_path": str(tmp_path / "teacher")})
    config["module"]["max_seq_len"] = 16
    plugin = HfNERPlugin(config)
    plugin.setup()
    scores = {}
    plugin.trainer.stats.writers = [lambda values, step: scores.update(values)]
    plugin.trainer.train()
    assert {"default/val_f1", "default/val_precision", "default/val_recall", "loss/logits"} <= set(scores)
    batch = plugin.moduleinterface.collate_fun([(["fine", "film"], [0, 2])])
    counted = batch["labels"][0][batch["labels"][0] != -100]
    assert counted.tolist() == [0, 2]


def test_a_config_elsewhere_is_refused():
    with pytest.raises(ValueError, match="put them together"):
        _ = ModelArguments(model_path="a", model_config_path="b").source


def test_a_teacher_that_has_taught_before_makes_a_student_that_trains():
    teacher = bert(2, 16).requires_grad_(False)
    recipe = pymarlin.DistillRecipe(
        pymarlin.ModuleInterfaceArguments(),
        pymarlin.DistillationArguments(student_layers=[1]),
        None,
        teacher=teacher,
    )
    recipe.setup_models()
    assert all(p.requires_grad for p in recipe.model.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
