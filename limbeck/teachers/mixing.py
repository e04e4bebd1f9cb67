"""How the logits of several teachers become one teacher's, computed in float32 or better.

Shape legend: K teachers, B examples, L positions, C classes; ``(..., C)`` stands for (B, C) or (B, L, C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.losses.base import full_precision
from limbeck.losses.labels import at_label, known_labels

LARGEST = 1e30
"""What an infinite cross-entropy counts as, so that teachers can be compared by it."""


def mean_of_logits(members: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""The weighted mean :math:`\sum_k w_k z_k / \sum_k w_k`.

    Args:
        members: K logits (..., C).
        weights: K numbers above 0.

    Example:
        >>> mean_of_logits([torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 2.0]])], [3.0, 1.0])
        tensor([[3.0000, 0.5000]])
    """
    total = sum(weights)
    mixed = full_precision(members[0]) * (weights[0] / total)
    for logits, weight in zip(members[1:], weights[1:], strict=True):
        mixed = mixed + full_precision(logits) * (weight / total)
    return mixed


def mean_of_probabilities(
    members: Sequence[Tensor], weights: Sequence[float | Tensor], temperature: float = 1.0
) -> Tensor:
    r"""Logits whose softmax at a temperature is the mean of the members' probabilities at that temperature.

    .. math:: T \log \frac{\sum_k w_k \operatorname{softmax}(z_k / T)}{\sum_k w_k}

    Args:
        members: K logits (..., C).
        weights: K numbers above 0; or K tensors (...,), one weight for each position.
        temperature: T.

    Example:
        >>> one, two = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> torch.softmax(mean_of_probabilities([one, two], [1.0, 1.0], temperature=2.0) / 2, dim=-1)
        tensor([[0.5976, 0.4024]])
        >>> (torch.softmax(one / 2, dim=-1) + torch.softmax(two / 2, dim=-1)) / 2
        tensor([[0.5976, 0.4024]])
    """
    mixed = None
    for logits, log_share in zip(members, _log_shares(weights), strict=True):
        own = torch.log_softmax(full_precision(logits) / temperature, dim=-1) + log_share
        mixed = own if mixed is None else torch.logaddexp(mixed, own)
    assert mixed is not None
    return mixed * temperature


def _log_shares(weights: Sequence[float | Tensor]) -> list[float | Tensor]:
    total = sum(weights)
    shares = [weight / total for weight in weights]
    return [torch.log(s).unsqueeze(-1) if isinstance(s, Tensor) else math.log(s) for s in shares]


def confidence(members: Sequence[Tensor], labels: Tensor | None, weights: Sequence[float]) -> list[Tensor]:
    r"""How far each teacher is to be trusted at each position: the more, the nearer it comes to the label.

    .. math:: w_k \frac{1 - \operatorname{softmax}_k(c_1, \dots, c_K)}{K - 1}

    with :math:`c_k` the cross-entropy of teacher k with the label, at temperature 1; its own entropy where there
    is no label.

    Args:
        members: K logits (..., C).
        labels: Class indices (...,), -100 where there is none; None where there are none at all.
        weights: K numbers above 0, which multiply what the labels say.

    Returns:
        K tensors (...,), at least one of them above 0 everywhere.

    Raises:
        ValueError: labels that do not fit the logits.

    Example:
        >>> right, wrong = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> confidence([right, wrong], torch.tensor([0]), [1.0, 1.0])
        [tensor([0.8808]), tensor([0.1192])]

    Reference:
        Zhang et al. 2022, Confidence-Aware Multi-Teacher Knowledge Distillation, arXiv:2201.00007.
    """
    if len(members) == 1:
        return [torch.full_like(full_precision(members[0][..., 0]), weights[0])]
    costs = torch.stack([_cost(logits, labels) for logits in members])
    trust = (1 - torch.softmax(costs, dim=0)) / (len(members) - 1)
    return [own * weight for own, weight in zip(trust, weights, strict=True)]


def _cost(logits: Tensor, labels: Tensor | None) -> Tensor:
    """(...,): the cross-entropy with the label, and the entropy where there is none."""
    log_probabilities = torch.log_softmax(full_precision(logits), dim=-1)
    if labels is None:
        return _entropy(log_probabilities)
    index, counts = known_labels(logits, labels)
    cost = (-at_label(log_probabilities, index)).clamp(max=LARGEST)
    return cost if counts is None else torch.where(counts, cost, _entropy(log_probabilities))


def _entropy(log_probabilities: Tensor) -> Tensor:
    """(..., C) to (...,); a class without probability adds nothing."""
    entropy: Tensor = torch.special.entr(log_probabilities.exp()).sum(dim=-1)
    return entropy
