"""TextBrewer's noise on texts, drawn by NumPy's global generator: `limbeck.tasks.noise` with its names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sklearn.utils import check_random_state

from limbeck.tasks import noise


def masking(tokens: Sequence[Any], p: float = 0.1, mask: Any = "[MASK]") -> list[Any]:
    """Replace each token by `mask` with the probability `p`."""
    return noise.masking(tokens, check_random_state(None), p=p, mask=mask)


def deleting(tokens: Sequence[Any], p: float = 0.1) -> list[Any]:
    """Leave each token out with the probability `p`."""
    return noise.deleting(tokens, check_random_state(None), p=p)


def n_gram_sampling(
    tokens: Sequence[Any],
    p_ng: Sequence[float] = (0.2, 0.2, 0.2, 0.2, 0.2),
    l_ng: Sequence[int] = (1, 2, 3, 4, 5),
) -> list[Any]:
    """Keep one random span, its length drawn from `l_ng` with the probabilities `p_ng`."""
    return noise.n_gram_sampling(tokens, check_random_state(None), lengths=l_ng, probabilities=p_ng)


def short_disorder(tokens: Sequence[Any], p: Sequence[float] = (0.9, 0.1, 0, 0, 0)) -> list[Any]:
    """Change the order of neighbours; `p` is that of abc, bac, cba, cab, bca."""
    return noise.short_disorder(tokens, check_random_state(None), probabilities=p)


def long_disorder(tokens: Sequence[Any], p: float = 0.1, length: float = 20) -> list[Any]:
    """Exchange the halves of spans of a length, or up to 1, of a share of all tokens."""
    return noise.long_disorder(tokens, check_random_state(None), p=p, length=length)
