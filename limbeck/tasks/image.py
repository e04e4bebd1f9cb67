"""Handwritten digits, the image task that scikit-learn carries.

Shape legend: B examples, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.metrics import check_metrics
from limbeck.pretrained import load_with_head
from limbeck.tasks.base import (
    TASKS,
    TRAIN,
    VALIDATION,
    Loaded,
    Rows,
    TaskOptions,
    check_taken,
    shorten,
    split_rows,
    with_first,
)
from limbeck.train import Examples
from limbeck.types import EXAMPLE_ID, LABELS


@dataclass(frozen=True)
class ImageTask:
    """Classes to predict from images; see `limbeck.tasks.Task`.

    Attributes:
        name: Its name.
        labels: Names of the classes.
        metrics: Names of the metrics, the main one first.
        splits: Arrays (C, H, W) of float32 with labels, by split.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, Rows]

    def __post_init__(self) -> None:
        check_metrics(self.metrics, len(self.labels))

    def load(self, source: str | Path) -> Loaded:
        """Load an image classifier from a folder or the hub."""
        model, trained = load_classifier(source, self.labels)
        return Loaded(model, None, head_is_trained=trained)

    def encode(self, rows: Rows, processor: Any) -> Examples:
        """Make tensors of the images; they need no processor."""
        return Examples(
            [
                {"pixel_values": torch.from_numpy(image), LABELS: torch.tensor(label), EXAMPLE_ID: torch.tensor(i)}
                for i, (image, label) in enumerate(zip(rows.inputs, rows.labels, strict=True))
            ]
        )


def load_classifier(source: str | Path, labels: Sequence[str], new_head: bool = False) -> tuple[Any, bool]:
    """Load an image classifier of transformers, and say whether its head was trained; see `load_with_head`."""
    from transformers import AutoModelForImageClassification

    return load_with_head(AutoModelForImageClassification, source, labels, "an image model", new_head=new_head)


@TASKS.register_as("digits")
def digits(options: TaskOptions) -> ImageTask:
    """1797 handwritten digits of 8 x 8 pixels, one fifth of them for validation.

    Raises:
        ValueError: an option that this task does not use.

    Reference:
        Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI.
    """
    from sklearn.datasets import load_digits

    check_taken(options)
    data = load_digits()
    images = (data.images[:, None].astype(np.float32) - 8.0) / 8.0
    train, validation = split_rows(Rows(list(images), data.target.tolist()))
    names = tuple(str(d) for d in range(10))
    metrics = with_first(options.metric, ("accuracy", "macro_f1"))
    return ImageTask("digits", names, metrics, shorten({TRAIN: train, VALIDATION: validation}, options))


def fresh_resnet(task: ImageTask, *, widths: tuple[int, ...] = (32, 64), depth: int = 2) -> Loaded:
    """A small ResNet with random weights for one-channel images."""
    from transformers import ResNetConfig, ResNetForImageClassification

    names = dict(enumerate(task.labels))
    config = ResNetConfig(
        num_channels=task.splits[TRAIN].inputs[0].shape[0],
        embedding_size=widths[0],
        hidden_sizes=list(widths),
        depths=[depth] * len(widths),
        layer_type="basic",
        num_labels=len(names),
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    return Loaded(ResNetForImageClassification(config), None, head_is_trained=False)
