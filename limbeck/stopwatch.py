"""A watch that adds up the time of a piece of work, on a GPU too, without making the GPU wait."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up the time spent inside its ``with`` blocks.

    Work on a GPU is only queued when a call returns, so its time is taken by events in the queue, which are read
    when the sum is asked for.

    Args:
        seconds: Where to start from.

    Example:
        >>> watch = Stopwatch()
        >>> with watch:
        ...     time.sleep(0.01)
        >>> 0.01 <= watch.seconds < 1
        True
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._start = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._on_gpu = torch.cuda.is_available()

    def __enter__(self) -> Stopwatch:
        if self._on_gpu:
            self._events.append((_mark(), None))
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._on_gpu:
            self._events[-1] = (self._events[-1][0], _mark())
        else:
            self._seconds += time.perf_counter() - self._start

    @property
    def seconds(self) -> float:
        """The sum so far; on a GPU this waits for what is queued."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


def _mark() -> Any:
    """A point of time in the GPU's queue."""
    make: Any = torch.cuda.Event
    event = make(enable_timing=True)
    event.record()
    return event
