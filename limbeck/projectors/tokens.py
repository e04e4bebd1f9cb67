"""Projections of the token axis, for students and teachers that cut their input into different numbers of tokens.

Shape legend: B examples, L tokens, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor

from limbeck.projectors.base import PROJECTORS, Projector, Shapes, full_precision, one_of, single
from limbeck.projectors.layers import RESAMPLING, Affine, resample


@PROJECTORS.register_as("pool_tokens")
class PoolTokens(Projector):
    """Another number of tokens, then an affine map where the widths differ.

    Maps (B, L, D_student) to (B, L', D_teacher). It knows no mask: tokens that are padding would be mixed with
    the others, so it is for inputs of one length, such as the patches of images.

    Args:
        class_tokens: How many tokens at the start, on both sides, are kept apart and never mixed.
        mode: ``"linear"`` interpolation (antialiased), or ``"average"`` over neighbours.
        grid: The tokens are the cells of a square, row by row (a vision transformer's patches), and are pooled
            in both directions.

    Example:
        >>> projection = PoolTokens(class_tokens=1, mode="average")
        >>> projection.size(Size([1, 5, 1]), Size([1, 3, 1]))
        >>> projection(torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0]).view(1, 5, 1), Size([1, 3, 1])).flatten()
        tensor([9.0000, 1.5000, 3.5000])
    """

    def __init__(self, *, class_tokens: int = 0, mode: str = "linear", grid: bool = False) -> None:
        super().__init__()
        if class_tokens < 0:
            raise ValueError(f"class_tokens must be 0 or more, got {class_tokens}")
        self.class_tokens = class_tokens
        self.mode = one_of("mode", mode, ("linear", "average"))
        self.grid = grid
        self.affine = Affine()

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from (B, L, D) shapes."""
        student, teacher = single(student, teacher, "pool_tokens")
        if len(student) != 3 or len(teacher) != 3:
            raise ValueError(f"pool_tokens maps (B, L, D) tensors, got {tuple(student)} and {tuple(teacher)}")
        for shape in (student, teacher):
            self._area(shape[1])
        if student[2] == teacher[2]:
            self.affine.omit()
        else:
            self.affine.size(student[2], teacher[2])

    def forward(self, features: Tensor, like: Size) -> Tensor:
        """Map (B, L, D_student) to (B, L', D_teacher)."""
        features = full_precision(features)
        special, tokens = features[:, : self.class_tokens], features[:, self.class_tokens :]
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *self._area(features.shape[1]))
        pooled = resample(maps, self._area(like[1]), RESAMPLING[self.mode == "average"])
        mapped: Tensor = self.affine(torch.cat([special, pooled.flatten(2).transpose(1, 2)], dim=1))
        return mapped

    def _area(self, length: int) -> tuple[int, int]:
        """Height and width in which so many tokens, class tokens included, lie; a line has width 1.

        Raises:
            ValueError: there are none but class tokens, or they fill no square.
        """
        count = length - self.class_tokens
        if count < 1:
            raise ValueError(f"{length} tokens, and class_tokens={self.class_tokens} leaves none to pool")
        side = math.isqrt(count)
        if self.grid and side * side != count:
            raise ValueError(f"{count} tokens fill no square; set class_tokens, or grid=False")
        return (side, side) if self.grid else (count, 1)
