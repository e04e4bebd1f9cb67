"""The shapes in which data travels between a student, a teacher and the terms between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Batch = Mapping[str, Any]
"""One batch by name: the model's inputs, ``labels``, ``example_id``."""

LABELS = "labels"
EXAMPLE_ID = "example_id"
INPUTS = "inputs"
"""The key under which positional inputs of a plain module stand in a batch, as a tuple."""

IGNORE_INDEX = -100
"""The label of a position that does not count, as in PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Signal:
    """What was read from one model for one batch, by tap.

    Example:
        >>> import torch
        >>> Signal({"logits": torch.zeros(2, 3)})["logits"].shape
        torch.Size([2, 3])
    """

    values: Mapping[str, Tensor]

    def __getitem__(self, tap: str) -> Tensor:
        return self.values[tap]


@dataclass(frozen=True)
class Output:
    """What a Distiller returns in training mode.

    Attributes:
        loss: The weighted sum of the terms, a scalar to call ``backward`` on.
        logits: The student's logits, or None where the student has none.
        terms: The unweighted value of each term by name, detached scalars.
        weights: What each term was multiplied by, schedules and balance included.
        gradients: Dot products of the unweighted terms' gradients in the student, (terms, terms), where they were
            measured.

    Example:
        >>> import torch
        >>> out = Output(torch.tensor(1.5), None, {"kd": torch.tensor(3.0)})
        >>> float(out["loss"]), float(out.terms["kd"])
        (1.5, 3.0)
    """

    loss: Tensor
    logits: Tensor | None
    terms: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    gradients: Tensor | None = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)
