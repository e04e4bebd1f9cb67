"""Losses against the ground truth. The second argument holds labels in the place of a teacher's tensor.

Shape legend: B examples, L positions, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss
from limbeck.types import IGNORE_INDEX


def known_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class indices that can be looked up in the last dimension of `logits`, and where they count.

    Args:
        logits: (..., C).
        labels: Class indices (...,), -100 where there is none.

    Returns:
        The indices, 0 in the place of -100, and True where there is a label; both (...,).

    Raises:
        ValueError: the shapes do not belong together, or a label is outside the classes. (An accelerator is not
            asked for the latter, since it would have to wait; it fails by itself when it looks the label up.)
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; "
            "there must be one class index per position"
        )
    counts = labels != IGNORE_INDEX
    index = torch.where(counts, labels, torch.zeros_like(labels)).long()
    if labels.device.type == "cpu":
        outside = index[(index < 0) | (index >= logits.shape[-1])]
        if outside.numel():
            raise ValueError(f"label {outside[0].item()} lies outside the {logits.shape[-1]} classes")
    return index, counts


def at_label(values: Tensor, index: Tensor) -> Tensor:
    """The value of each position's class: (..., C) and (...,) to (...,)."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def finite(values: Tensor) -> bool:
    """Whether nothing is infinite or NaN, so that steps against those can be left out.

    An accelerator is not asked, since it would have to wait, and neither is a compiler: there the answer is no.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(values.detach().sum().isfinite())  # where a sum overflows, the steps are merely taken


def zero_unless(counts: Tensor, values: Tensor) -> Tensor:
    """Values where they count, 0 elsewhere."""
    return torch.where(counts, values, torch.zeros_like(values))


def _checked_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is a share from 0 to 1, got {label_smoothing}")


@loss
def cross_entropy(student: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy of the student against class indices.

    .. math:: -(1 - \varepsilon) \log q_y - \tfrac{\varepsilon}{C} \sum_c \log q_c

    Args:
        student: Logits (B, C) or (B, L, C). A class at minus infinity is not there: C does not count it.
        labels: Class indices (B,) or (B, L); a position with label -100 gives 0.
        label_smoothing: ε, the share of the target spread evenly over all classes.

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
    index, counts = known_labels(student, labels)
    log_q = torch.log_softmax(full_precision(student), dim=-1)
    values = -at_label(log_q, index)
    if label_smoothing:
        spread = -log_q.mean(dim=-1) if finite(log_q) else -_mean_of_possible(log_q, student)
        values = (1 - label_smoothing) * values + label_smoothing * spread
    return zero_unless(counts, values)


def _mean_of_possible(log_q: Tensor, logits: Tensor) -> Tensor:
    there = ~logits.isneginf()
    return zero_unless(there, log_q).sum(dim=-1) / there.sum(dim=-1)


@loss
def binary_cross_entropy(
    student: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    r"""Cross-entropy of each class on its own, where an example may belong to several (multi-label).

    .. math:: -\tfrac{1}{C} \sum_c \bigl( y_c \log \sigma(z_c) + (1 - y_c) \log \sigma(-z_c) \bigr)

    Args:
        student: Logits (..., C).
        labels: 0 or 1, or a probability between, for each class (..., C); an entry of -100 is not known and
            does not count. A position without any known entry gives 0.
        label_smoothing: ε; the target is y (1 - ε) + ε / 2.
        reduction: ``"mean"`` or ``"sum"`` over the known classes of a position.

    Returns:
        One value in nats per position, (...).

    Raises:
        ValueError: the shapes differ, a label is no probability, ε is outside [0, 1], or another reduction.

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
    student, known = full_precision(student), labels != IGNORE_INDEX
    target = torch.where(known, labels.detach(), torch.zeros_like(labels)).to(student.dtype)
    if target.device.type == "cpu" and ((target < 0) | (target > 1)).any():
        raise ValueError("binary_cross_entropy takes labels from 0 to 1, and -100 for what is not known")
    target = target * (1 - label_smoothing) + label_smoothing / 2
    if finite(student):
        return over_classes(
            F.binary_cross_entropy_with_logits(student, target, reduction="none"), known, reduction
        )
    yes, no = F.logsigmoid(student), F.logsigmoid(-student)
    yes, no = zero_unless(target != 0, yes), zero_unless(target != 1, no)  # 0 · log 0 is 0
    return over_classes(-(target * yes + (1 - target) * no), known, reduction)


def over_classes(values: Tensor, there: Tensor, reduction: str) -> Tensor:
    """Average or add up over the last dimension those values that are there; 0 where none is.

    Raises:
        ValueError: a reduction other than ``"mean"`` and ``"sum"``.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r} over the classes; known: mean, sum")
    total = zero_unless(there, values).sum(dim=-1)
    return total if reduction == "sum" else total / there.sum(dim=-1).clamp(min=1)


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
