"""Losses between scores of several candidates, or of several labels at once.

Shape legend: B examples, L positions, N candidates, C classes; ``(..., C)`` stands for (B, C) or (B, L, C).
``p`` is the teacher's and ``q`` the student's distribution at temperature T.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss, same_shape
from limbeck.losses.distributions import check_temperature, softened, times_squared, weighted
from limbeck.losses.labels import finite, over_classes, zero_unless
from limbeck.losses.logits import forward_kl
from limbeck.losses.sparse import CONSTANT
from limbeck.types import TopK


def _check_candidates(student: Tensor) -> None:
    if student.shape[-1] < 2:
        raise ValueError(
            f"scores of shape {tuple(student.shape)} have one candidate, which cannot be ranked; "
            "put the candidates of a query side by side in the last dimension"
        )


@loss(sparse="it compares every candidate with the first one, which is not always among the kept")
def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference of the margins between the first candidate and each of the others.

    .. math:: \tfrac{1}{N - 1} \sum_{j = 2}^N \bigl( (s_1 - s_j) - (t_1 - t_j) \bigr)^2

    Args:
        student: Scores (..., N) of a query's candidates, the positive one first; N = 2 for one negative.
        teacher: Scores (..., N). A candidate at minus infinity on both sides is not there.

    Returns:
        One value per query, (...). Zero where the margins are equal.

    Raises:
        ValueError: the shapes differ, or there is one candidate alone.

    Example:
        >>> margin_mse(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[9.0, 8.0, 5.0]]))
        tensor([1.])

    Reference:
        Hofstätter et al. 2020, Improving Efficient Neural Ranking Models, arXiv:2010.02666. Where
        sentence-transformers is given margins for labels, the teacher's scores are ``[margin, 0]``.
    """
    same_shape(student, teacher)
    _check_candidates(student)
    there = ~(student.isneginf() & teacher.isneginf())
    pair = full_precision(student), full_precision(teacher.detach())
    off = torch.sub(*(zero_unless(there, side) for side in pair))
    return over_classes((off[..., :1] - off[..., 1:]).square(), there[..., 1:] & there[..., :1], "mean")


@loss(sparse=True)
def listwise_kl(student: Tensor, teacher: Tensor | TopK, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Forward KL between the two distributions over the candidates of a query.

    .. math:: T^2 \sum_j p_j (\log p_j - \log q_j), \quad p = softmax(t / T), \; q = softmax(s / T)

    Args:
        student: Scores (..., N) of a query's candidates, in any order.
        teacher: Scores (..., N). A candidate at minus infinity on both sides is not there.
        temperature: T, softens both distributions; T² keeps the gradient's size, as in `forward_kl`.

    Returns:
        One value in nats (times T²) per query, (...). Zero where the scores differ by a constant.

    Raises:
        ValueError: the shapes differ, there is one candidate alone, or the temperature is not positive.

    Example:
        >>> listwise_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])).item()  # doctest: +ELLIPSIS
        0.327...

    Reference:
        Lin et al. 2020, Distilling Dense Representations for Ranking, arXiv:2010.11386; DistillKLDivLoss of
        sentence-transformers.
    """
    _check_candidates(student)
    return forward_kl(student, teacher, temperature=temperature)


@loss(sparse=CONSTANT)
def binary_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    classes: Literal["sum", "mean"] = "sum",
) -> Tensor:
    r"""Forward KL of each class on its own, where an example may belong to several (multi-label).

    .. math:: T^2 \sum_c KL(\sigma(t_c / T), \sigma(-t_c / T) \Vert \sigma(s_c / T), \sigma(-s_c / T))

    Args:
        student: Logits (..., C), of a sigmoid each.
        teacher: Logits (..., C). A class at minus infinity on both sides is not there.
        temperature: T, softens both sides; T² keeps the gradient's size, as in `forward_kl`.
        classes: ``"sum"`` over the classes, which is the divergence of all together, or ``"mean"``.

    Returns:
        One value in nats (times T²) per position, (...). Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, the temperature is not positive, or another word for `classes`.

    Example:
        >>> binary_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])).item()  # doctest: +ELLIPSIS
        0.327...

    Reference:
        Yang et al. 2023, Multi-Label Knowledge Distillation, arXiv:2308.06453 (one divergence per label).
    """
    same_shape(student, teacher)
    check_temperature(temperature, student)
    there = None if finite(student) else ~(student.isneginf() & teacher.isneginf())
    ours, theirs = softened(student, temperature), softened(teacher.detach(), temperature)
    values = _outcome(ours, theirs) + _outcome(-ours, -theirs)
    return times_squared(over_classes(values, there, classes), temperature)


def _outcome(student: Tensor, teacher: Tensor) -> Tensor:
    """The share of one of two outcomes in their divergence, from the logits of that outcome."""
    return weighted(teacher.sigmoid(), F.logsigmoid(teacher) - F.logsigmoid(student))
