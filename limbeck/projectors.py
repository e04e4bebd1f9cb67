"""Projections from a student's tensor to the shape of a teacher's.

They train with the student, live in the Distiller under their term's name and are gone after export. A
projection is sized from two sample shapes, on the first batch; its parameters exist before that (unsized), so
an optimizer may be built at any time.

Shape legend: B examples, D features (last dimension), C channels, H and W a feature map's height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Size, Tensor, nn
from torch.nn.parameter import UninitializedParameter

from limbeck.registry import Registry, check_options
from limbeck.shapes import mismatch

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}

PROJECTORS: Registry[Callable[..., Projector]] = Registry("projection")


class Projector(nn.Module):
    """What every projection can do: be sized once from two shapes, then map tensors.

    ``forward(features, like)`` gets the student's tensor and the shape of the teacher's.
    """

    def size(self, student: Size, teacher: Size) -> None:
        """Give the parameters their shapes.

        Args:
            student: Shape of the student's tensor.
            teacher: Shape of the teacher's tensor.

        Raises:
            ValueError: this kind of projection cannot map one to the other.
        """
        raise NotImplementedError

    @property
    def sized(self) -> bool:
        """Whether the parameters have their shapes."""
        return not any(isinstance(p, UninitializedParameter) for p in self.parameters())


class Affine(nn.Module):
    """``x W^T + b`` over the last dimension, sized later, initialised as `torch.nn.Linear` is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = cast("nn.Parameter", UninitializedParameter())
        self.bias = cast("nn.Parameter", UninitializedParameter())

    def size(self, width_in: int, width_out: int) -> None:
        """Create the weights: (width_out, width_in) and (width_out,)."""
        assert isinstance(self.weight, UninitializedParameter)
        assert isinstance(self.bias, UninitializedParameter)
        self.weight.materialize((width_out, width_in))
        self.bias.materialize((width_out,))
        bound = 1 / math.sqrt(width_in)
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)
            self.bias.uniform_(-bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., D_in) to (..., D_out)."""
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)

    # Without its sizes an affine map has nothing to save, and takes them from what it loads.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not isinstance(self.weight, UninitializedParameter):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}weight")
        if isinstance(self.weight, UninitializedParameter):
            if saved is None:
                return
            with torch.random.fork_rng():
                self.size(saved.shape[1], saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)


@PROJECTORS.register_as("identity")
class Identity(Projector):
    """No projection; the shapes must be equal."""

    def size(self, student: Size, teacher: Size) -> None:
        """Check that nothing has to be mapped."""
        if student != teacher:
            raise ValueError(mismatch(student, teacher))

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Return the input."""
        return features


@PROJECTORS.register_as("linear")
class Linear(Projector):
    """An affine map over the last dimension, with an optional activation behind it.

    Args:
        activation: None, ``"relu"``, ``"tanh"`` or ``"gelu"``.

    Example:
        >>> projection = Linear()
        >>> projection.size(torch.Size([4, 3]), torch.Size([4, 5]))
        >>> projection(torch.zeros(4, 3)).shape
        torch.Size([4, 5])
    """

    def __init__(self, *, activation: str | None = None) -> None:
        super().__init__()
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        self.affine = Affine()
        self.activation = activation

    def size(self, student: Size, teacher: Size) -> None:
        """Size from the last dimensions; all others must be equal."""
        if student[:-1] != teacher[:-1]:
            raise ValueError(mismatch(student, teacher))
        self.affine.size(student[-1], teacher[-1])

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (..., D_student) to (..., D_teacher)."""
        mapped: Tensor = self.affine(features)
        return mapped if self.activation is None else ACTIVATIONS[self.activation](mapped)


@PROJECTORS.register_as("mlp")
class MLP(Projector):
    """Two affine maps with a GELU between them.

    Args:
        hidden: Width between the two; by default the larger of both sides.
    """

    def __init__(self, *, hidden: int | None = None) -> None:
        super().__init__()
        self.hidden = hidden
        self.inner = Affine()
        self.outer = Affine()

    def size(self, student: Size, teacher: Size) -> None:
        """Size from the last dimensions; all others must be equal."""
        if student[:-1] != teacher[:-1]:
            raise ValueError(mismatch(student, teacher))
        hidden = self.hidden or max(student[-1], teacher[-1])
        self.inner.size(student[-1], hidden)
        self.outer.size(hidden, teacher[-1])

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (..., D_student) to (..., D_teacher)."""
        mapped: Tensor = self.outer(F.gelu(self.inner(features)))
        return mapped


@PROJECTORS.register_as("conv1x1")
class Conv1x1(Projector):
    """A 1x1 convolution over channels; a map of another height or width is resized to the teacher's first."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = Affine()

    def size(self, student: Size, teacher: Size) -> None:
        """Size from (B, C, H, W) shapes."""
        if len(student) != 4 or len(teacher) != 4:
            raise ValueError(f"conv1x1 maps (B, C, H, W) tensors, got {tuple(student)} and {tuple(teacher)}")
        self.affine.size(student[1], teacher[1])

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (B, C_student, H, W) to (B, C_teacher, H', W')."""
        features = features.to(self.affine.weight.dtype)
        if like is not None and features.shape[2:] != like[2:]:
            features = F.interpolate(features, like[2:], mode="bilinear", antialias=True)
        weight = self.affine.weight[:, :, None, None]
        return F.conv2d(features, weight, self.affine.bias)


@PROJECTORS.register_as("linear_relu")
def linear_relu() -> Projector:
    """`Linear` with a ReLU behind it."""
    return Linear(activation="relu")


@PROJECTORS.register_as("linear_tanh")
def linear_tanh() -> Projector:
    """`Linear` with a tanh behind it."""
    return Linear(activation="tanh")


def build_projector(project: str | Mapping[str, Any]) -> Projector:
    """Make a projection from its name, or from ``{"kind": name, **options}``.

    Raises:
        ValueError: unknown kind.
        TypeError: an option that the kind does not have.

    Example:
        >>> build_projector({"kind": "mlp", "hidden": 8}).hidden
        8
    """
    options = {"kind": project} if isinstance(project, str) else dict(project)
    kind = options.pop("kind", "linear")
    make = PROJECTORS.get(kind)
    check_options(make, options, (), f"projection {kind!r}")
    return make(**options)
