"""Statistics of a training: numbers by name, written every few steps or after each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from limbeck.compat.pymarlin.utils.arguments import arguments
from limbeck.compat.pymarlin.utils.writer.base import Writer

Value = float | Mapping[str, float]


@arguments
@dataclass
class StatInitArguments:
    """When statistics are written.

    Raises:
        ValueError: what is not measured here is asked for.

    Example:
        >>> StatInitArguments(log_steps=20).log_steps
        20
    """

    log_steps: int = 1
    update_system_stats: bool = False
    log_model_steps: int = 1000
    exclude_list: str = ""

    def __post_init__(self) -> None:
        if self.update_system_stats:
            raise ValueError("update_system_stats=True: the machine's load is not measured; set it to False")
        if self.log_steps < 1:
            raise ValueError(f"log_steps must be a whole number of steps from 1 on, got {self.log_steps}")


class BasicStats:
    """Collects the newest value of each name and brings them to the writers.

    Args:
        args: When they are written.
        writers: Where.

    Example:
        >>> from limbeck.compat.pymarlin.utils.writer import Stdout
        >>> stats = BasicStats(StatInitArguments(), [Stdout()])
        >>> stats.update("lr", 0.1, frequent=True)
        >>> stats.log_stats(step=1)
        step = 1, lr : 0.1
    """

    def __init__(self, args: StatInitArguments, writers: Sequence[Writer] = ()) -> None:
        self.args, self.writers = args, list(writers)
        self.short: dict[str, Value] = {}
        self.long: dict[str, Value] = {}

    def update(self, k: str, v: float, frequent: bool = False) -> None:
        """Note a number, to be written every few steps (`frequent`) or after the epoch."""
        (self.short if frequent else self.long)[k] = v

    def update_multi(self, k: str, v: Mapping[str, float], frequent: bool = False) -> None:
        """Note numbers that belong together."""
        (self.short if frequent else self.long)[k] = dict(v)

    def log_stats(self, step: int, force: bool = False) -> None:
        """Write the frequent ones, if their step has come."""
        if force or step % self.args.log_steps == 0:
            self._write(self.short, step)

    def log_long_stats(self, step: int) -> None:
        """Write the others."""
        self._write(self.long, step)

    def finish(self) -> None:
        """Close the writers."""
        for writer in self.writers:
            writer.finish()

    def _write(self, values: dict[str, Value], step: int) -> None:
        for name, value in values.items():
            for writer in self.writers:
                if isinstance(value, Mapping):
                    writer.log_multi(name, value, step)
                else:
                    writer.log_scalar(name, value, step)
        values.clear()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let `global_stats` stand for these inside the block."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[BasicStats | None] = ContextVar("the statistics of the trainer at work", default=None)


class GlobalStats:
    """Stands for the statistics of the trainer that is at work; outside of one, nothing is noted.

    It keeps nothing itself. Scripts import it as `global_stats`.

    Example:
        >>> stats = BasicStats(StatInitArguments())
        >>> with stats.current():
        ...     global_stats.update("accuracy", 0.9)
        >>> stats.long
        {'accuracy': 0.9}
    """

    def update(self, k: str, v: float, frequent: bool = False) -> None:
        """See `BasicStats.update`."""
        if (stats := _CURRENT.get()) is not None:
            stats.update(k, v, frequent)

    def update_multi(self, k: str, v: Mapping[str, float], frequent: bool = False) -> None:
        """See `BasicStats.update_multi`."""
        if (stats := _CURRENT.get()) is not None:
            stats.update_multi(k, v, frequent)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"statistics here are numbers, and {name!r} is not there; use update or update_multi")


global_stats = GlobalStats()
