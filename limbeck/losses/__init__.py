"""The losses, by name: ``LOSSES.get("forward_kl")`` or ``from limbeck.losses import forward_kl``.

A new one is a decorated function in its family's file and is listed nowhere else.
"""

from __future__ import annotations

from typing import Any

from limbeck.losses.base import FAMILIES, LOSSES, SUPPLIED, Loss, full_precision, loss, same_shape, traits_of
from limbeck.losses.call import Comparison, compare_by, evaluate

__all__ = [
    "FAMILIES",
    "LOSSES",
    "SUPPLIED",
    "Comparison",
    "Loss",
    "compare_by",
    "evaluate",
    "full_precision",
    "loss",
    "same_shape",
    "traits_of",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name in FAMILIES or name not in set(LOSSES):
        raise AttributeError(f"module 'limbeck.losses' has no attribute {name!r}")
    return LOSSES.get(name)
