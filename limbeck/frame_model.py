"""A model of data frames: the columns that it knows, its network, and what encodes its texts and images.

Shape legend: N rows, C classes, D features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import PartialState

from limbeck.atomic import write_text
from limbeck.distiller import Distiller
from limbeck.encodings import pair
from limbeck.metrics import Array
from limbeck.pretrained import load_backbone, load_tokenizer, most_tokens
from limbeck.tasks.column_kinds import CATEGORICAL, IMAGE, NUMERICAL, REGRESSION, TEXT
from limbeck.tasks.frames import Columns
from limbeck.tasks.fusion import FusionNetwork
from limbeck.tasks.pixels import Pixels, load_pixels
from limbeck.teachers import Cached, ModuleTeacher
from limbeck.terms import Term
from limbeck.train import Callback, Examples, FitResult, Settings, fit, predict
from limbeck.train.callbacks import State

if TYPE_CHECKING:
    import pandas as pd

COLUMNS, TEXTS, IMAGES = "columns.json", "text", "image"

TRAINING = "training"
"""Where a model's folder has the checkpoints of a training that did not end yet."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's channels, for backbones that come without an image processor."""


@dataclass(frozen=True)
class FrameModel:
    """A network and all that makes its inputs of a table.

    Attributes:
        columns: What the table's columns hold.
        network: The network.
        tokenizer: Of the text columns.
        pixels: What becomes of images.
        max_length: Tokens after which a row's texts are cut.
        notes: What is kept with it, as JSON. `fit_frame_model` writes under ``"fit"`` how its training went.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"x": [1.0, 2.0, 4.0, 3.0], "y": ["b", "a", "b", "a"]})
        >>> model = FrameModel.build(Columns.find(frame, "y"))
        >>> model.logits(frame).shape
        (4, 2)
    """

    columns: Columns
    network: FusionNetwork
    tokenizer: Any = None
    pixels: Pixels | None = None
    max_length: int = 512
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        columns: Columns,
        *,
        text: str | Path | None = None,
        image: str | Path | None = None,
        pooling: Literal["cls", "mean"] = "cls",
        max_length: int = 512,
        hidden: int = 128,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> FrameModel:
        """Make a model for some columns, from pretrained encoders and with new layers above them.

        Args:
            columns: What it will read.
            text: A text encoder of transformers, by folder or hub id.
            image: An image backbone of transformers, likewise.
            pooling: How the encoder makes one vector of a text.
            max_length: Tokens after which a row's texts are cut; never more than the encoder reads.
            hidden: Width of tabular parts and of the fusion.
            dropout: After the fusion.
            seed: Of the new layers.

        Raises:
            ValueError: columns of texts or images without an encoder, or one that cannot be loaded.
        """
        for kind, source in ((TEXT, text), (IMAGE, image)):
            if columns.of(kind) and source is None:
                raise ValueError(f"column {columns.of(kind)[0]!r} holds {kind} and there is no encoder; name one")
        torch.manual_seed(seed)
        encoders: dict[str, Any] = {}
        tokenizer = pixels = None
        if columns.of(TEXT) and text is not None:
            encoders["text"], tokenizer = load_backbone(text, "a text encoder"), load_tokenizer(text)
            max_length = min(max_length, most_tokens(encoders["text"]) or max_length)
        if columns.of(IMAGE) and image is not None:
            encoders["image"] = load_backbone(image, "an image backbone")
            pixels = load_pixels(image) or _usual_pixels(encoders["image"])
        network = FusionNetwork(
            columns.outputs,
            **encoders,
            pooling=pooling,
            categories=[1 + len(columns.categories[name]) for name in columns.of(CATEGORICAL)],
            numbers=2 * len(columns.of(NUMERICAL)),
            hidden=hidden,
            dropout=dropout,
        )
        return cls(columns, network, tokenizer, pixels, max_length)

    def encode(self, frame: pd.DataFrame, labelled: bool = True) -> Examples:
        """The rows of a table as this model reads them; see `limbeck.tasks.frames.Columns.encode`."""
        return self.columns.encode(frame, self.tokenizer, self.pixels, self.max_length, labelled=labelled)

    def logits(self, frame: pd.DataFrame, batch_size: int = 32) -> Array:
        """What the network says of each row, (N, C); of a number to predict standardised, (N, 1)."""
        return predict(self.network, self.encode(frame, labelled=False), batch_size=batch_size).logits

    def features(self, frame: pd.DataFrame, batch_size: int = 32) -> Array:
        """What the network's head reads of each row, (N, D)."""
        rows = self.encode(frame, labelled=False)
        return predict(self.network, rows, batch_size=batch_size, read=lambda out: {"logits": out.features}).logits

    def labels(self, logits: Array) -> Array:
        """The labels that logits (N, C) stand for, as the table has them, (N,)."""
        if self.columns.problem == REGRESSION:
            return np.asarray(self.columns.in_units(logits[:, 0]))
        classes = self.columns.classes
        return np.asarray([classes[number] for number in logits.argmax(axis=1)])

    def probabilities(self, logits: Array) -> Array:
        """The probability of each class, (N, C).

        Raises:
            ValueError: a number is predicted.
        """
        if self.columns.problem == REGRESSION:
            raise ValueError("a number to predict has no probabilities; take the labels")
        exponents: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: Array = exponents / exponents.sum(axis=1, keepdims=True)
        return shares

    def scores(self, logits: Array, frame: pd.DataFrame, metrics: Sequence[str]) -> dict[str, float]:
        """How well logits (N, C) fit the labels of a table, by each of some metrics.

        Raises:
            ValueError: an unknown metric, or one for another kind of problem.
        """
        chosen = {name: self.columns.metric(name) for name in metrics}
        labels = np.asarray(self.columns.labels(frame))
        return {name: metric(logits, labels) for name, metric in chosen.items()}

    def save(self, folder: str | Path) -> None:
        """Write all of it as JSON and safetensors; the tokenizer and the image processor as transformers does.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
            ValueError: the folder holds something else.
        """
        check_folder(folder)
        self._write(Path(folder), done=True)

    def _write(self, folder: Path, done: bool) -> None:
        self.network.save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / TEXTS)
        if self.pixels is not None:
            self.pixels.save_pretrained(folder / IMAGES)
        kept = {
            "columns": self.columns.to_dict(),
            "max_length": self.max_length,
            "notes": self.notes,
            "done": done,
        }
        write_text(folder / COLUMNS, json.dumps(kept))

    @classmethod
    def load(cls, folder: str | Path, resume: bool = False) -> FrameModel:
        """Load what `save` or `fit_frame_model` wrote.

        Args:
            folder: Where it is.
            resume: Whether a model is taken whose training did not end, to go on with it.

        Raises:
            ValueError: the folder holds no such model, or one whose training did not end.
        """
        folder = Path(folder)
        if not (folder / COLUMNS).is_file():
            raise ValueError(f"{folder} holds no model of data frames, for it has no {COLUMNS}; correct the path")
        kept = json.loads((folder / COLUMNS).read_text())
        if not kept.get("done", True) and not resume:
            raise ValueError(f"the training of {folder} did not end; load it with resume=True, and fit it again")
        columns = Columns.from_dict(kept["columns"])
        tokenizer = load_tokenizer(folder / TEXTS) if columns.of(TEXT) else None
        pixels = load_pixels(folder / IMAGES) if columns.of(IMAGE) else None
        return cls(
            columns, FusionNetwork.load(folder), tokenizer, pixels, kept["max_length"], kept.get("notes", {})
        )


def check_folder(folder: str | Path) -> None:
    """Refuse to write a model of data frames among files of something else.

    Raises:
        ValueError: the folder holds other files and no such model.

    Example:
        >>> check_folder("a folder that is not there")
    """
    folder = Path(folder)
    if (folder / COLUMNS).is_file() or not folder.is_dir():
        return
    if any(path.name != TRAINING or path.is_file() or any(path.iterdir()) for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no model of data frames; choose another folder")


def fit_frame_model(
    student: FrameModel,
    train: pd.DataFrame,
    tuning: pd.DataFrame | None,
    settings: Settings,
    terms: Sequence[Term],
    *,
    teacher: FrameModel | None = None,
    metric: str = "accuracy",
    callbacks: Sequence[Callback] = (),
    folder: str | Path | None = None,
) -> FitResult:
    """Train a model of data frames, from a teacher's answers where there is one.

    Each of the two reads the columns that it knows, with its own tokenizer and image size. The teacher is run once
    for each row and remembered, and not at all in evaluations.

    Args:
        student: What is trained, in place.
        train: Training rows.
        tuning: Rows for evaluations on the way; None for none.
        settings: How to train.
        terms: What is learned; they may read ``"logits"``, ``"features"`` and the labels.
        teacher: Another such model for the same label.
        metric: What evaluations measure, in the label's own units.
        callbacks: What watches.
        folder: Where the trained model goes, and the checkpoints as long as it trains. If it holds some, the
            training goes on from there. What is refused before the first step leaves an older model in it.

    Raises:
        ValueError: a teacher for other classes, or in another scale; a folder of something else; whatever
            `limbeck.fit` finds wrong.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"x": [float(i % 7) for i in range(64)], "y": [i % 7 > 3 for i in range(64)]})
        >>> model = FrameModel.build(Columns.find(frame, "y"), hidden=8)
        >>> settings = Settings(epochs=20, batch_size=16, learning_rate=0.02)
        >>> fit_frame_model(model, frame, frame, settings, [Term("labels", loss="cross_entropy")]).best_score
        1.0
    """
    if folder is not None:
        check_folder(folder)
    if teacher is not None:
        _check_same_labels(student.columns, teacher.columns)
    rows, remembered = student.encode(train), None
    if teacher is not None:
        rows = pair(rows, teacher.encode(train, labelled=False))
        remembered = Cached(ModuleTeacher(teacher.network))
    student.network.requires_grad_(True)
    distiller = Distiller(student.network, remembered, terms)
    judge = student.columns.metric(metric)
    held = None if tuning is None else student.encode(tuning)
    checkpoints = None
    if folder is not None:
        checkpoints = Path(folder) / TRAINING
        callbacks = [*callbacks, _Begun(student, Path(folder))]
    fitted = fit(distiller, rows, held, settings, metric=judge, callbacks=callbacks, folder=checkpoints)
    told = ("best_score", "seconds", "steps", "teacher_examples")
    student.notes["fit"] = {name: getattr(fitted, name) for name in told}
    if folder is not None and PartialState().is_main_process:
        student.save(folder)
        shutil.rmtree(Path(folder) / TRAINING)
    return fitted


@dataclass
class _Begun(Callback):
    """Writes the model as its training begins, for who goes on with it; what is refused has left the folder."""

    model: FrameModel
    folder: Path

    def on_start(self, state: State) -> None:
        """Before the first step."""
        if state.step == 0:
            self.model._write(self.folder, done=False)


def _check_same_labels(student: Columns, teacher: Columns) -> None:
    """Refuse a teacher whose logits stand for something else."""
    for what, ours, theirs in (
        ("classes", student.classes, teacher.classes),
        ("label's mean and deviation", student.scale, teacher.scale),
    ):
        if ours != theirs:
            raise ValueError(
                f"the student's {what} are {ours} and the teacher's {theirs}, so their logits do not stand for "
                "the same; make the student's columns like the teacher's: Columns.find(..., like=teacher.columns)"
            )


def _usual_pixels(encoder: Any) -> Pixels:
    size = getattr(encoder.config, "image_size", None)
    return Pixels(size if isinstance(size, int) else 224, *IMAGENET)
