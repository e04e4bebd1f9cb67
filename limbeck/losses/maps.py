"""Losses between the statistics of feature maps: where they look, how their channels go together.

Shape legend: B examples, C channels, H and W a feature map's height and width, N = H·W; L positions, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss, mean_square, same_shape
from limbeck.losses.features import unit_vectors
from limbeck.losses.logits import forward_kl
from limbeck.reduce import blank
from limbeck.shapes import mismatch

Side = Tensor | Sequence[Tensor]
"""What a loss reads of one model: a tensor, or several from several places."""


def check_maps(student: Tensor, teacher: Tensor, *, any_channels: bool = False) -> None:
    """Refuse what are no feature maps of the same examples, or not of the same number of channels.

    Raises:
        ValueError: no feature maps, or they differ in more than their height and width.
    """
    if student.ndim != 4 or teacher.ndim != 4:
        raise ValueError(
            f"feature maps are (B, C, H, W), got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "tap a convolutional layer"
        )
    if student.shape[0] != teacher.shape[0] or (student.shape[1] != teacher.shape[1] and not any_channels):
        raise ValueError(mismatch(student.shape, teacher.shape))


def paired_maps(student: Tensor, teacher: Tensor, *, any_channels: bool = False) -> tuple[Tensor, Tensor]:
    """Checked, in float32 or better, the larger averaged down to the smaller, the teacher without gradient."""
    check_maps(student, teacher, any_channels=any_channels)
    return _one_size(full_precision(student), full_precision(teacher.detach()))


def _one_size(left: Tensor, right: Tensor, pool: Literal["avg", "max"] = "avg") -> tuple[Tensor, Tensor]:
    """Pool the larger of two maps to the height and width of the smaller."""
    size = (min(left.shape[2], right.shape[2]), min(left.shape[3], right.shape[3]))
    shrink = F.adaptive_avg_pool2d if pool == "avg" else F.adaptive_max_pool2d
    left, right = (x if x.shape[2:] == size else shrink(x, size) for x in (left, right))
    return left, right


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def _pair_of(side: Side, loss_name: str) -> tuple[Tensor, Tensor]:
    """The two tensors of a side, in float32 or better."""
    if isinstance(side, Tensor) or len(side) != 2:
        count = 1 if isinstance(side, Tensor) else len(side)
        raise ValueError(f"{loss_name} compares two layers of each model, got {count}; tap two of each")
    first, second = side
    return full_precision(first), full_precision(second)


@loss
def attention_transfer(
    student: Tensor, teacher: Tensor, *, p: float = 2.0, mode: Literal["code", "paper"] = "code"
) -> Tensor:
    r"""Difference of the two spatial attention maps, the energy of all channels at each place.

    .. math:: \tfrac{1}{N} \Big\lVert \frac{a_s}{\lVert a_s \rVert} - \frac{a_t}{\lVert a_t \rVert} \Big\rVert^2
        \quad a_{hw} = \tfrac{1}{C} \sum_c |f_{chw}|^p

    Args:
        student: Feature maps (B, C, H, W); channels may differ, and a larger map is pooled to the smaller.
        teacher: Feature maps (B, C', H', W').
        p: Power of the activations, at least 1.
        mode: ``"code"`` is the formula above, ``"paper"`` the length of the difference instead.

    Returns:
        One value per example, (B,): in [0, 2/N], or in [0, 1.42] for the paper's mode.

    Raises:
        ValueError: no feature maps, other examples, or a wrong option.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]])
        >>> attention_transfer(student, teacher), attention_transfer(student, teacher, mode="paper")
        (tensor([1.]), tensor([1.4142]))

    Reference:
        Zagoruyko and Komodakis 2017, Paying More Attention to Attention, arXiv:1612.03928. The authors' code, and
        most others, is not the paper's formula; mdistiller and RepDistiller lack the absolute value, which counts
        for odd p.
    """
    _one_of("mode", mode, ("code", "paper"))
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    maps = paired_maps(student, teacher, any_channels=True)
    looks, target = (unit_vectors(_energy(x, p).mean(dim=1).flatten(1)) for x in maps)
    if mode == "code":
        return mean_square(looks, target)
    lengths: Tensor = torch.linalg.vector_norm(looks - target, dim=1)
    return lengths


def _energy(maps: Tensor, p: float) -> Tensor:
    """``|f|^p``; an even power needs no absolute value."""
    return maps.square() if p == 2 else maps.abs().pow(p)


@loss
def nst(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Literal["poly", "linear", "gaussian"] = "poly",
    degree: int = 2,
    offset: float = 0.0,
    bandwidth: float | None = None,
) -> Tensor:
    r"""Squared maximum mean discrepancy between the student's and the teacher's channels, as points in space.

    .. math:: \operatorname{mean}_{cc'} k(s_c, s_{c'}) + k(t_c, t_{c'}) - 2 k(s_c, t_{c'})
        \quad k(x, y) = (x \cdot y + o)^d

    Every channel is first divided by its length over all places.

    Args:
        student: Feature maps (B, C, H, W); channels may differ, and a larger map is pooled to the smaller.
        teacher: Feature maps (B, C', H', W').
        kernel: ``"poly"`` as above, ``"linear"``, or ``"gaussian"``: exp(-|x - y|² / 2σ²).
        degree: d of the polynomial kernel.
        offset: o of the polynomial kernel.
        bandwidth: σ² of the Gaussian kernel; by default the mean squared distance of the teacher's channels.

    Returns:
        One value per example, (B,); in [0, 2] with the usual options.

    Raises:
        ValueError: no feature maps, other examples, or a wrong option.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]])
        >>> nst(student, teacher)
        tensor([2.])

    Reference:
        Huang and Wang 2017, Like What You Like: Neuron Selectivity Transfer, arXiv:1707.01219.
    """
    _one_of("kernel", kernel, ("poly", "linear", "gaussian"))
    if degree < 1 or (bandwidth is not None and not bandwidth > 0):
        raise ValueError(f"degree must be at least 1 and bandwidth positive, got {degree} and {bandwidth}")
    maps = paired_maps(student, teacher, any_channels=True)
    points, targets = (unit_vectors(x.flatten(2)) for x in maps)
    spread = (bandwidth or _typical_distance(targets)) if kernel == "gaussian" else 1.0

    def similarity(left: Tensor, right: Tensor) -> Tensor:
        if kernel == "gaussian":
            values = (-_squared_distances(left, right) / (2 * spread)).exp()
        else:
            values = left @ right.mT
            values = (values + offset) ** degree if kernel == "poly" else values
        return values.mean(dim=(1, 2))

    return similarity(points, points) + similarity(targets, targets) - 2 * similarity(points, targets)


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """Between all pairs of rows: (B, C, N) and (B, C', N) to (B, C, C')."""
    squares = left.square().sum(dim=-1)[:, :, None] + right.square().sum(dim=-1)[:, None, :]
    return (squares - 2 * left @ right.mT).clamp_min(0)  # rounding may go below


def _typical_distance(points: Tensor) -> Tensor:
    """The mean squared distance of an example's points, (B, 1, 1); not zero where they are all the same."""
    distances = _squared_distances(points, points)
    return distances.mean(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(distances.dtype).eps)


@loss
def cwd(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Channel-wise divergence: every channel is a distribution over places, and these are compared.

    .. math:: \tfrac{T^2}{C} \sum_c \sum_{hw} p_{chw} (\log p_{chw} - \log q_{chw})
        \quad p_c = \operatorname{softmax}_{hw}(t_c / T)

    Args:
        student: Feature maps or dense logits (B, C, H, W), already projected to the teacher's shape.
        teacher: Feature maps of the same shape.
        temperature: T, softens both distributions.

    Returns:
        One value in nats (times T²) per example, (B,).

    Raises:
        ValueError: the shapes differ, no feature maps, or the temperature is not positive.

    Example:
        >>> cwd(torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[2.0, 0.0]]]])).item()
        0.327...

    Reference:
        Shu et al. 2021, Channel-wise Knowledge Distillation for Dense Prediction, arXiv:2011.13256.
    """
    check_maps(student, teacher)
    same_shape(student, teacher)
    return forward_kl(student.flatten(2), teacher.flatten(2), temperature=temperature).mean(dim=1)


@loss
def pearson(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Half the mean squared difference of maps that are standardised channel by channel.

    .. math:: \tfrac{1}{2CN} \sum_{chw} (\hat s_{chw} - \hat t_{chw})^2 \approx 1 - \rho
        \quad \hat f_c = \frac{f_c - \operatorname{mean}_{bhw} f_c}{\operatorname{std}_{bhw} f_c + 10^{-6}}

    Mean and deviation are those of a channel in the whole batch, so an example's value depends on the others.

    Args:
        student: Feature maps (B, C, H, W); another height or width is resized to the teacher's.
        teacher: Feature maps (B, C, H', W').

    Returns:
        One value per example, (B,); the mean over the batch lies in [0, 2]. A constant channel is zero.

    Raises:
        ValueError: no feature maps, or the examples or channels differ.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[5.0, 3.0, 1.0]]]])
        >>> round(pearson(student, teacher).item(), 4)
        1.3333

    Reference:
        Cao et al. 2022, PKD: General Distillation for Object Detectors via Pearson Correlation, arXiv:2207.02039.
        As in the authors' code the deviation divides by n - 1, so that the value is (1 - ρ)(n - 1)/n.
    """
    check_maps(student, teacher)
    student, teacher = full_precision(student), full_precision(teacher.detach())
    if student.shape != teacher.shape:
        student = F.interpolate(student, teacher.shape[2:], mode="bilinear")
    difference = _standardized_channels(student) - _standardized_channels(teacher)
    return 0.5 * difference.square().mean(dim=(1, 2, 3))


def _standardized_channels(maps: Tensor) -> Tensor:
    """Every channel with mean 0 and variance 1 over the batch; a constant one is zero, with a finite gradient."""
    centred = maps - maps.mean(dim=(0, 2, 3), keepdim=True)
    count = maps.numel() // maps.shape[1]
    length: Tensor = torch.linalg.vector_norm(centred, dim=(0, 2, 3), keepdim=True)
    deviation = length / math.sqrt(max(count - 1, 1))
    return centred / (deviation + 1e-6)


@loss
def hcl(student: Side, teacher: Side, *, output_sizes: Sequence[int] = (4, 2, 1)) -> Tensor:
    r"""Hierarchical context: the mean squared difference of the maps, and of their coarser and coarser averages.

    .. math:: \frac{1}{\sum_l 2^{-l}} \sum_{l \ge 0} 2^{-l} \operatorname{mean} (s^{(l)} - t^{(l)})^2

    Level 0 is the map itself; a level that is not coarser than the map is left out.

    Args:
        student: Feature maps (B, C, H, W), or several whose values add up; a larger map is pooled to the smaller.
        teacher: Feature maps with the same channels, as many.
        output_sizes: Height and width of the levels from 1 on.

    Returns:
        One value per example, (B,).

    Raises:
        ValueError: no feature maps, not as many, other examples or channels, or a level without size.

    Example:
        >>> hcl(torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]]), torch.zeros(1, 1, 2, 2))
        tensor([0.7500])

    Reference:
        Chen et al. 2021, Distilling Knowledge via Knowledge Review, arXiv:2104.09044.
    """
    if any(size < 1 for size in output_sizes):
        raise ValueError(f"output_sizes must be positive, got {', '.join(map(str, output_sizes))}")
    students = (student,) if isinstance(student, Tensor) else tuple(student)
    teachers = (teacher,) if isinstance(teacher, Tensor) else tuple(teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(f"hcl got {len(students)} student maps for {len(teachers)} of the teacher; tap as many")
    values = [_levels(*paired_maps(s, t), output_sizes) for s, t in zip(students, teachers, strict=True)]
    return torch.stack(values).sum(dim=0)


def _levels(student: Tensor, teacher: Tensor, output_sizes: Sequence[int]) -> Tensor:
    difference = student - teacher  # averaging is linear: one pyramid instead of two
    coarser = [size for size in output_sizes if size < min(difference.shape[2:])]
    levels = [difference, *(F.adaptive_avg_pool2d(difference, size) for size in coarser)]
    weights = [0.5**level for level in range(len(levels))]
    values = [w * x.square().mean(dim=(1, 2, 3)) for w, x in zip(weights, levels, strict=True)]
    return torch.stack(values).sum(dim=0) / sum(weights)


@loss
def channel_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared difference of how similar the channels are to each other.

    .. math:: \tfrac{1}{C} \sum_c \Big\lVert \frac{g_{s,c}}{\lVert g_{s,c} \rVert}
        - \frac{g_{t,c}}{\lVert g_{t,c} \rVert} \Big\rVert^2 \quad g_{cc'} = f_c \cdot f_{c'}

    Args:
        student: Feature maps (B, C, H, W), projected to the teacher's channels; a larger map is pooled.
        teacher: Feature maps (B, C, H', W').

    Returns:
        One value in [0, 4] per example, (B,).

    Raises:
        ValueError: no feature maps, or the examples or channels differ.

    Example:
        >>> student, teacher = torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[1.0]], [[1.0]]]])
        >>> round(channel_similarity(student, teacher).item(), 4)
        0.7929

    Reference:
        Liu et al. 2021, Inter-Channel Correlation for Knowledge Distillation (ICKD), ICCV. The authors' code
        divides the mean over the batch by the batch size once more.
    """
    left, right = (x.flatten(2) for x in paired_maps(student, teacher))
    difference = unit_vectors(left @ left.mT) - unit_vectors(right @ right.mT)
    return difference.square().sum(dim=2).mean(dim=1)


@loss
def fsp(
    student: Side,
    teacher: Side,
    *,
    mask: Tensor | None = None,
    distance: Literal["mse", "columns"] = "mse",
    pool: Literal["avg", "max"] = "avg",
) -> Tensor:
    r"""Flow between two layers: how the channels of one go together with those of the other, compared.

    .. math:: \tfrac{1}{C C'} \lVert G_s - G_t \rVert_F^2 \quad G_{cc'} = \tfrac{1}{N} \sum_{hw} f_{chw} f'_{c'hw}

    Args:
        student: Two feature maps (B, C, H, W), the larger pooled to the smaller, or two hidden states (B, L, D).
        teacher: Two of the same channels.
        mask: (B, L), positions of hidden states that are 0 do not count.
        distance: ``"mse"`` as above; ``"columns"`` sums the lengths of the difference's columns.
        pool: How the larger map of a pair is made smaller.

    Returns:
        One value per example, (B,).

    Raises:
        ValueError: not two tensors per side, shapes that do not belong together, or a wrong option.

    Example:
        >>> first, second = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]]]])
        >>> fsp((first, second), (first, first))
        tensor([9.])

    Reference:
        Yim et al. 2017, A Gift from Knowledge Distillation, CVPR, who sum the squares over C C'. RepDistiller and
        TextBrewer have the mean; torchdistill has ``columns`` and, as the paper, ``max``.
    """
    _one_of("distance", distance, ("mse", "columns"))
    _one_of("pool", pool, ("avg", "max"))
    flows = [_flow(*_pair_of(side, "fsp"), mask, pool) for side in (student, teacher)]
    if flows[0].shape != flows[1].shape:
        culprit = 0 if flows[0].shape[:2] != flows[1].shape[:2] else 1
        raise ValueError(mismatch(student[culprit].shape, teacher[culprit].shape))
    ours, theirs = flows[0], flows[1].detach()
    if distance == "mse":
        return mean_square(ours.flatten(1), theirs.flatten(1))
    lengths: Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    return lengths.sum(dim=1)


def _flow(first: Tensor, second: Tensor, mask: Tensor | None, pool: Literal["avg", "max"]) -> Tensor:
    """The mean over all places, or valid positions, of the outer product: (B, C, C')."""
    if first.ndim == second.ndim == 4:
        first, second = (x.flatten(2).mT for x in _one_size(first, second, pool))
    if first.ndim != 3 or first.shape[:2] != second.shape[:2]:
        raise ValueError(
            f"a flow runs between two maps (B, C, H, W) or two hidden states (B, L, D), got "
            f"{tuple(first.shape)} and {tuple(second.shape)}; tap two of one kind"
        )
    valid = _valid_positions(mask, first)
    first, second = blank(first, valid), blank(second, valid)
    return first.mT @ second / valid.sum(dim=1).clamp_min(1)[:, None, None]


def _valid_positions(mask: Tensor | None, features: Tensor) -> Tensor:
    """Where positions count, (B, L): everywhere if there is no mask, or one of whole examples."""
    if mask is None or mask.ndim == 1:
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if mask.shape != features.shape[:2]:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit positions {tuple(features.shape[:2])}")
    return mask != 0


@loss
def mmd(student: Side, teacher: Side, *, mask: Tensor | None = None) -> Tensor:
    r"""Squared difference of how the positions of one layer resemble those of another.

    .. math:: \tfrac{1}{L} \sum_j (K_{s,ij} - K_{t,ij})^2 \quad K_{ij} = \tfrac{1}{D} h_i \cdot h'_j

    Args:
        student: Two hidden states (B, L, D), which may be the same one twice.
        teacher: Two hidden states (B, L, D'); the widths may differ.
        mask: (B, L), positions that are 0 do not count.

    Returns:
        One value per position i of the first layer, (B, L).

    Raises:
        ValueError: not two tensors per side, or they differ before the last dimension.

    Example:
        >>> first, second = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [4.0]]])
        >>> mmd((first, first), (second, second))
        tensor([[ 82., 122.]])

    Reference:
        The matrix form of Huang and Wang 2017, arXiv:1707.01219, with a linear kernel, as TextBrewer has it; given
        a mask, TextBrewer divides by L instead of D, and weighs long examples more.
    """
    (first, second), (target, other) = _pair_of(student, "mmd"), _pair_of(teacher, "mmd")
    if first.shape[:2] != target.shape[:2]:
        raise ValueError(mismatch(first.shape, target.shape))
    valid = _valid_positions(mask, first)
    squares = (_kernel(first, second, valid) - _kernel(target, other, valid).detach()).square()
    return (squares * valid[:, None, :]).sum(dim=2) / valid.sum(dim=1, keepdim=True).clamp_min(1)


def _kernel(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    """Mean products of all pairs of positions: (B, L, D) twice to (B, L, L)."""
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(
            f"mmd reads two hidden states (B, L, D) of one shape, got {tuple(first.shape)} "
            f"and {tuple(second.shape)}; tap two layers of the same width"
        )
    return blank(first, valid) @ blank(second, valid).mT / first.shape[2]
