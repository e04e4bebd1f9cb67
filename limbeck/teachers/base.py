"""What a teacher is: something that offers taps and gives a Signal for a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from limbeck.types import Batch, Signal


@runtime_checkable
class Teacher(Protocol):
    """The source of what a student learns: a module, several of them, a cache, a server."""

    def offers(self, tap: str) -> bool:
        """Whether `signal` can be asked for this tap."""
        ...

    def names(self) -> Iterable[str]:
        """Taps that this teacher offers, to suggest the nearest one in an error message."""
        ...

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Read the wanted taps for one batch, without gradient."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A teacher that can say what its signals depend on, so that they may be kept for later."""

    def identity(self) -> Mapping[str, Any]:
        """All that determines its signals but the batch, as flat JSON: two teachers that agree in it are one."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A teacher that changes in training; checkpoints keep its state."""

    def state(self) -> dict[str, Any]:
        """All that its next signals depend on, as nested dicts of tensors and what JSON can hold."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; called when the student's weights are back."""
        ...


@runtime_checkable
class Combined(Protocol):
    """A teacher that stands on others: one for each task, several mixed, one that is remembered."""

    def parts(self) -> Mapping[str, Teacher]:
        """Those that it asks, by what stands before their taps."""
        ...


def within(teacher: Teacher | None) -> Iterator[tuple[str, Teacher]]:
    """A teacher and all that it stands on, itself first, with what stands before their taps.

    Example:
        >>> from torch import nn
        >>> from limbeck.teachers import Ensemble
        >>> [(prefix, type(t).__name__) for prefix, t in within(Ensemble({"bert": nn.Linear(2, 3)}))]
        [('', 'Ensemble'), ('bert:', 'ModuleTeacher')]
    """
    if teacher is None:
        return
    yield "", teacher
    if isinstance(teacher, Combined):
        for before, part in teacher.parts().items():
            yield from ((before + prefix, inner) for prefix, inner in within(part))
