"""Augmentation: what training does to an image each time it is seen, drawn from a generator that it is given.

Images are uint8 tensors, so that what is drawn costs little and is the same on every machine.

Shape legend: C channels, H and W height and width, S the height and width that models read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.registry import nearest

CROP, RESIZED_CROP, FLIP = "crop", "resized_crop", "flip"

FITTED = "fitted"
"""Whether an example's image has the size that models read, or is the whole picture still."""

PADDING = 8
"""A crop is drawn from the image padded by this fraction of its size: 4 of 32 pixels on each side."""

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10


def random_crop(image: Tensor, size: int, generator: np.random.Generator) -> Tensor:
    """Pad an image by black pixels on all sides and cut a part of its old size out.

    Args:
        image: (C, S, S).
        size: S; the padding is an eighth of it.
        generator: What draws.

    Example:
        >>> import torch
        >>> image = torch.ones(3, 32, 32, dtype=torch.uint8)
        >>> random_crop(image, 32, np.random.default_rng(0)).shape
        torch.Size([3, 32, 32])

    Reference:
        He et al. 2015, Deep Residual Learning, arXiv:1512.03385 (section 4.2).
    """
    padding = max(1, size // PADDING)
    top, left = generator.integers(0, 2 * padding + 1, 2).tolist()
    return F.pad(image, (padding,) * 4)[:, top : top + size, left : left + size]


def random_flip(image: Tensor, size: int, generator: np.random.Generator) -> Tensor:
    """Mirror an image (C, H, W), left to right, in half of the cases."""
    return image.flip(-1) if generator.integers(0, 2) else image


def random_resized_crop(image: Tensor, size: int, generator: np.random.Generator) -> Tensor:
    """Cut a part of random area and shape out of an image and resize it.

    Args:
        image: (C, H, W).
        size: S, the height and width of what comes out.
        generator: What draws.

    Reference:
        Szegedy et al. 2014, Going Deeper with Convolutions, arXiv:1409.4842 (section 6).
    """
    height, width = image.shape[1:]
    tall, wide = _part(height, width, generator)
    top = int(generator.integers(0, height - tall + 1))
    left = int(generator.integers(0, width - wide + 1))
    part = image[:, top : top + tall, left : left + wide]
    resized = F.interpolate(part[None].float(), (size, size), mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(image.dtype)


def _part(height: int, width: int, generator: np.random.Generator) -> tuple[int, int]:
    """Height and width of a part; the largest square where none that fits is drawn."""
    for _ in range(TRIES):
        area = height * width * generator.uniform(*AREA)
        ratio = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            return tall, wide
    return min(height, width), min(height, width)


AUGMENTATIONS: dict[str, Callable[[Tensor, int, np.random.Generator], Tensor]] = {
    CROP: random_crop,
    RESIZED_CROP: random_resized_crop,
    FLIP: random_flip,
}


def check_augmentation(names: Sequence[str]) -> None:
    """Refuse names of augmentations that there are not, or that exclude each other.

    Raises:
        ValueError: such a name.

    Example:
        >>> check_augmentation(["crop", "flop"])
        Traceback (most recent call last):
        ValueError: there is no augmentation 'flop'; did you mean 'flip'?
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise ValueError(f"there is no augmentation {name!r}; {nearest(name, AUGMENTATIONS)}")
        if list(names).count(name) > 1:
            raise ValueError(f"the augmentation {name!r} stands twice; name it once")
    if CROP in names and RESIZED_CROP in names:
        raise ValueError(f"{CROP!r} and {RESIZED_CROP!r} both cut images; name one of them as augmentation")


@dataclass(frozen=True)
class Augment:
    """Changes the image of an example, by several augmentations one after the other.

    Attributes:
        names: Of the augmentations.
        size: Height and width of the images that models read.
        key: Where the image stands in an example.
    """

    names: tuple[str, ...]
    size: int
    key: str

    def __call__(self, example: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """The example with another image; the given one stays as it is."""
        image = example[self.key]
        for name in self.names:
            image = AUGMENTATIONS[name](image, self.size, generator)
        return {**example, self.key: image, FITTED: True}
