"""Losses between the relations of the examples of a batch: distances, angles, similarities.

Shape legend: B examples, D features, ``...`` anything that is flattened to D. The widths of the two sides may
differ, since only relations within a side are compared. Every loss gives one value per example, (B,), its share
in the relations of the whole batch; their mean is the formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss, mean_square, same_shape
from limbeck.losses.features import unit_vectors

ANGLES_AT_ONCE = 2**18
"""How many angles are held at a time: few enough for a processor's cache."""


CLOSE = 1e-8
"""Squared distances below this share of the squared lengths are not taken from products."""


def paired_rows(student: Tensor, teacher: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Both sides as one row per example, in float32 or better, the teacher without gradient.

    Args:
        student: (B, ...).
        teacher: (B, ...).
        normalize: Divide each row by its length.

    Raises:
        ValueError: the numbers of examples differ, or there are no features.
    """
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            f"relations are between examples (batch, ...), the same on both sides, got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}; tap one vector or map for each"
        )
    rows = full_precision(student).flatten(1), full_precision(teacher.detach()).flatten(1)
    return (unit_vectors(rows[0]), unit_vectors(rows[1])) if normalize else rows


def reciprocal(tensor: Tensor) -> Tensor:
    """One divided by each number, and zero for zero."""
    zero = tensor == 0
    return torch.where(zero, torch.zeros_like(tensor), 1 / torch.where(zero, torch.ones_like(tensor), tensor))


def from_products(rows: Tensor) -> Tensor | None:
    """Distances between rows (B, D) of float32 from their products in float64, which a processor has fast.

    None where that would cost digits, because rows are close to each other, or on an accelerator, which would have
    to wait for the question whether they are.
    """
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    centred = rows.double() - rows.double().mean(dim=0)
    products = centred @ centred.mT
    lengths = products.diagonal()
    both = lengths[:, None] + lengths
    squares = (both - 2 * products).fill_diagonal_(0)
    apart = (squares > CLOSE * both).fill_diagonal_(True)
    return squares.sqrt().float() if bool(apart.all()) else None


class Distances(torch.autograd.Function):
    """Euclidean distances between rows: exact for close ones, with no (B, B, D) tensor, not even in backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Compute (B, B) distances of (B, D) rows."""
        distances = from_products(rows)
        if distances is None:
            distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(rows, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Pull rows along the lines between them; equal rows have none."""
        rows, distances = ctx.saved_tensors
        pull: Tensor = (gradient + gradient.mT) * reciprocal(distances)
        centred: Tensor = rows - rows.mean(dim=0)  # differences of large numbers lose digits
        return pull.sum(dim=-1, keepdim=True) * centred - pull @ centred


def distances(rows: Tensor) -> Tensor:
    """Euclidean distances between rows (B, D), as (B, B); their gradient is zero between equal rows."""
    between: Tensor = Distances.apply(rows)  # type: ignore[no-untyped-call]
    return between


class AngleDifferences(torch.autograd.Function):
    """Mean smooth L1 difference of the cosines of all angles at each example, from two matrices of distances.

    The cosines follow from the law of cosines, so that no difference of features is formed; B³ of them are
    computed in chunks of few examples at whose places the angles are, in forward and again in backward. A cosine
    is as exact as the number type, times the ratio of the longest side to the shortest one.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute one value per example, (B,), from distances (B, B)."""
        ctx.save_for_backward(student, teacher)
        parts = [
            F.smooth_l1_loss(ours, theirs, reduction="none").mean(dim=(1, 2))
            for (_, ours), (_, theirs) in zip(cosines(student), cosines(teacher), strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Compute the gradient in the student's distances: as the sides at each example, and as opposite ones."""
        student, teacher = ctx.saved_tensors
        inverse = reciprocal(student)
        adjacent, opposite = torch.zeros_like(student), torch.zeros_like(student)
        for (at, ours), (_, theirs) in zip(cosines(student), cosines(teacher), strict=True):
            slope = theirs.neg_().add_(ours).clamp_(-1.0, 1.0)
            near = (slope @ inverse[at].unsqueeze(-1)).squeeze(-1) * (student[at] != 0)
            adjacent[at] = near - inverse[at] * ours.mul_(slope).sum(dim=-1)
            weighted = inverse[at] * gradient[at, None]
            opposite += slope.mul_(inverse[at].unsqueeze(1)).mul_(weighted.unsqueeze(2)).sum(dim=0)
        return (2 * gradient[:, None] * adjacent - student * opposite) / len(student) ** 2, None


def cosines(between: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of the angles at some examples i at a time, between the lines to j and to k, as (i, j, k).

    Args:
        between: Distances (B, B). An angle with a side of length zero counts as a right one.
    """
    squares, inverse = between.square(), reciprocal(between)
    step = max(1, ANGLES_AT_ONCE // max(1, len(between) ** 2))
    for start in range(0, len(between), step):
        at = slice(start, start + step)
        sides = squares[at].unsqueeze(2) + squares[at].unsqueeze(1)
        yield at, sides.sub_(squares).mul_(inverse[at].unsqueeze(2)).mul_(inverse[at].unsqueeze(1)).mul_(0.5)


@loss
def rkd_distance(student: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Smooth L1 difference of the distances between examples, each divided by the mean distance of its side.

    .. math:: \frac{1}{B^2} \sum_{ij} \ell_1\Big( \frac{\lVert s_i - s_j \rVert}{\mu_s} -
        \frac{\lVert t_i - t_j \rVert}{\mu_t} \Big)

    Args:
        student: Embeddings (B, D), or any (B, ...).
        teacher: Embeddings (B, D') of the same examples.
        normalize: Divide each embedding by its length first.

    Returns:
        One value per example, (B,); their mean is the formula. A batch of one gives 0.

    Raises:
        ValueError: the numbers of examples differ.

    Example:
        >>> student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [1.0]])
        >>> rkd_distance(student, teacher)
        tensor([0.0938, 0.1875, 0.0938])

    Reference:
        Park et al. 2019, Relational Knowledge Distillation, arXiv:1904.05068; weight 25 in RepDistiller, 1 in
        torchdistill. mmrazor normalises by default. The means leave out the distances of examples to themselves.
    """
    ours, theirs = (relative_distances(rows) for rows in paired_rows(student, teacher, normalize))
    return F.smooth_l1_loss(ours, theirs, reduction="none").mean(dim=-1)


def relative_distances(rows: Tensor) -> Tensor:
    """Distances between rows, divided by the mean of those between two of them; zero where all are equal."""
    between = distances(rows)
    count = len(rows) * (len(rows) - 1)
    return between * reciprocal(between.sum() / max(count, 1))


@loss
def rkd_angle(student: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Smooth L1 difference of the cosines of all angles that three examples form.

    .. math:: \frac{1}{B^3} \sum_{ijk} \ell_1\big( \cos \angle(s_j, s_i, s_k) - \cos \angle(t_j, t_i, t_k) \big)

    The memory grows with B² and B·D, the time with B³ and B²·D.

    Args:
        student: Embeddings (B, D), or any (B, ...).
        teacher: Embeddings (B, D') of the same examples.
        normalize: Divide each embedding by its length first.

    Returns:
        One value per example, that of the angles at its place, (B,); their mean is the formula. A batch of one
        gives 0.

    Raises:
        ValueError: the numbers of examples differ.

    Example:
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
        >>> [round(value, 4) for value in rkd_angle(student, teacher).tolist()]
        [0.0556, 0.0556, 0.0]

    Reference:
        Park et al. 2019, Relational Knowledge Distillation, arXiv:1904.05068; weight 50 in RepDistiller, 2 in
        torchdistill. mmrazor normalises by default.
    """
    ours, theirs = (distances(rows) for rows in paired_rows(student, teacher, normalize))
    values: Tensor = AngleDifferences.apply(ours, theirs)  # type: ignore[no-untyped-call]
    return values


@loss
def similarity_preserving(student: Tensor, teacher: Tensor, *, norm: Literal[1, 2] = 2) -> Tensor:
    r"""Squared difference of the similarities between examples, each row of which is divided by its norm.

    .. math:: \frac{1}{B^2} \Big\lVert \frac{S S^\top}{\lVert \cdot \rVert_{\mathrm{row}}} -
        \frac{T T^\top}{\lVert \cdot \rVert_{\mathrm{row}}} \Big\rVert_F^2

    Args:
        student: Features (B, D), or maps (B, C, H, W), flattened.
        teacher: Features (B, D') of the same examples.
        norm: Of the rows of similarities: 2, or 1 as in torchdistill.

    Returns:
        One value per example, (B,); their mean is the formula.

    Raises:
        ValueError: the numbers of examples differ, or another norm.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> [round(value, 4) for value in similarity_preserving(student, teacher).tolist()]
        [0.2929, 0.2929]

    Reference:
        Tung and Mori 2019, Similarity-Preserving Knowledge Distillation, arXiv:1907.09682; weight 3000.
        torchdistill divides the rows by their L1 norm instead, with the paper's weight.
    """
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, got {norm}")
    grams = [rows @ rows.mT for rows in paired_rows(student, teacher)]
    ours, theirs = (x * reciprocal(torch.linalg.vector_norm(x, norm, dim=-1, keepdim=True)) for x in grams)
    return (ours - theirs).square().sum(dim=-1) / len(ours)


@loss
def pkt(student: Tensor, teacher: Tensor, *, eps: float = 1e-7) -> Tensor:
    r"""Probabilistic knowledge transfer: KL divergence between the probabilities of being neighbours.

    .. math:: \frac{1}{B^2} \sum_{ij} p_{ij} \log \frac{p_{ij} + \varepsilon}{q_{ij} + \varepsilon}, \quad
        p_{ij} = \frac{\cos(t_i, t_j) + 1}{\sum_k \cos(t_i, t_k) + 1}

    Args:
        student: Embeddings (B, D), or any (B, ...).
        teacher: Embeddings (B, D') of the same examples.
        eps: Is added to probabilities and to lengths of embeddings; at least 0. Where the relations are equal it
            leaves a gradient of about its size.

    Returns:
        One value per example, (B,); their mean is the formula. Zero where the relations are equal.

    Raises:
        ValueError: the numbers of examples differ, or eps is negative.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> [round(value, 4) for value in pkt(student, teacher).tolist()]
        [0.0294, 0.0294]

    Reference:
        Passalis and Tefas 2018, Probabilistic Knowledge Transfer, arXiv:1803.10837; weight 30000.
    """
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    q, p = (neighbour_probabilities(rows, eps) for rows in paired_rows(student, teacher))
    impossible = p == 0
    ratio = torch.where(impossible, torch.ones_like(p), (p + eps) / (q + eps))
    return (p * ratio.log()).mean(dim=-1)


def neighbour_probabilities(rows: Tensor, eps: float) -> Tensor:
    """Cosines between rows, shifted to be positive and divided by their sum over each row, (B, B)."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    unit = rows / torch.where(lengths == 0, torch.ones_like(lengths), lengths + eps)
    closeness = (unit @ unit.mT + 1).clamp(min=0)  # rounding may leave less than nothing
    return closeness / closeness.sum(dim=-1, keepdim=True)


@loss
def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Literal["gaussian", "bilinear", "neighbors"] = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
) -> Tensor:
    r"""Squared difference of the correlations between examples under a kernel, here a Gaussian's Taylor series.

    .. math:: \frac{1}{B^2} \sum_{ij} \big( k(s_i, s_j) - k(t_i, t_j) \big)^2, \quad
        k(x, y) = \sum_{p=0}^{P} e^{-2\gamma} \frac{(2\gamma)^p}{p!} (x^\top y)^p

    Args:
        student: Embeddings (B, D), or any (B, ...).
        teacher: Embeddings (B, D') of the same examples.
        kernel: ``"gaussian"``; ``"bilinear"``: the dot product; ``"neighbors"``: no kernel, but the dot product
            of the absolute differences of both sides at an example and at the next of the batch, averaged.
        gamma: γ of the Gaussian.
        order: P, the last power of its series.
        normalize: Divide each embedding by its length first, without which the series is no Gaussian's.

    Returns:
        One value per example, (B,); their mean is the formula.

    Raises:
        ValueError: shapes that do not fit, or an unknown option.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> [round(value, 4) for value in correlation_congruence(student, teacher).tolist()]
        [0.1266, 0.1266]

    Reference:
        Peng et al. 2019, Correlation Congruence for Knowledge Distillation, arXiv:1904.01802. torchdistill does
        not normalise and takes the root of the sum, divided by B²; RepDistiller's ``Correlation``, from the
        authors, is ``kernel="neighbors", normalize=False``.
    """
    if kernel not in ("gaussian", "bilinear", "neighbors"):
        raise ValueError(f"unknown kernel {kernel!r}; known: gaussian, bilinear, neighbors")
    if not gamma > 0 or order < 0:
        raise ValueError(f"gamma must be positive and order 0 or more, got {gamma} and {order}")
    sides = paired_rows(student, teacher, normalize)
    if kernel == "neighbors":
        same_shape(*sides)
        gaps = (sides[0] - sides[1]).abs()
        products = (gaps[:-1] * gaps[1:]).sum(dim=-1) * (len(gaps) / max(len(gaps) - 1, 1))
        return torch.cat([products, torch.zeros_like(gaps[:1, 0])])
    grams = [rows @ rows.mT for rows in sides]
    ours, theirs = (gaussian_series(x, gamma, order) for x in grams) if kernel == "gaussian" else grams
    return mean_square(ours, theirs)


def gaussian_series(products: Tensor, gamma: float, order: int) -> Tensor:
    """The Taylor series of ``exp(-gamma |x - y|²)`` in the dot products of unit vectors."""
    terms = [(2 * gamma) ** p / math.factorial(p) * products**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(dim=0)
