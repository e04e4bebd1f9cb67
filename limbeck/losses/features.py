"""Losses between two feature tensors: hidden states, feature maps, embeddings, logits as plain numbers.

Shape legend: B examples, L positions, D features, C channels, ``...`` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss, mean_square, same_shape, squared_length
from limbeck.losses.labels import zero_unless
from limbeck.losses.logits import soft_cross_entropy
from limbeck.shapes import mismatch


def paired_features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in float32 or better, the teacher without gradient.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    return full_precision(student), full_precision(teacher.detach())


def unit_vectors(vectors: Tensor, dim: int = -1) -> Tensor:
    """Divide by the length along `dim`; a zero vector stays zero, with a finite gradient."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / (lengths + (lengths == 0))


def per_channel(values: Tensor, features: Tensor) -> Tensor:
    """Shape one value per channel (C,), or a single one, to broadcast over (B, C, H, W) or (..., C).

    Raises:
        ValueError: there is not one value per channel.
    """
    dim = 1 if features.ndim == 4 else -1
    if values.ndim == 0:
        return values
    if values.shape != (features.shape[dim],):
        raise ValueError(
            f"{tuple(values.shape)} values do not fit features {tuple(features.shape)}; "
            f"give one for each of the {features.shape[dim]} channels"
        )
    return values[:, None, None] if dim == 1 else values


def batch_rows(features: Tensor, mask: Tensor | None) -> Tensor:
    """Lay out a batch as a matrix: one row for each example, or for each valid position of hidden states.

    Raises:
        ValueError: the mask does not fit.
    """
    if mask is not None:
        if mask.shape != features.shape[: mask.ndim]:
            raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit features {tuple(features.shape)}")
        return features[mask != 0].flatten(1)
    return features.flatten(0, 1) if features.ndim == 3 else features.flatten(1)


def standardized(rows: Tensor) -> Tensor:
    """Every column with mean 0 and variance 1, as batch normalisation without weights makes it."""
    centred = rows - rows.mean(dim=0)
    return centred / (centred.square().mean(dim=0) + 1e-5).sqrt()


def overlap(left: Tensor, right: Tensor) -> Tensor:
    """The squared Frobenius norm of ``left^T right``, computed over whichever is smaller, rows or columns."""
    if len(left) < min(left.shape[1], right.shape[1]):
        return ((left @ left.mT) * (right @ right.mT)).sum()
    return (left.mT @ right).square().sum()


@loss
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared difference over the last dimension.

    .. math:: \tfrac{1}{D} \sum_d (s_d - t_d)^2

    Args:
        student: Features (..., D), already projected to the teacher's shape.
        teacher: Features (..., D).

    Returns:
        One value per position, (...).

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([2.])

    Reference:
        Romero et al. 2015, FitNets, arXiv:1412.6550; Jiao et al. 2020, TinyBERT, arXiv:1909.10351 (hidden
        states); Ba and Caruana 2014, arXiv:1312.6184 (logits).
    """
    student, teacher = paired_features(student, teacher)
    return mean_square(student, teacher)


@loss
def cosine(student: Tensor, teacher: Tensor, *, dim: int = -1) -> Tensor:
    r"""One minus the cosine of the angle between the two vectors.

    .. math:: 1 - \frac{s \cdot t}{\lVert s \rVert \lVert t \rVert}

    Args:
        student: Features (..., D).
        teacher: Features (..., D).
        dim: The dimension of the vectors; 1 for feature maps (B, C, H, W).

    Returns:
        One value in [0, 2] per position, without `dim`. It is 1 where a vector is zero.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([1.])

    Reference:
        Sanh et al. 2019, DistilBERT, arXiv:1910.01108.
    """
    student, teacher = paired_features(student, teacher)
    squares, length = squared_length(student, dim), torch.linalg.vector_norm(teacher, dim=dim)
    lengths = (squares + (squares == 0)).sqrt() * (length + (length == 0))
    cosines = (student * teacher).sum(dim=dim) / lengths
    return 1.0 - zero_unless(squares != 0, cosines)  # without an angle there is no gradient


@loss
def l1(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean absolute difference over the last dimension.

    .. math:: \tfrac{1}{D} \sum_d |s_d - t_d|

    Args:
        student: Features (..., D), already projected to the teacher's shape.
        teacher: Features (..., D).

    Returns:
        One value per position, (...).

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> l1(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([1.])

    Reference:
        The hint of Romero et al. 2015, FitNets, arXiv:1412.6550, with another norm.
    """
    student, teacher = paired_features(student, teacher)
    return F.l1_loss(student, teacher, reduction="none").mean(dim=-1)


@loss
def smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Mean over the last dimension of a difference that is squared where it is small, and absolute beyond.

    .. math:: \tfrac{1}{D} \sum_d \begin{cases} \delta_d^2 / (2 \beta) & |\delta_d| < \beta \\
        |\delta_d| - \beta / 2 & \text{else} \end{cases} \quad \delta = s - t

    Args:
        student: Features (..., D), already projected to the teacher's shape.
        teacher: Features (..., D).
        beta: Where the absolute part begins; 0 gives `l1`.

    Returns:
        One value per position, (...).

    Raises:
        ValueError: the shapes differ, or beta is negative.

    Example:
        >>> import torch
        >>> smooth_l1(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 5.0]]))
        tensor([1.5000])

    Reference:
        Girshick 2015, Fast R-CNN, arXiv:1504.08083. Huber's loss is beta times as large.
    """
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    student, teacher = paired_features(student, teacher)
    return F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(dim=-1)


@loss
def normalized_mse(student: Tensor, teacher: Tensor, *, average: bool = False) -> Tensor:
    r"""Squared distance of the two vectors, each divided by its length.

    .. math:: \Big\lVert \frac{s}{\lVert s \rVert} - \frac{t}{\lVert t \rVert} \Big\rVert^2

    Args:
        student: Features (..., D), already projected to the teacher's shape.
        teacher: Features (..., D).
        average: Divide by D.

    Returns:
        One value in [0, 4] per position, (...). A zero vector stays zero.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> normalized_mse(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([2.])

    Reference:
        Sun et al. 2019, Patient Knowledge Distillation (PKD), arXiv:1908.09355, on the [CLS] states. TextBrewer
        sums over D as the paper does; the authors' code averages, and rounds to half precision.
    """
    student, teacher = paired_features(student, teacher)
    values = F.mse_loss(unit_vectors(student), unit_vectors(teacher), reduction="none").sum(dim=-1)
    return values / student.shape[-1] if average else values


@loss(learns={"variance": "channel_variance"})
def vid(student: Tensor, teacher: Tensor, *, variance: Tensor | Callable[[], Tensor]) -> Tensor:
    r"""Variational information: how badly the student predicts the teacher under a Gaussian of learned width.

    .. math:: \tfrac{1}{2} \Big( \frac{(s - t)^2}{\sigma_c^2} + \log \sigma_c^2 \Big)
        \quad \text{averaged over all features}

    It is the negative log-likelihood without its constant: not zero at equality, and it may be negative.

    Args:
        student: The predicted mean, (B, C, H, W) or (..., C), already projected to the teacher's shape.
        teacher: Features, of the same shape.
        variance: One positive value per channel, (C,), or what returns them when called, as a module does.

    Returns:
        One value in nats per feature and position, (B,) or (...).

    Raises:
        ValueError: the shapes differ, or there is not one variance per channel.

    Example:
        >>> import torch
        >>> vid(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]), variance=torch.tensor([1.0, 1.0]))
        tensor([1.])

    Reference:
        Ahn et al. 2019, Variational Information Distillation, arXiv:1904.05835. mdistiller keeps its variances
        out of the parameters, and never trains them.
    """
    student, teacher = paired_features(student, teacher)
    given = variance if isinstance(variance, Tensor) else variance()
    spread = per_channel(full_precision(given), student)
    values = 0.5 * ((student - teacher).square() / spread + spread.log())
    return values.flatten(1).mean(dim=-1) if values.ndim == 4 else values.mean(dim=-1)


@loss(learns={"log_variance": "linear"})
def pad(
    student: Tensor,
    teacher: Tensor,
    *,
    log_variance: Tensor | Callable[[Tensor], Tensor],
    eps: float = 1e-6,
) -> Tensor:
    r"""Prime-aware distillation: a squared difference that counts less where the student foresees a large one.

    .. math:: \tfrac{1}{D} \sum_d \frac{(s_d - t_d)^2}{\epsilon + \sigma_d^2} + \log \sigma_d^2

    Args:
        student: Features (..., D), already projected to the teacher's shape.
        teacher: Features (..., D).
        log_variance: The logarithm of the variance, (..., D), or a module that reads it off the student.
        eps: Smallest variance.

    Returns:
        One value per position, (...). Not zero at equality, and it may be negative.

    Raises:
        ValueError: the shapes differ, or that of the variances does.

    Example:
        >>> import torch
        >>> pad(torch.tensor([[1.0]]), torch.tensor([[3.0]]), log_variance=torch.tensor([[0.0]]), eps=0.0)
        tensor([4.])

    Reference:
        Zhang et al. 2020, Prime-Aware Adaptive Distillation, arXiv:2008.01458.
    """
    student, teacher = paired_features(student, teacher)
    given = log_variance if isinstance(log_variance, Tensor) else log_variance(student)
    if given.shape != student.shape:
        raise ValueError(
            f"log_variance {tuple(given.shape)} must have the features' shape {tuple(student.shape)}; "
            "give one value per feature"
        )
    logarithm = full_precision(given)
    return ((student - teacher).square() / (eps + logarithm.exp()) + logarithm).mean(dim=-1)


@loss
def srd(
    student: Tensor,
    teacher: Tensor,
    *,
    exponent: float = 4.0,
    standardize: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Logarithm of the summed powers of all differences in the batch, after standardising every feature.

    .. math:: \log \Big( 10^{-12} + \sum_b \sum_d |\hat s_{bd} - \hat t_{bd}|^{\alpha} \Big)

    Both sides are standardised over the batch, as a batch normalisation without weights does. The small constant
    bounds the value at equality, log 1e-12 = -27.6, where the gradient is zero; elsewhere it is without effect.

    Args:
        student: Features (B, D) or (B, L, D), already projected to the teacher's shape.
        teacher: Features of the same shape.
        exponent: α; large differences count more.
        standardize: False where the features are batch-normalised already.
        mask: (B, L) or (B,), positions that are 0 do not count.

    Returns:
        One value for the batch, a scalar; it may be negative.

    Raises:
        ValueError: the shapes differ, or the exponent is below 1.

    Example:
        >>> import torch
        >>> srd(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]]), standardize=False).item()
        2.83321...

    Reference:
        Miles and Mikolajczyk 2024, Understanding the Role of the Projector, arXiv:2303.11098. The authors' code
        weighs it by 2, beside a `forward_kl`, and is minus infinity at equality.
    """
    if not exponent >= 1:
        raise ValueError(f"the exponent must be at least 1, got {exponent}")
    student, teacher = paired_features(student, teacher)
    rows, targets = batch_rows(student, mask), batch_rows(teacher, mask)
    if standardize:
        rows, targets = standardized(rows), standardized(targets)
    return (1e-12 + (rows - targets).abs().pow(exponent).sum()).log()


@loss
def cka(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""One minus the linear centred kernel alignment: how differently both sides place the examples of a batch.

    .. math:: 1 - \frac{\lVert \bar S^\top \bar T \rVert_F^2}
        {\lVert \bar S^\top \bar S \rVert_F \, \lVert \bar T^\top \bar T \rVert_F}

    It does not change when either side is rotated or scaled, and needs no projection: the widths may differ.

    Args:
        student: Features (B, D), hidden states (B, L, D), each token a row, or feature maps (B, C, H, W).
        teacher: Features with the same number of rows.
        mask: (B, L) or (B,), positions that are 0 do not count.

    Returns:
        One value in [0, 1] for the batch, a scalar; 1 where a side is the same in all rows.

    Raises:
        ValueError: the numbers of rows differ.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
        >>> round(cka(points, 3 * points.flip(-1)).item(), 4), round(cka(points, points[:, :1]).item(), 4)
        (0.0, 0.2094)

    Reference:
        Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, arXiv:1905.00414; as a
        loss: Saha et al. 2022, Distilling Representational Similarity using CKA, BMVC.
    """
    sides = [batch_rows(full_precision(side), mask) for side in (student, teacher.detach())]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(mismatch(student.shape, teacher.shape))
    left, right = (unit_vectors((x - x.mean(dim=0)).flatten()).view_as(x) for x in sides)
    scale = overlap(left, left) * overlap(right, right)
    return 1 - overlap(left, right) / torch.where(scale == 0, torch.ones_like(scale), scale).sqrt()


@loss(borrows=("head",))
def softmax_regression(
    student: Tensor,
    teacher: Tensor,
    *,
    head: Callable[[Tensor], Tensor],
    kind: Literal["mse", "cross_entropy"] = "mse",
) -> Tensor:
    r"""What the teacher's classifier answers to the student's features, compared with its answer to its own.

    .. math:: \ell\big(h(s), h(t)\big)

    Args:
        student: The features before the classifier, (..., D), already projected to the teacher's shape.
        teacher: The teacher's features (..., D).
        head: The teacher's classifier, from (..., D) to logits (..., C). The gradient passes through it into the
            student's features; its own weights are frozen by the caller.
        kind: How the logits are compared: ``"mse"``, or ``"cross_entropy"`` with the teacher's probabilities.

    Returns:
        One value per position, (...).

    Raises:
        ValueError: the shapes differ, or another kind.

    Example:
        >>> import torch
        >>> doubled = lambda features: 2 * features
        >>> softmax_regression(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]), head=doubled)
        tensor([8.])

    Reference:
        Yang et al. 2021, Knowledge Distillation via Softmax Regression Representation Learning (SRRL), ICLR.
        AutoMM does not freeze the head, and lets gradients pile up in it.
    """
    if kind not in ("mse", "cross_entropy"):
        raise ValueError(f"unknown kind {kind!r} of softmax_regression; known: mse, cross_entropy")
    student, teacher = paired_features(student, teacher)
    with torch.no_grad():
        target = head(teacher)
    return mse(head(student), target) if kind == "mse" else soft_cross_entropy(head(student), target)
