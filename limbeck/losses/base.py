"""What every loss is: a function ``(student, teacher, *, options) -> one value per position``.

A loss reduces over classes or features, never over positions: `limbeck.reduce` does that, with the right count.
Keyword-only parameters named in `SUPPLIED` are filled in by the Distiller when a loss asks for them; all others
are the user's options and are checked when a term is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from limbeck.registry import Registry
from limbeck.shapes import mismatch

SUPPLIED = frozenset({"mask", "labels"})
FAMILIES = ("logits", "features", "labels")


class Loss(Protocol):
    """A distance between a student's and a teacher's tensor, per position."""

    __name__: str

    def __call__(self, student: Tensor, teacher: Tensor, /, **options: object) -> Tensor:
        """Return one value per position; the leading dimensions of `student` are kept."""
        ...


F = TypeVar("F", bound=Callable[..., Tensor])


def _import_families() -> None:
    for family in FAMILIES:
        importlib.import_module(f"limbeck.losses.{family}")


LOSSES: Registry[Callable[..., Tensor]] = Registry("loss", load=_import_families)


def loss(function: F) -> F:
    """Register a loss under its function's name; used as a decorator.

    Example:
        >>> from limbeck.losses import LOSSES, loss
        >>> @loss
        ... def squared(student, teacher, *, scale: float = 1.0):
        ...     return scale * (student - teacher).square().mean(-1)
        >>> LOSSES.get("squared") is squared
        True
    """
    return LOSSES.register(function)


def full_precision(tensor: Tensor) -> Tensor:
    """Lift half precision to float32, where differences of log-probabilities keep their digits.

    Example:
        >>> full_precision(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse a pair that would broadcast.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> same_shape(torch.zeros(2, 3), torch.zeros(2, 5))
        Traceback (most recent call last):
        ValueError: student (2, 3) and teacher (2, 5) differ in shape; add project='linear'
    """
    if student.shape != teacher.shape:
        raise ValueError(mismatch(student.shape, teacher.shape))
