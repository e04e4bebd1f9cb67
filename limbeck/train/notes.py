"""The log of a loop of one's own: numbers noted along the way, written every few steps and after each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from accelerate import PartialState
from torch import Tensor

from limbeck.train.plain_state import Callback, State

__all__ = ["Notes", "Write", "show"]

Write = Callable[[Mapping[str, float], int], object]
"""Takes numbers by name, and the step."""


def show(values: Mapping[str, float], step: int) -> None:
    """Print each number on a line.

    Example:
        >>> show({"loss": 0.5}, 3)
        step = 3, loss : 0.5
    """
    for name, value in values.items():
        print(f"step = {step}, {name} : {value}", flush=True)


class Notes(Callback):
    """Brings the loss of a `limbeck.train.plain.Loop`, and what else is noted, to writers on the first rank.

    Put it behind the callbacks that note something.

    Args:
        writers: Functions of numbers by name and the step: `show`, ``Scalars(folder).write``, one of your own.
        every: Steps after which the numbers of steps are written, each as its mean since the last time.

    Example:
        >>> notes = Notes([show], every=2)
        >>> notes.note("rate", 0.5)
        >>> notes.note("rate", 1.5)
        >>> notes.note("accuracy", 0.9, of_step=False)
        >>> notes.write_steps(1), notes.write_steps(2), notes.write_epoch(2)
        step = 2, rate : 1.0
        step = 2, accuracy : 0.9
        (None, None, None)
    """

    def __init__(self, writers: Sequence[Write], every: int = 1) -> None:
        self.writers, self.every = list(writers), every
        self._of_steps: dict[str, list[float | Tensor]] = {}
        self._of_epoch: dict[str, float | Tensor] = {}

    def note(self, name: str, value: float | Tensor, *, of_step: bool = True) -> None:
        """Take up a number of a step, or of an epoch, of which the last one counts; tensors are detached."""
        value = value.detach() if isinstance(value, Tensor) else value
        if of_step:
            self._of_steps.setdefault(name, []).append(value)
        else:
            self._of_epoch[name] = value

    def write_steps(self, step: int) -> None:
        """Write the numbers of steps, if their time has come; this waits for the device."""
        if step % self.every == 0:
            means = {name: sum(map(float, values)) / len(values) for name, values in self._of_steps.items()}
            self._write(means, step)
            self._of_steps.clear()

    def write_epoch(self, step: int) -> None:
        """Write the numbers of the epoch."""
        self._write({name: float(value) for name, value in self._of_epoch.items()}, step)
        self._of_epoch.clear()

    def on_step(self, state: State) -> None:
        """Note the loss, and write."""
        if state.loss is not None:
            self.note("loss", state.loss)
        self.write_steps(state.step)

    def on_epoch(self, state: State) -> None:
        """Write what was noted of the epoch."""
        self.write_epoch(state.step)

    def on_end(self, state: State) -> None:
        """Write what was noted since."""
        self.write_epoch(state.step)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for write in self.writers if values and PartialState().is_main_process else ():
            write(values, step)
