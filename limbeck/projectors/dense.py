"""Projections of the last dimension: hidden states, embeddings, logits.

Shape legend: B examples, L positions, D features, ``...`` any leading dimensions.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Size, Tensor

from limbeck.projectors.base import PROJECTORS, Features, Projector, Shapes, at_least_one, single
from limbeck.projectors.layers import Affine, BatchNorm, activate, checked_activation
from limbeck.shapes import mismatch


def same_places(student: Shapes, teacher: Shapes, kind: str) -> tuple[int, int]:
    """The last dimensions of two shapes that agree in all others.

    Raises:
        ValueError: they do not, or the term reads several places.
    """
    student, teacher = single(student, teacher, kind)
    if student[:-1] != teacher[:-1]:
        raise ValueError(mismatch(student, teacher))
    return student[-1], teacher[-1]


@PROJECTORS.register_as("identity")
class Identity(Projector):
    """No projection; the shapes must be equal, of one tensor or of several."""

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Check that nothing has to be mapped."""
        if student == teacher:
            return
        if isinstance(student, Size) and isinstance(teacher, Size):
            raise ValueError(mismatch(student, teacher))
        both = f"student {_plain(student)} and teacher {_plain(teacher)}"
        raise ValueError(f"{both} differ in shape; add project={{'kind': 'each'}}")

    def forward(self, features: Features, like: Shapes | None = None) -> Features:
        """Return the input."""
        return features


def _plain(shapes: Shapes) -> tuple[object, ...]:
    """Shapes without the name of their type, to be read by people."""
    return tuple(shapes) if isinstance(shapes, Size) else tuple(tuple(s) for s in shapes)


@PROJECTORS.register_as("linear")
class Linear(Projector):
    """An affine map over the last dimension, with an optional activation behind it.

    Maps (..., D_student) to (..., D_teacher).

    Args:
        activation: None, ``"relu"``, ``"tanh"`` or ``"gelu"``.

    Example:
        >>> import torch
        >>> projection = Linear()
        >>> projection.size(torch.Size([4, 3]), torch.Size([4, 5]))
        >>> projection(torch.zeros(4, 3)).shape
        torch.Size([4, 5])

    Reference:
        Jiao et al. 2020, TinyBERT, arXiv:1909.10351 (hidden states).
    """

    def __init__(self, *, activation: str | None = None) -> None:
        super().__init__()
        self.activation = checked_activation(activation)
        self.affine = Affine()

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from the last dimensions; all others must be equal."""
        self.affine.size(*same_places(student, teacher, "linear"))

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (..., D_student) to (..., D_teacher)."""
        return activate(self.affine(features), self.activation)


@PROJECTORS.register_as("linear_where_needed")
class LinearWhereNeeded(Projector):
    """An affine map over the one dimension in which two shapes differ, behind the first; none where they agree.

    Maps (B, ..., D_student, ...) to (B, ..., D_teacher, ...).

    Example:
        >>> import torch
        >>> projection, like = LinearWhereNeeded(), torch.Size([2, 5, 8, 8])
        >>> projection.size(torch.Size([2, 3, 8, 8]), like)
        >>> projection(torch.zeros(2, 3, 8, 8), like).shape
        torch.Size([2, 5, 8, 8])

    Reference:
        Neural Compressor's matcher of features, which there is in no optimizer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.affine = Affine()

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from the dimension that differs.

        Raises:
            ValueError: more than one does, or the numbers of examples or of dimensions.
        """
        student, teacher = single(student, teacher, "linear_where_needed")
        if student[0] != teacher[0]:
            raise ValueError(_not_one(student, teacher))
        place = _differing(student, teacher)
        if place is None:
            self.affine.omit()
        else:
            self.affine.size(student[place], teacher[place])

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map the dimension that differs from `like`, the shape of the teacher's tensor; without it the last."""
        place = features.ndim - 1 if like is None else _differing(features.shape, like)
        if place is None or self.affine.omitted:
            return features
        mapped: Tensor = self.affine(features.transpose(place, -1)).transpose(place, -1)
        return mapped


def _differing(student: Size, teacher: Size) -> int | None:
    """The one dimension behind the first in which two shapes differ; None where they agree."""
    places = [i for i, (s, t) in enumerate(zip(student, teacher, strict=False)) if i and s != t]
    if len(student) != len(teacher) or len(places) > 1:
        raise ValueError(_not_one(student, teacher))
    return places[0] if places else None


def _not_one(student: Size, teacher: Size) -> str:
    return (
        f"student {tuple(student)} and teacher {tuple(teacher)} differ in more than one dimension, or in the "
        "number of examples; tap other places, or take another projection"
    )


@PROJECTORS.register_as("linear_relu")
def linear_relu() -> Projector:
    """`Linear` with a ReLU behind it."""
    return Linear(activation="relu")


@PROJECTORS.register_as("linear_tanh")
def linear_tanh() -> Projector:
    """`Linear` with a tanh behind it."""
    return Linear(activation="tanh")


@PROJECTORS.register_as("mlp")
class MLP(Projector):
    """Two affine maps with a GELU between them.

    Maps (..., D_student) to (..., D_teacher).

    Args:
        hidden: Width between the two; by default the larger of both sides.
    """

    def __init__(self, *, hidden: int | None = None) -> None:
        super().__init__()
        self.hidden = at_least_one("hidden", hidden)
        self.inner = Affine()
        self.outer = Affine()

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from the last dimensions; all others must be equal."""
        width_in, width_out = same_places(student, teacher, "mlp")
        hidden = self.hidden or max(width_in, width_out)
        self.inner.size(width_in, hidden)
        self.outer.size(hidden, width_out)

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (..., D_student) to (..., D_teacher)."""
        mapped: Tensor = self.outer(F.gelu(self.inner(features)))
        return mapped


@PROJECTORS.register_as("batch_norm_linear")
class BatchNormLinear(Projector):
    """A linear map of embeddings with batch normalisation behind it, neither with a bias nor a scale.

    Maps (B, D_student) to (B, D_teacher). Positions are refused, since padding would enter the statistics.

    Args:
        eps: Added to the variance.

    Reference:
        Miles and Mikolajczyk 2023, Understanding the Role of the Projector in Knowledge Distillation (SRD),
        arXiv:2303.11098. There the teacher's embeddings are normalised in the same way, which is the loss's part.
    """

    def __init__(self, *, eps: float = 1e-4) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.affine = Affine(bias=False)
        self.norm = BatchNorm(affine=False, eps=eps)

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from (B, D) shapes."""
        student, teacher = single(student, teacher, "batch_norm_linear")
        if len(student) != 2 or len(teacher) != 2:
            raise ValueError(
                f"batch_norm_linear maps (B, D) embeddings, got {tuple(student)} and {tuple(teacher)}; "
                "use project='linear', or tap a pooled output"
            )
        self.affine.size(student[1], teacher[1])
        self.norm.size(teacher[1])

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (B, D_student) to (B, D_teacher)."""
        normalised: Tensor = self.norm(self.affine(features))
        return normalised
