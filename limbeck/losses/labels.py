"""Losses against the ground truth. The second argument holds labels in the place of a teacher's tensor.

Shape legend: B examples, L positions, C classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss
from limbeck.types import IGNORE_INDEX


def cross_entropy_at(logits: Tensor, index: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each position, in float32 or better: (..., C) and (...,) to (...,)."""
    rows = full_precision(logits)
    if index.ndim > 1:
        return cross_entropy_at(rows.flatten(end_dim=-2), index.flatten(), label_smoothing).view(index.shape)
    return F.cross_entropy(rows, index, reduction="none", label_smoothing=label_smoothing)


def may_ask(values: Tensor) -> bool:
    """Whether a step may depend on values: an accelerator would have to wait, a compiler does not know them."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def all_within(values: Tensor, lowest: float, highest: float) -> bool:
    """Whether all values are known to lie between two numbers; False where that must not be asked."""
    if not may_ask(values) or not values.numel():
        return False
    least, most = values.detach().aminmax()
    return bool(least >= lowest) and bool(most <= highest)


def known_labels(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor | None]:
    """Class indices that can be looked up in the last dimension of `logits`, and where they count.

    Args:
        logits: (..., C).
        labels: Class indices (...,).
        ignore_index: The label of a position that has none.

    Returns:
        The indices, 0 where there is none, and True where there is a label, both (...,); None for the latter
        where every position is known to have one.

    Raises:
        ValueError: the shapes do not belong together, the labels are no indices, or one is outside the classes.
            (Of the last an accelerator is not asked, since it would have to wait; it fails when it looks it up.)
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; "
            "there must be one class index per position"
        )
    if labels.is_floating_point():
        raise ValueError(f"labels are class indices, whole numbers, and these are {labels.dtype}; convert them")
    if not 0 <= ignore_index < logits.shape[-1] and all_within(labels, 0, logits.shape[-1] - 1):
        return labels.long(), None
    counts = labels != ignore_index
    index = torch.where(counts, labels, torch.zeros_like(labels)).long()
    if labels.device.type == "cpu":
        outside = index[(index < 0) | (index >= logits.shape[-1])]
        if outside.numel():
            raise ValueError(
                f"label {outside[0].item()} lies outside the {logits.shape[-1]} classes; "
                f"mark what has none with {ignore_index}"
            )
    return index, counts


def at_label(values: Tensor, index: Tensor) -> Tensor:
    """The value of each position's class: (..., C) and (...,) to (...,)."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def finite(values: Tensor) -> bool:
    """Whether nothing is infinite or NaN, so that steps against those can be left out.

    Where that must not be asked, the answer is no.
    """
    return may_ask(values) and math.isfinite(values.detach().sum())  # where a sum overflows, the steps are taken


def zero_unless(counts: Tensor | None, values: Tensor) -> Tensor:
    """Values where they count, 0 elsewhere; None where all count."""
    return values if counts is None else torch.where(counts, values, torch.zeros_like(values))


def _checked_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is a share from 0 to 1, got {label_smoothing}")


@loss
def cross_entropy(
    student: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    r"""Cross-entropy of the student against class indices.

    .. math:: -(1 - \varepsilon) \log q_y - \tfrac{\varepsilon}{C} \sum_c \log q_c

    Args:
        student: Logits (B, C) or (B, L, C). A class at minus infinity is not there: C does not count it.
        labels: Class indices (B,) or (B, L).
        label_smoothing: ε, the share of the target spread evenly over all classes.
        ignore_index: The label of a position that has none; it gives 0.

    Returns:
        One value in nats per position, (B,) or (B, L).

    Raises:
        ValueError: the shapes do not belong together, a label is outside the classes, or ε outside [0, 1].

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item()  # doctest: +ELLIPSIS
        1.386...

    Reference:
        Szegedy et al. 2016, arXiv:1512.00567 (smoothing). PyTorch's is infinite where a class is at minus
        infinity and ε is not 0.
    """
    _checked_smoothing(label_smoothing)
    index, counts = known_labels(student, labels, ignore_index)
    if not label_smoothing or finite(student):
        return zero_unless(counts, cross_entropy_at(student, index, label_smoothing))
    log_q, there = torch.log_softmax(full_precision(student), dim=-1), ~student.isneginf()
    spread = zero_unless(there, log_q).sum(dim=-1) / there.sum(dim=-1)
    values = (1 - label_smoothing) * at_label(log_q, index) + label_smoothing * spread
    return zero_unless(counts, -values)


@loss
def binary_cross_entropy(
    student: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    classes: Literal["mean", "sum"] = "mean",
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    r"""Cross-entropy of each class on its own, where an example may belong to several (multi-label).

    .. math:: -\tfrac{1}{C} \sum_c \bigl( y_c \log \sigma(z_c) + (1 - y_c) \log \sigma(-z_c) \bigr)

    Args:
        student: Logits (..., C).
        labels: 0 or 1, or a probability between, for each class (..., C). A position without any known entry
            gives 0.
        label_smoothing: ε; the target is y (1 - ε) + ε / 2.
        classes: ``"mean"`` or ``"sum"`` over the known classes of a position.
        ignore_index: An entry of `labels` that is not known and does not count.

    Returns:
        One value in nats per position, (...).

    Raises:
        ValueError: the shapes differ, a label is no probability, ε is outside [0, 1], or `classes` is another.

    Example:
        >>> import torch
        >>> binary_cross_entropy(torch.zeros(1, 3), torch.tensor([[1, 0, -100]])).item()  # doctest: +ELLIPSIS
        0.693...

    Reference:
        The multi-label loss of PyTorch (``BCEWithLogitsLoss``) with its mean taken over classes first; smoothing
        after Szegedy et al. 2016, arXiv:1512.00567, over the two outcomes.
    """
    _checked_smoothing(label_smoothing)
    if student.shape != labels.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(student.shape)}; "
            "binary_cross_entropy takes a 0 or 1 for each class"
        )
    student, (target, known) = full_precision(student), _known_targets(labels.detach(), ignore_index)
    target = target.to(student.dtype)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / 2
    if finite(student):
        return over_classes(F.binary_cross_entropy_with_logits(student, target, reduction="none"), known, classes)
    yes, no = F.logsigmoid(student), F.logsigmoid(-student)
    yes, no = zero_unless(target != 0, yes), zero_unless(target != 1, no)  # 0 · log 0 is 0
    return over_classes(-(target * yes + (1 - target) * no), known, classes)


def _known_targets(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Labels from 0 to 1 with 0 where they are not known, and where they are; None where all are known."""
    if not 0 <= ignore_index <= 1 and all_within(labels, 0, 1):
        return labels, None
    known = labels != ignore_index
    target = zero_unless(known, labels)
    if target.device.type == "cpu" and ((target < 0) | (target > 1)).any():
        raise ValueError(
            f"binary_cross_entropy takes labels from 0 to 1, and {ignore_index} for what is not known"
        )
    return target, known


def over_classes(values: Tensor, there: Tensor | None, classes: str) -> Tensor:
    """Average or add up over the last dimension those values that are there; 0 where none is, None where all are.

    Raises:
        ValueError: another word than ``"mean"`` and ``"sum"``.
    """
    if classes not in ("mean", "sum"):
        raise ValueError(f"classes are taken by 'mean' or 'sum', got {classes!r}")
    total = zero_unless(there, values).sum(dim=-1)
    if there is None:
        return total if classes == "sum" else total / max(values.shape[-1], 1)
    return total if classes == "sum" else total / there.sum(dim=-1).clamp(min=1)


@loss
def label_mse(student: Tensor, labels: Tensor, *, ignore_index: float | None = None) -> Tensor:
    r"""Squared difference between the student's prediction and a number to predict.

    .. math:: (z - y)^2

    Args:
        student: Predictions (B, 1), or the shape of `labels`.
        labels: Targets (B,), or any shape.
        ignore_index: A target that is none, such as -100.0; it gives 0. By default every number is a target.

    Returns:
        One value per position, the shape of `labels`.

    Raises:
        ValueError: the numbers of predictions and labels differ.

    Example:
        >>> import torch
        >>> label_mse(torch.tensor([[3.0]]), torch.tensor([5.0]))
        tensor([4.])

    Reference:
        Gauss's least squares; the hard-label loss of regression tasks such as STS-B.
    """
    if student.shape not in (labels.shape, (*labels.shape, 1)):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit predictions of shape "
            f"{tuple(student.shape)}; label_mse takes one prediction per label"
        )
    student = full_precision(student).view(labels.shape)
    values = F.mse_loss(student, labels.detach().to(student.dtype), reduction="none")
    return values if ignore_index is None else zero_unless(labels != ignore_index, values)
