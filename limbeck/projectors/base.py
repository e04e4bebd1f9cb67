"""What every projection is: a module that is sized once from two sample shapes, then maps a student's tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Size, Tensor, nn
from torch.nn.parameter import UninitializedParameter

from limbeck.registry import Registry, check_options

PROJECTORS: Registry[Callable[..., Projector]] = Registry("projection")

Shapes = Size | tuple[Size, ...]
"""The shape of what a term reads of one model; several where it reads several places."""

Features = Tensor | tuple[Tensor, ...]
"""What a term reads of one model: a tensor, or several from several places."""


def unsized() -> nn.Parameter:
    """A parameter that an optimizer may already hold, and that gets its shape later."""
    return cast("nn.Parameter", UninitializedParameter())


class Unsized(nn.Module):
    """A module whose parameters and buffers get their shapes later: from `size`, or from what it loads.

    Until then its parameters are torch's `UninitializedParameter`, its buffers are empty, and none is saved.
    """

    @property
    def sized(self) -> bool:
        """Whether the parameters and buffers have their shapes."""
        unshaped = any(isinstance(p, UninitializedParameter) for p in self.parameters())
        return not unshaped and all(buffer.numel() for buffer in self.buffers())

    def shape(self, **shapes: Iterable[int]) -> None:
        """Give parameters and buffers of this module, by name, their shapes; what is switched off is left out.

        A parameter without elements stands for a step that is not needed, and asks for no gradient.
        """
        for name, shape in shapes.items():
            tensor: Any = getattr(self, name)
            if isinstance(tensor, UninitializedParameter):
                tensor.materialize(tuple(shape))
                tensor.requires_grad_(tensor.requires_grad and tensor.numel() > 0)
            elif tensor is not None:
                setattr(self, name, tensor.new_empty(tuple(shape)))

    def _waits(self) -> bool:
        """Whether tensors of this very module still lack their shapes."""
        parameters, buffers = self._parameters.values(), self._buffers.values()
        return any(isinstance(p, UninitializedParameter) for p in parameters) or any(
            b is not None and b.numel() == 0 for b in buffers
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self._waits():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self._waits():
            names = [n for n in (*self._parameters, *self._buffers) if f"{prefix}{n}" in state_dict]
            if not names:
                return  # it was saved before it had a size
            self.shape(**{n: state_dict[f"{prefix}{n}"].shape for n in names})
        super()._load_from_state_dict(state_dict, prefix, *args)


class Projector(Unsized):
    """What every projection can do: be sized once from two shapes, then map tensors.

    ``forward(features, like)`` gets the student's tensor and the shape of the teacher's. Where a term reads
    several places, ``features``, ``like`` and what comes out are tuples.

    In training mode it may draw from torch's random generator. In eval mode it does not, and no running
    statistics move.
    """

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Give the parameters their shapes.

        Args:
            student: Shape of the student's tensor, or shapes of several.
            teacher: Shape of the teacher's tensor, or shapes of several.

        Raises:
            ValueError: this kind of projection cannot map one to the other.
        """
        raise NotImplementedError


class PerPlace(Projector):
    """A projection of several places, with a part for each.

    Args:
        places: How many there are. Without it the parts come into being when it is sized or loaded, too late
            for an optimizer that was built before.
    """

    kind = "each"
    """Its name in messages."""

    def __init__(self, places: int | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        at_least_one("places", places)
        if places is not None:
            self._grow(places)

    @property
    def sized(self) -> bool:
        """Whether there are parts, and all have their shapes."""
        return len(self.parts) > 0 and super().sized

    def part(self, index: int, places: int) -> nn.Module:
        """Make the part for one of so many places."""
        raise NotImplementedError

    def pairs(self, student: Shapes, teacher: Shapes) -> list[tuple[Size, Size]]:
        """The shapes of both sides place by place; afterwards there is a part for each.

        Raises:
            ValueError: one tensor instead of several, or another number than there are parts.
        """
        if isinstance(student, Size) or isinstance(teacher, Size):
            raise ValueError(f"projection {self.kind!r} reads several places and got one; list several taps")
        places = len(self.parts) or len(student)
        if not places == len(student) == len(teacher):
            raise ValueError(
                f"projection {self.kind!r} is for {places} places and got {len(student)} of the student and "
                f"{len(teacher)} of the teacher; list as many taps of both"
            )
        self._grow(len(student))
        return list(zip(student, teacher, strict=True))

    def _grow(self, places: int) -> None:
        if not len(self.parts):
            self.parts.extend(self.part(i, places) for i in range(places))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}parts."
        saved = {int(key[len(start) :].split(".")[0]) for key in state_dict if key.startswith(start)}
        if saved:
            self._grow(max(saved) + 1)  # before torch looks for modules to load into
        super()._load_from_state_dict(state_dict, prefix, *args)


def single(student: Shapes, teacher: Shapes, kind: str) -> tuple[Size, Size]:
    """The two shapes, for a kind of projection that maps one tensor.

    Raises:
        ValueError: the term reads several places.

    Example:
        >>> single((Size([2, 3]), Size([2, 4])), (Size([2, 5]), Size([2, 5])), "linear")
        Traceback (most recent call last):
        ValueError: projection 'linear' maps one tensor and got several; write {'kind': 'each', 'of': ...}
    """
    if not isinstance(student, Size) or not isinstance(teacher, Size):
        raise ValueError(
            f"projection {kind!r} maps one tensor and got several; write {{'kind': 'each', 'of': ...}}"
        )
    return student, teacher


def maps_only(student: Shapes, teacher: Shapes, kind: str) -> tuple[Size, Size]:
    """The two shapes, for a kind of projection that maps one (B, C, H, W) tensor to another.

    Raises:
        ValueError: the term reads several places, or tensors of other dimensions.
    """
    student, teacher = single(student, teacher, kind)
    if len(student) != 4 or len(teacher) != 4:
        raise ValueError(f"{kind} maps (B, C, H, W) tensors, got {tuple(student)} and {tuple(teacher)}")
    return student, teacher


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """Check an option that has few values.

    Raises:
        ValueError: it is none of them.

    Example:
        >>> one_of("mode", "cubic", ["bilinear", "average"])
        Traceback (most recent call last):
        ValueError: unknown mode 'cubic'; known: bilinear, average
    """
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    return value


def at_least_one(name: str, value: int | None) -> int | None:
    """Check an option that is a number of something, or None for the default.

    Raises:
        ValueError: it is not positive.
    """
    if value is not None and value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return value


def full_precision(features: Tensor) -> Tensor:
    """Lift half precision to float32, for kinds without weights to set the type."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


def build_projector(project: str | Mapping[str, Any], places: int | None = None) -> Projector:
    """Make a projection from its name, or from ``{"kind": name, **options}``.

    Args:
        project: The name, or name and options.
        places: How many tensors the term reads, for the kinds that have a part for each.

    Raises:
        ValueError: unknown kind.
        TypeError: an option that the kind does not have.

    Example:
        >>> build_projector({"kind": "mlp", "hidden": 8}).hidden
        8
    """
    options: dict[str, Any] = {"kind": project} if isinstance(project, str) else dict(project)
    kind = options.pop("kind", "linear")
    make = PROJECTORS.get(kind)
    check_options(make, options, (), f"projection {kind!r}")
    if places is not None and "places" in inspect.signature(make).parameters:
        options.setdefault("places", places)
    return make(**options)
