"""TextBrewer's losses by their names, with its values; each gives one number.

Shape legend: B examples, h heads, L positions, D features, C classes, N logits that a mask selects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from limbeck.losses import evaluate
from limbeck.losses.logits import logit_mse, soft_cross_entropy
from limbeck.losses.maps import mmd

NOTHING_BELOW = -1e-3
"""Without a mask, TextBrewer takes every score up to this one for that of a padded position."""


def kd_mse_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Mean squared difference of logits (N, C), both divided by the temperature, one for all or (N,)."""
    return logit_mse(logits_S, logits_T, temperature=temperature).mean()


def kd_ce_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Cross-entropy with the teacher's soft targets, *without* T²: its gradient falls as the temperature grows."""
    values = soft_cross_entropy(logits_S, logits_T, temperature=temperature)
    return (values / temperature**2).mean()


def kd_ce_loss_with_square(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Cross-entropy with the teacher's soft targets, times T², as Hinton et al. 2015 have it."""
    return soft_cross_entropy(logits_S, logits_T, temperature=temperature).mean()


def att_mse_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention (B, h, L, L); mask (B, L). Without one, negative scores become zero."""
    return _attention("attention_mse", attention_S, attention_T, mask, **_pairs(mask))


def att_mse_sum_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `att_mse_loss`, of the sum of all heads; of attention (B, L, L) as it is."""
    return _attention("attention_mse", attention_S, attention_T, mask, heads="sum", **_pairs(mask))


def att_ce_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None, **heads: Any) -> Tensor:
    """Cross-entropy of the rows of attention scores (B, h, L, L); without a mask, of keys with positive scores."""
    which: dict[str, Any] = {"above": NOTHING_BELOW} if mask is None else {"renormalize": False}
    return _attention("attention_kl", attention_S, attention_T, mask, kind="cross_entropy", **which, **heads)


def att_ce_mean_loss(attention_S: Tensor, attention_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `att_ce_loss`, of the mean of all heads; of attention (B, L, L) as it is."""
    return att_ce_loss(attention_S, attention_T, mask, heads="mean")


def hid_mse_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states (B, L, D) over valid tokens; mask (B, L)."""
    return evaluate("mse", state_S, state_T, mask=mask)


def cos_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus the cosine between hidden states (B, L, D), over valid tokens; mask (B, L)."""
    return evaluate("cosine", state_S, state_T, mask=mask)


def pkd_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance of the first tokens' states as unit vectors: (B, L, D) or (B, D). The mask is not used."""
    first, other = (side[:, 0] if side.ndim == 3 else side for side in (state_S, state_T))
    return evaluate("normalized_mse", first, other)


def fsp_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Difference of the flows between two layers, each a pair of hidden states (B, L, D); mask (B, L)."""
    return evaluate("fsp", tuple(state_S), tuple(state_T), mask=mask)


def mmd_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Difference of how positions of two layers resemble one another: pairs of hidden states (B, L, D).

    With a mask (B, L), products are divided by L instead of D, and every pair of valid positions counts the same.
    """
    if mask is None:
        return evaluate("mmd", tuple(state_S), tuple(state_T))
    sides = [(first * (first.shape[2] / first.shape[1]), second) for first, second in (state_S, state_T)]
    valid = mask != 0
    lengths = valid.sum(dim=1).to(sides[0][0].dtype)
    total = (mmd(*sides, mask=valid) * lengths[:, None] * valid).sum()
    return total / lengths.square().sum().clamp(min=1)


def _pairs(mask: Tensor | None) -> dict[str, Any]:
    return {"zero_below": NOTHING_BELOW} if mask is None else {"average": "pairs"}


def _attention(loss: str, student: Tensor, teacher: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    first, other = (side.unsqueeze(1) if side.ndim == 3 else side for side in (student, teacher))
    return evaluate(loss, first, other, mask=mask, **options)


def _right(loss: str, **options: Any) -> Callable[..., Tensor]:
    """A loss of limbeck in the shape of TextBrewer's."""

    def compare(side_S: Any, side_T: Any, mask: Tensor | None = None) -> Tensor:
        if not isinstance(side_S, Tensor):
            return evaluate(loss, tuple(side_S), tuple(side_T), mask=mask, **options)
        return _attention(loss, side_S, side_T, mask, **options)

    return compare


CORRECT: Mapping[Callable[..., Tensor], Callable[..., Tensor]] = {
    kd_ce_loss: kd_ce_loss_with_square,
    att_mse_loss: _right("attention_mse"),
    att_mse_sum_loss: _right("attention_mse", heads="sum"),
    att_ce_loss: _right("attention_kl", kind="cross_entropy"),
    att_ce_mean_loss: _right("attention_kl", kind="cross_entropy", heads="mean"),
    mmd_loss: _right("mmd"),
}
"""What takes the place of a loss where ``correct=True``; the others are right already."""
