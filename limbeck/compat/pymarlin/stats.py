"""``global_stats``: numbers that a module notes, written every few steps or after each epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from limbeck.compat.pymarlin.arguments import StatInitArguments as StatInitArguments
from limbeck.registry import nearest

LOGGER = logging.getLogger(__name__)

Writer = Callable[[Mapping[str, float], int], Any]


def show(values: Mapping[str, float], step: int) -> None:
    """Print each number on a line.

    Example:
        >>> show({"loss": 0.5}, 3)
        step = 3, loss : 0.5
    """
    for name, value in values.items():
        print(f"step = {step}, {name} : {value}", flush=True)


def writers_of(names: Sequence[Any], trackers: Writer) -> list[Writer]:
    """The writers of these names; functions stand for themselves.

    Args:
        names: ``"stdout"``, ``"tensorboard"``, or functions; ``"aml"`` gives a line in the log alone.
        trackers: What writes for trackers.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> writers_of(["stdot"], show)
        Traceback (most recent call last):
        ValueError: unknown writer 'stdot'; did you mean 'stdout'?
    """
    known: dict[str, Writer] = {"stdout": show, "tensorboard": trackers}
    if "aml" in names:
        LOGGER.warning(
            "writer 'aml' writes nothing: Azure ML is not used here; pass a function(values, step) for it"
        )
    for name in names:
        if not callable(name) and name not in (*known, "aml"):
            raise ValueError(f"unknown writer {name!r}; {nearest(str(name), [*known, 'aml'])}")
    return [name if callable(name) else known[name] for name in names if name != "aml"]


class Stats:
    """Brings numbers by name to writers.

    Args:
        log_steps: Steps after which the frequent ones are written, each as its mean since the last time.
        writers: Where.

    Example:
        >>> stats = Stats(1, [show])
        >>> stats.update("lr", 0.1, frequent=True)
        >>> stats.log_stats(step=1)
        step = 1, lr : 0.1
    """

    def __init__(self, log_steps: int, writers: Sequence[Writer]) -> None:
        self.log_steps, self.writers = log_steps, list(writers)
        self.short: dict[str, list[float]] = {}
        self.long: dict[str, float] = {}

    def update(self, k: str, v: float, frequent: bool = False) -> None:
        """Note a number, to be written every few steps (`frequent`) or after the epoch."""
        if frequent:
            self.short.setdefault(k, []).append(v)
        else:
            self.long[k] = v

    def log_stats(self, step: int) -> None:
        """Write the frequent ones, if their step has come."""
        if step % self.log_steps == 0:
            self._write({name: sum(values) / len(values) for name, values in self.short.items()}, step)
            self.short.clear()

    def log_long_stats(self, step: int) -> None:
        """Write the others."""
        self._write(dict(self.long), step)
        self.long.clear()

    def _write(self, values: dict[str, float], step: int) -> None:
        for write in self.writers if values else ():
            write(values, step)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let `global_stats` stand for these inside the block."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[Stats | None] = ContextVar("the statistics of the trainer at work", default=None)


class GlobalStats:
    """Stands for the statistics of the trainer that is at work; outside of one, nothing is noted.

    It keeps nothing itself. Scripts import it as `global_stats`.

    Example:
        >>> stats = Stats(1, [])
        >>> with stats.current():
        ...     global_stats.update("accuracy", 0.9)
        >>> stats.long
        {'accuracy': 0.9}
    """

    def update(self, k: str, v: float, frequent: bool = False) -> None:
        """Note a number; see `Stats.update`."""
        if (stats := _CURRENT.get()) is not None:
            stats.update(k, v, frequent)

    def update_multi(self, k: str, v: Mapping[str, float], frequent: bool = False) -> None:
        """Note numbers that belong together, each as ``k/name``."""
        for name, value in v.items():
            self.update(f"{k}/{name}", value, frequent)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"statistics here are numbers, and {name!r} is not there; use update or update_multi")


global_stats = GlobalStats()
