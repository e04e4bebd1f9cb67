"""What a checkpoint brings back, what it refuses, and what a full disk leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck import Callback, Distiller, Settings, Term, fit
from limbeck.train import JsonLog, read_log
from limbeck.train.checkpoint import load_weights, save_weights
from tests.test_fit import items

FULL_DISK = Path(__file__).parent / "workers" / "full_disk.py"
SETTINGS = Settings(
    epochs=30,
    batch_size=10,
    learning_rate=0.3,
    warmup=0,
    schedule="constant",
    best=True,
    patience=3,
    evaluate_every=2,
    log_every=3,
)


class InterruptAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def distiller():
    torch.manual_seed(4)
    student = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 2))
    terms = [Term("logits", loss="forward_kl", name="kd"), Term("labels", loss="cross_entropy", weight=0.5)]
    return Distiller(student, nn.Linear(4, 2), terms)


def train(folder, settings=SETTINGS, callbacks=(), trained=None):
    trained = trained or distiller()
    log = JsonLog(folder / "log.jsonl")
    folder.mkdir(exist_ok=True)
    result = fit(trained, items(), items(30), settings, callbacks=[log, *callbacks], folder=folder / "checkpoints")
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(log.path)]
    return result, trained.state_dict(), lines


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_interruption_at_any_step_changes_nothing(tmp_path):
    """Neither the weights, nor the evaluations, nor the log, nor where and why it stops."""
    expected, weights, lines = train(tmp_path / "whole")
    assert expected.stopped == "no better score in 3 evaluations"
    assert expected.steps < 150
    assert not same(weights, train(tmp_path / "last", SETTINGS.model_copy(update={"best": False}))[1])
    for step in range(1, expected.steps + 1):
        with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {step}; what was trained is kept in"):
            train(tmp_path / f"{step}", callbacks=[InterruptAt(step)])
        result, resumed, its_lines = train(tmp_path / f"{step}")
        assert (result.steps, result.stopped, result.history) == (
            expected.steps,
            expected.stopped,
            expected.history,
        )
        assert same(resumed, weights)
        assert its_lines == lines


def test_a_training_that_stopped_is_not_trained_on(tmp_path):
    class Stop(Callback):
        def on_step(self, state):
            state.stop = "enough" if state.step == 4 else ""

    settings = SETTINGS.model_copy(update={"patience": None})
    first = train(tmp_path, settings, [Stop()])
    again = train(tmp_path, settings)
    assert (first[0].steps, first[0].stopped) == (again[0].steps, again[0].stopped) == (4, "enough")
    assert same(again[1], first[1])


@pytest.mark.parametrize("method", ["on_start", "on_log", "on_evaluate", "on_checkpoint"])
def test_every_callback_may_stop(tmp_path, method):
    class Stop(Callback):
        pass

    setattr(Stop, method, lambda self, state: setattr(state, "stop", method))
    result, _, _ = train(tmp_path, SETTINGS.model_copy(update={"patience": None}), [Stop()])
    steps = {"on_start": 0, "on_log": 3, "on_evaluate": 2, "on_checkpoint": 3}[method]
    assert (result.steps, result.stopped) == (steps, method)


def test_half_precision_goes_on_with_its_scale(tmp_path):
    settings = SETTINGS.model_copy(update={"precision": "fp16", "patience": None, "steps": 6})
    expected = train(tmp_path / "whole", settings)[1]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", settings, [InterruptAt(4)])
    assert same(train(tmp_path / "cut", settings)[1], expected)
    kept = (tmp_path / "cut" / "checkpoints" / "step-00000006" / "state.json").read_text()
    assert '"_growth_tracker": 6' in kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.1}, r"settings.learning_rate is 0.3 there and 0.1 here; give this training another"),
        ({"seed": 3}, "settings.seed is 0 there and 3 here"),
        ({"epochs": 2, "batch_size": 4}, r"batch_size is 10 there and 4 here.*\(and 1 more\)"),
    ],
)
def test_another_training_is_refused(tmp_path, change, message):
    train(tmp_path)
    with pytest.raises(ValueError, match=f"step-.* belongs to another training: .*{message}"):
        train(tmp_path, SETTINGS.model_copy(update=change))


def test_other_terms_are_refused(tmp_path):
    train(tmp_path)
    other = distiller()
    other = Distiller(other.student, nn.Linear(4, 2), [Term("logits", loss="forward_kl", name="kd", weight=0.3)])
    with pytest.raises(
        ValueError, match=r"term kd is .*weight 1.*there and .*weight 0.3.*here; term cross_entropy"
    ):
        train(tmp_path, trained=other)


def test_what_changes_no_weight_may_change(tmp_path):
    first = train(tmp_path)
    again = train(tmp_path, SETTINGS.model_copy(update={"keep": 2, "log_every": 7}))
    assert same(again[1], first[1])


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    train(tmp_path)
    half = tmp_path / "checkpoints" / "step-00000099.partial"
    half.mkdir()
    train(tmp_path)
    assert not half.exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files, since safetensors reports it as it does a full disk: not by an OSError."""
    done = subprocess.run(
        [sys.executable, str(FULL_DISK), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"File too large at step 4 in writing {tmp_path}" in done.stdout
    assert f"make room, and the next start goes on from {tmp_path / 'step-00000002'}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "step-00000002"]


class Views(nn.Module):
    """Parameters that share memory in all the ways that are no tie, and one that is."""

    def __init__(self, fill):
        super().__init__()
        self.square = nn.Parameter(torch.full((3, 3), fill))
        with torch.no_grad():
            self.square += fill * torch.arange(9.0).view(3, 3)
        self.tied = self.square
        self.register_buffer("transposed", self.square.detach().t())
        self.register_buffer("row", self.square.detach()[1])
        self.register_buffer("bits", self.square.detach().view(torch.int32))


def test_tied_weights_are_those_that_read_memory_alike(tmp_path):
    source, path = Views(1.0), tmp_path / "w.safetensors"
    expected = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    save_weights(source, path)
    target = Views(2.0)
    for name in ("transposed", "row", "bits"):  # memory of their own, as in a model built otherwise
        setattr(target, name, getattr(target, name).clone())
    load_weights(target, path)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
