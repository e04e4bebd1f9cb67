"""What every training backend has to do, whatever runs its steps.

A backend is a function ``fit(distiller, train_data, eval_data, settings, *, metric, callbacks, folder)`` that
trains as `limbeck.fit` does.
"""

from __future__ import annotations

import inspect
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from limbeck.distiller import Distiller
from limbeck.terms import Term
from limbeck.testing.checks import close, require
from limbeck.train import Callback, FitResult, Settings, State

Weights = dict[str, Tensor]
TEACHER_WIDTH = 11
"""A size that no tensor of the student has, by which the teacher's are known in a checkpoint."""


class BackendContract:
    """What a training backend has to do.

    Attributes:
        fit: The backend.
        tolerance: How far weights may be apart that differ in the order of summation alone.

    Example:
        >>> import limbeck
        >>> from limbeck.testing import run
        >>> class TestFit(BackendContract):
        ...     fit = limbeck.fit
        >>> len(run(TestFit))
        6
    """

    fit: Callable[..., FitResult]
    tolerance: float = 1e-5

    def distiller(self) -> Distiller:
        """Make a Distiller, the same one each time; override it for another kind of model."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            student = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 2))
            teacher = nn.Sequential(nn.Linear(4, TEACHER_WIDTH), nn.Linear(TEACHER_WIDTH, 2))
        terms = [Term("logits", loss="forward_kl", name="kd"), Term("labels", loss="cross_entropy", weight=0.5)]
        return Distiller(student, teacher, terms)

    def data(self) -> list[dict[str, Tensor]]:
        """Make examples; their number is no multiple of the batch size."""
        points = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))
        return [{"input": point, "labels": (point.sum() > 0).long()} for point in points]

    def train(
        self, settings: Settings, callbacks: Sequence[Callback] = (), folder: Path | None = None
    ) -> tuple[FitResult, Weights, Distiller]:
        """Train a new student; its result, its weights and what trained it."""
        found = inspect.getattr_static(type(self), "fit")  # as an attribute, a function would become a method
        fit = found.__func__ if isinstance(found, staticmethod) else found
        distiller, data = self.distiller(), self.data()
        result = fit(distiller, data, data, settings, metric="accuracy", callbacks=callbacks, folder=folder)
        return result, {n: t.detach().clone() for n, t in distiller.export().state_dict().items()}, distiller

    def test_learns(self) -> None:
        """Training changes the student, and its evaluations are counted by steps."""
        before = self.distiller().student.state_dict()
        result, weights, _ = self.train(_settings(steps=8))
        require(any(not torch.equal(before[n], t.cpu()) for n, t in weights.items()), "no weight has moved")
        steps = [step for step, _ in result.history]
        require(result.steps == 8 and steps == [3, 6, 8], f"{result.steps} steps, evaluated at {steps}")

    def test_does_not_depend_on_accumulation(self) -> None:
        """However a step is cut into micro-batches, the weights are the same."""
        expected = self.train(_settings(), [_NoDropout()])[1]
        for parts in (2, 4):
            weights = self.train(_settings(accumulation=parts), [_NoDropout()])[1]
            for name, tensor in expected.items():
                close(weights[name], tensor, f"in {name!r} with accumulation {parts}", self.tolerance)

    def test_resumes_bit_for_bit(self) -> None:
        """Interrupted after any step and started again, it ends with the same weights and evaluations."""
        expected, weights, _ = self.train(_settings(best=True))
        for step in range(1, expected.steps + 1):
            with tempfile.TemporaryDirectory() as folder:
                self._interrupted(step, Path(folder))
                result, resumed, _ = self.train(_settings(best=True), folder=Path(folder))
            require(result.history == expected.history, f"other evaluations, interrupted after step {step}")
            for name, tensor in weights.items():
                require(torch.equal(resumed[name], tensor), f"{name!r} differs, interrupted after step {step}")

    def test_keeps_no_teacher(self) -> None:
        """A checkpoint holds no tensor of the teacher, and nothing that is pickled."""
        with tempfile.TemporaryDirectory() as folder:
            self.train(_settings(), folder=Path(folder))
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            require(bool(files), "nothing was kept")
            for path in files:
                require(path.suffix in (".safetensors", ".json"), f"{path.name} is neither safetensors nor JSON")
                for shape in _shapes(path):
                    require(TEACHER_WIDTH not in shape, f"{path.name} holds a tensor {shape} of the teacher")

    def test_a_callback_may_stop(self) -> None:
        """A stop counts after the step that asked for it, the result says why, and a resume goes no further."""
        with tempfile.TemporaryDirectory() as folder:
            result, weights, _ = self.train(_settings(), [_Stop(4)], Path(folder))
            again, resumed, _ = self.train(_settings(), folder=Path(folder))
        for found in (result, again):
            require((found.steps, found.stopped) == (4, "enough"), f"{found.stopped!r} after {found.steps} steps")
        require(all(torch.equal(resumed[name], tensor) for name, tensor in weights.items()), "it trained on")

    def test_leaves_the_distiller_as_it_was(self) -> None:
        """Afterwards it is in eval mode, and neither it nor the student keeps a hook or a patched forward."""
        _, _, distiller = self.train(_settings())
        require(not distiller.training, "the Distiller is in training mode")
        for module in distiller.modules():
            kept = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            require(not kept, f"a {type(module).__name__} keeps a hook or a patched forward")

    def _interrupted(self, step: int, folder: Path) -> None:
        try:
            self.train(_settings(best=True), [_Interrupt(step)], folder)
        except KeyboardInterrupt:
            return
        raise AssertionError(f"an interruption after step {step} raised no KeyboardInterrupt")


def _settings(**changes: object) -> Settings:
    values = {"steps": 7, "batch_size": 16, "learning_rate": 0.05, "checkpoint_every": 2, "log_every": 3}
    return Settings.model_validate({**values, **changes})


def _shapes(path: Path) -> list[tuple[int, ...]]:
    if path.suffix != ".safetensors":
        return []
    with safe_open(path, "pt") as file:
        return [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - it is no dict


class _NoDropout(Callback):
    """Dropout draws other numbers for other micro-batches, so it is off where those are compared."""

    def on_start(self, state: State) -> None:
        for module in state.distiller.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


class _Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: State) -> None:
        if state.step == self.step:
            state.stop = "enough"


class _Interrupt(Callback):
    """Presses Ctrl-C."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: State) -> None:
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
