"""Losses against the ground truth. The second argument holds labels in the place of a teacher's tensor.

Shape legend: B examples, L positions, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss
from limbeck.types import IGNORE_INDEX


@loss
def cross_entropy(student: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy of the student against class indices.

    .. math:: -\log q_y

    Args:
        student: Logits (B, C) or (B, L, C).
        labels: Class indices (B,) or (B, L); a position with label -100 gives 0.
        label_smoothing: Share of the target spread evenly over all classes.

    Returns:
        One value in nats per position, (B,) or (B, L).

    Raises:
        ValueError: the shapes do not belong together, or a label is outside the classes.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item()  # doctest: +ELLIPSIS
        1.386...

    Reference:
        Szegedy et al. 2016, arXiv:1512.00567 (smoothing).
    """
    if student.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(student.shape)}; "
            "cross_entropy takes one class index per position"
        )
    try:
        values = F.cross_entropy(
            full_precision(student).reshape(-1, student.shape[-1]),
            labels.reshape(-1).long(),
            ignore_index=IGNORE_INDEX,
            label_smoothing=label_smoothing,
            reduction="none",
        )
    except IndexError:
        wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= student.shape[-1]))]
        raise ValueError(f"label {wrong[0].item()} lies outside the {student.shape[-1]} classes") from None
    return values.view(labels.shape)


@loss
def label_mse(student: Tensor, labels: Tensor) -> Tensor:
    r"""Squared difference between the student's prediction and a number to predict.

    .. math:: (z - y)^2

    Args:
        student: Predictions (B, 1), or the shape of `labels`.
        labels: Targets (B,), or any shape.

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
    return F.mse_loss(student, labels.detach().to(student.dtype), reduction="none")
