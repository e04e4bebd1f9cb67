"""What may be tried for one value of a recipe: ``loguniform(1, 20)``, ``int(2, 6)``, ``choice([1, 3], [2])``."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from limbeck.registry import nearest

RANGES = ("uniform", "loguniform", "int", "logint")
CHOICE = "choice"
WHOLE, LOGARITHMIC = ("int", "logint"), ("loguniform", "logint")
_WRITTEN = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)


@dataclass(frozen=True)
class Distribution:
    """What may be tried for one value.

    Attributes:
        kind: ``uniform``, ``loguniform``, ``int``, ``logint`` or ``choice``.
        low: The lower end, which may be tried; 0 of a choice.
        high: The upper end, likewise.
        choices: The values of a choice.

    Example:
        >>> Distribution.parse("loguniform(1, 20)").ends
        (1.0, 20.0)
        >>> Distribution.parse("choice([1, 3, 5], [2, 5])").ends
        ([1, 3, 5], [2, 5])
        >>> Distribution.parse("logunifrom(1, 20)")
        Traceback (most recent call last):
        ValueError: unknown distribution 'logunifrom'; did you mean 'loguniform' or 'uniform'?
    """

    kind: str
    low: float = 0
    high: float = 0
    choices: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, text: Any) -> Distribution:
        """Read a distribution as it is written in a recipe.

        Raises:
            ValueError: it cannot be read, or has nothing in it.
        """
        written = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
        if written is None:
            raise ValueError(
                f"{text!r} is no distribution; write uniform(0, 1), loguniform(1, 20), int(2, 6), logint(8, 64) "
                "or choice(...)"
            )
        kind, inner = written.groups()
        if kind not in (*RANGES, CHOICE):
            raise ValueError(f"unknown distribution {kind!r}; {nearest(kind, (*RANGES, CHOICE))}")
        try:
            values = [_number(value) for value in yaml.safe_load(f"[{inner}]")]
        except yaml.YAMLError:
            raise ValueError(f"what stands in {text!r} cannot be read; write values with commas between") from None
        return cls._choice(values, text) if kind == CHOICE else cls._range(kind, values, text)

    @classmethod
    def _choice(cls, values: list[Any], text: str) -> Distribution:
        written = [json.dumps(value, sort_keys=True) for value in values]
        if not values:
            raise ValueError(f"{text!r} has nothing to choose from; write at least one value")
        twice = next((each for each in written if written.count(each) > 1), None)
        if twice is not None:
            raise ValueError(f"{text!r} names {twice} twice; drop one")
        return cls(CHOICE, choices=tuple(values))

    @classmethod
    def _range(cls, kind: str, values: list[Any], text: str) -> Distribution:
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(values) != 2 or len(numbers) != 2 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{text!r} needs two numbers, the lowest and the highest, as in {kind}(2, 6)")
        low, high = numbers
        if low > high:
            raise ValueError(f"{text!r} begins at {low:g} above its end {high:g}; write {kind}({high:g}, {low:g})")
        if kind in WHOLE and (low != int(low) or high != int(high)):
            raise ValueError(f"{text!r} is of whole numbers; round its ends, or write uniform or loguniform")
        if kind in LOGARITHMIC and low <= 0:
            raise ValueError(f"{text!r} is logarithmic, and {low:g} is not above 0; begin above it")
        make = int if kind in WHOLE else float
        return cls(kind, make(low), make(high))

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values of a choice, or both ends of a range: what a recipe has to take."""
        return self.choices if self.kind == CHOICE else tuple(dict.fromkeys((self.low, self.high)))

    @property
    def count(self) -> int | None:
        """How many different values there are; None for as many as floating-point numbers."""
        if self.kind == CHOICE:
            return len(self.choices)
        if self.kind in WHOLE:
            return int(self.high - self.low) + 1
        return 1 if self.low == self.high else None

    def holds(self, value: Any) -> bool:
        """Whether a value may come of it.

        Example:
            >>> Distribution.parse("int(2, 6)").holds(3.0), Distribution.parse("uniform(0, 1)").holds(2)
            (True, False)
        """
        if self.kind == CHOICE:
            return _plain(value) in [_plain(choice) for choice in self.choices]
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and (self.kind not in WHOLE or value == int(value))

    def __str__(self) -> str:
        values = self.choices if self.kind == CHOICE else (self.low, self.high)
        return f"{self.kind}({', '.join(json.dumps(value) for value in values)})"


def _number(value: Any) -> Any:
    """YAML takes 1e-5 for text, which lacks a decimal point."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _plain(value: Any) -> Any:
    """A value as JSON has it, to compare."""
    return json.loads(json.dumps(value))
