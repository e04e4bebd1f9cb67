"""Projections of feature maps.

Shape legend: B examples, C channels, H and W a map's height and width.
"""

from __future__ import annotations

import torch
from torch import Size, Tensor

from limbeck.projectors.base import PROJECTORS, Projector, Shapes, at_least_one, full_precision, maps_only, one_of
from limbeck.projectors.layers import (
    RESAMPLING,
    Affine,
    BatchNorm,
    Convolution,
    activate,
    checked_activation,
    resample,
)


def resized(maps: Tensor, like: Size | None) -> Tensor:
    """Maps at the height and width of the teacher's, where these are known."""
    return maps if like is None else resample(maps, like[2:])


@PROJECTORS.register_as("conv1x1")
class Conv1x1(Projector):
    """A 1x1 convolution over channels; a map of another height or width is resized to the teacher's first.

    Maps (B, C_student, H, W) to (B, C_teacher, H', W').

    Args:
        norm: Whether batch normalisation comes behind it (which takes the bias's place).
        activation: None, ``"relu"``, ``"tanh"`` or ``"gelu"``, behind both.

    Reference:
        Romero et al. 2015, FitNets, arXiv:1412.6550. Well-known code (RepDistiller's ``ConvReg``) is
        ``norm=True, activation="relu"``.
    """

    def __init__(self, *, norm: bool = False, activation: str | None = None) -> None:
        super().__init__()
        self.activation = checked_activation(activation)
        self.affine = Affine(bias=not norm)
        self.norm = BatchNorm() if norm else None

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from (B, C, H, W) shapes."""
        student, teacher = maps_only(student, teacher, "conv1x1")
        self.affine.size(student[1], teacher[1])
        if self.norm is not None:
            self.norm.size(teacher[1])

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (B, C_student, H, W) to (B, C_teacher, H', W')."""
        mapped = self.affine.over_channels(resized(features, like))
        return activate(mapped if self.norm is None else self.norm(mapped), self.activation)


@PROJECTORS.register_as("resize")
class Resize(Projector):
    """Another height and width for maps of the same number of channels, without parameters.

    Maps (B, C, H, W) to (B, C, H', W').

    Args:
        mode: ``"bilinear"``, antialiased, or ``"average"``, the mean over the cells of a grid.
    """

    def __init__(self, *, mode: str = "bilinear") -> None:
        super().__init__()
        self.mode = one_of("mode", mode, RESAMPLING)

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Check that only heights and widths differ."""
        student, teacher = maps_only(student, teacher, "resize")
        if student[1] != teacher[1]:
            raise ValueError(
                f"resize keeps the channels, and the student has {student[1]} for the teacher's {teacher[1]}; "
                "use project='conv1x1'"
            )

    def forward(self, features: Tensor, like: Size) -> Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        self.size(features.shape, like)  # without parameters, nobody had to ask before
        return resample(full_precision(features), like[2:], self.mode)


@PROJECTORS.register_as("masked_generator")
class MaskedGenerator(Projector):
    """Masks a part of the student's map and generates the teacher's whole map from the rest.

    Maps (B, C_student, H, W) to (B, C_teacher, H', W'): a 1x1 convolution where the numbers of channels differ,
    the mask, a 3x3 convolution, a ReLU and another 3x3 convolution. Nothing is masked in eval mode.

    Args:
        mask_ratio: Which share is masked on average, 0 to below 1.
        mask_on_channel: Mask whole channels instead of positions (the paper's choice for classification).

    Reference:
        Yang et al. 2022, Masked Generative Distillation (MGD), arXiv:2205.01529. The ratio is called
        ``lambda_mgd`` in its code. A map of another size is resized to the teacher's first, which is ours.
    """

    def __init__(self, *, mask_ratio: float = 0.65, mask_on_channel: bool = False) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.mask_on_channel = mask_on_channel
        self.align = Convolution(1)
        self.inner = Convolution(3)
        self.outer = Convolution(3)

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from (B, C, H, W) shapes."""
        student, teacher = maps_only(student, teacher, "masked_generator")
        channels = teacher[1]
        if student[1] == channels:
            self.align.omit()
        else:
            self.align.size(student[1], channels)
        self.inner.size(channels, channels)
        self.outer.size(channels, channels)

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (B, C_student, H, W) to (B, C_teacher, H', W')."""
        aligned: Tensor = self.align(resized(features, like))
        if self.training:
            aligned = aligned * self.mask(aligned)
        generated: Tensor = self.outer(torch.relu(self.inner(aligned)))
        return generated

    def mask(self, maps: Tensor) -> Tensor:
        """Draw what is kept: ones and zeros, (B, 1, H, W) or (B, C, 1, 1)."""
        examples, channels, height, width = maps.shape
        shape = (examples, channels, 1, 1) if self.mask_on_channel else (examples, 1, height, width)
        return (torch.rand(shape, device=maps.device) >= self.mask_ratio).to(maps.dtype)


@PROJECTORS.register_as("vid_regressor")
class VIDRegressor(Projector):
    """The mean of VID: three 1x1 convolutions with batch normalisation and ReLU between them.

    Maps (B, C_student, H, W) to (B, C_teacher, H', W'); a map of another size is resized first.

    Args:
        mid_channels: Channels between the convolutions; by default the teacher's.
        norm: Whether there is batch normalisation. Well-known code (RepDistiller, torchdistill) has none.

    Reference:
        Ahn et al. 2019, Variational Information Distillation, arXiv:1904.05835.
    """

    def __init__(self, *, mid_channels: int | None = None, norm: bool = True) -> None:
        super().__init__()
        self.mid_channels = at_least_one("mid_channels", mid_channels)
        self.first = Conv1x1(norm=norm, activation="relu")
        self.second = Conv1x1(norm=norm, activation="relu")
        self.last = Convolution(1, bias=False)

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from (B, C, H, W) shapes."""
        student, teacher = maps_only(student, teacher, "vid_regressor")
        mid = Size([teacher[0], self.mid_channels or teacher[1], *teacher[2:]])
        self.first.size(student, mid)
        self.second.size(mid, mid)
        self.last.size(mid[1], teacher[1])

    def forward(self, features: Tensor, like: Size | None = None) -> Tensor:
        """Map (B, C_student, H, W) to (B, C_teacher, H', W')."""
        mapped: Tensor = self.last(self.second(self.first(features, like)))
        return mapped
