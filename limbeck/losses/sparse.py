"""Losses against a teacher of whose logits only some are known: `limbeck.types.TopK`, `limbeck.types.Sampled`.

Both sides become distributions over K + 1 classes: the kept entries, and all others as one. These are exact at
each temperature for which the targets were made, so a divergence of them is a lower bound of that of the whole
distributions, and it is the same where all entries are kept.

Shape legend: V classes, K kept ones, ``...`` positions. T is the temperature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.losses.base import accepts_sparse, full_precision
from limbeck.losses.labels import known_labels, zero_unless
from limbeck.shapes import are_padded
from limbeck.sparse import block_rows
from limbeck.types import IGNORE_INDEX, LABELS, Sampled, Sparse, TopK

CONSTANT = "a constant added to all logits of a position counts for it, and they are kept up to such a constant"
COLUMNS = "it compares a class over the batch, and each position keeps other classes"
"""Why some losses cannot be computed from a few entries."""


def bucketed(student: Tensor, teacher: Sparse, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    r"""Logits of K + 1 classes, divided by the temperature: the kept ones, and behind them all others as one.

    .. math:: \Bigl( \frac{z_{i_1}}{T}, \dots, \frac{z_{i_K}}{T}, \log \sum_{j \notin K} \exp \frac{z_j}{T} \Bigr)

    Args:
        student: Logits (..., V).
        teacher: What is kept of logits (..., V).
        temperature: T, one of those that the targets were made for.

    Returns:
        The student's and the teacher's, (..., K + 1), in float32 or better; the gradient flows to all V of the
        student's logits, and none to the teacher.

    Raises:
        ValueError: targets drawn at random, another number of classes or positions, or a temperature at which
            they are not known.

    Example:
        >>> from limbeck.sparse import top_k
        >>> kept = top_k(torch.tensor([[5.0, 1.0, 1.0]]), k=1)
        >>> [[round(z, 2) for z in side[0].tolist()] for side in bucketed(torch.zeros(1, 3), kept)]
        [[0.0, 0.69], [0.0, -3.31]]
    """
    check_sides(student, teacher)
    if not isinstance(teacher, TopK):
        raise ValueError(
            f"targets drawn at random ({type(teacher).__name__}) are right on average in soft_cross_entropy "
            "alone, which has the gradient of forward_kl; use that loss, or keep the largest logits (TopK)"
        )
    column = known_column(teacher, temperature)
    log_rest = full_precision(teacher.log_rest.detach())[..., column : column + 1]
    known = torch.cat([_divided(teacher.values.detach(), temperature), log_rest], dim=-1)
    nothing = teacher.ids < 0
    some = torch.where(nothing, teacher.ids.amax(dim=-1, keepdim=True), teacher.ids)  # one that is kept anyway
    kept, rest = _parted(student, some.clamp(min=0), True, float(temperature))
    return torch.cat([kept.masked_fill(nothing, -torch.inf), rest], dim=-1), known


class Parted(torch.autograd.Function):
    """See `parted`; nothing as large as the logits is kept for backward, which makes their gradient alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, out: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Compute (N, K) and (N, 1) of (N, V), some positions at a time."""
        ctx.temperature = temperature
        parts = [parted(rows, at, left_out, temperature) for rows, at, left_out in _blocks(logits, ids, out)]
        kept, rest = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, ids, out, rest)
        return kept, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_kept: Tensor, of_rest: Tensor) -> tuple[Tensor, None, None, None]:
        """Compute exp(z / T - rest) / T times the gradient of the rest, and that of the kept in their places."""
        logits, ids, out, rest = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        rest, of_rest = rest.masked_fill(rest.isneginf(), 0.0), of_rest / ctx.temperature
        sides = (logits, ids, out, rest, of_kept / ctx.temperature, of_rest, gradient)
        for block, at, left_out, level, own, other, written in _blocks(*sides):
            shares = (_divided(block, ctx.temperature) - level).exp_().mul_(other)
            written.copy_(shares.scatter_(-1, left_out, 0.0).scatter_add_(-1, at, own))
        return gradient, None, None, None


def _blocks(*sides: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Some positions of each at a time; the first decides how many, (N, V)."""
    return zip(*(torch.split(side, block_rows(sides[0])) for side in sides), strict=True)


def parted(logits: Tensor, ids: Tensor, out: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Some entries of logits (N, V) at a temperature, (N, K), and log-sum-exp of all not in `out`, (N, 1)."""
    logits = _divided(logits, temperature)
    others = logits.scatter(-1, out, -torch.inf)
    largest = others.detach().amax(dim=-1, keepdim=True)
    none = largest.isneginf()  # there the exponentials sum to 0, whose logarithm has no gradient
    level = largest.masked_fill(none, 0.0)
    total = (others - level).exp().sum(dim=-1, keepdim=True)
    return logits.gather(-1, ids), (level + total.masked_fill(none, 1.0).log()).masked_fill(none, -torch.inf)


def _parted(logits: Tensor, ids: Tensor, apart: bool, temperature: float) -> tuple[Tensor, Tensor]:
    """Some entries (..., K), and log-sum-exp of all others, or of all unless they are `apart`, (..., 1)."""
    rows = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1])
    out = rows[1] if apart else rows[1][:, :0]
    if torch.compiler.is_compiling():  # it does the same by itself
        kept, rest = parted(*rows, out, temperature)
    else:
        kept, rest = Parted.apply(*rows, out, temperature)  # type: ignore[no-untyped-call]
    return kept.view(ids.shape), rest.view(*ids.shape[:-1], 1)


def sampled_cross_entropy(student: Tensor, teacher: Sampled, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Cross-entropy against entries drawn at random, without T²: on average that against all of them.

    .. math:: -\sum_k w_k(T) \log q_{i_k}

    Args:
        student: Logits (..., V).
        teacher: Entries drawn of logits (..., V).
        temperature: T, one of those that the weights were computed for.

    Returns:
        One value in nats per position, (...), with the mean of the dense value and gradient over draws.

    Raises:
        ValueError: another number of classes or positions, or a temperature that is not among theirs.

    Example:
        >>> from limbeck.sparse import sample
        >>> drawn = sample(torch.tensor([[9.0, -90.0]]), draws=8)
        >>> round(sampled_cross_entropy(torch.zeros(1, 2), drawn).item(), 4)
        0.6931

    Reference:
        Anshumann et al. 2025, Sparse Logit Sampling, arXiv:2503.16870.
    """
    check_sides(student, teacher)
    weights = full_precision(teacher.weights.detach())[..., known_column(teacher, temperature)]
    picked, whole = _parted(student, teacher.ids, False, float(temperature))
    return -(weights * zero_unless(weights != 0, picked - whole)).sum(dim=-1)


def most_probable(student: Tensor, teacher: Sparse) -> Tensor:
    """The teacher's decision at each position, (...,).

    Raises:
        ValueError: targets drawn at random, or another number of classes or positions.
    """
    check_sides(student, teacher)
    if not isinstance(teacher, TopK):
        raise ValueError(
            "the largest of a teacher's logits is not known from entries drawn at random "
            f"({type(teacher).__name__}); use soft_cross_entropy, or keep the largest logits (TopK)"
        )
    best = teacher.values.argmax(dim=-1, keepdim=True)
    return teacher.ids.gather(-1, best).squeeze(-1).clamp(min=0)


def known_places(student: Tensor, teacher: Tensor | TopK, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the labels stand among the classes that `softened_pair` compares, and where they count.

    Args:
        student: Logits (..., V).
        teacher: Logits (..., V), or `TopK` in their place: a label that is not kept is one of "all others".
        labels: Class indices (...,), -100 where there is none.

    Returns:
        See `limbeck.losses.labels.known_labels`, which says what is refused, too.

    Example:
        >>> from limbeck.sparse import top_k
        >>> kept = top_k(torch.tensor([[0.0, 5.0, 3.0]]).expand(3, 3), k=2)
        >>> known_places(torch.zeros(3, 3), kept, torch.tensor([2, 1, 0]))[0]
        tensor([1, 0, 2])
    """
    index, counts = known_labels(student, labels)
    if not isinstance(teacher, TopK):
        return index, counts
    found = teacher.ids == index.unsqueeze(-1)
    return torch.where(found.any(dim=-1), found.int().argmax(dim=-1), teacher.ids.shape[-1]), counts


def over_buckets(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a loss between logits accept `TopK`: it is then given logits of K + 1 classes, and labels among these.

    The last class stands for all that were not kept. What the loss does with logits must make sense for that: a
    function of probabilities does, one of the differences between logits does not.

    Args:
        function: ``(student, teacher, *, temperature, labels, ...)``; without a temperature, 1 is taken.

    Returns:
        The same for logits, and one that takes `TopK` too. Put it below `limbeck.losses.loss`.

    Example:
        >>> from limbeck.sparse import top_k
        >>> @over_buckets
        ... def brier(student, teacher, *, temperature=1.0):
        ...     p, q = ((side / temperature).softmax(-1) for side in (teacher, student))
        ...     return (p - q).square().sum(-1)
        >>> brier(torch.zeros(1, 4), top_k(torch.zeros(1, 4), k=2)).item()
        0.0
    """
    default = inspect.signature(function).parameters.get("temperature")

    @functools.wraps(function)
    def compared(student: Tensor, teacher: Tensor | Sparse, **options: Any) -> Tensor:
        if isinstance(teacher, Sparse):
            temperature = options.get("temperature", 1.0 if default is None else default.default)
            labels = options.get(LABELS)
            if labels is not None and isinstance(teacher, TopK):
                index, counts = known_places(student, teacher, labels)
                options[LABELS] = index if counts is None else index.masked_fill(~counts, IGNORE_INDEX)
            student, teacher = (side * temperature for side in bucketed(student, teacher, temperature))
        return function(student, teacher, **options)

    return accepts_sparse(compared)


def check_sides(student: Tensor, teacher: Sparse) -> None:
    """Refuse targets of other positions or other classes.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape == teacher.shape:
        return
    fact = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"{fact} before the last dimension; the teacher's targets are of other inputs")
    likely = (
        "" if are_padded(student.shape[-1], teacher.size) else "if these are vocabularies with other padding, "
    )
    raise ValueError(f"{fact}; {likely}add transforms=['vocabulary']")


def known_column(teacher: Sparse, temperature: float | Tensor) -> int:
    """The place of a temperature among those at which targets are known.

    Raises:
        ValueError: it is none of them, or one for each position.
    """
    if isinstance(temperature, Tensor):
        known = ", ".join(f"{t:g}" for t in teacher.temperatures)
        raise ValueError(
            f"targets that hold only some of the teacher's logits ({type(teacher).__name__}) are known at "
            f"temperature {known}, and not at one for each position; give one of these numbers"
        )
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    return teacher.column(temperature)


def _divided(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return full_precision(logits) if temperature == 1 else full_precision(logits) / temperature
