"""From a picture to the numbers that a model reads: resized, cropped, normalised, as the model was trained.

Shape legend: B examples, C channels, H and W height and width, S the height and width that a model reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from limbeck.pretrained import UNREADABLE, first_line, quiet_transformers

PREPROCESSOR = "preprocessor_config.json"
WHITE = 255.0

CROPPED_BY = 384
"""ConvNeXt's processor cuts the centre out of images below this size, and squeezes larger ones whole."""

NEAR = 3 / WHITE
"""By how much the pixels of two ways to the same image may differ, before normalisation."""

Raw = NDArray[np.uint8]


@dataclass(frozen=True)
class Pixels:
    """How pictures become a model's input.

    Attributes:
        size: Height and width that the model reads, S.
        mean: Of each channel, of values from 0 to 1.
        std: Of each channel.
        resized: Length of the sides before the centre is cut out; by default `size`.
        keeps_shape: Whether the shorter side gets that length, and not both.
        resample: Pillow's number of the way to resize; 2 is bilinear, 3 bicubic.

    Example:
        >>> pixels = Pixels(2, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> picture = np.full((4, 4, 3), 255, np.uint8)
        >>> pixels.normalised(torch.tensor(pixels.fit(picture)).permute(2, 0, 1)[None])[0, 0]
        tensor([[1., 1.],
                [1., 1.]])
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resized: int = 0
    keeps_shape: bool = False
    resample: int = 2

    def at(self, size: int | None) -> Pixels:
        """The same for another size; sides before the cut keep their proportion to it."""
        if size is None or size == self.size:
            return self
        return replace(self, size=size, resized=round(self.resized * size / self.size))

    def fit(self, picture: Raw) -> Raw:
        """Resize a picture (H, W, C) and cut its centre out: (S, S, C)."""
        height, width = picture.shape[:2]
        tall, wide = self._resized(height, width)
        if (tall, wide) != (height, width):
            picture = np.asarray(Image.fromarray(picture).resize((wide, tall), Image.Resampling(self.resample)))
        top, left = (tall - self.size) // 2, (wide - self.size) // 2
        return picture[top : top + self.size, left : left + self.size]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        side = self.resized or self.size
        if not self.keeps_shape:
            return side, side
        short = min(height, width)
        return (side, int(side * width / short)) if height == short else (int(side * height / short), side)

    def normalised(self, images: Tensor) -> Tensor:
        """Make what a model reads, float32, of uint8 images (B, C, S, S)."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / WHITE - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """The configuration of the image processor of transformers that does the same."""
        side = self.resized or self.size
        square = {"height": self.size, "width": self.size}
        geometry: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": square}
        if self.keeps_shape or side != self.size:
            geometry = {"do_center_crop": True, "crop_size": square} | (
                {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}}
                if self.keeps_shape
                else {"image_processor_type": "DeiTImageProcessor", "size": {"height": side, "width": side}}
            )
        return {
            **geometry,
            **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
            "resample": self.resample,
            "rescale_factor": 1 / WHITE,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configuration; transformers' AutoImageProcessor reads it."""
        (Path(folder) / PREPROCESSOR).write_text(json.dumps(self.to_dict(), indent=2))


def measured(pictures: Iterable[Raw], size: int) -> Pixels:
    """Normalisation by the mean and standard deviation of some pictures' channels, rounded to be stated.

    Example:
        >>> grey = np.full((2, 2, 3), 51, np.uint8)
        >>> measured([grey, 3 * grey], size=2).mean
        (0.4, 0.4, 0.4)
    """
    plain = Pixels(size, mean=(), std=())
    # Picture by picture: all of them as floating-point numbers would fill the memory.
    fitted = (plain.fit(picture) / WHITE for picture in pictures)
    first, second = np.mean([(values.mean((0, 1)), (values**2).mean((0, 1))) for values in fitted], axis=0)
    # A channel that is the same everywhere has nothing to scale.
    deviation = np.sqrt(np.maximum(second - first**2, 1e-4))
    return replace(plain, mean=_rounded(first), std=_rounded(deviation))


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)


def load_pixels(source: str | Path) -> Pixels | None:
    """What a model's own image processor does, from a folder or the hub; None where there is none.

    Raises:
        ValueError: it cannot be read, or does more than resizing, cutting and normalising.
    """
    from transformers import AutoImageProcessor

    with quiet_transformers():
        try:
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        except UNREADABLE as error:
            if (Path(source) / PREPROCESSOR).is_file():
                raise ValueError(f"cannot read {Path(source) / PREPROCESSOR}: {first_line(error)}") from None
            return None
        pixels = from_config(processor.to_dict(), str(source))
        _check_same(pixels, processor, str(source))
    return pixels


def from_config(config: Mapping[str, Any], source: str) -> Pixels:
    """What a configuration of an image processor says.

    Raises:
        ValueError: it has no size, or one that is no square.

    Example:
        >>> from_config({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, "a model").resized
        256
    """
    channels = len(config.get("image_mean") or "RGB")
    normalises = config.get("do_normalize", True)
    mean = tuple(config["image_mean"]) if normalises and config.get("image_mean") else (0.0,) * channels
    std = tuple(config["image_std"]) if normalises and config.get("image_std") else (1.0,) * channels
    size: Any = config.get("size") or {}
    crop: Any = config.get("crop_size") if config.get("do_center_crop") else None
    resample = int(config.get("resample", 2))
    keeps_shape = "shortest_edge" in size
    resized = _side(size, source)
    if crop:
        return Pixels(_side(crop, source), mean, std, resized, keeps_shape, resample)
    if keeps_shape and config.get("crop_pct") and resized < CROPPED_BY:
        return Pixels(resized, mean, std, int(resized / config["crop_pct"]), True, resample)
    return Pixels(resized, mean, std, resample=resample)


def _side(size: Any, source: str) -> int:
    sides = set(size.values()) if isinstance(size, Mapping) else {size}
    if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"{source} reads images of {size}; only square images of a fixed size are supported")
    return int(sides.pop())


def _check_same(pixels: Pixels, processor: Any, source: str) -> None:
    """Compare with the processor itself on one picture, since processors have options without end.

    Raises:
        ValueError: the two differ.
    """
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    ours = pixels.normalised(torch.tensor(pixels.fit(picture)).permute(2, 0, 1)[None])
    tolerance = NEAR / min(pixels.std)
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > tolerance:
        raise ValueError(
            f"the image processor of {source} does more than resizing, cutting and normalising; save a plain one "
            "with the model, such as transformers' ViTImageProcessor"
        )
