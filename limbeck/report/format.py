"""How numbers and names are written, in one place for the page, the model card and the terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that report.py may import this module
    from limbeck.report.report import Interval

NOTHING = "–"
LARGEST_FRACTION = 1.0
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
UNBOUNDED = ("loss", "mse", "mae", "perplexity", "entropy", "brier")


@dataclass(frozen=True)
class Scale:
    """How the values of one metric are written: in points (100 times the value), or as they are.

    Attributes:
        factor: What a value is multiplied with: 100 for points, else 1.
        decimals: Number of decimals.

    Example:
        >>> Scale(100, 1).write(0.8342), Scale(100, 1).signed(0.012), Scale(1, 3).write(0.8342)
        ('83.4', '+1.2', '0.834')
    """

    factor: float
    decimals: int

    def write(self, value: float) -> str:
        """Write a value."""
        return f"{self.factor * value:.{self.decimals}f}"

    def signed(self, value: float) -> str:
        """Write a difference, always with its sign."""
        return f"{self.factor * value:+.{self.decimals}f}"

    def ends(self, interval: Interval) -> str:
        """Write the two ends of an interval."""
        return f"[{self.write(interval.low)}, {self.write(interval.high)}]"

    def signed_ends(self, interval: Interval) -> str:
        """Write the two ends of the interval of a difference."""
        return f"[{self.signed(interval.low)}, {self.signed(interval.high)}]"

    @property
    def unit(self) -> str:
        """``" points"`` or nothing, to stand behind a difference."""
        return " points" if self.in_points else ""

    @property
    def in_points(self) -> bool:
        """Whether values are written as points."""
        return self.factor != 1


POINTS = Scale(100, 1)
RATIO = Scale(1, 2)


def scale_for(name: str, values: Iterable[float], *, higher_is_better: bool = True) -> Scale:
    """Choose how a metric is written: points for shares and correlations, four digits for all else.

    A report does not say what a metric's range is, so it is judged by the values, the direction and the name: a
    mean squared error of 0.3 is no "30 points".

    Example:
        >>> scale_for("accuracy", [0.8, 0.9]).write(0.8342), scale_for("perplexity", [25.3]).write(25.312)
        ('83.4', '25.31')
    """
    sizes = [abs(v) for v in values if math.isfinite(v)]
    largest = max(sizes, default=0.0)
    bounded = higher_is_better and not any(word in name.lower() for word in UNBOUNDED)
    return POINTS if bounded and largest <= LARGEST_FRACTION else Scale(1, _decimals(largest, 4))


def share(value: float) -> str:
    """Write a share as per cent.

    Example:
        >>> share(0.9717)
        '97.2%'
    """
    return f"{100 * value:.1f}%"


def share_ends(interval: Interval) -> str:
    """Write the ends of an interval of a share."""
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def times(value: float) -> str:
    """Write a factor.

    Example:
        >>> times(2.13), times(0.609), times(14.2)
        ('2.1×', '0.61×', '14×')
    """
    return f"{value:.{max(0, _decimals(value, 2))}f}×"


def measure(value: float) -> str:
    """Write a measured quantity with three digits.

    Example:
        >>> measure(12.345), measure(0.05342), measure(1234.5)
        ('12.3', '0.0534', '1,234')
    """
    return f"{value:,.{_decimals(value, 3)}f}"


def measure_ends(interval: Interval) -> str:
    """Write the quartiles of a measured quantity, with as many decimals as its median has."""
    decimals = _decimals(interval.value, 3)
    return f"[{interval.low:,.{decimals}f}, {interval.high:,.{decimals}f}]"


def parameters(count: int) -> str:
    """Write a number of parameters.

    Example:
        >>> parameters(22_713_216), parameters(85_400), parameters(640), parameters(1_300_000_000)
        ('22.7 M', '85.4 k', '640', '1.3 B')
    """
    for step, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= step:
            return f"{count / step:.1f} {letter}"
    return f"{count}"


def size(count: int) -> str:
    """Write a number of bytes, in megabytes of 10^6 and only below a tenth of one in less.

    Example:
        >>> size(267_832_560), size(2_600)
        ('267.8 MB', '2.6 kB')
    """
    if count >= 1e5:
        return f"{count / 1e6:,.1f} MB"
    return f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count} bytes"


def duration(seconds: float) -> str:
    """Write a time.

    Example:
        >>> duration(192), duration(7.31), duration(59.97), duration(7530), duration(3599.6)
        ('3 min 12 s', '7.3 s', '1 min 0 s', '2 h 6 min', '1 h 0 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def clean(text: str) -> str:
    r"""Take out control characters, lone surrogates and marks that reverse the numbers after them.

    Example:
        >>> clean("a\x1b[31mb\n")
        'a�[31mb\n'
    """
    return "".join("�" if _unprintable(c) else c for c in text)


def one_line(text: str) -> str:
    r"""Clean a text and put it on one line.

    Example:
        >>> one_line(" two\n lines ")
        'two lines'
    """
    return " ".join(clean(text).split())


def shorten(text: str, length: int) -> str:
    """Cut a text in its middle; the ends of a module path say more than what lies between.

    Example:
        >>> shorten("distilbert.transformer.layer.0", 16)
        'distilb….layer.0'
    """
    text = one_line(text)
    if len(text) <= length:
        return text
    tail = length // 2
    return f"{text[: length - tail - 1]}…{text[-tail:]}"


def _decimals(value: float, digits: int) -> int:
    """How many decimals show so many digits."""
    if value == 0 or not math.isfinite(value):
        return digits - 1
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def _unprintable(character: str) -> bool:
    """Whether a character has no place in a text: XML forbids it, terminals obey it, or it turns what follows."""
    if character in "\n\t":
        return False
    turns = unicodedata.bidirectional(character) in _TURNS
    return turns or unicodedata.category(character) in ("Cc", "Cs") or character in "\ufffe\uffff"
