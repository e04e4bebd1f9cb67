"""Sizes and times as people write them: 20MB, 2 ms, 1h30m."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_ONE = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-zµ]*)\s*", re.IGNORECASE)


def size_of(text: str) -> int:
    """Read a size: B, kB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

    Args:
        text: A number above 0 and a unit, in upper or lower case, with or without a space between.

    Returns:
        Bytes, at least 1.

    Raises:
        ValueError: it is no size; the message shows how one is written.

    Example:
        >>> size_of("20MB"), size_of("1.5 MiB")
        (20000000, 1572864)
    """
    return max(1, round(_read(text, _BYTES, "size", "20MB")))


def milliseconds_of(text: str) -> float:
    """Read a latency: us, ms or s.

    Returns:
        Milliseconds.

    Raises:
        ValueError: it is no latency; the message shows how one is written.

    Example:
        >>> milliseconds_of("2ms"), milliseconds_of("0.002 s")
        (2.0, 2.0)
    """
    return _read(text, _MILLISECONDS, "latency", "2ms")


def seconds_of(text: str) -> float:
    """Read a time limit: s, m (or min), h or d, or several of them, the largest first.

    Returns:
        Seconds.

    Raises:
        ValueError: it is no time; the message shows how one is written.

    Example:
        >>> seconds_of("2h"), seconds_of("1h30m")
        (7200.0, 5400.0)
    """
    parts = list(_ONE.finditer(text))
    if len(parts) < 2 or "".join(part[0] for part in parts) != text:
        return _read(text, _SECONDS, "time", "2h")
    total, last = 0.0, math.inf
    for part in parts:
        unit = _SECONDS.get(part[2].lower(), 0.0)
        if not 0 < unit < last:
            raise _refused(text, _SECONDS, "time", "1h30m")
        total, last = total + _read(part[0], _SECONDS, "time", "1h30m"), unit
    return total


def _read(text: str, units: Mapping[str, float], what: str, example: str) -> float:
    """Read one number with one unit."""
    match = _ONE.fullmatch(text)
    by_name = {name.lower(): factor for name, factor in units.items()}
    if match is None or match[2].lower() not in by_name:
        raise _refused(text, units, what, example)
    value = float(match[1]) * by_name[match[2].lower()]
    if not 0 < value < math.inf:
        raise ValueError(f"the {what} {text!r} has to be above 0 and finite, like {example}")
    return value


def _refused(text: str, units: Mapping[str, float], what: str, example: str) -> ValueError:
    return ValueError(f"{text!r} is no {what}; write a number and a unit ({', '.join(units)}), like {example}")
