"""Losses between two sets of logits.

Shape legend: B examples, L positions, C classes; a leading ``(..., C)`` stands for (B, C) or (B, L, C).
``p`` is the teacher's and ``q`` the student's distribution at temperature T, ``z`` are logits.
Every divergence carries the factor T², which keeps its gradient's size independent of T (Hinton et al. 2015).
A temperature is a number, or a tensor with one for each position. A class at minus infinity on both sides
cannot occur, and counts as if it were not there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.base import full_precision, loss, mean_square, same_shape
from limbeck.losses.distributions import (
    check_share,
    check_temperature,
    divergence,
    log_mixture,
    paired_log_probs,
    paired_probs,
    softened,
    softened_pair,
    times_squared,
    weighted_sum,
)
from limbeck.losses.labels import at_label, cross_entropy_at, finite, may_ask, over_classes, zero_unless
from limbeck.losses.sparse import CONSTANT, most_probable, sampled_cross_entropy
from limbeck.types import Sampled, Sparse, TopK


@loss(sparse=True)
def forward_kl(student: Tensor, teacher: Tensor | TopK, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher to the student.

    .. math:: T^2 \sum_c p_c (\log p_c - \log q_c)

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T, softens both distributions. With T², the gradient tends to that of
            ``logit_mse`` (of centred logits, halved) as T grows.

    Returns:
        One value in nats (times T²) per position, (...). Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> forward_kl(student, teacher).item()  # doctest: +ELLIPSIS
        0.327...

    Reference:
        Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531. ModelOpt (by
        default), DeiT and Intel's Neural Compressor divide it by C too.
    """
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    return times_squared(divergence(log_p, log_q), temperature)


@loss(sparse=True)
def reverse_kl(student: Tensor, teacher: Tensor | TopK, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Kullback-Leibler divergence from the student to the teacher: the student keeps to what the teacher expects.

    .. math:: T^2 \sum_c q_c (\log q_c - \log p_c)

    It is infinite where the student expects what the teacher excludes (a logit of minus infinity on that side
    alone).

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T, softens both distributions. T² does here what it does in `forward_kl`, which has the same
            limit as T grows.

    Returns:
        One value in nats (times T²) per position, (...). Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> reverse_kl(student, teacher).item()  # doctest: +ELLIPSIS
        0.433...

    Reference:
        Gu et al. 2023, MiniLLM, arXiv:2306.08543; Agarwal et al. 2023, GKD, arXiv:2306.13649. TRL and Liger
        leave T² out.
    """
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    return times_squared(divergence(log_q, log_p), temperature)


@loss(sparse=True)
def js_divergence(
    student: Tensor, teacher: Tensor | TopK, *, beta: float = 0.5, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence, between forward KL (β = 0) and reverse KL (β = 1).

    .. math:: T^2 \bigl( \beta \, KL(p \Vert m) + (1 - \beta) \, KL(q \Vert m) \bigr),
        \quad m = \beta p + (1 - \beta) q

    At β = 0 and β = 1 the formula itself would be 0; the two KL are put there, as is usual. Divided by β (by
    1 - β), it tends to them.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        beta: β, the teacher's share of the mixture m; 0.5 for the Jensen-Shannon divergence.
        temperature: T, softens both distributions. T² keeps the gradient's size, as in `forward_kl`; as T grows,
            it is β (1 - β) times that of `forward_kl`.

    Returns:
        One value in nats (times T²) per position, (...), for 0 < β < 1 at most T² times the entropy of β. Zero
        where teacher equals student.

    Raises:
        ValueError: the shapes differ, the temperature is not positive, or β lies outside [0, 1].

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> js_divergence(student, teacher).item()  # doctest: +ELLIPSIS
        0.089...

    Reference:
        Agarwal et al. 2023, On-Policy Distillation of Language Models (GKD), arXiv:2306.13649; β as in TRL and
        Liger, which leave T² out.
    """
    check_share("beta", beta)
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    if beta in (0, 1):
        return times_squared(divergence(log_q, log_p) if beta else divergence(log_p, log_q), temperature)
    log_m = log_mixture(log_p, log_q, beta)
    value = beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)
    return times_squared(value, temperature)


@loss(sparse=True)
def skewed_forward_kl(
    student: Tensor, teacher: Tensor | TopK, *, alpha: float = 0.1, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Forward KL to a student that has a share α of the teacher mixed in, finite whatever the student excludes.

    .. math:: T^2 \, KL(p \Vert \alpha p + (1 - \alpha) q)

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        alpha: α, the teacher's share of the mixture; 0 gives `forward_kl`.
        temperature: T, softens both distributions. T² keeps the gradient's size, as in `forward_kl`; as T grows,
            it is (1 - α)² times that of `forward_kl`.

    Returns:
        One value in nats (times T²) per position, (...), at most -T² log α. Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, the temperature is not positive, or α lies outside [0, 1).

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> skewed_forward_kl(student, teacher).item()  # doctest: +ELLIPSIS
        0.272...

    Reference:
        Ko et al. 2024, DistiLLM, arXiv:2402.03898; its code leaves the teacher's entropy out, which has no
        gradient.
    """
    check_share("alpha", alpha, below_one=True)
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    return times_squared(divergence(log_p, log_mixture(log_p, log_q, alpha)), temperature)


@loss(sparse=True)
def skewed_reverse_kl(
    student: Tensor, teacher: Tensor | TopK, *, alpha: float = 0.1, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Reverse KL to a teacher that has a share α of the student mixed in, finite whatever the teacher excludes.

    .. math:: T^2 \, KL(q \Vert \alpha q + (1 - \alpha) p)

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        alpha: α, the student's share of the mixture (in `skewed_forward_kl` it is the teacher's); 0 gives
            `reverse_kl`.
        temperature: T, softens both distributions. T² keeps the gradient's size, as in `forward_kl`; as T grows,
            it is (1 - α)² times that of `forward_kl`.

    Returns:
        One value in nats (times T²) per position, (...), at most -T² log α. Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, the temperature is not positive, or α lies outside [0, 1).

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> skewed_reverse_kl(student, teacher).item()  # doctest: +ELLIPSIS
        0.317...

    Reference:
        Ko et al. 2024, DistiLLM, arXiv:2402.03898. The gradient flows through the student on both sides.
    """
    check_share("alpha", alpha, below_one=True)
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    return times_squared(divergence(log_q, log_mixture(log_q, log_p, alpha)), temperature)


@loss(sparse=True)
def total_variation(student: Tensor, teacher: Tensor | TopK, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Half the sum of the absolute differences of probabilities.

    .. math:: \tfrac{T^2}{2} \sum_c \lvert p_c - q_c \rvert

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T, softens both distributions. The distance is linear where the divergences are quadratic: T
            would keep its gradient's size, and with T², which is here for uniformity, that grows like T.

    Returns:
        One value in [0, T²] per position, (...). Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> total_variation(student, teacher).item()  # doctest: +ELLIPSIS
        0.380...

    Reference:
        Wen et al. 2023, f-divergence minimization for sequence-level distillation, arXiv:2307.15190.
    """
    q, p = paired_probs(student, teacher, temperature)
    return times_squared((p - q).abs().sum(dim=-1) / 2, temperature)


@loss(sparse=True)
def soft_cross_entropy(student: Tensor, teacher: Tensor | Sparse, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Cross-entropy of the student against the teacher's soft targets.

    .. math:: -T^2 \sum_c p_c \log q_c

    It has the gradient of `forward_kl` and is larger by T² times the teacher's entropy: not zero at equality.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T, softens both distributions. T² is for the gradient, as in `forward_kl`; the value grows
            like T².

    Returns:
        One value in nats (times T²) per position, (...).

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> soft_cross_entropy(student, teacher).item()  # doctest: +ELLIPSIS
        0.693...

    Reference:
        Hinton et al. 2015, arXiv:1503.02531; the form of TextBrewer and TinyBERT, there without T².
    """
    if isinstance(teacher, Sampled):
        return times_squared(sampled_cross_entropy(student, teacher, temperature), temperature)
    student, teacher = softened_pair(student, teacher, temperature)
    log_q, p = torch.log_softmax(student, dim=-1), torch.softmax(teacher, dim=-1)
    return times_squared(-weighted_sum(p, log_q), temperature)


@loss(sparse=CONSTANT)
def logit_mse(student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Mean squared difference of the logits.

    .. math:: \tfrac{1}{C} \sum_c \Bigl( \frac{z^s_c - z^t_c}{T} \Bigr)^2

    It is no divergence: a constant added to all logits of one side counts, and there is no T².

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C). C does not count a class at minus infinity on both sides.
        temperature: T, divides both sides, and so the value by T².

    Returns:
        One value per position, (...). Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> logit_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([2.])

    Reference:
        Ba and Caruana 2014, Do Deep Nets Really Need to be Deep?, arXiv:1312.6184; T as in TextBrewer.
    """
    same_shape(student, teacher)
    check_temperature(temperature, student)
    sides = full_precision(student), full_precision(teacher.detach())
    if may_ask(student):
        values = mean_square(*sides)
        if finite(values):
            return values / times_squared(torch.ones_like(values), temperature)
    there = ~(student.isneginf() & teacher.isneginf())
    return over_classes(softened(zero_unless(there, sides[0] - sides[1]), temperature).square(), there, "mean")


@loss(sparse=True)
def hard_label(student: Tensor, teacher: Tensor | TopK) -> Tensor:
    r"""Cross-entropy of the student against the class that the teacher finds most probable.

    .. math:: -\log q_y, \quad y = \arg\max_c z^t_c

    There is no temperature: it would not change the teacher's decision.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).

    Returns:
        One value in nats per position, (...). Not zero at equality.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> hard_label(student, teacher).item()  # doctest: +ELLIPSIS
        0.693...

    Reference:
        Touvron et al. 2020, DeiT (hard-label distillation), arXiv:2012.12877.
    """
    if isinstance(teacher, Sparse):
        return cross_entropy_at(student, most_probable(student, teacher))
    same_shape(student, teacher)
    teacher = teacher.detach()
    index = teacher.argmax(dim=-1)  # that of a NaN, if there is one
    values = cross_entropy_at(student, index)
    return values if finite(teacher) else torch.where(at_label(teacher, index).isfinite(), values, torch.nan)
