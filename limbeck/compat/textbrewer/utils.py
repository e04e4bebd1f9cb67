"""TextBrewer's helpers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from limbeck.report.parameters import Part, parameter_tree


def display_parameters(model: nn.Module | Mapping[str, Tensor], max_level: int | None = None) -> tuple[str, Part]:
    """Count the parameters of a model or a state dict: a table to print, and the tree behind it.

    Example:
        >>> display_parameters(nn.Linear(2, 3))[1].count
        9
    """
    tree = parameter_tree(model)
    return tree.table(max_level), tree


def cycle(iterable: Iterable[Any]) -> Iterator[Any]:
    """Read something that can be read again over and over."""
    while True:
        yield from iterable
