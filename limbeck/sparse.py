"""Sparse targets made of a teacher's logits: the largest of them, or entries drawn at random.

Shape legend: V entries, K kept ones, T temperatures, ``...`` positions; N rows of positions in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.types import Sampled, TopK

BLOCK, LARGE_BLOCK = 1 << 18, 1 << 24
"""Logits worked on at once; on a CPU as many as its cache holds, and anywhere more would take memory."""


@torch.no_grad()
def top_k(logits: Tensor, k: int, temperatures: Sequence[float] = (1.0,)) -> TopK:
    r"""Keep the largest logits of each position, and what all others hold together.

    With :math:`\log r_T = \log \sum_{j \notin K} \exp(z_j / T)` the probability of every kept entry and of the
    rest is exact at each of the temperatures, and at no other.

    Args:
        logits: (..., V); an entry at minus infinity has no probability.
        k: How many to keep, at most V of them.
        temperatures: Those at which the targets will be used, T of them.

    Returns:
        The kept entries from the largest down, relative to the largest; float32 for logits in half precision.

    Raises:
        ValueError: `k` is below 1, a temperature is not positive, or there is none.

    Example:
        >>> kept = top_k(torch.tensor([[1.0, 5.0, 3.0, 1.0]]), k=2)
        >>> kept.ids.tolist(), kept.values.tolist()
        ([[1, 2]], [[0.0, -2.0]])
        >>> round(kept.log_rest.exp().item(), 4)  # twice exp(-4)
        0.0366
    """
    _check(logits, temperatures, k=k)
    k = min(k, logits.shape[-1])
    blocks = [_top_k(rows, k, temperatures) for rows in _blocks(logits)]
    joined = (torch.cat(part) for part in zip(*blocks, strict=True))
    ids, values, log_rest = (part.view(*logits.shape[:-1], part.shape[-1]) for part in joined)
    return TopK(ids, logits.shape[-1], _floats(temperatures), values, log_rest)


def _top_k(logits_NV: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    values, ids = logits_NV.topk(min(k + 1, logits_NV.shape[-1]), dim=-1)
    values, following = values[:, :k], values[:, k:]
    largest, following = _finite(values[:, :1]), _finite(following)
    log_rest = torch.full((len(values), len(temperatures)), -torch.inf, dtype=values.dtype, device=values.device)
    if following.numel():
        rest = logits_NV.scatter(-1, ids[:, :k], -torch.inf).sub_(following)
        sums = torch.stack([_log_sum(rest, t) for t in temperatures], dim=-1)
        log_rest = sums + (following - largest) / log_rest.new_tensor(temperatures)
    return ids[:, :k], values - largest, log_rest


@torch.no_grad()
def sample(
    logits: Tensor,
    draws: int,
    temperatures: Sequence[float] = (1.0,),
    generator: torch.Generator | None = None,
    head: int = 0,
) -> Sampled:
    r"""Draw entries of each position at random, so that what they weigh is their probability on average.

    Entry :math:`i`, drawn :math:`n_i` times of :math:`N`, weighs
    :math:`\frac{n_i}{N} P \frac{p_T(i)}{p_{T_0}(i)}`. The draws are of the distribution at the first temperature
    :math:`T_0`, and :math:`P` is the probability there of what is drawn from, 1 without a `head`. At temperatures
    far above :math:`T_0` few draws carry most of the weight, and the mean is right only over very many.

    Args:
        logits: (..., V); an entry at minus infinity is never drawn.
        draws: N, how many times to draw, with replacement; equal draws become one entry.
        temperatures: Those at which the targets will be used, T of them.
        generator: Where the randomness comes from; by default torch's own.
        head: So many of the largest entries are kept with their exact probabilities; only the rest is drawn from.

    Returns:
        (..., head + draws) entries: first the head, then what was drawn, then places without a draw, which have
        the number 0 and the weight 0. Weights are in float32 for logits in half precision.

    Raises:
        ValueError: `draws` is below 1, `head` below 0, a temperature is not positive, or there is none.

    Example:
        >>> drawn = sample(torch.tensor([[0.0, 100.0, 0.0]]), draws=4)
        >>> drawn.ids.tolist(), drawn.weights[..., 0].tolist()
        ([[1, 0, 0, 0]], [[1.0, 0.0, 0.0, 0.0]])

    Reference:
        Anshumann et al. 2025, Sparse Logit Sampling, arXiv:2503.16870 (plain, at one temperature).
    """
    _check(logits, temperatures, draws=draws)
    if head < 0:
        raise ValueError(f"head is {head}; give a number of entries of at least 0")
    head = min(head, logits.shape[-1])
    blocks = [_sample(rows, draws, temperatures, generator, head) for rows in _blocks(logits)]
    ids, weights = (torch.cat(part) for part in zip(*blocks, strict=True))
    shape = (*logits.shape[:-1], ids.shape[-1])
    weights = weights.view(*shape, len(temperatures))
    return Sampled(ids.view(shape), logits.shape[-1], _floats(temperatures), weights)


def _sample(
    logits_NV: Tensor,
    draws: int,
    temperatures: Sequence[float],
    generator: torch.Generator | None,
    head: int,
) -> tuple[Tensor, Tensor]:
    shifted = logits_NV - _finite(logits_NV.amax(dim=-1, keepdim=True))
    kept = shifted.topk(head, dim=-1).indices
    rest = shifted.scatter(-1, kept, -torch.inf) if head else shifted
    first = temperatures[0]
    log_rest = torch.logsumexp(rest / first, dim=-1)
    ids, counts = _merged(_drawn(rest, first, draws, generator))
    log_weights, shares = [], (counts / draws).log()
    for t in temperatures:
        log_sum = _log_sum(shifted, t).unsqueeze(-1)
        drawn = shifted.gather(-1, ids)
        correction = (log_rest.unsqueeze(-1) - log_sum) + (drawn / t - drawn / first)
        log_weights.append(torch.cat([shifted.gather(-1, kept) / t - log_sum, shares + correction], dim=-1))
    weights = torch.stack(log_weights, dim=-1).exp()
    places = torch.cat([torch.ones_like(kept), counts * ~log_rest.isneginf().unsqueeze(-1)], dim=-1) > 0
    return torch.cat([kept, ids], dim=-1), torch.where(places.unsqueeze(-1), weights, torch.zeros_like(weights))


def _drawn(logits_NV: Tensor, temperature: float, draws: int, generator: torch.Generator | None) -> Tensor:
    """Draw with replacement: (N, draws); in float64, where a large vocabulary's small entries are not lost."""
    sums = torch.softmax(logits_NV.double() / temperature, dim=-1).cumsum(dim=-1).nan_to_num(0.0)
    device = logits_NV.device if generator is None else generator.device
    points = torch.rand(len(sums), draws, dtype=torch.float64, device=device, generator=generator).to(sums.device)
    total = sums[:, -1:].contiguous()
    last = torch.searchsorted(sums, total)  # beyond it nothing can be drawn, however a point is rounded
    return torch.minimum(torch.searchsorted(sums, points * total, right=True), last)


def _merged(ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Equal ids of a row as one, and how often each stood there; places that become free come last, as 0."""
    ordered = ids_NK.sort(dim=-1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = new.cumsum(dim=-1) - 1
    empty = torch.zeros_like(ordered)
    return empty.scatter(-1, place, ordered), empty.scatter_add(-1, place, torch.ones_like(ordered))


def _blocks(logits: Tensor) -> Sequence[Tensor]:
    """The positions in a row, some at a time, in float32 or better."""
    rows = logits.detach().reshape(-1, logits.shape[-1])
    half = logits.dtype in (torch.float16, torch.bfloat16)
    return [block.float() if half else block for block in torch.split(rows, block_rows(logits))]


def block_rows(logits: Tensor) -> int:
    """How many positions to work on at once.

    Example:
        >>> block_rows(torch.zeros(1000, 1 << 15))
        8
    """
    return max(1, (BLOCK if logits.device.type == "cpu" else LARGE_BLOCK) // logits.shape[-1])


def _finite(largest: Tensor) -> Tensor:
    """What to subtract: 0 where no entry has any probability."""
    return torch.where(largest.isneginf(), torch.zeros_like(largest), largest)


def _log_sum(logits: Tensor, temperature: float) -> Tensor:
    """Log-sum-exp of logits whose largest is 0, or minus infinity."""
    scaled = logits if temperature == 1 else logits / temperature
    return scaled.exp().sum(dim=-1).log()


def _floats(temperatures: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(t) for t in temperatures)


def _check(logits: Tensor, temperatures: Sequence[float], **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; give a number of entries of at least 1")
    if not temperatures or any(not t > 0 for t in temperatures):
        raise ValueError(f"the temperatures {list(temperatures)} are not all positive numbers; give one or more")
    if logits.ndim < 1 or logits.shape[-1] < 1 or not logits.is_floating_point():
        raise ValueError(f"logits of shape {tuple(logits.shape)} and type {logits.dtype} are none; give (..., V)")
