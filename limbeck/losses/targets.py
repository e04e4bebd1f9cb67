"""Losses between logits that also know the right class.

Shape legend: B examples, L positions, C classes; ``(..., C)`` stands for (B, C) or (B, L, C).
``p`` is the teacher's and ``q`` the student's distribution at temperature T, ``y`` the label. A position without
a label (-100) gives 0. Against top-k targets, a label that is not among the kept classes is one of "all others",
of which only the sum is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.base import loss
from limbeck.losses.distributions import (
    check_share,
    divergence,
    expectation,
    paired_log_probs,
    times_squared,
    weighted_sum,
)
from limbeck.losses.labels import at_label, zero_unless
from limbeck.losses.sparse import known_places
from limbeck.types import TopK

EPSILON = 1e-7
"""Keeps a quotient finite; the number is that of the known code, mmrazor's and ModelOpt's."""


def _split(log_probs: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of "the label or not" (..., 2), and of the other classes among themselves (..., C).

    Neither is taken out of log space, where the small one of the two would lose its digits.
    """
    others = log_probs.scatter(-1, index.unsqueeze(-1), -torch.inf)
    none = others.isneginf().all(dim=-1, keepdim=True)  # without other classes, logsumexp has no gradient
    rest = torch.logsumexp(others.masked_fill(none, 0.0), dim=-1, keepdim=True).masked_fill(none, -torch.inf)
    binary = torch.cat([log_probs.gather(-1, index.unsqueeze(-1)), rest], dim=-1)
    return binary, others - rest.masked_fill(none, 0.0)


@loss(sparse=True)
def dkd(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
) -> Tensor:
    r"""Decoupled distillation: "the label or not", and the other classes among themselves, weighted apart.

    .. math:: T^2 \bigl( \alpha \, KL(p_y, 1 - p_y \Vert q_y, 1 - q_y)
        + \beta \sum_{c \ne y} \hat p_c (\log \hat p_c - \log \hat q_c) \bigr),
        \quad \hat p_c = \frac{p_c}{1 - p_y}

    With α = 1 and β = 1 - p_y it would be `forward_kl`.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        labels: Class indices (...,); a position with label -100 gives 0.
        alpha: α, weight of the target class.
        beta: β, weight of the other classes.
        temperature: T, softens both distributions; T² keeps the gradient's size, as in `forward_kl`.

    Returns:
        One value in nats (times T²) per position, (...). Zero where teacher equals student.

    Raises:
        ValueError: shapes that differ, a label outside the classes, or a temperature that is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> dkd(student, teacher, labels=torch.tensor([0]), temperature=1.0).item()  # doctest: +ELLIPSIS
        1.116...

    Reference:
        Zhao et al. 2022, Decoupled Knowledge Distillation, arXiv:2203.08679 (CIFAR-100: 1, 8, T = 4; ImageNet:
        1, 0.5, T = 1). Its code leaves log space, and is NaN for large logits.
    """
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    index, counts = known_places(student, teacher, labels)
    (binary_q, others_q), (binary_p, others_p) = _split(log_q, index), _split(log_p, index)
    values = alpha * divergence(binary_p, binary_q) + beta * divergence(others_p, others_q)
    return zero_unless(counts, times_squared(values, temperature))


@loss(sparse=True)
def wsld(student: Tensor, teacher: Tensor | TopK, *, labels: Tensor, temperature: float | Tensor = 2.0) -> Tensor:
    r"""Soft cross-entropy, weighted less where the student already finds the label more probable than the teacher.

    .. math:: -w \, T^2 \sum_c p_c \log q_c,
        \quad w = 1 - \exp \Bigl( - \frac{\log q^1_y}{\log p^1_y} \Bigr)

    The weight is taken at temperature 1 and has no gradient.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        labels: Class indices (...,); a position with label -100 gives 0.
        temperature: T, softens both distributions but not the weight; T² is for the gradient, as in
            `soft_cross_entropy`.

    Returns:
        One value in nats (times T²) per position, (...). Not zero at equality.

    Raises:
        ValueError: shapes that differ, a label outside the classes, or a temperature that is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> wsld(student, teacher, labels=torch.tensor([0]), temperature=1.0).item()  # doctest: +ELLIPSIS
        0.690...

    Reference:
        Zhou et al. 2021, Rethinking Soft Labels, arXiv:2102.00650; mmrazor's configuration has
        T = 2 and weight 2.5. As there, 1e-7 is added to the teacher's cross-entropy, so that a teacher without
        doubt gives w = 1.
    """
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    index, counts = known_places(student, teacher, labels)
    own_q, own_p = (-at_label(side, index) for side in paired_log_probs(student.detach(), teacher))
    ratio = torch.where(own_q.isposinf() & own_p.isposinf(), 1.0, own_q / (own_p + EPSILON))
    values = torch.expm1(-ratio) * expectation(log_p, log_q)  # two negative factors
    return zero_unless(counts, times_squared(values, temperature))


@loss(sparse=True)
def mft(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    labels: Tensor,
    threshold: float = 0.2,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    r"""Forward KL from a teacher that is corrected towards the label by no more than is needed.

    .. math:: T^2 \, KL(p' \Vert q), \quad p' = (1 - \lambda) p + \lambda \, 1_y

    Where the teacher is wrong, λ is such that the label leads all other classes by the threshold τ. Where it is
    right, the label's probability gains τ, up to 1. Where the student cannot say the label (minus infinity), the
    value is infinite.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        labels: Class indices (...,); a position with label -100 gives 0.
        threshold: τ, from 0 to 1.
        temperature: T, softens both distributions before the correction; T² keeps the gradient's size, as in
            `forward_kl`.

    Returns:
        One value in nats (times T²) per position, (...). Zero where the student equals the corrected teacher.

    Raises:
        ValueError: shapes that differ, a label outside the classes, a threshold outside [0, 1], or a temperature
            that is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> mft(student, teacher, labels=torch.tensor([1])).item()  # doctest: +ELLIPSIS
        0.020...

    Reference:
        Belcak et al. 2025, Minifinetuning, arXiv:2506.15702; as in ModelOpt, λ has 1e-7 in its denominators.
    """
    check_share("threshold", threshold)
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    index, counts = known_places(student, teacher, labels)
    corrected = _corrected(log_p.exp(), index, threshold, rest=isinstance(teacher, TopK))
    values = weighted_sum(corrected, corrected.log() - log_q)
    return zero_unless(counts, times_squared(values, temperature))


def _corrected(p: Tensor, index: Tensor, threshold: float, rest: bool = False) -> Tensor:
    """Probabilities (..., C) with just enough of the label mixed in; the largest of equal ones counts as right.

    Where the last class stands for the `rest`, no class leads by it, and a label among them has a probability
    that is not known, and small: it is taken for 0.
    """
    single = torch.cat([p[..., :-1], torch.zeros_like(p[..., :1])], dim=-1) if rest else p
    own, best = at_label(single, index), single.amax(dim=-1)
    wrong = (best - own + threshold) / (1 + best - own + EPSILON)
    right = ((own + threshold).clamp(max=1) - own) / (1 - own + EPSILON)
    mixed_in = torch.where(own < best, wrong, right).clamp(0, 1).unsqueeze(-1)
    return (p * (1 - mixed_in)).scatter_add(-1, index.unsqueeze(-1), mixed_in)


@loss(sparse=True)
def ofa(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    labels: Tensor,
    eps: float = 1.5,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    r"""Soft cross-entropy that trusts the teacher more about the label, for sides of unlike architectures.

    .. math:: -T^2 \sum_c \bigl( (p_c + 1_{c = y})^\varepsilon - 1_{c = y} \bigr) \log q_c

    Args:
        student: Logits (..., C), of the model or of one of its exits.
        teacher: Logits (..., C).
        labels: Class indices (...,); a position with label -100 gives 0.
        eps: ε, at least 1. At 1 it is `soft_cross_entropy`; more raises the label's share and lowers that of the
            unlikely classes.
        temperature: T, softens both distributions; T² is for the gradient, as in `soft_cross_entropy`.

    Returns:
        One value in nats (times T²) per position, (...). Not zero at equality.

    Raises:
        ValueError: shapes that differ, a label outside the classes, ε below 1, or a temperature that is not
            positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> ofa(student, teacher, labels=torch.tensor([0])).item()  # doctest: +ELLIPSIS
        1.123...

    Reference:
        Hao et al. 2023, One-for-All, arXiv:2310.19444 (ε 1.5 on ImageNet with CNN students, 1 on CIFAR-100, T =
        1); its code has no T².
    """
    if not eps >= 1:
        raise ValueError(f"eps must be at least 1, got {eps}")
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    index, counts = known_places(student, teacher, labels)
    right = torch.zeros_like(log_p).scatter(-1, index.unsqueeze(-1), 1.0)
    weights = (log_p.exp() + right) ** eps - right
    return zero_unless(counts, times_squared(-weighted_sum(weights, log_q), temperature))
