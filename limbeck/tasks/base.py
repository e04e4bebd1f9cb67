"""What a task is: examples with labels, a way to encode them for a model, and the metrics that judge it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field, field_validator
from torch import nn

from limbeck.registry import Registry
from limbeck.strict import Strict, Texts
from limbeck.train import Examples

TRAIN = "train"
VALIDATION = "validation"
HOLDOUT = "holdout"
EXTRA = "extra"
"""The split of examples without labels that the student alone is trained on; see `limbeck.tasks.extra`."""

MOST_TEXTS = 2
"""Texts that one example may consist of; tokenizers join a pair, and no more."""

TAKEN_BY_ALL = ("name", "metric", "train_examples", "eval_examples", "holdout")
"""Options that `shorten` and `with_first` see to, whatever the task."""


class TaskOptions(Strict):
    """Which task, on which data; the ``task:`` part of a recipe."""

    name: str = Field(description="glue/rte, table, image, docstrings, digits, ...")
    data: str | None = Field(None, description="a folder or file; by default the hub, or what the task carries")
    text: Texts = Field((), description="text columns of a table, one or two")
    label: str | None = Field(None, description="label column of a table")
    image: str | None = Field(None, description="image column of a table, by default the only one")
    size: int | None = Field(None, gt=0, description="height and width of images, by default the model's own")
    augmentation: Texts = Field(
        ("crop", "flip"), description="what training does to images: crop or resized_crop, flip; or nothing"
    )
    variants: int | None = Field(
        None, gt=0, description="of each augmented image; they repeat, and the teacher's answers are remembered"
    )
    metric: str | None = Field(None, description="main metric, if not the task's own")
    max_length: int = Field(128, gt=0, description="tokens after which a text is cut")
    train_examples: int | None = Field(None, gt=0, description="use a random part of the training data")
    eval_examples: int | None = Field(None, gt=0, description="use a random part of the evaluation data")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of the training data kept to choose models by")

    @field_validator("text")
    @classmethod
    def _one_text_or_a_pair(cls, text: tuple[str, ...]) -> tuple[str, ...]:
        if len(text) > MOST_TEXTS or len(set(text)) < len(text):
            raise ValueError(f"a model reads one text column or two different ones, and {len(text)} are named")
        return text


def content(example: Any) -> bytes:
    """What an input consists of, to tell equal ones: its texts, an array's values, or what it says itself."""
    if isinstance(example, tuple):
        return "\x1f".join(example).encode()
    return bytes(example.tobytes() if isinstance(example, np.ndarray) else example.content)


@dataclass(frozen=True)
class Rows:
    """The examples of one split before encoding.

    Attributes:
        inputs: What a model will read: tuples of one or two texts, arrays, or anything else whose ``content`` is
            a hash of it.
        labels: A class index or a number for each.
    """

    inputs: Sequence[Any]
    labels: Sequence[float]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Rows:
        """Some of the examples.

        Example:
            >>> Rows([("a",), ("b",)], [0, 1]).take([1]).inputs
            [('b',)]
        """
        return Rows([self.inputs[i] for i in indices], [self.labels[i] for i in indices])

    def subset(self, count: int | None, seed: int = 0) -> Rows:
        """A random part, always the same one; all of them where `count` is None or too large."""
        if count is None or count >= len(self):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self))[:count]
        return self.take(sorted(chosen.tolist()))

    def fingerprint(self) -> str:
        """A hash of every example, to tell whether two runs saw the same data."""
        digest = hashlib.sha256()
        for example, label in zip(self.inputs, self.labels, strict=True):
            digest.update(content(example) + b"\x1e" + repr(float(label)).encode() + b"\x1e")
        return digest.hexdigest()


@dataclass(frozen=True)
class Loaded:
    """A model, what encodes its inputs, and whether its head was trained or is new."""

    model: nn.Module
    processor: Any
    head_is_trained: bool


class Task(Protocol):
    """A problem to solve, with data.

    Attributes:
        name: Its name.
        labels: Names of the classes; empty where a number is to be predicted.
        metrics: Names of the metrics, the main one first.
        splits: ``"train"``, ``"validation"`` and, for some tasks, further splits to evaluate on.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, Rows]

    def load(self, source: str | Path) -> Loaded:
        """Load a model with a head for this task, from a folder or the hub.

        Raises:
            ValueError: nothing to load, or a head that was trained for other labels.
        """
        ...

    def encode(self, rows: Rows, processor: Any) -> Examples:
        """Make the examples that a model trains on."""
        ...


def is_regression(task: Task) -> bool:
    """Whether a number is to be predicted and not a class.

    Example:
        >>> from limbeck.tasks import make_task
        >>> is_regression(make_task(TaskOptions(name="digits")))
        False
    """
    return not task.labels


def reads_texts(task: Task) -> bool:
    """Whether the inputs of a task are texts or pairs of texts.

    Example:
        >>> from limbeck.tasks import make_task
        >>> reads_texts(make_task(TaskOptions(name="digits")))
        False
    """
    first = next(iter(task.splits[TRAIN].inputs), None)
    return isinstance(first, tuple) and all(isinstance(text, str) for text in first)


TASKS: Registry[Callable[..., Task]] = Registry("task")


def with_first(metric: str | None, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """A task's metrics with the one that the user chose in front.

    Example:
        >>> with_first("f1", ("accuracy", "f1"))
        ('f1', 'accuracy')
    """
    return metrics if metric is None else (metric, *(m for m in metrics if m != metric))


def shorten(task_splits: dict[str, Rows], options: TaskOptions) -> dict[str, Rows]:
    """Apply ``train_examples``, ``eval_examples`` and ``holdout`` to the splits of a task.

    The part held out of the training data becomes the split ``"holdout"``.

    Raises:
        ValueError: a split without examples.
    """
    splits = {
        name: rows.subset(options.train_examples if name == TRAIN else options.eval_examples)
        for name, rows in task_splits.items()
    }
    for name, rows in splits.items():
        if not len(rows):
            raise ValueError(f"the {name} split is empty; check the data")
    if options.holdout:
        kept, held = split_rows(splits[TRAIN], options.holdout, seed=1)
        if not len(kept) or not len(held):
            raise ValueError(
                f"a holdout of {options.holdout:g} of {len(splits[TRAIN])} training examples leaves "
                f"{len(kept)} to train on and {len(held)} to choose by; change task.holdout or use more data"
            )
        splits[TRAIN], splits[HOLDOUT] = kept, held
    return splits


def split_rows(rows: Rows, share: float = 0.2, seed: int = 0) -> tuple[Rows, Rows]:
    """Split off a random share of the distinct inputs, so that equal inputs stay on one side.

    Example:
        >>> rows = Rows([("a",), ("a",), ("b",), ("c",), ("d",)], [0, 0, 1, 0, 1])
        >>> train, validation = split_rows(rows, 0.25)
        >>> len(train), len(validation), set(train.inputs) & set(validation.inputs)
        (4, 1, set())
    """
    groups: dict[bytes, list[int]] = {}
    for i, example in enumerate(rows.inputs):
        groups.setdefault(content(example), []).append(i)
    order = np.random.default_rng(seed).permutation(len(groups))
    members = list(groups.values())
    wanted = round(share * len(members))
    part = sorted(i for g in order[:wanted] for i in members[g])
    rest = sorted(i for g in order[wanted:] for i in members[g])
    return rows.take(rest), rows.take(part)


def check_taken(options: TaskOptions, takes: Collection[str] = ()) -> None:
    """Refuse options that a task does not use; a value that changes nothing would mislead.

    Args:
        options: The options.
        takes: Names of those that the task uses beside the ones that every task has.

    Raises:
        ValueError: an option differs from its default and is not used.

    Example:
        >>> check_taken(TaskOptions(name="digits", data="scans"))
        Traceback (most recent call last):
        ValueError: the task digits takes no 'data' (it is 'scans'); leave it out or take another task
    """
    for name, field in TaskOptions.model_fields.items():
        value = getattr(options, name)
        if name not in (*TAKEN_BY_ALL, *takes) and value != field.default:
            shown = ", ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
            raise ValueError(
                f"the task {options.name} takes no {name!r} (it is {shown or 'empty'}); leave it out or take "
                "another task"
            )
