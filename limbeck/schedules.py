"""Numbers that change as training goes on: weights of terms, temperatures, any option of a loss.

A schedule is a function ``(progress, *, options)``; progress runs from 0 at the first step to 1 at the last. It
keeps no state, so there is nothing to resume, and nothing of the configuration is ever changed.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.registry import Registry, check_options

SCHEDULES: Registry[Callable[..., float]] = Registry("schedule")


@SCHEDULES.register
def constant(progress: float, *, value: float = 1.0) -> float:
    """The same value throughout."""
    return value


@SCHEDULES.register
def linear(progress: float, *, start: float = 0.0, end: float = 1.0) -> float:
    """A straight line from `start` to `end`."""
    return start + (end - start) * progress


@SCHEDULES.register
def linear_growth(progress: float) -> float:
    """From 0 to 1 in a straight line."""
    return progress


@SCHEDULES.register
def linear_decay(progress: float) -> float:
    """From 1 to 0 in a straight line."""
    return 1.0 - progress


@SCHEDULES.register
def cosine(progress: float, *, start: float = 1.0, end: float = 0.0) -> float:
    """Half a cosine from `start` to `end`: slow, fast, slow."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@SCHEDULES.register
def exponential(progress: float, *, start: float = 1.0, end: float = 0.01) -> float:
    """Growth or decay by the same factor at every step, from `start` to `end`; both of one sign."""
    if start * end <= 0:
        raise ValueError(f"an exponential schedule goes between numbers of one sign, got {start} and {end}")
    return float(start * (end / start) ** progress)


@SCHEDULES.register
def warmup(progress: float, *, until: float = 0.1, start: float = 0.0, end: float = 1.0) -> float:
    """From `start` to `end` in a straight line up to the progress `until`, and `end` from there on."""
    if not 0 < until <= 1:
        raise ValueError(f"a warm-up ends at a progress in (0, 1], got until={until}")
    return end if progress >= until else start + (end - start) * progress / until


@SCHEDULES.register
def piecewise(progress: float, *, points: Sequence[Sequence[float]], steps: bool = False) -> float:
    """Through points ``[progress, value]``, in straight lines or, with `steps`, jumping at each point.

    Example:
        >>> [piecewise(at, points=[[0.0, 4.0], [0.5, 2.0]]) for at in (0.0, 0.25, 1.0)]
        [4.0, 3.0, 2.0]
    """
    if not all(isinstance(point, Sequence) and len(point) == 2 for point in points):
        raise ValueError(f"piecewise takes points [progress, value] in order of progress, got {list(points)}")
    places = [float(place) for place, _ in points]
    values = [float(value) for _, value in points]
    if not places or places != sorted(places):
        raise ValueError(f"piecewise takes points [progress, value] in order of progress, got {list(points)}")
    after = bisect.bisect_right(places, progress)
    if after in (0, len(places)) or steps:
        return values[max(0, after - 1)]
    share = (progress - places[after - 1]) / (places[after] - places[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


@dataclass(frozen=True)
class Scheduled:
    """A number that is a base times a function of progress.

    Attributes:
        function: ``function(progress, **options)``.
        base: The factor on it.
        options: The function's options.
    """

    function: Callable[..., float]
    base: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, progress: float) -> float:
        """The value at a progress from 0 to 1.

        Raises:
            ValueError: the schedule gives no finite number.
        """
        value = self.base * self.function(progress, **self.options)
        if not math.isfinite(value):
            raise ValueError(f"the schedule {self} is {value} at progress {progress:g}")
        return value

    def lowest(self) -> float:
        """The lowest value at a hundred and one places from the first step to the last."""
        return min(self.at(place / 100) for place in range(101))

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.base:g} x {getattr(self.function, '__name__', 'a function')}({options})"


def build_schedule(spec: Mapping[str, Any] | Callable[..., float]) -> Scheduled:
    """Make a schedule from ``{"schedule": name, "base": 0.9, **options}``, or from a function of progress.

    Args:
        spec: A mapping, whose ``schedule`` is a registered name, ``"package.module:function"``, or a function
            ``(progress, *, options)``; ``base`` multiplies it and is 1 by default.

    Raises:
        ValueError: an unknown name, or values that make no finite number somewhere.
        TypeError: an option that the schedule does not have.

    Example:
        >>> weight = build_schedule({"schedule": "cosine", "base": 0.9})
        >>> weight, weight.at(0.0), round(weight.at(0.5), 3), weight.at(1.0)
        (0.9 x cosine(), 0.9, 0.45, 0.0)
    """
    options: dict[str, Any] = {"schedule": spec} if callable(spec) else dict(spec)
    if "schedule" not in options:
        raise ValueError(f"a scheduled value is written {{schedule: name, base: 1.0}}, got {options}")
    name, base = options.pop("schedule"), options.pop("base", 1.0)
    if isinstance(base, bool) or not isinstance(base, (int, float)):
        raise ValueError(f"the base of a schedule is a number, got {base!r}")
    function = SCHEDULES.get(name) if isinstance(name, str) else name
    check_options(function, options, (), f"schedule {name if isinstance(name, str) else 'function'!r}")
    schedule = Scheduled(function, base, options)
    try:
        schedule.lowest()
    except TypeError as error:
        raise TypeError(f"the schedule {schedule} cannot be computed: {error}") from None
    return schedule


def is_schedule(value: Any) -> bool:
    """Whether an option is the description of a schedule, and not a value of its own."""
    return isinstance(value, Mapping) and "schedule" in value


def value_at(value: Any, progress: float | None, what: str) -> Any:
    """The value of what may be scheduled; anything else is returned as it is.

    Args:
        value: A number, anything else, or a `Scheduled`.
        progress: From 0 to 1, or None where the caller does not say.
        what: What the value is, in an error message.

    Raises:
        ValueError: the value is scheduled and there is no progress.

    Example:
        >>> value_at(4.0, None, "temperature"), value_at(build_schedule(lambda p: 1 - p), 0.25, "weight")
        (4.0, 0.75)
    """
    if not isinstance(value, Scheduled):
        return value
    if progress is None:
        raise ValueError(f"the {what} follows {value}; pass progress=step / (steps - 1) with each batch")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress runs from 0 at the first step to 1 at the last, got {progress}")
    return value.at(progress)
