"""``global_stats``: numbers that a module notes for the trainer that is at work, which keeps `Notes` of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from limbeck.registry import nearest
from limbeck.train.notes import Notes, Write, show

_CURRENT: ContextVar[Notes | None] = ContextVar("the notes of the trainer at work", default=None)


def writers_of(names: Sequence[Any], scalars: Write) -> list[Write]:
    """The writers of these names; functions stand for themselves, and ``"aml"`` gives a line in the log alone.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> writers_of(["stdout"], print)[0] is show
        True
    """
    known: dict[str, Write] = {"stdout": show, "tensorboard": scalars}
    for name in names:
        if name == "aml":
            logging.getLogger(__name__).warning(
                "writer 'aml' writes nothing: Azure ML is not used here; pass a function(values, step) for it"
            )
        elif not callable(name) and name not in known:
            raise ValueError(f"unknown writer {name!r}; {nearest(str(name), [*known, 'aml'])}")
    return [known.get(name, name) for name in names if name != "aml"]


@contextmanager
def noting(notes: Notes) -> Iterator[None]:
    """Let `global_stats` stand for these notes inside the block."""
    token = _CURRENT.set(notes)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class GlobalStats:
    """Stands for the notes of the trainer that is at work; outside of one, nothing is noted.

    It keeps nothing itself. Scripts import it as `global_stats`.

    Example:
        >>> from limbeck.train.notes import show
        >>> notes = Notes([show])
        >>> with noting(notes):
        ...     global_stats.update("accuracy", 0.9)
        >>> notes.write_epoch(3)
        step = 3, accuracy : 0.9
    """

    def update(self, k: str, v: float, frequent: bool = False) -> None:
        """Note a number, to be written every few steps (`frequent`) or after the epoch."""
        if (notes := _CURRENT.get()) is not None:
            notes.note(k, v, of_step=frequent)

    def update_multi(self, k: str, v: Mapping[str, float], frequent: bool = False) -> None:
        """Note numbers that belong together, each as ``k/name``."""
        for name, value in v.items():
            self.update(f"{k}/{name}", value, frequent)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"statistics here are numbers, and {name!r} is not there; use update or update_multi")


global_stats = GlobalStats()
