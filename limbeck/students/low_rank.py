"""Fewer hidden dimensions by rotation: the directions in which a model's weights are largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.students.axes import HIDDEN, Axes


@dataclass(frozen=True)
class HiddenBasis:
    r"""Directions of the hidden space, and how weights are written in them.

    .. math:: P = \arg\min_{P^T P = 1} \sum_W \lVert W - W P P^T \rVert^2 / \lVert W \rVert^2

    over all matrices that read or write the hidden state. A norm's gains become those of the directions, times the
    root of the old size over the new one, since the same vector has a larger mean square in fewer dimensions.

    Attributes:
        axes: Of the model.
        directions: P, (hidden size, new hidden size), orthonormal columns.
        fresh: A new model's weights, which tell norms whose gain is their weight from those (Gemma's) that add 1.
    """

    axes: Axes
    directions: Tensor
    fresh: Mapping[str, Tensor]

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A weight with its hidden dimensions written in the new directions; others as they are."""
        slots = [slot for slot in self.axes.slots[name] if slot.axis == HIDDEN]
        if not slots:
            return tensor
        basis = self.directions.to(tensor.device)
        if tensor.ndim == 1 and name.endswith(".weight"):
            return self._gains(tensor.double(), 1.0 - float(self.fresh[name].mean())).to(tensor.dtype)
        result = tensor.double()
        for slot in slots:
            result = (result.movedim(slot.dim, -1) @ basis).movedim(-1, slot.dim)
        return result.to(tensor.dtype).contiguous()

    def _gains(self, weight: Tensor, offset: float) -> Tensor:
        squares = self.directions.to(weight.device).square()
        old, new = squares.shape
        return float((old / new) ** 0.5) * ((weight + offset) @ squares) - offset


def hidden_basis(state: Mapping[str, Tensor], axes: Axes, size: int, fresh: Mapping[str, Tensor]) -> HiddenBasis:
    """Find the best directions; see `HiddenBasis`.

    Args:
        state: The model's weights.
        axes: Of the model.
        size: How many directions there shall be.
        fresh: The weights of a new model.
    """
    count = axes.sizes[HIDDEN]
    squares = torch.zeros(count, count, dtype=torch.float64)
    for name, slots in axes.slots.items():
        for slot in slots:
            if slot.axis == HIDDEN and state[name].ndim > 1:
                rows = state[name].detach().double().movedim(slot.dim, 0).flatten(1)
                size_of_all = rows.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)
                squares += (rows @ rows.T / size_of_all).cpu()
    return HiddenBasis(axes, torch.linalg.eigh(squares).eigenvectors[:, -size:].flip(1), fresh)
