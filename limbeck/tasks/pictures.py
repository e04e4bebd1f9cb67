"""Image classification on one's own pictures: class folders or Parquet, augmented while training.

Shape legend: B examples, C channels, S the height and width that models read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.metrics import check_metrics
from limbeck.tasks.augment import FITTED, RESIZED_CROP, Augment, check_augmentation
from limbeck.tasks.base import TASKS, TRAIN, Loaded, Rows, TaskOptions, check_taken, shorten, with_first
from limbeck.tasks.image import load_classifier
from limbeck.tasks.image_files import Picture, read_images
from limbeck.tasks.pixels import Pixels, Raw, load_pixels, measured
from limbeck.train import Examples
from limbeck.types import EXAMPLE_ID, INPUTS, LABELS

USUAL_SIZE = 224
"""Height and width where neither the model nor the data nor the user says: what most image models read."""

MEASURED = 2000
"""Training images that normalisation is measured on."""

LOOKED_AT = 200
"""Training images whose sizes are compared."""

KEPT_BYTES = 2 << 30
"""Decoded images of a split are kept in memory up to this size, and decoded each time beyond it."""


@dataclass(frozen=True)
class PictureTask:
    """Classes to predict from pictures; see `limbeck.tasks.Task`.

    Attributes:
        name: Its name.
        labels: Names of the classes.
        metrics: Names of the metrics, the main one first.
        splits: Pictures with labels, by split.
        size: Height and width for the models, where the user chose them.
        augmentation: What training does to images.
        variants: How often each is augmented anew; see `limbeck.Examples`.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, Rows]
    size: int | None = None
    augmentation: tuple[str, ...] = ()
    variants: int | None = None

    def __post_init__(self) -> None:
        check_metrics(self.metrics, len(self.labels))
        check_augmentation(self.augmentation)

    @cached_property
    def pixels(self) -> Pixels:
        """What models read that have no image processor of their own, measured on the training images."""
        pictures = _some(self.splits[TRAIN].inputs, MEASURED)
        size = self.size or _common_size(_some(pictures, LOOKED_AT)) or USUAL_SIZE
        return measured((picture.decoded() for picture in pictures), size)

    def load(self, source: str | Path) -> Loaded:
        """Load an image classifier and what its image processor does, from a folder or the hub.

        A head that was trained for another number of classes is replaced.
        """
        model, trained = load_classifier(source, self.labels, new_head=True)
        pixels = load_pixels(source)
        size = getattr(model.config, "image_size", None)
        if pixels is None and isinstance(size, int):
            pixels = self.pixels.at(size)
        return Loaded(model, None if pixels is None else pixels.at(self.size), head_is_trained=trained)

    def encode(self, rows: Rows, processor: Any) -> Examples:
        """Decode the pictures, now where they fit into memory, else each time; training augments them."""
        pixels: Pixels = processor or self.pixels
        whole = RESIZED_CROP in self.augmentation  # the part is cut out of the picture as it is
        store = _Decoded(rows.inputs, rows.labels, None if whole else pixels)
        if store.bytes() <= KEPT_BYTES:
            store = _Decoded(rows.inputs, rows.labels, store.pixels, [store.image(i) for i in range(len(rows))])
        augment = Augment(self.augmentation, pixels.size, INPUTS) if self.augmentation else None
        return Examples(store, _Collate(pixels), augment=augment, variants=self.variants)


@dataclass(frozen=True)
class _Decoded:
    """The examples of a split as uint8 images (C, H, W): fitted to what models read, or whole."""

    pictures: Sequence[Picture]
    labels: Sequence[float]
    pixels: Pixels | None
    kept: Sequence[Raw] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, index: int) -> Raw:
        """One image (H, W, C)."""
        decoded = self.pictures[index].decoded()
        return decoded if self.pixels is None else np.ascontiguousarray(self.pixels.fit(decoded))

    def bytes(self) -> int:
        """What all images take in memory; reading their heads also finds files that are no images."""
        sizes = [picture.size() for picture in self.pictures]
        if self.pixels is not None:
            return 3 * len(sizes) * self.pixels.size**2
        return sum(3 * height * width for height, width in sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.image(index) if self.kept is None else self.kept[index]
        return {
            INPUTS: torch.tensor(image).permute(2, 0, 1),
            FITTED: self.pixels is not None,
            LABELS: self.labels[index],
            EXAMPLE_ID: index,
        }


@dataclass(frozen=True)
class _Collate:
    """Makes a batch of examples: normalised images (B, C, S, S) as the model's first input, labels, numbers."""

    pixels: Pixels

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.stack([self.fitted(example) for example in examples])
        return {
            INPUTS: (self.pixels.normalised(images),),
            LABELS: torch.tensor([int(example[LABELS]) for example in examples]),
            EXAMPLE_ID: torch.tensor([example[EXAMPLE_ID] for example in examples]),
        }

    def fitted(self, example: dict[str, Any]) -> torch.Tensor:
        """The image of an example; a whole picture out of which nothing was cut is resized here."""
        image: torch.Tensor = example[INPUTS]
        if example[FITTED]:
            return image
        return torch.tensor(self.pixels.fit(image.permute(1, 2, 0).contiguous().numpy())).permute(2, 0, 1)


def _some(things: Sequence[Any], count: int) -> list[Any]:
    """That many, evenly spaced; all where there are fewer."""
    places = np.linspace(0, len(things) - 1, min(count, len(things)))
    return [things[int(place)] for place in places]


def _common_size(pictures: Sequence[Picture]) -> int | None:
    """The height and width of all pictures, where all are the same small square."""
    sizes = {side for picture in pictures for side in picture.size()}
    return sizes.pop() if len(sizes) == 1 and max(sizes) <= USUAL_SIZE else None


@TASKS.register_as("image")
def image(options: TaskOptions) -> PictureTask:
    """Make a task from class folders or Parquet; see `limbeck.tasks.image_files.read_images`.

    Raises:
        ValueError: nothing to read, or an option that this task does not use.
    """
    if options.data is None:
        raise ValueError("the image task needs --data: a folder of class folders, or Parquet with images")
    check_taken(options, ["data", "label", "image", "size", "augmentation", "variants"])
    check_augmentation(options.augmentation)
    names, splits = read_images(Path(options.data), options.image, options.label)
    metrics = with_first(options.metric, ("accuracy", "macro_f1"))
    return PictureTask(
        "image", names, metrics, shorten(splits, options), options.size, options.augmentation, options.variants
    )
