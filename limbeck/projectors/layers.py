"""The layers that projections are made of, sized later, and what they have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from limbeck.projectors.base import Unsized, full_precision, one_of, unsized

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}

RESAMPLING = ("bilinear", "average")


def checked_activation(name: str | None) -> str | None:
    """The name of an activation, or None for none.

    Raises:
        ValueError: unknown activation.
    """
    return None if name is None else one_of("activation", name, list(ACTIVATIONS))


def activate(features: Tensor, name: str | None) -> Tensor:
    """Apply an activation by name; None is none."""
    return features if name is None else ACTIVATIONS[name](features)


def resample(maps: Tensor, area: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Bring maps (B, C, H, W) to another height and width.

    Args:
        maps: Maps (B, C, H, W); half precision is lifted to float32.
        area: The height and width wanted.
        mode: ``"bilinear"``, which takes all of a larger map into account (antialiased), or ``"average"``, the
            mean over the cells of a grid.

    Example:
        >>> resample(torch.arange(4.0).view(1, 1, 1, 4), (1, 2), "average")
        tensor([[[[0.5000, 2.5000]]]])
    """
    height, width = area
    if maps.shape[2:] == (height, width):
        return maps
    maps = full_precision(maps)
    if mode == "average":
        return F.adaptive_avg_pool2d(maps, (height, width))
    return F.interpolate(maps, (height, width), mode="bilinear", antialias=True)


class Weighted(Unsized):
    """A layer with weights and perhaps a bias, initialised as torch initialises its own.

    Args:
        bias: Whether it has one.
        gain: Factor of the initial weights; √3 is He's uniform initialisation for a linear layer.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    dimensions: int
    """Number of the weight's dimensions."""

    def __init__(self, *, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.weight = unsized()
        self.register_parameter("bias", unsized() if bias else None)

    def create(self, *shape: int) -> None:
        """Create weights of a shape (out, in, ...), uniform within one over the square root of the inputs."""
        self.shape(weight=shape, bias=shape[:1])
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        with torch.no_grad():
            self.weight.uniform_(-bound * self.gain, bound * self.gain)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def omit(self) -> None:
        """Let the input through unchanged, and have nothing to learn."""
        self.shape(weight=(0,) * self.dimensions, bias=(0,))

    @property
    def omitted(self) -> bool:
        """Whether this layer lets its input through."""
        return self.weight.numel() == 0


class Affine(Weighted):
    """``x W^T + b`` over the last dimension, sized later, initialised as `torch.nn.Linear` is."""

    dimensions = 2

    def size(self, width_in: int, width_out: int) -> None:
        """Create the weights: (width_out, width_in) and (width_out,)."""
        self.create(width_out, width_in)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., D_in) to (..., D_out)."""
        if self.omitted:
            return features
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)

    def over_channels(self, maps: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W), at each position by itself."""
        return F.conv2d(maps.to(self.weight.dtype), self.weight[:, :, None, None], self.bias)


class Convolution(Weighted):
    """A convolution that keeps height and width, sized later, initialised as `torch.nn.Conv2d` is.

    Args:
        kernel: Height and width of the kernel, odd.
        bias: Whether it has one.
        gain: Factor of the initial weights.
    """

    dimensions = 4

    def __init__(self, kernel: int, *, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__(bias=bias, gain=gain)
        self.kernel = kernel

    def size(self, channels_in: int, channels_out: int) -> None:
        """Create the weights: (channels_out, channels_in, kernel, kernel) and (channels_out,)."""
        self.create(channels_out, channels_in, self.kernel, self.kernel)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        if self.omitted:
            return maps
        return F.conv2d(maps.to(self.weight.dtype), self.weight, self.bias, padding=self.kernel // 2)


class BatchNorm(Unsized):
    """Batch normalisation of dimension 1, sized later; running statistics as `torch.nn.BatchNorm2d` keeps them.

    Args:
        affine: Whether it learns a scale and a shift.
        eps: Added to the variance.
        momentum: Share of a batch in the running statistics.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, *, affine: bool = True, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_parameter("weight", unsized() if affine else None)
        self.register_parameter("bias", unsized() if affine else None)
        self.register_buffer("running_mean", torch.zeros(0))
        self.register_buffer("running_var", torch.zeros(0))

    def size(self, channels: int) -> None:
        """Create scale, shift and statistics of so many channels."""
        shape = (channels,)
        self.shape(weight=shape, bias=shape, running_mean=shape, running_var=shape)
        for tensor, value in (
            (self.weight, 1.0),
            (self.bias, 0.0),
            (self.running_mean, 0.0),
            (self.running_var, 1.0),
        ):
            if tensor is not None:
                nn.init.constant_(tensor, value)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise (B, C) or (B, C, H, W) per channel.

        Raises:
            ValueError: in training mode, a single value per channel, which has no variance.
        """
        if self.training and features.numel() == features.shape[1]:
            raise ValueError(
                f"batch normalisation needs more than one value per channel, got {tuple(features.shape)}; use "
                "larger micro-batches or a projection without it"
            )
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(features, *tensors, self.training, self.momentum, self.eps)
