"""Arguments whose mistakes are told with the nearest name."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

from limbeck.registry import refuse_unknown

Class = TypeVar("Class")


def arguments(cls: type[Class]) -> type[Class]:
    """Let a dataclass refuse a name that it does not know, and propose the nearest one.

    Example:
        >>> @arguments
        ... @dataclasses.dataclass
        ... class Sizes:
        ...     width: int = 1
        >>> Sizes(wdth=3)
        Traceback (most recent call last):
        TypeError: Sizes has no option 'wdth'; did you mean 'width'?
    """
    made: Any = cls
    plain, known = made.__init__, [field.name for field in dataclasses.fields(made)]

    @functools.wraps(plain)
    def checked(self: Any, *values: Any, **named: Any) -> None:
        refuse_unknown(named, known, cls.__name__)
        plain(self, *values, **named)

    made.__init__ = checked
    return cls
