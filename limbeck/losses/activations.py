"""Losses between feature maps, point by point, for methods with their own idea of which points count.

Shape legend: B examples, C channels, H and W a feature map's height and width; ``...`` any dimensions behind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.losses.base import full_precision, loss
from limbeck.losses.features import paired_features, per_channel, unit_vectors
from limbeck.losses.maps import paired_maps


def total(values: Tensor) -> Tensor:
    """The sum over all that an example has, (B,)."""
    return values.flatten(1).sum(dim=1)


def keep_nan(values: Tensor, teacher: Tensor) -> Tensor:
    """Put back the teacher's NaNs, which no comparison notices."""
    return torch.where(teacher.isnan(), teacher, values)


@loss(project="masked_generator")
def mgd(student: Tensor, teacher: Tensor, *, alpha: float = 2e-5) -> Tensor:
    r"""Masked generative distillation: summed squares of what a generator misses from a masked student map.

    .. math:: \alpha \sum_{chw} (s_{chw} - t_{chw})^2

    The masking and the generator are the projection ``masked_generator``; this is the comparison behind it.

    Args:
        student: Generated maps (B, C, H, W), of the teacher's shape.
        teacher: Feature maps (B, C, H, W).
        alpha: Scale of the sum.

    Returns:
        One value per example, (B,).

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> mgd(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), alpha=0.5)
        tensor([9.])

    Reference:
        Yang et al. 2022, Masked Generative Distillation, arXiv:2205.01529; α is that of detection.
    """
    student, teacher = paired_features(student, teacher)
    return alpha * total((student - teacher).square())


@loss
def ab(student: Tensor, teacher: Tensor, *, margin: float = 1.0) -> Tensor:
    r"""Activation boundaries: every neuron of the student is active, by a margin, where the teacher's is.

    .. math:: \sum_{chw} \begin{cases} \max(0, m - s_{chw})^2 & t_{chw} > 0 \\
        \max(0, m + s_{chw})^2 & \text{else} \end{cases}

    Args:
        student: Pre-activations (B, ...), already projected to the teacher's shape.
        teacher: Pre-activations of the same shape.
        margin: m, how far behind the boundary is far enough.

    Returns:
        One value per example, (B,). Not zero at equality, where the teacher is within its margin.

    Raises:
        ValueError: the shapes differ, or the margin is negative.

    Example:
        >>> ab(torch.tensor([[0.5, 0.5, 2.0]]), torch.tensor([[3.0, -3.0, 0.1]]))
        tensor([2.5000])

    Reference:
        Heo et al. 2019, Distillation of Activation Boundaries, arXiv:1811.03233. The authors' code, RepDistiller
        and mmrazor multiply by 3/1000; torchdistill does not.
    """
    if not margin >= 0:
        raise ValueError(f"the margin must not be negative, got {margin}")
    student, teacher = paired_features(student, teacher)
    short = torch.where(teacher > 0, margin - student, margin + student).relu()
    return keep_nan(total(short.square()), total(teacher.detach()))


@loss(borrows=("margin",))
def ofd(student: Tensor, teacher: Tensor, *, margin: Tensor | float | nn.BatchNorm2d) -> Tensor:
    r"""Overhauled feature distillation: summed squares, save where both are inactive and the student more so.

    .. math:: \sum_{chw} (s - \tilde t)^2 \, [s > \tilde t \text{ or } \tilde t > 0] \quad \tilde t = \max(t, m_c)

    Args:
        student: Pre-activations (B, C, H, W), projected to the teacher's channels; a larger map is pooled.
        teacher: Pre-activations (B, C, H', W').
        margin: m, a negative number, one per channel (C,), or the teacher's batch normalisation, from which
            `ofd_margin` takes them (in a term its path).

    Returns:
        One value per example, (B,).

    Raises:
        ValueError: no feature maps, the examples or channels differ, or there is not one margin per channel.

    Example:
        >>> student, teacher = torch.tensor([[[[-3.0, 2.0, 0.0]]]]), torch.tensor([[[[-2.0, 1.0, -5.0]]]])
        >>> ofd(student, teacher, margin=-1.0)
        tensor([2.])

    Reference:
        Heo et al. 2019, A Comprehensive Overhaul of Feature Distillation, arXiv:1904.01866. The authors' code
        multiplies by 1/1000, and halves the weight with each stage from the last one down.
    """
    student, teacher = paired_maps(student, teacher)
    margin = ofd_margin(margin) if isinstance(margin, nn.Module) else margin
    lowest = torch.as_tensor(margin, dtype=teacher.dtype, device=teacher.device).detach()
    target = torch.maximum(teacher, per_channel(lowest, teacher))
    counts = (student > target) | (target > 0)
    squares = (student - target).square()
    return total(keep_nan(torch.where(counts, squares, torch.zeros_like(squares)), squares.detach()))


def ofd_margin(norm: nn.BatchNorm2d) -> Tensor:
    """The margins of `ofd`: what a teacher's channels are on average where they are negative.

    Args:
        norm: The batch normalisation that makes the pre-activations; a channel is normal, with the mean ``bias``
            and the deviation ``|weight|``.

    Returns:
        (C,), negative. A channel that is negative in less than one case of a thousand gets -3 deviations.

    Raises:
        ValueError: the normalisation has no weights.

    Example:
        >>> ofd_margin(torch.nn.BatchNorm2d(1))
        tensor([-0.7979])
    """
    if not norm.affine:
        raise ValueError("a batch normalisation without weights does not know its margins; pass numbers")
    deviation, mean = full_precision(norm.weight.detach()).abs(), full_precision(norm.bias.detach())
    ratio = mean / deviation.clamp_min(1e-12)
    share = torch.special.ndtr(-ratio)
    density = (-0.5 * ratio.square()).exp() / math.sqrt(2 * math.pi)
    return torch.where(share > 0.001, mean - deviation * density / share, -3 * deviation)


@loss
def factor_transfer(student: Tensor, teacher: Tensor, *, p: float = 1.0, p1: float | None = None) -> Tensor:
    r"""Difference of two factors, each divided by its length.

    .. math:: \operatorname{mean} \Big| \frac{f_s}{\lVert f_s \rVert} - \frac{f_t}{\lVert f_t \rVert} \Big|

    Args:
        student: The translator's factor (B, ...), already projected to the teacher's shape.
        teacher: The paraphraser's factor, of the same shape.
        p: 1 for the mean absolute difference as above, else the p-norm of the difference.
        p1: None takes the factors as they are; a number first takes the mean over channels of ``|f|^p1``.

    Returns:
        One value per example, (B,). A zero factor stays zero.

    Raises:
        ValueError: the shapes differ, or a power below 1.

    Example:
        >>> factor_transfer(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([1.])

    Reference:
        Kim et al. 2018, Paraphrasing Complex Network: Network Compression via Factor Transfer, arXiv:1802.04977.
        torchdistill and mmrazor are p1=None; RepDistiller is p1=2.
    """
    for power in (p, p1):
        if power is not None and not power >= 1:
            raise ValueError(f"a power must be at least 1, got {power}")
    student, teacher = paired_features(student, teacher)
    if p1 is not None:
        student, teacher = (x.abs().pow(p1).mean(dim=1) for x in (student, teacher))
    difference = unit_vectors(student.flatten(1)) - unit_vectors(teacher.flatten(1))
    return difference.abs().mean(dim=1) if p == 1 else torch.linalg.vector_norm(difference, p, dim=1)
