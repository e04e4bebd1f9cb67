"""Losses between attention patterns, given or recomputed from queries, keys and values.

Shape legend: B examples, h heads, L positions, D features. A pattern (B, h, L, L) has a row for each query and a
column for each key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss
from limbeck.losses.distributions import weighted_sum
from limbeck.losses.features import normalized_mse, unit_vectors
from limbeck.losses.labels import finite, zero_unless
from limbeck.reduce import blank

Heads = Literal["each", "mean", "sum"]
Side = Tensor | Sequence[Tensor]

PARTS = "qkv"
"""The letters by which `qkv_relation` calls the tensors of a side."""


def paired_patterns(student: Tensor, teacher: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Both patterns in float32 or better, the teacher's without gradient, their heads kept or made one.

    Args:
        student: (B, h, L, L).
        teacher: (B, h', L, L), where h' differs from h only if `heads` is not ``"each"``.
        heads: ``"each"`` keeps them, ``"mean"`` and ``"sum"`` make one of all.

    Raises:
        ValueError: the shapes differ, or `heads` is something else.
    """
    if heads not in ("each", "mean", "sum"):
        raise ValueError(f"unknown heads {heads!r}; known: each, mean, sum")
    fact = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    if student.ndim != 4 or teacher.ndim != 4:
        raise ValueError(f"attention is (batch, heads, queries, keys), got {fact}; tap attentions")
    if student[:, 0].shape != teacher[:, 0].shape:
        raise ValueError(f"{fact} differ in more than the heads; give both models the same tokens")
    if heads == "each" and student.shape != teacher.shape:
        raise ValueError(f"{fact} differ in their heads; set heads='mean'")
    sides = full_precision(student), full_precision(teacher.detach())
    if heads == "each":
        return sides
    merge: Callable[..., Tensor] = torch.mean if heads == "mean" else torch.sum
    return merge(sides[0], 1, keepdim=True), merge(sides[1], 1, keepdim=True)


def valid_tokens(mask: Tensor | None, pattern: Tensor) -> Tensor | None:
    """The mask as truth values, (B, L).

    Raises:
        ValueError: it does not fit the queries and keys of the pattern (B, h, L, L).
    """
    if mask is None:
        return None
    batch, _, queries, keys = pattern.shape
    if mask.shape != (batch, queries) or queries != keys:
        raise ValueError(
            f"a mask {tuple(mask.shape)} does not fit attention {tuple(pattern.shape)}; "
            "it must have an entry for each token, which is a query and a key"
        )
    return mask != 0


def relative_entropy(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    cross: bool = False,
    renormalize: bool = True,
    above: float | None = None,
) -> Tensor:
    """How the student's rows of a pattern differ from the teacher's: KL divergence or cross-entropy, (B, h, L).

    Args:
        student: Scores (B, h, L, L), before the softmax.
        teacher: Scores of the same shape.
        mask: (B, L); a masked query gives 0.
        cross: Whether the teacher's entropy is left in.
        renormalize: Whether masked keys are kept out of the softmax, and not only out of the sum behind it.
        above: Keys with scores of the teacher up to this one are left out of the sum; None for none.
    """
    valid = valid_tokens(mask, student)
    counts = None if above is None else teacher > above
    if valid is not None:
        student, teacher = (_masked_scores(side, valid, renormalize) for side in (student, teacher))
    log_q = torch.log_softmax(student, dim=-1)
    if cross:
        p, values = torch.softmax(teacher, dim=-1), log_q
    else:
        log_p = torch.log_softmax(teacher, dim=-1)
        p, values = log_p.exp(), log_p - log_q
    if valid is not None and (cross or not renormalize):
        p = p * valid[:, None, None, :].to(p.dtype)
    p = p if counts is None else p * counts.to(p.dtype)
    total = weighted_sum(p, values)
    total = total if valid is None else zero_unless(valid.unsqueeze(1), total)
    return -total if cross else total


def _masked_scores(scores: Tensor, valid: Tensor, renormalize: bool) -> Tensor:
    """Minus infinity at masked keys, and nothing but zeros in the rows of masked queries."""
    queries = valid[:, None, :, None]
    if not renormalize:
        return scores if finite(scores) else scores.masked_fill(~queries, 0.0)
    instead = torch.where(queries, -math.inf, 0.0).to(scores.dtype)
    return torch.where(pairs_of(valid), scores, instead)


def pairs_of(valid: Tensor) -> Tensor:
    """Whether the query and the key of a pair are both valid, (B, 1, L, L), for valid tokens (B, L)."""
    return valid[:, None, :, None] & valid[:, None, None, :]


def scores_of(probabilities: Tensor, tiny: float, valid: Tensor | None) -> Tensor:
    """Scores whose softmax these are; a probability that was rounded to zero counts as `tiny`."""
    if valid is not None:  # a NaN behind the mask would get into the gradient of the logarithm
        probabilities = torch.where(pairs_of(valid), probabilities, torch.ones_like(probabilities))
    return probabilities.clamp(min=tiny).log()


@loss
def attention_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: Heads = "each",
    average: Literal["queries", "pairs"] = "queries",
    zero_below: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Mean squared difference of two attention patterns over the pairs of valid tokens.

    .. math:: \frac{1}{h \sum_j m_j} \sum_{h j} m_j (s_{hij} - t_{hij})^2

    Pairs with the same value on both sides, minus infinity included, count as no difference.

    Args:
        student: Attention scores before the softmax, or probabilities, (B, h, L, L).
        teacher: The same of the teacher; another number of heads needs `heads` ``"mean"`` or ``"sum"``.
        heads: Compare ``"each"`` head, or the ``"mean"`` or ``"sum"`` of all.
        average: ``"queries"``: over the valid keys of each query, as above; it does not depend on the other
            examples of the batch. ``"pairs"``: the mean over the queries is that over all valid pairs of the
            batch, as in TextBrewer, where long texts count more. Both are the same where all are of one length.
        zero_below: Values up to this one become zero on both sides; None for none.
        mask: (B, L), tokens that are 0 count neither as queries nor as keys.

    Returns:
        One value per query i, (B, L).

    Raises:
        ValueError: shapes that do not fit, or an unknown option.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
        >>> attention_mse(student, teacher), attention_mse(student, teacher, heads="sum")
        (tensor([[1., 1.]]), tensor([[4., 4.]]))

    Reference:
        Jiao et al. 2020, TinyBERT, arXiv:1909.10351, with ``zero_below=-100`` in the authors' code, over scores.
        TextBrewer's ``attention_mse`` and, with ``heads="sum"``, ``attention_mse_sum``: with a mask
        ``average="pairs"``; without one ``zero_below=-1e-3``, which loses every negative score.
    """
    if average not in ("pairs", "queries"):
        raise ValueError(f"unknown average {average!r}; known: pairs, queries")
    student, teacher = paired_patterns(student, teacher, heads)
    if zero_below is not None:
        student, teacher = (torch.where(x <= zero_below, torch.zeros_like(x), x) for x in (student, teacher))
    valid = valid_tokens(mask, student)
    if not (finite(student) and finite(teacher)):
        same = student == teacher  # two minus infinities differ by nothing
        apart = ~(same if valid is None else same | ~pairs_of(valid))
        student, teacher = zero_unless(apart, student), zero_unless(apart, teacher)
    squares = F.mse_loss(student, teacher, reduction="none").sum(dim=1)
    if valid is None:
        return squares.sum(dim=-1) / (student.shape[1] * student.shape[3])
    total = weighted_sum(valid.unsqueeze(1).to(squares.dtype), squares)
    lengths = valid.sum(dim=-1, keepdim=True).to(squares.dtype)
    keys = lengths if average == "queries" else lengths.square().sum() / lengths.sum().clamp(min=1)
    return zero_unless(valid, total / (student.shape[1] * keys.clamp(min=1)))


@loss
def attention_pattern(
    student: Tensor, teacher: Tensor, *, heads: Heads = "each", mask: Tensor | None = None
) -> Tensor:
    r"""Squared distance of two attention patterns, each divided by its length as one long vector.

    .. math:: \frac{1}{h} \sum_h \Big\lVert \frac{S_h}{\lVert S_h \rVert}
        - \frac{T_h}{\lVert T_h \rVert} \Big\rVert^2

    Args:
        student: Attention probabilities, or scores, (B, h, L, L).
        teacher: The same of the teacher; another number of heads needs `heads` ``"mean"`` or ``"sum"``.
        heads: Compare ``"each"`` head, or the ``"mean"`` or ``"sum"`` of all.
        mask: (B, L), tokens that are 0 count neither as queries nor as keys.

    Returns:
        One value in [0, 4] per example, (B,).

    Raises:
        ValueError: shapes that do not fit, or an unknown option.

    Example:
        >>> attention_pattern(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]]))
        tensor([2.])

    Reference:
        PyMarlin's ``representations_loss`` of attentions, which has no mask.
    """
    student, teacher = paired_patterns(student, teacher, heads)
    valid = valid_tokens(mask, student)
    if valid is not None:
        student, teacher = (zero_unless(pairs_of(valid), side) for side in (student, teacher))
    return normalized_mse(student.flatten(2), teacher.flatten(2)).mean(dim=1)


@loss
def attention_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    of: Literal["scores", "probabilities"] = "scores",
    kind: Literal["kl", "cross_entropy"] = "kl",
    heads: Heads = "each",
    renormalize: bool = True,
    above: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence between the attention of the teacher's queries and that of the student's.

    .. math:: \tfrac{1}{h} \sum_h \sum_j p_{hij} (\log p_{hij} - \log q_{hij})

    Args:
        student: Attention scores before the softmax, or probabilities, (B, h, L, L).
        teacher: The same of the teacher; another number of heads needs `heads` ``"mean"`` or ``"sum"``.
        of: What both tensors hold: ``"scores"``, or ``"probabilities"``, as transformers returns them. Rows of
            probabilities that dropout has thinned out are rescaled.
        kind: ``"cross_entropy"`` leaves the teacher's entropy in, with the same gradient.
        heads: Compare ``"each"`` head, or the ``"mean"`` or ``"sum"`` of all, scores or probabilities.
        renormalize: Whether masked keys are kept out of the softmax. False only leaves them out of the sum over
            the keys, and is the same where their scores are minus infinity already.
        above: Leave keys with scores of the teacher up to this one out of the sum over the keys; None for none. Of
            probabilities, the score is the logarithm.
        mask: (B, L), tokens that are 0 count neither as queries nor as keys.

    Returns:
        One value in nats per query, (B, L); 0 for masked queries. Zero where teacher equals student.

    Raises:
        ValueError: shapes that do not fit, or an unknown option.

    Example:
        >>> student, teacher = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[0.9, 0.1]]]])
        >>> attention_kl(student, teacher, of="probabilities").item()
        0.368...

    Reference:
        Wang et al. 2020, MiniLM, arXiv:2002.10957, on the last layer. TextBrewer's ``attention_ce`` is
        ``kind="cross_entropy", renormalize=False``, its ``attention_ce_mean`` that with ``heads="mean"``; without
        a mask ``above=-1e-3``, which drops the keys with negative scores of the teacher.
    """
    if of not in ("scores", "probabilities"):
        raise ValueError(f"unknown content {of!r} of attention; known: scores, probabilities")
    if kind not in ("kl", "cross_entropy"):
        raise ValueError(f"unknown kind {kind!r} of attention_kl; known: kl, cross_entropy")
    tiny = max(torch.finfo(side.dtype).tiny for side in (student, teacher))
    student, teacher = paired_patterns(student, teacher, heads)
    if of == "probabilities":
        valid = valid_tokens(mask, student) if renormalize else None
        student, teacher = scores_of(student, tiny, valid), scores_of(teacher, tiny, valid)
    cross = kind == "cross_entropy"
    values = relative_entropy(student, teacher, mask, cross=cross, renormalize=renormalize, above=above)
    return values.mean(dim=1)


@loss
def qkv_relation(
    student: Side,
    teacher: Side,
    *,
    relation_heads: int = 48,
    pairs: Sequence[str] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""How differently tokens relate to one another: the softmax of their scaled dot products, head by head.

    .. math:: \sum_{(X, Y)} \tfrac{1}{A} \sum_{a=1}^{A} \mathrm{KL}\Big(
        \mathrm{softmax}\Big(\frac{X_a^t {Y_a^t}^\top}{\sqrt{D_t / A}}\Big) \,\Big\Vert\,
        \mathrm{softmax}\Big(\frac{X_a^s {Y_a^s}^\top}{\sqrt{D_s / A}}\Big) \Big)

    X and Y are the queries, keys or values of all heads side by side, cut into A relation heads. Widths and heads
    of the models may differ, and no attention weights are needed, so that both may run fused attention.

    Args:
        student: What the projections to queries, keys and values give, (B, L, D) each: one, or a tuple of up to
            three in this order.
        teacher: As many of the teacher, with the same tokens.
        relation_heads: A, divides both widths: 48 for a teacher of BERT-base's size in the paper, 64 for a large
            one, the number of attention heads in MiniLM.
        pairs: Which relations are added up, ``["qq", "kk", "vv"]``; q, k and v stand for the first, second and
            third tensor. By default each with itself.
        mask: (B, L), tokens that are 0 count neither as queries nor as keys.

    Returns:
        One value in nats per token, (B, L); 0 for masked ones. Zero where teacher equals student.

    Raises:
        ValueError: shapes that do not fit, heads that do not divide the widths, or an unknown pair.

    Example:
        >>> tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
        >>> [round(value, 4) for value in qkv_relation(tokens.flip(-2), tokens, relation_heads=1)[0].tolist()]
        [0.225, 0.3571]

    Reference:
        Wang et al. 2021, MiniLMv2, arXiv:2012.15828. The value relation of MiniLM, arXiv:2002.10957, is that of
        the values alone with the models' own number of heads.
    """
    parts = _paired_parts(student, teacher, mask)
    _check_heads(parts, relation_heads)
    relations = []
    for first, second in _chosen_pairs(pairs, len(parts)):
        ours, theirs = (relation_scores(parts[first][i], parts[second][i], relation_heads) for i in (0, 1))
        relations.append(relative_entropy(ours, theirs, mask).mean(dim=1))
    return torch.stack(relations).sum(dim=0)


def relation_scores(first: Tensor, second: Tensor, relation_heads: int) -> Tensor:
    """The scaled dot products of the tokens of two tensors (B, L, D), head by head, (B, A, L, L)."""
    size = first.shape[-1] // relation_heads
    left, right = (x.view(*x.shape[:2], relation_heads, size).transpose(1, 2) for x in (first, second))
    return left @ right.mT / math.sqrt(size)


def paired_tokens(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token features of both sides, (B, L, D) and (B, L, D'), in float32 or better, zero where masked.

    The teacher's carry no gradient.

    Raises:
        ValueError: they are other shapes, or they or the mask differ in B or L.
    """
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"tokens are (batch, length, features), with one batch and length on both sides, got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}; tap hidden states of the same tokens"
        )
    sides = full_precision(student).contiguous(), full_precision(teacher.detach()).contiguous()
    if mask is None:
        return sides
    if mask.shape != student.shape[:2]:
        raise ValueError(f"a mask {tuple(mask.shape)} does not fit tokens {tuple(student.shape)}; give (B, L)")
    return blank(sides[0], mask != 0), blank(sides[1], mask != 0)


def _paired_parts(student: Side, teacher: Side, mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    students, teachers = ((side,) if isinstance(side, Tensor) else tuple(side) for side in (student, teacher))
    if len(students) != len(teachers) or not 1 <= len(students) <= len(PARTS):
        raise ValueError(
            f"{len(students)} tensors of the student and {len(teachers)} of the teacher; "
            "give the same one to three of queries, keys and values on both sides"
        )
    return [paired_tokens(*parts, mask) for parts in zip(students, teachers, strict=True)]


def _chosen_pairs(pairs: Sequence[str] | None, count: int) -> list[tuple[int, int]]:
    """The positions of the tensors that are related.

    Raises:
        ValueError: a pair that is not two letters of the tensors given, or none.
    """
    known = PARTS[:count]
    named = [letter * 2 for letter in known] if pairs is None else list(pairs)
    wrong = [pair for pair in named if len(pair) != 2 or not set(pair) <= set(known)]
    if wrong or not named:
        raise ValueError(f"pairs {named} of {count} tensors; name each by two of the letters {', '.join(known)}")
    return [(known.index(pair[0]), known.index(pair[1])) for pair in named]


def _check_heads(parts: Sequence[tuple[Tensor, Tensor]], relation_heads: int) -> None:
    """Refuse a number of relation heads that does not divide all widths.

    Raises:
        ValueError: that, with the nearest number below that does.
    """
    if relation_heads < 1:
        raise ValueError(f"relation_heads must be 1 or more, got {relation_heads}")
    widths = [side.shape[-1] for part in parts for side in part]
    common = math.gcd(*widths)
    if common % relation_heads:
        best = max(n for n in range(1, min(common, relation_heads) + 1) if common % n == 0)
        raise ValueError(f"relation_heads={relation_heads} does not divide the widths {widths}; use {best}")


@loss
def token_gram_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.07, mask: Tensor | None = None
) -> Tensor:
    r"""How differently tokens resemble one another: the softmax of their cosines.

    .. math:: \mathrm{KL}\big( \mathrm{softmax}(\hat T \hat T^\top / \tau) \,\Vert\,
        \mathrm{softmax}(\hat S \hat S^\top / \tau) \big)

    Every row is divided by its length first; the widths may differ. There is no factor τ².

    Args:
        student: Token features (B, L, D).
        teacher: Token features (B, L, D') of the same tokens.
        temperature: τ > 0.
        mask: (B, L), tokens that are 0 count neither as rows nor as columns.

    Returns:
        One value in nats per token, (B, L); 0 for masked ones. Zero where teacher equals student.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.

    Example:
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]])
        >>> [round(value, 4) for value in token_gram_kl(tokens[..., :1], tokens, temperature=1.0)[0].tolist()]
        [0.01, 0.0726, 0.0728]

    Reference:
        The local term of LightlyTrain's distillation of vision transformers (its third version).
    """
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    rows = [unit_vectors(side) for side in paired_tokens(student, teacher, mask)]
    ours, theirs = ((side @ side.mT / temperature).unsqueeze(1) for side in rows)
    return relative_entropy(ours, theirs, mask).squeeze(1)
