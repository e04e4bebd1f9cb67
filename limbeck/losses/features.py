"""Losses between two feature tensors: hidden states, feature maps, embeddings, logits as plain numbers.

Shape legend: B examples, L positions, D features, ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.losses.base import full_precision, loss, same_shape


def paired_features(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in float32 or better, the teacher without gradient.

    Raises:
        ValueError: the shapes differ.
    """
    same_shape(student, teacher)
    return full_precision(student), full_precision(teacher.detach())


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
    return F.mse_loss(student, teacher, reduction="none").mean(dim=-1)


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
    norms = torch.linalg.vector_norm(student.detach(), dim=dim, keepdim=True)
    student = torch.where(norms == 0, torch.zeros_like(student), student)  # no gradient where there is no angle
    return 1.0 - F.cosine_similarity(student, teacher, dim=dim)
