"""What is done to both sides before a logit loss compares them, and temperatures that each example has of its own.

Both compose with any loss between logits. No gradient reaches the teacher; the student's flows through.

Shape legend: B examples, L positions, C classes; ``(..., C)`` stands for (B, C) or (B, L, C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.losses.base import full_precision, same_shape
from limbeck.losses.features import cosine
from limbeck.losses.labels import at_label, known_labels
from limbeck.reduce import masked_mean
from limbeck.registry import Registry, check_options
from limbeck.types import Sampled, Sparse, TopK

TRANSFORMS: Registry[Callable[..., tuple[Tensor, Any]]] = Registry("transform")
"""Functions ``(student, teacher, *, labels=None, options) -> (student, teacher)``."""

TEMPERATURES: Registry[Callable[..., Tensor]] = Registry("temperature")
"""Functions ``(student, teacher, *, mask=None, options) -> (...,)`` of logits (..., C), above 0."""


@TRANSFORMS.register
def standardize(
    student: Tensor, teacher: Tensor, *, labels: Tensor | None = None, epsilon: float = 1e-7
) -> tuple[Tensor, Tensor]:
    r"""Bring the logits of each position to mean 0 and deviation 1, so that only their relations are taught.

    .. math:: \frac{z - \bar z}{\varepsilon + \sqrt{\tfrac{1}{C - 1} \sum_c (z_c - \bar z)^2}}

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C). On both sides, a class at minus infinity is not there, and stays.
        labels: Not needed.
        epsilon: Added to the deviation. Where that is 0, the result is 0 and has no gradient.

    Returns:
        Both sides, (..., C), in float32 or better.

    Example:
        >>> standardize(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]]))
        (tensor([[-1.0000,  0.0000,  1.0000]]), tensor([[-1.,  0.,  1.]]))

    Reference:
        Sun et al. 2024, Logit Standardization in Knowledge Distillation, arXiv:2403.01427; a temperature of 2
        and a weight of 9 go with it.
    """
    return _standardized(student, epsilon), _standardized(teacher.detach(), epsilon)


def _standardized(logits: Tensor, epsilon: float) -> Tensor:
    logits = full_precision(logits)
    there = ~logits.isneginf()
    none = torch.zeros_like(logits)
    count = there.sum(dim=-1, keepdim=True)
    mean = torch.where(there, logits, none).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(there, logits - mean, none)
    variance = centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    flat = variance == 0
    scale = 1 / (epsilon + torch.where(flat, torch.ones_like(variance), variance).sqrt())
    scaled = centred * torch.where(flat, torch.zeros_like(scale), scale)
    return torch.where(there, scaled, torch.full_like(logits, -torch.inf))


@TRANSFORMS.register
def probability_shift(student: Tensor, teacher: Tensor, *, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Put the teacher right where it is wrong: its largest logit and that of the label change places.

    Args:
        student: Logits (..., C), returned as they are.
        teacher: Logits (..., C), not changed in place.
        labels: Class indices (...,); a position with label -100 stays as it is.

    Returns:
        Both sides, (..., C).

    Raises:
        ValueError: there are no labels, or they do not fit the teacher's logits.

    Example:
        >>> probability_shift(torch.zeros(1, 3), torch.tensor([[5.0, 2.0, 1.0]]), labels=torch.tensor([1]))[1]
        tensor([[2., 5., 1.]])

    Reference:
        Wen et al. 2019, Preparing Lessons, arXiv:1911.07471; TextBrewer's changes the teacher's logits in place.
    """
    if labels is None:
        raise ValueError("probability_shift needs labels, and there are none; add them to the batch")
    teacher = teacher.detach()
    index, counts = known_labels(teacher, labels)
    best = teacher.argmax(dim=-1)
    if counts is not None:
        index = torch.where(counts, index, best)  # changing places with itself
    shifted = teacher.scatter(-1, best.unsqueeze(-1), at_label(teacher, index).unsqueeze(-1))
    return student, shifted.scatter(-1, index.unsqueeze(-1), at_label(teacher, best).unsqueeze(-1))


@TRANSFORMS.register
def log_of_probabilities(
    student: Tensor, teacher: Tensor, *, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Take the logarithm of a side that holds probabilities, so that both sides are logits.

    Args:
        student: Logits (..., C), or probabilities: no entry below 0, and every row sums to 1 (rows of nothing but
            zeros, as at masked positions, are not asked).
        teacher: Likewise, by itself: one side may hold probabilities and the other logits.
        labels: Not needed.

    Returns:
        Both sides, (..., C); a probability of 0 counts as the smallest normal number of its type.

    Example:
        >>> log_of_probabilities(torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, 1.0]]))
        (tensor([[-0.6931, -0.6931]]), tensor([[3., 1.]]))

    Reference:
        Neural Compressor's divergence between features, which takes for probabilities what sums to 1 within 0.2.
    """
    return _log_if_probabilities(student), _log_if_probabilities(teacher.detach())


def _log_if_probabilities(side: Tensor) -> Tensor:
    rows = side.detach().float().flatten(0, -2) if side.ndim > 1 else side.detach().float()[None]
    asked = (rows != 0).any(dim=-1)
    sums = torch.where(asked, rows.sum(dim=-1), torch.ones_like(rows[..., 0]))
    if (rows < 0).any() or not ((sums - 1).abs() < 0.02).all():  # bfloat16 rounds by up to 0.004
        return side
    side = full_precision(side)
    return side.clamp(min=torch.finfo(side.dtype).tiny).log()


@TRANSFORMS.register
def vocabulary(
    student: Tensor, teacher: Tensor | Sparse, *, labels: Tensor | None = None, size: int | None = None
) -> tuple[Tensor, Tensor | Sparse]:
    """Compare the entries that both vocabularies have; what lies beyond (padding) gets no probability.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C'), for the same tokens in the same order, or a few entries in their place. Of top-k
            targets, kept entries beyond lose their probability; what padding has of "all others" cannot be told
            apart, so cut the teacher's logits when the targets are made. Entries drawn beyond lose their weight.
        labels: Not needed.
        size: The number of real entries, the tokenizer's length; by default the smaller of C and C'.

    Returns:
        Both sides, (..., size).

    Raises:
        ValueError: `size` is larger than a side, or below 1.

    Example:
        >>> [side.shape[-1] for side in vocabulary(torch.zeros(1, 8), torch.zeros(1, 10), size=7)]
        [7, 7]

    Reference:
        Models of one family with vocabularies padded to different multiples, 151,936 and 152,064 (Qwen2.5).
    """
    common = min(student.shape[-1], teacher.shape[-1])
    size = common if size is None else size
    if not 1 <= size <= common:
        raise ValueError(
            f"a vocabulary of size {size} does not fit a student with {student.shape[-1]} and a teacher with "
            f"{teacher.shape[-1]} entries; give the tokenizer's length, at most {common}"
        )
    cut = _cut(teacher, size) if isinstance(teacher, Sparse) else teacher.detach()[..., :size]
    return student[..., :size], cut


def _cut(teacher: Sparse, size: int) -> Sparse:
    """Sparse targets without the entries from `size` on."""
    beyond = teacher.ids >= size
    if isinstance(teacher, TopK):
        values = teacher.values.masked_fill(beyond, -torch.inf)
        return replace(teacher, ids=teacher.ids.masked_fill(beyond, -1), values=values, size=size)
    assert isinstance(teacher, Sampled)
    weights = teacher.weights.masked_fill(beyond.unsqueeze(-1), 0.0)
    return replace(teacher, ids=teacher.ids.masked_fill(beyond, 0), weights=weights, size=size)


OF_SPARSE = frozenset({vocabulary})
"""The transforms that need not know all of the teacher's logits."""


@dataclass(frozen=True)
class Transform:
    """A registered transform with its options, ready to be called."""

    function: Callable[..., tuple[Tensor, Any]]
    options: Mapping[str, Any]

    def __call__(
        self, student: Tensor, teacher: Tensor | Sparse, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | Sparse]:
        """Transform both sides; labels may be None where they are not needed."""
        if isinstance(teacher, Sparse):
            _refuse(self.function, teacher, self.function not in OF_SPARSE)
            return self.function(student, teacher, labels=labels, **self.options)
        return self.function(student, teacher.detach(), labels=labels, **self.options)


def build_transform(spec: str | Mapping[str, Any]) -> Transform:
    """Make a transform from its name, or from ``{"kind": name, **options}``.

    Returns:
        A callable ``(student, teacher, labels) -> (student, teacher)``.

    Raises:
        ValueError: unknown kind.
        TypeError: an option that the kind does not have.

    Example:
        >>> cut = build_transform({"kind": "vocabulary", "size": 3})
        >>> cut(torch.zeros(1, 4), torch.zeros(1, 5), None)[1].shape
        torch.Size([1, 3])
    """
    return Transform(*_parsed(spec, TRANSFORMS, "labels"))


def _refuse(function: Callable[..., Any], teacher: object, wrong: bool) -> None:
    if wrong:
        raise ValueError(
            f"{function.__name__} needs all of the teacher's logits, and these targets hold only some of them "
            f"({type(teacher).__name__}); leave it out, or keep all logits"
        )


def _parsed(
    spec: str | Mapping[str, Any], registry: Registry[Callable[..., Any]], supplied: str
) -> tuple[Callable[..., Any], dict[str, Any]]:
    options = {"kind": spec} if isinstance(spec, str) else dict(spec)
    if "kind" not in options:
        raise ValueError(f"a {registry.kind} needs the key 'kind', got {sorted(options)}")
    kind = options.pop("kind")
    function = registry.get(kind)
    check_options(function, options, {supplied}, f"{registry.kind} {kind!r}")
    return function, options


@TEMPERATURES.register
def flsw(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    base: float = 4.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    minimum: float = 0.1,
    epsilon: float = 0.0,
) -> Tensor:
    r"""Soften less where the student's logits point elsewhere than the teacher's: such examples weigh more.

    .. math:: \max(T_{min}, T + \beta (\bar w - w)), \quad w = (1 - \cos(z_s, z_t))^\gamma

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        mask: (...,), 0 where a position does not count in the mean of w.
        base: T, the temperature of an average example.
        beta: β, how far it may go from there.
        gamma: γ, the power of the weight.
        minimum: The smallest temperature given. TextBrewer has none: a large β makes its temperatures negative.
        epsilon: Added to the lengths of both logits in the cosine; 0.0001 in TextBrewer.

    Returns:
        One temperature per position, (...,), at least `minimum`, without gradient. The mean is over the batch.

    Raises:
        ValueError: the shapes differ, or `base` or `minimum` is not positive.

    Example:
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> flsw(student, teacher, base=4.0)
        tensor([4.5000, 3.5000])

    Reference:
        Wen et al. 2019, Preparing Lessons (dynamic temperature, focal-loss style), arXiv:1911.07471.
    """
    same_shape(student, teacher)
    there = ~(student.isneginf() | teacher.isneginf())
    sides = [torch.where(there, side.detach(), torch.zeros_like(side)) for side in (student, teacher)]
    distances = cosine(*sides)
    if epsilon:
        lengths = [torch.linalg.vector_norm(full_precision(side), dim=-1) for side in sides]
        distances = 1 - (1 - distances) * (lengths[0] * lengths[1]) / (
            (lengths[0] + epsilon) * (lengths[1] + epsilon)
        )
    weights = distances.clamp(min=0) ** gamma  # rounding can bring it below 0
    return _around(base, beta, weights, mask, minimum)


@TEMPERATURES.register
def cwsm(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    base: float = 4.0,
    beta: float = 1.0,
    minimum: float = 0.1,
) -> Tensor:
    r"""Soften less where the student is unsure: such examples weigh more.

    .. math:: \max(T_{min}, T + \beta (\bar w - w)), \quad w = \frac{1}{\max_c q_c + 0.001}

    Args:
        student: Logits (..., C).
        teacher: Not looked at.
        mask: (...,), 0 where a position does not count in the mean of w.
        base: T, the temperature of an average example.
        beta: β, how far it may go from there.
        minimum: The smallest temperature given. TextBrewer has none: a large β makes its temperatures negative.

    Returns:
        One temperature per position, (...,), at least `minimum`, without gradient. The mean is over the batch.

    Raises:
        ValueError: `base` or `minimum` is not positive.

    Example:
        >>> cwsm(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), torch.zeros(2, 2), base=4.0)
        tensor([3.5015, 4.4985])

    Reference:
        Wen et al. 2019, Preparing Lessons (confidence weighted by the student's maximum), arXiv:1911.07471.
    """
    largest = torch.softmax(full_precision(student.detach()), dim=-1).amax(dim=-1)
    return _around(base, beta, 1 / (largest + 1e-3), mask, minimum)


def _around(base: float, beta: float, weights: Tensor, mask: Tensor | None, minimum: float) -> Tensor:
    """``base``, more where a weight is below their mean and less where it is above."""
    if not (base > 0 and minimum > 0):
        raise ValueError(f"a temperature must be positive, got base {base} and minimum {minimum}")
    mean = masked_mean(weights.flatten(), None if mask is None else mask.flatten())
    return (base + beta * (mean - weights)).clamp(min=minimum)


@dataclass(frozen=True)
class OwnTemperature:
    """A registered temperature that each position has of its own, ready to be called."""

    function: Callable[..., Tensor]
    options: Mapping[str, Any]

    @torch.no_grad()
    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The temperature of each position, (...,), from both sides' logits (..., C)."""
        _refuse(self.function, teacher, isinstance(teacher, Sparse))
        return self.function(student, teacher, mask=mask, **self.options)

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.function.__name__}({options})"


def build_temperature(spec: str | Mapping[str, Any]) -> OwnTemperature:
    """Make a temperature that each position has of its own, from a name or ``{"kind": name, **options}``.

    Returns:
        A callable ``(student, teacher, mask=None) -> (...,)`` of both sides' logits; its result goes into any
        loss with the option ``temperature``.

    Raises:
        ValueError: unknown kind.
        TypeError: an option that the kind does not have.

    Example:
        >>> from limbeck.losses import forward_kl
        >>> student, teacher = torch.eye(2), torch.ones(2, 2)
        >>> own = build_temperature({"kind": "cwsm", "base": 2.0})
        >>> own, forward_kl(student, teacher, temperature=own(student, teacher)).shape
        (cwsm(base=2.0), torch.Size([2]))
    """
    return OwnTemperature(*_parsed(spec, TEMPERATURES, "mask"))
