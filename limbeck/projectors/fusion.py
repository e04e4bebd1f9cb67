"""Projections of several places of a model: each by itself, or fused.

Shape legend: B examples, C channels, H and W a map's height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Size, Tensor, nn

from limbeck.projectors.base import (
    PROJECTORS,
    PerPlace,
    Projector,
    Shapes,
    at_least_one,
    build_projector,
    maps_only,
)
from limbeck.projectors.layers import BatchNorm, Convolution

WIDEST = 512
"""The most channels in which maps are fused, unless told otherwise."""


@PROJECTORS.register_as("each")
class Each(PerPlace):
    """One projection of the same kind for each of several places.

    Maps a tuple of tensors to a tuple of tensors.

    Args:
        of: The projection, by name or as ``{"kind": name, **options}``.
        places: How many there are; the Distiller fills it in.

    Example:
        >>> projection = Each(of="linear", places=2)
        >>> projection.size((Size([4, 3]), Size([4, 2])), (Size([4, 5]), Size([4, 6])))
        >>> [tuple(mapped.shape) for mapped in projection((torch.zeros(4, 3), torch.zeros(4, 2)))]
        [(4, 5), (4, 6)]
    """

    def __init__(self, *, of: str | Mapping[str, Any] = "linear", places: int | None = None) -> None:
        build_projector(of)  # what is wrong with it shall be known now, however many places there are
        self.of = of
        super().__init__(places)

    def part(self, index: int, places: int) -> Projector:
        """Make the projection of one place."""
        return build_projector(self.of)

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size each from the shapes at its place."""
        pairs = self.pairs(student, teacher)
        for part, pair in zip(self.parts, pairs, strict=True):
            assert isinstance(part, Projector)
            part.size(*pair)

    def forward(self, features: Sequence[Tensor], like: Sequence[Size] | None = None) -> tuple[Tensor, ...]:
        """Map each tensor by its own projection."""
        shapes: Sequence[Size | None] = like or [None] * len(features)
        parts = zip(self.parts, features, shapes, strict=True)
        return tuple(part(tensor, shape) for part, tensor, shape in parts)


class FusionStage(nn.Module):
    """One stage of `AttentionFusion`: meet the deeper stages' map half-way, and go out to the teacher's channels.

    Args:
        deepest: Whether there is no deeper stage to meet.
    """

    def __init__(self, deepest: bool) -> None:
        super().__init__()
        he = math.sqrt(3)
        self.inward = Convolution(1, bias=False, gain=he)
        self.inward_norm = BatchNorm()
        self.attention = None if deepest else Convolution(1)
        self.outward = Convolution(3, bias=False, gain=he)
        self.outward_norm = BatchNorm()

    def size(self, student: int, mid: int, teacher: int) -> None:
        """Size from the numbers of channels."""
        self.inward.size(student, mid)
        self.inward_norm.size(mid)
        if self.attention is not None:
            self.attention.size(2 * mid, 2)
        self.outward.size(mid, teacher)
        self.outward_norm.size(teacher)

    def forward(self, maps: Tensor, deeper: Tensor | None, like: Size | None) -> tuple[Tensor, Tensor]:
        """Give the map for the teacher, and the fused one for the next shallower stage."""
        fused: Tensor = self.inward_norm(self.inward(maps))
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            attention = torch.sigmoid(self.attention(torch.cat([fused, deeper], dim=1)))
            fused = attention[:, :1] * fused + attention[:, 1:] * deeper
        if like is not None and fused.shape[2:] != like[2:]:
            fused = F.interpolate(fused, like[2:], mode="nearest")
        return self.outward_norm(self.outward(fused)), fused


@PROJECTORS.register_as("abf")
class AttentionFusion(PerPlace):
    """Attention-based fusion: each stage of the student learns from the teacher with the deeper stages' help.

    Maps a tuple of maps (B, C_student, H, W), from the shallowest to the deepest, to a tuple of the teacher's
    shapes. From the deepest up, each is brought to `mid_channels` by a 1x1 convolution, mixed with the enlarged
    fused map of the deeper ones by two spatial attention maps, and led to the teacher's channels by a 3x3
    convolution.

    Args:
        mid_channels: Channels of the fused maps; by default those of the student's deepest map, 512 at most.
        places: How many stages there are; the Distiller fills it in.

    Reference:
        Chen et al. 2021, Distilling Knowledge via Knowledge Review (ReviewKD), arXiv:2104.09044. Batch
        normalisation, nearest-neighbour enlargement and initialisation are those of its code.
    """

    kind = "abf"

    def __init__(self, *, mid_channels: int | None = None, places: int | None = None) -> None:
        super().__init__(places)
        self.mid_channels = at_least_one("mid_channels", mid_channels)

    def part(self, index: int, places: int) -> FusionStage:
        """Make one stage."""
        return FusionStage(deepest=index == places - 1)

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from tuples of (B, C, H, W) shapes."""
        pairs = [maps_only(*pair, "abf") for pair in self.pairs(student, teacher)]
        mid = self.mid_channels or min(WIDEST, pairs[-1][0][1])
        for stage, (own, target) in zip(self.parts, pairs, strict=True):
            assert isinstance(stage, FusionStage)
            stage.size(own[1], mid, target[1])

    def forward(self, features: Sequence[Tensor], like: Sequence[Size] | None = None) -> tuple[Tensor, ...]:
        """Map the student's stages to the teacher's."""
        shapes: Sequence[Size | None] = like or [None] * len(features)
        results: list[Tensor] = []
        fused = None
        for stage, maps, shape in reversed(list(zip(self.parts, features, shapes, strict=True))):
            result, fused = stage(maps, fused, shape)
            results.append(result)
        return tuple(reversed(results))
