"""The only place that reduces: from one value per position to one number.

Shape legend: B examples, L positions (tokens), ``...`` whatever else a loss keeps.

A mean over a micro-batch depends on how the batch was cut. A sum divided by the number of valid positions of
the *whole* step does not; that is why `masked_mean` takes the count from outside when there is one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def per_position(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average over all that stands behind the positions of `mask`: (B, L, ...) to (B, L), (B, ...) to (B,).

    Args:
        values: What a loss returned, (B, ...).
        mask: (B, L) or (B,), or None where every example counts as one position.

    Raises:
        ValueError: the shape of `mask` is not the beginning of the shape of `values`.
    """
    kept = 1 if mask is None else mask.ndim
    if mask is not None and values.shape[:kept] != mask.shape:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(values.shape)}; "
            "it must match their first dimensions"
        )
    return values if values.ndim == kept else values.flatten(kept).mean(dim=-1)


def fitting(mask: Tensor | None, values: Tensor) -> Tensor | None:
    """The mask, or None where a loss gives one value for each example, or one for all, and used the mask inside.

    Raises:
        ValueError: the mask is of another batch or another length.

    Example:
        >>> fitting(torch.ones(2, 5), torch.zeros(2)) is None
        True
    """
    if mask is None or values.ndim == 0 or (values.ndim < mask.ndim and values.shape == mask.shape[: values.ndim]):
        return None
    if values.shape[: mask.ndim] != mask.shape:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(values.shape)}; "
            "it must match their first dimensions"
        )
    return mask


def blank(tensor: Tensor, mask: Tensor) -> Tensor:
    """Put zeros at masked positions, so that not even a NaN there gets into a gradient.

    Args:
        tensor: (B, L, ...).
        mask: (B, L), True where a position counts.
    """
    if mask.device.type == "cpu" and bool(mask.all()):  # a question that would make a GPU wait
        return tensor
    behind = mask.view(*mask.shape, *[1] * (tensor.ndim - mask.ndim))
    return torch.where(behind, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def masked_mean(values: Tensor, mask: Tensor | None = None, count: Tensor | float | None = None) -> Tensor:
    """Average a loss over the valid positions, in float32 or better.

    Args:
        values: One value per position, (B,), (B, L) or with more dimensions behind, or a scalar that
            describes the batch as a whole (it counts once per example).
        mask: (B,) or (B, L); positions where it is 0 do not count and give no gradient.
        count: The number of valid positions to divide by, when the batch is a part of a larger step; by
            default the number in this batch. A batch without any valid position gives 0.

    Returns:
        A scalar.

    Example:
        >>> values = torch.tensor([[1.0, 3.0], [5.0, float("inf")]])
        >>> masked_mean(values, torch.tensor([[1, 1], [1, 0]])).item()
        3.0
    """
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if values.ndim == 0:
        return values
    values = per_position(values, mask)
    if mask is None:
        return values.mean() if count is None else values.sum() / count
    valid = mask != 0
    total = torch.where(valid, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()
    count = valid.sum() if count is None else count
    count = torch.as_tensor(count, device=values.device)
    return total / torch.where(count > 0, count, torch.ones_like(count))


def reduce(
    values: Tensor, mask: Tensor | None = None, reduction: Literal["mean", "batchmean", "sum"] = "mean"
) -> Tensor:
    """Reduce what a loss returned in one of the usual ways.

    Args:
        values: (B,), (B, L) or with more dimensions behind; a scalar is returned as it is.
        mask: (B,) or (B, L); positions where it is 0 do not count.
        reduction: ``"mean"`` over valid positions, the ``"sum"`` over them, or ``"batchmean"``: that sum divided
            by the number of examples.

    Raises:
        ValueError: another reduction.

    Example:
        >>> values = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
        >>> mask = torch.tensor([[1, 1], [1, 0]])
        >>> [reduce(values, mask, how).item() for how in ("mean", "batchmean", "sum")]
        [3.0, 4.5, 9.0]
    """
    if reduction not in ("mean", "batchmean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; known: mean, batchmean, sum")
    if values.ndim == 0:
        return values
    mean = masked_mean(values, mask)
    if reduction == "mean":
        return mean
    behind = 1 if mask is None else values[(0,) * mask.ndim].numel()
    positions = values.numel() if mask is None else (mask != 0).sum() * behind
    total = mean * positions
    return total / values.shape[0] if reduction == "batchmean" else total
