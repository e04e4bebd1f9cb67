"""Distributions of both sides at a temperature, and what is computed of them.

Shape legend: ``(..., C)`` stands for (B, C) or (B, L, C). ``p`` is the teacher's and ``q`` the student's
distribution at temperature T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.losses.base import full_precision, same_shape
from limbeck.losses.labels import finite, zero_unless
from limbeck.losses.sparse import bucketed
from limbeck.types import Sparse


def check_temperature(temperature: float | Tensor, logits: Tensor) -> None:
    """Refuse a temperature that is not positive or does not fit the positions of `logits`.

    Raises:
        ValueError: as said. (An accelerator is not asked for the values of a tensor, since it would have to wait;
            `softened` makes those positions NaN.)
    """
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != logits.shape[:-1]:
            raise ValueError(
                f"temperatures of shape {tuple(temperature.shape)} do not fit logits of shape "
                f"{tuple(logits.shape)}; give one number, or one for each position"
            )
        if temperature.device.type != "cpu":
            return
        temperature = temperature.min().item() if temperature.numel() else 1.0
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")


def softened(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits (..., C) divided by a number or by one for each position (...,), in float32 or better."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return full_precision(logits)
    if isinstance(temperature, Tensor):
        temperature = torch.where(temperature > 0, full_precision(temperature), torch.nan)
        temperature = temperature.unsqueeze(-1) if temperature.ndim else temperature
        if temperature.requires_grad:  # which minus infinity would make NaN
            never = logits.isneginf()
            return (full_precision(logits).masked_fill(never, 0.0) / temperature).masked_fill(never, -torch.inf)
    return full_precision(logits) / temperature


def times_squared(values: Tensor, temperature: float | Tensor) -> Tensor:
    """T² · values, for a number or one for each position."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return values
    return values * (full_precision(temperature) if isinstance(temperature, Tensor) else temperature) ** 2


def softened_pair(
    student: Tensor, teacher: Tensor | Sparse, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Both sides' logits divided by a temperature; where the teacher's are top-k, those of K + 1 classes.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C), or `TopK` in their place: see `limbeck.losses.sparse.bucketed`.
        temperature: T > 0, a number or one for each position (...,).

    Returns:
        The student's and the teacher's, each (..., C) or (..., K + 1), in float32 or better; the teacher's carry
        no gradient.

    Raises:
        ValueError: the shapes differ, the temperature is not positive, or top-k targets are not known at it.
    """
    if isinstance(teacher, Sparse):
        return bucketed(student, teacher, temperature)
    same_shape(student, teacher)
    check_temperature(temperature, student)
    return softened(student, temperature), softened(teacher.detach(), temperature)


def paired_log_probs(
    student: Tensor, teacher: Tensor | Sparse, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``(log q, log p)`` of both sides at a temperature, with all else as in `softened_pair`."""
    student, teacher = softened_pair(student, teacher, temperature)
    return torch.log_softmax(student, dim=-1), torch.log_softmax(teacher, dim=-1)


def paired_probs(
    student: Tensor, teacher: Tensor | Sparse, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Probabilities ``(q, p)`` of both sides at a temperature, with all else as in `softened_pair`."""
    student, teacher = softened_pair(student, teacher, temperature)
    return torch.softmax(student, dim=-1), torch.softmax(teacher, dim=-1)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Their products; what has no weight counts nothing, even if infinite."""
    if not finite(values):
        values = zero_unless(weights != 0, values)  # a NaN of the weights stays one
    return weights * values


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sum over the last dimension; what has no weight counts nothing, even if infinite."""
    return weighted(weights, values).sum(dim=-1)


def expectation(log_p: Tensor, values: Tensor) -> Tensor:
    """Sum ``p · values`` over the last dimension; what has no probability counts nothing, even if infinite."""
    return weighted_sum(log_p.exp(), values)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p‖q) over the last dimension; a gradient flows to both."""
    return expectation(log_p, log_p - log_q)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share · p + (1 - share) · q), where neither is ever taken out of log space.

    Args:
        log_p: Log-probabilities (..., C).
        log_q: Log-probabilities (..., C).
        share: Share of p, from 0 to 1.
    """
    if share in (0, 1):
        return log_p if share else log_q
    never = log_p.isneginf() & log_q.isneginf()
    log_p, log_q = zero_unless(~never, log_p), zero_unless(~never, log_q)  # there, logaddexp has no gradient
    mixed = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    return mixed.masked_fill(never, -torch.inf)


def check_share(name: str, value: float, below_one: bool = False) -> None:
    """Refuse an option that is no share.

    Raises:
        ValueError: the value is outside [0, 1], or [0, 1) where it has to stay below 1.
    """
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise ValueError(f"{name} must lie in [0, 1{')' if below_one else ']'}, got {value}")
