"""Losses between logits that look at how classes and examples of a batch go together.

Shape legend: B examples, L positions, C classes; ``(..., C)`` stands for (B, C) or (B, L, C).
``p`` is the teacher's and ``q`` the student's distribution at temperature T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.base import loss, refuse_sparse
from limbeck.losses.distributions import paired_probs, times_squared
from limbeck.losses.labels import finite, may_ask, over_classes, zero_unless
from limbeck.losses.sparse import COLUMNS


def _rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Positions in a row, (..., C) to (N, C), those that the mask leaves out at zero."""
    if mask is not None:
        values = zero_unless((mask != 0).unsqueeze(-1), values)
    return values.reshape(-1, values.shape[-1])


def _check_mask(student: Tensor, mask: Tensor | None) -> None:
    if mask is not None and mask.shape != student.shape[:-1]:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit logits of shape {tuple(student.shape)}; "
            "it must match all dimensions but the last"
        )


def _centred(values: Tensor, there: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Probabilities with mean 0 along a dimension; and whether they vary at all.

    Where all are small, the largest is divided out first, since their squares would vanish. What is not there is
    zero; None where all is.
    """
    values = values if there is None else zero_unless(there, values)
    largest = values.detach().amax(dim=dim, keepdim=True)
    eps = torch.finfo(values.dtype).eps
    smallest, size = torch.finfo(values.dtype).tiny / eps, largest
    if not (may_ask(values) and bool((largest >= eps).all())):
        values = values / torch.where(largest < smallest, torch.ones_like(largest), largest)
        size = torch.ones_like(largest)
    if there is None:
        centred = values - values.mean(dim=dim, keepdim=True)
    else:
        count = there.sum(dim=dim, keepdim=True).clamp(min=1)
        centred = zero_unless(there, values - values.sum(dim=dim, keepdim=True) / count)
    fixed = centred.detach()
    spread = torch.maximum(fixed.amax(dim=dim, keepdim=True), -fixed.amin(dim=dim, keepdim=True))
    flat = (largest < smallest) | (spread <= 8 * eps * size)  # the noise of a mean of equal numbers
    return centred, ~flat.squeeze(dim)


def _uncorrelated(student: Tensor, teacher: Tensor, there: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """One minus Pearson's correlation along a dimension, 0 where the teacher does not vary; and where it does."""
    (student, both), (teacher, varies) = _centred(student, there, dim), _centred(teacher, there, dim)
    both = both & varies
    squares = torch.stack([student.square().sum(dim=dim), teacher.square().sum(dim=dim)])
    scale = torch.where(both, squares, torch.ones_like(squares)).rsqrt().prod(dim=0)
    correlation = zero_unless(both, (student * teacher).sum(dim=dim) * scale)
    return zero_unless(varies, 1 - correlation), varies


def _there(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which classes of which positions take part, as rows; None where all do."""
    if mask is None and finite(student):  # a class that is excluded on both sides is so on this one
        return None
    there = ~(student.isneginf() & teacher.isneginf())
    return _rows(there if mask is None else there & (mask != 0).unsqueeze(-1), None)


@loss(sparse=COLUMNS)
def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    r"""One minus the correlation of probabilities: between the classes of an example, and within a class.

    .. math:: T^2 \Bigl( \beta \bigl(1 - \rho(q_{b \cdot}, p_{b \cdot})\bigr)
        + \tfrac{\gamma}{C} \sum_c \bigl(1 - \rho(q_{\cdot c}, p_{\cdot c})\bigr) \Bigr)

    ρ is Pearson's correlation. The second part belongs to the batch, and each position gets the same.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C). A class at minus infinity on both sides is not there.
        mask: (...,), 0 where a position does not count among the examples of a class.
        beta: β, weight of the relation between classes.
        gamma: γ, weight of the relation within a class.
        temperature: T, softens both distributions. A correlation does not scale with T, and becomes that of the
            logits as T grows: its gradient would keep its size without T², and grows like T² with it.

    Returns:
        One value in [0, 2 T² (β + γ)] per position, (...). Zero where teacher equals student. A relation in
        which the teacher does not vary, as in a batch of one, counts nothing.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> student, teacher = torch.eye(3), torch.eye(3).roll(1, 0)
        >>> dist(student, teacher)
        tensor([3., 3., 3.])

    Reference:
        Huang et al. 2022, Knowledge Distillation from a Stronger Teacher, arXiv:2205.10536 (β = γ = 1, weight 2,
        T = 1; CIFAR-100 T = 4). Its code adds 1e-8 to the product of the lengths, which mutes the classes whose
        probabilities are about 1e-4 and less in the whole batch.
    """
    refuse_sparse("the loss", COLUMNS, teacher)
    q, p = paired_probs(student, teacher, temperature)
    _check_mask(student, mask)
    there = _there(student, teacher, mask)
    q, p = _rows(q, mask), _rows(p, mask)
    between, _ = _uncorrelated(q, p, there, dim=1)
    within, varies = _uncorrelated(q, p, there, dim=0)
    values = beta * between + gamma * over_classes(within, varies, "mean")
    return times_squared(values.view(student.shape[:-1]), temperature)


@loss(sparse=COLUMNS)
def class_correlation(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Squared difference between the two matrices of how often classes are expected together.

    .. math:: \tfrac{1}{C} \lVert P^\top P - Q^\top Q \rVert_F^2

    P and Q hold one row of probabilities per position.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        mask: (...,), 0 where a position does not count.
        temperature: T, softens both distributions. There is no T², as in the authors' code: the gradient falls
            with T.

    Returns:
        A scalar that describes the batch: it grows with the square of the number of positions. Zero where
        teacher equals student.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> class_correlation(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])).item()  # doctest: +ELLIPSIS
        0.187...

    Reference:
        Jin et al. 2023, Multi-Level Logit Distillation, CVPR (class correlation; it sums the divergences at T of
        2 to 6 beside this).
    """
    q, p = _batch_of_probabilities(student, teacher, mask, temperature)
    classes = (~(student.isneginf() & teacher.isneginf())).flatten(end_dim=-2).any(dim=0).sum()
    return (p.T @ p - q.T @ q).square().sum() / classes


@loss(sparse=COLUMNS)
def batch_correlation(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Squared difference between the two matrices of how alike the predictions for two examples are.

    .. math:: \sum_j \bigl( (P P^\top)_{bj} - (Q Q^\top)_{bj} \bigr)^2

    P and Q hold one row of probabilities per position; j runs over the batch.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        mask: (...,), 0 where a position does not count.
        temperature: T, softens both distributions. There is no T², as in the authors' code: the gradient falls
            with T.

    Returns:
        One value per position, (...); it grows with their number. Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> batch_correlation(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])).item()  # doctest: +ELLIPSIS
        0.084...

    Reference:
        Jin et al. 2023, Multi-Level Logit Distillation, CVPR (batch correlation).
    """
    q, p = _batch_of_probabilities(student, teacher, mask, temperature)
    return (p @ p.T - q @ q.T).square().sum(dim=-1).view(student.shape[:-1])


def _batch_of_probabilities(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    refuse_sparse("the loss", COLUMNS, teacher)
    q, p = paired_probs(student, teacher, temperature)
    _check_mask(student, mask)
    return _rows(q, mask), _rows(p, mask)
