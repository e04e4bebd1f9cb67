"""Teachers that stand on the student's weights: their running mean, and the model without its adapters."""

import copy
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from limbeck import Callback, Distiller, Settings, Term, fit
from limbeck.cache import Store
from limbeck.teachers import Average, Cached, Ensemble, ModuleTeacher, WithoutAdapter
from limbeck.testing import TeacherContract
from limbeck.train.checkpoint import latest
from tests.models import bert, perceptron, points, text_batch
from tests.test_memory_ranks import ROOT, free_port

KD = Term("logits", loss="forward_kl", name="kd")
LABELS = Term("labels", loss="cross_entropy")


def normed(seed=0, dropout=0.0):
    """With running statistics and, if asked for, dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Linear(6, 3))


def numbers(module):
    """Its weights in float64."""
    return {name: tensor.detach().double().numpy().copy() for name, tensor in module.named_parameters()}


def close(module, expected, **tolerance):
    for name, ours in numbers(module).items():
        np.testing.assert_allclose(
            ours, expected[name], **(tolerance or {"rtol": 1e-5, "atol": 1e-6}), err_msg=name
        )


# ---- the mean --------------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "for each": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "one by one": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_follows_each_update_once_in_any_loop(optimizer):
    """Two micro-batches to an update, against the definition in float64."""
    student, decay = normed(), 0.7
    teacher = Average(student, decay)
    distiller = Distiller(student, teacher, [KD, LABELS]).train()
    update = OPTIMIZERS[optimizer](student.parameters())
    features, labels = points(8)
    expected = numbers(student)
    for _ in range(5):
        for part in (slice(0, 4), slice(4, 8)):
            distiller(features[part], labels[part]).loss.backward()
            close(teacher.module, expected)
        update.step()
        update.zero_grad()
        theirs = numbers(student)
        expected = {name: decay * mean + (1 - decay) * theirs[name] for name, mean in expected.items()}
    teacher.follow()
    close(teacher.module, expected)
    assert any(np.abs(mean - theirs[name]).max() > 1e-3 for name, mean in expected.items())


def test_the_first_signal_is_the_students_own():
    student = normed()
    teacher = Average(student)
    batch = {"input": points()[0]}
    assert torch.equal(teacher.signal(batch, ["logits"])["logits"], student.eval()(batch["input"]))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_ends_of_the_scale(decay):
    student = normed()
    before, teacher = copy.deepcopy(student), Average(student, decay)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    teacher.follow()
    like = before if decay else student
    assert all(torch.equal(a, b) for a, b in zip(teacher.module.parameters(), like.parameters(), strict=True))


def test_the_smallest_change_is_an_update():
    """Of one weight by one bit, uncounted by PyTorch, wherever it stands and whatever its dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for place in range(7):
            student = nn.Linear(7, 1, bias=False).to(dtype)
            student.weight.data = torch.randn(8).to(dtype)[1:].view(1, 7)  # does not begin at eight bytes
            teacher = Average(student, 0.0)
            version = student.weight._version
            flipped = student.weight.data.view(torch.uint8)[0, place * dtype.itemsize :][:1]
            flipped.bitwise_xor_(torch.tensor(1, dtype=torch.uint8))
            assert student.weight._version == version
            teacher.follow()
            assert torch.equal(teacher.module.weight, student.weight), (dtype, place)


def test_running_statistics_are_those_of_the_last_update():
    student = normed()
    teacher = Average(student, 0.5)
    features, _ = points()
    student(features)
    student(features * 3)
    after = student[1].running_mean.clone()
    teacher.follow()
    assert not torch.equal(teacher.module[1].running_mean, after)
    with torch.no_grad():
        student[0].weight.mul_(2)
    teacher.follow()
    assert torch.equal(teacher.module[1].running_mean, after)
    assert teacher.module[1].num_batches_tracked == 2


def test_half_precision_weights_are_averaged_in_full():
    """Each step is far below what bfloat16 can add to the mean."""
    student = nn.Linear(4, 3).bfloat16()
    teacher = Average(student, 0.999)
    expected = numbers(student)
    for _ in range(200):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.01)
        teacher.follow()
        theirs = numbers(student)
        expected = {name: 0.999 * mean + 0.001 * theirs[name] for name, mean in expected.items()}
    assert teacher.module.weight.dtype == torch.bfloat16
    close(teacher.module, expected, rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(teacher.state()["weights"]["weight"].numpy(), expected["weight"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["average", "without adapter"])
def test_the_student_is_untouched_by_the_teachers_pass(kind):
    """Modes, gradients, running statistics, and the random numbers of its dropout."""
    student = Adapted()
    student.base[1].eval()  # as one that keeps its statistics
    teacher = Average(student) if kind == "average" else WithoutAdapter(student)
    features, labels = points()
    nn.functional.cross_entropy(student(features), labels).backward()

    def everything():
        gradients = {f"{n} grad": p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        modes = [m.training for m in student.modules()], [p.requires_grad for p in student.parameters()]
        return {**copy.deepcopy(student.state_dict()), **gradients}, modes, torch.get_rng_state()

    before, modes, random = everything()
    with torch.enable_grad():
        value = teacher.signal({"features": features}, ["logits", "base.0"])["logits"]
    after, modes_after, random_after = everything()
    assert not value.requires_grad
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == modes_after
    assert torch.equal(random, random_after)


def test_the_mean_is_in_no_state_dict_and_no_optimizer():
    student = normed()
    distiller = Distiller(student, Average(student), [KD])
    assert list(distiller.state_dict()) == [f"student.{name}" for name in student.state_dict()]
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in student.parameters()}


# ---- the mean in checkpoints -----------------------------------------------------------------------------------


class InterruptAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


SETTINGS = Settings(steps=7, batch_size=5, learning_rate=0.1, evaluate_every=2)


def items(count=20):
    features, labels = points(count)
    return [{"input": x, "labels": y} for x, y in zip(features, labels, strict=True)]


def with_mean(kind):
    student = normed(dropout=0.3)
    student = student.bfloat16() if kind == "half" else student
    mean = Average(student, 0.8)
    other = perceptron(seed=3)
    teachers = {"alone": mean, "half": mean, "in an ensemble": Ensemble({"mean": mean, "other": other})}
    teachers["at random"] = Ensemble({"mean": mean, "other": other}, mix="random")
    return Distiller(student, teachers[kind], [KD, LABELS]), mean


def trained(kind, folder, settings=SETTINGS, callbacks=()):
    distiller, mean = with_mean(kind)
    data = items()
    if kind == "half":
        data = [{**item, "input": item["input"].bfloat16()} for item in data]
    fit(distiller, data, settings=settings, callbacks=callbacks, folder=folder)
    mean.follow()
    return {**distiller.state_dict(), **{f"mean {n}": t for n, t in mean.module.state_dict().items()}}


@pytest.mark.parametrize("kind", ["alone", "half", "in an ensemble", "at random"])
def test_resume_is_exact(kind, tmp_path):
    expected = trained(kind, tmp_path / "whole")
    for step in (1, 4, 6):
        with pytest.raises(KeyboardInterrupt):
            trained(kind, tmp_path / f"{step}", callbacks=[InterruptAt(step)])
        ours = trained(kind, tmp_path / f"{step}")
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in expected), step
    often = trained(kind, tmp_path / "often", SETTINGS.model_copy(update={"checkpoint_every": 1}))
    assert all(torch.equal(often[name], expected[name]) for name in expected)


def test_a_mean_that_begins_anew_would_be_another_training(tmp_path):
    """So that the test above can fail: the teacher's state matters."""
    expected = trained("alone", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained("alone", tmp_path / "cut", callbacks=[InterruptAt(4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Average, "load_state", lambda self, state: None)
        ours = trained("alone", tmp_path / "cut")
    assert not torch.equal(ours["student.0.weight"], expected["student.0.weight"])


def test_another_teachers_checkpoint_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained("alone", tmp_path, callbacks=[InterruptAt(4)])
    assert latest(tmp_path) is not None
    student = normed(dropout=0.3)
    for teacher, message in (
        (Average(student, 0.9), r"was made with decay 0.8 and goes on with 0.9; take that one"),
        (normed(), r"had other teachers \(1 that change there, 0 that change here\)"),
        (Ensemble([Average(student, 0.8)]), r"had other teachers \(1 that change there, 1 that change here\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Distiller(student, teacher, [KD, LABELS]), items(), settings=SETTINGS, folder=tmp_path)


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), "0.9"])
def test_wrong_decay(decay):
    with pytest.raises(ValueError, match="a decay is a share from 0 to 1, got"):
        Average(nn.Linear(2, 2), decay)


def test_an_average_of_no_module_is_refused():
    with pytest.raises(TypeError, match=r"a student is a torch\.nn\.Module, got a NoneType; pass a module"):
        Average(None)


def test_teachers_of_another_student():
    student = Adapted()
    for kind in (Average, WithoutAdapter):
        teacher = kind(Adapted())
        name = kind.__name__
        for wrapped in (teacher, Ensemble([perceptron(), teacher])):
            with pytest.raises(ValueError, match=rf"the {name} is of another model.*; pass {name}\(student\)"):
                Distiller(student, wrapped, [KD])


def test_what_changes_is_not_kept():
    student = perceptron()
    for teacher in (Average(student), Ensemble([perceptron(seed=1), Average(student)])):
        with pytest.raises(ValueError, match=r"this one changes; leave Cached out"):
            Distiller(student, Cached(teacher, Store({})), [KD])
    with pytest.raises(ValueError, match="teacher '0' of an ensemble, a Average, cannot say"):
        Ensemble([Average(student)]).identity()


def test_a_student_that_has_changed_its_shape():
    student = perceptron()
    teacher = Average(student)
    student.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"the student has changed since .* \('4.bias'\); make the Average after"):
        teacher.signal({"input": points()[0]}, ["logits"])


def test_no_adapters():
    with pytest.raises(TypeError, match=r"a Linear has no adapters to switch off \(no disable_adapter\(\)\)"):
        WithoutAdapter(nn.Linear(2, 2))


# ---- without adapters ------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """Two low-rank adapters, switched as peft switches them: what trains is frozen and thawed as well."""

    def __init__(self):
        super().__init__()
        self.base = normed(dropout=0.4).requires_grad_(False)
        torch.manual_seed(9)
        self.adapter = nn.Linear(4, 3)
        self.frozen_adapter = nn.Linear(4, 3).requires_grad_(False)
        self.switched_on = True

    def forward(self, features):
        logits = self.base(features)
        return logits + self.adapter(features) + self.frozen_adapter(features) if self.switched_on else logits

    @contextmanager
    def disable_adapter(self):
        self._switch(False)
        yield
        self._switch(True)

    def _switch(self, on):
        self.switched_on = on
        for part in (self.adapter, self.frozen_adapter):
            part.requires_grad_(on)


class TestWithoutAdapter(TeacherContract):
    wants = ("logits", "base.1")
    wrong_tap = "bass.1"

    def teacher(self):
        return WithoutAdapter(Adapted())

    def batch(self):
        return {"features": points()[0], "labels": points()[1]}


class TestAverage(TestWithoutAdapter):
    def teacher(self):
        return Average(Adapted())


def test_it_is_the_model_below_the_adapters():
    student = Adapted()
    ours = WithoutAdapter(student).signal({"features": points()[0]}, ["logits"])["logits"]
    assert torch.equal(ours, copy.deepcopy(student.base).eval()(points()[0]))


@pytest.mark.parametrize("compiled", [False, True])
def test_it_trains_like_a_copy_of_the_model_below(compiled):
    features, labels = points()

    def gradients(make):
        student = Adapted()
        student.base.eval()  # its statistics are the teacher's too
        hidden = Term("adapter", "base.3", loss="mse", name="hidden")
        distiller = Distiller(student, make(student), [KD, LABELS, hidden]).train()
        student.base.eval()
        if compiled:
            distiller.compile_student(backend="eager")
        for _ in range(2):
            distiller(features=features, labels=labels).loss.backward()
        return [p.grad for p in student.parameters() if p.grad is not None]

    ours, theirs = gradients(WithoutAdapter), gradients(lambda student: Renamed(copy.deepcopy(student.base)))
    assert len(ours) == 2
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


class Renamed(nn.Module):
    """Takes the batch's name for the inputs."""

    def __init__(self, module):
        super().__init__()
        self.base = module

    def forward(self, features):
        return self.base(features)


def test_taps_of_a_student_that_was_compiled_without_them():
    student, features = Adapted(), points()[0]
    student.compile(backend="eager")
    with torch.no_grad(), student.disable_adapter():
        exact = student.eval()(features)
    ours = WithoutAdapter(student).signal({"features": features}, ["base.3"])["base.3"]
    assert torch.equal(ours, exact)


def test_an_error_in_the_pass_leaves_the_student_as_it_was():
    student = Adapted()
    with pytest.raises(RuntimeError):
        WithoutAdapter(student).signal({"features": torch.ones(2, 5)}, ["logits"])
    assert student.training
    assert [p.requires_grad for p in student.adapter.parameters()] == [True, True]


def test_its_identity_is_that_of_what_stays():
    student, other = Adapted(), Adapted()
    before = WithoutAdapter(student).identity()
    with torch.no_grad():
        student.adapter.weight.add_(1)
        other.base[0].weight.add_(1)
    assert WithoutAdapter(student).identity() == before
    assert WithoutAdapter(other).identity() != before


def test_it_may_be_kept_and_mixed():
    student = Adapted()
    student.base.eval()
    kept = Cached(WithoutAdapter(student), Store({}))
    distiller = Distiller(student, Ensemble([kept, ModuleTeacher(Renamed(perceptron()))]), [KD])
    for _ in range(3):
        distiller(features=points()[0], labels=points()[1])
    assert kept.computed == 6


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's and transformers' affair
def test_with_peft_itself():
    peft = pytest.importorskip("peft")
    base = bert(layers=1)
    exact = ModuleTeacher(copy.deepcopy(base)).signal(text_batch(), ["logits"])["logits"]
    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.2)
    student = peft.get_peft_model(base, config)
    trains = [p.requires_grad for p in student.parameters()]
    tap = "base_model.model.bert.encoder.layer.0"
    terms = [KD, LABELS, Term(tap, tap, loss="mse", name="hidden")]
    teacher = WithoutAdapter(student)
    distiller = Distiller(student, teacher, terms)
    update = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    said = teacher.identity()
    for _ in range(3):
        out = distiller(**text_batch())
        out.loss.backward()
        update.step()
        update.zero_grad()
    assert [p.requires_grad for p in student.parameters()] == trains
    assert all(module.training for module in student.modules())
    assert torch.equal(teacher.signal(text_batch(), ["logits"])["logits"], exact)
    assert out.terms["kd"] > 0
    assert teacher.identity() == said


def test_resume_is_exact_on_two_ranks(tmp_path):
    """Running statistics, which differ between ranks until the next step, included."""
    command = [sys.executable, "-m", "tests.workers.own_weights", str(free_port()), str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=180)
    for kind in ("Average", "WithoutAdapter"):
        found = [torch.load(tmp_path / kind / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for whole, resumed in found:
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert all(torch.equal(found[0][0][n], t) for n, t in found[1][0].items() if "running" not in n)
