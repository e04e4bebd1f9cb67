"""Losses between two sets of logits.

Shape legend: B examples, L positions, C classes; a leading ``(..., C)`` stands for (B, C) or (B, L, C).
``p`` is the teacher's and ``q`` the student's distribution at temperature T, ``z`` are logits.
Every divergence carries the factor T², which keeps its gradient's size independent of T (Hinton et al. 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.base import full_precision, loss, same_shape


def paired_log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both sides at a temperature, in float32 or better; the teacher's carry no gradient.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T > 0.

    Returns:
        ``(log q, log p)``, each (..., C).

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    same_shape(student, teacher)
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    log_q = torch.log_softmax(full_precision(student) / temperature, dim=-1)
    log_p = torch.log_softmax(full_precision(teacher.detach()) / temperature, dim=-1)
    return log_q, log_p


def expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Sum ``p · values`` over the last dimension; what has no probability counts nothing, even if infinite."""
    p = log_p.exp()
    return torch.where(p == 0, torch.zeros_like(p), p * values).sum(dim=-1)  # a NaN stays one


@loss
def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher to the student.

    .. math:: T^2 \sum_c p_c (\log p_c - \log q_c)

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T, softens both distributions.

    Returns:
        One value in nats (times T²) per position, (...). Zero where teacher equals student.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> forward_kl(student, teacher).item()  # doctest: +ELLIPSIS
        0.327...

    Reference:
        Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    return expectation(log_p, log_p - log_q) * temperature**2


@loss
def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Cross-entropy of the student against the teacher's soft targets.

    .. math:: -T^2 \sum_c p_c \log q_c

    It has the gradient of `forward_kl` and is larger by T² times the teacher's entropy: not zero at equality.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T, softens both distributions.

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
    log_q, log_p = paired_log_probs(student, teacher, temperature)
    return -expectation(log_p, log_q) * temperature**2
