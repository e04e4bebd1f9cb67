"""What a Trainer's data keep on the way to a student and its teacher."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from limbeck.batch import as_batch, task_of, view
from limbeck.teachers import ByTask, Given, ModuleInputs, ModuleTeacher, Remote, Self, Teacher, within
from limbeck.teachers.average import Average
from limbeck.teachers.base import Combined
from limbeck.teachers.own import WithoutAdapter
from limbeck.teachers.remote import FIELD
from limbeck.terms import Term
from limbeck.train.checkpoint import random_state, set_random_state
from limbeck.types import EXAMPLE_ID, IGNORE_INDEX, INPUTS, LABELS, STUDENT, TASK, TEACHER, TEACHER_CACHE

BESIDE = (EXAMPLE_ID, TASK, TEACHER_CACHE, STUDENT, TEACHER, INPUTS, LABELS, "label", "label_ids")
"""Entries of a batch that a distillation knows, whatever the models take."""

PARTS = (STUDENT, TEACHER, TEACHER_CACHE)
"""Columns that are always read, unless they are texts, which only share the name."""

TEXTS = ("string", "large_string")

SPANS = ("start_positions", "end_positions")
"""Where an answer begins and ends, among the labels."""

SAMPLE = 2

EMPTY = "the training data is empty; check the split, the file and dataloader_drop_last"

Collate = Callable[[Sequence[Any]], Any]


def base_of(student: nn.Module) -> nn.Module:
    """The model that names its task and inputs: the student, or the one in it that adapters were put on.

    Example:
        >>> base_of(nn.Linear(2, 3))
        Linear(in_features=2, out_features=3, bias=True)
    """
    from transformers.utils import is_peft_available

    if not is_peft_available():
        return student
    from peft import PeftModel

    base: nn.Module = student.get_base_model() if isinstance(student, PeftModel) else student
    return base


@dataclass(frozen=True)
class Entries:
    """Which entries of an example are for whom.

    Attributes:
        student: What the student's forward names.
        others: What the teacher takes beside that, masks and labels that terms name.
        columns: Those of the others that are kept of a data set. Of names that a data set may well use for
            something else (``task``, ``inputs``, ``example_id``), only what this distillation reads.
        takes_all: Whether the student's forward passes on what it does not name.
        anything: Whether the teacher may read any entry, for all that is known of it.
    """

    student: frozenset[str]
    others: frozenset[str]
    columns: frozenset[str]
    takes_all: bool
    anything: bool

    @classmethod
    def of(
        cls, student: nn.Module, teacher: Teacher | None, terms: Sequence[Term], labels: Sequence[str]
    ) -> Entries:
        """Look at what two models take and terms name.

        Example:
            >>> entries = Entries.of(nn.Linear(2, 3), None, [Term("logits", loss="mse", mask="known")], ["labels"])
            >>> sorted(entries.student), "known" in entries.others, entries.anything
            (['input', 'labels'], True, False)
        """
        call = ModuleInputs(base_of(student))
        own = call.named | set(labels)
        read = [name for _, inner in within(teacher) for name in (_reads(inner) or ()) if call.named]
        named = [entry for t in terms for entry in (t.mask, t.labels) if entry]
        others = {*BESIDE, *read, *named} - own
        columns = {*PARTS, *_asked(teacher, terms), *read, *named} - own
        anything = any(_reads(inner) is None for _, inner in within(teacher))
        return cls(frozenset(own), frozenset(others), frozenset(columns), call.is_open, anything)

    def of_student(self, batch: Any) -> Any:
        """The part of a batch that the student's forward is given in an evaluation.

        Example:
            >>> entries = Entries(frozenset({"x"}), frozenset({"seen", "student"}), frozenset(), True, False)
            >>> entries.of_student({"student": {"x": 1}, "seen": 2, "more": 3})
            {'more': 3, 'x': 1}
        """
        own = view(as_batch(batch), STUDENT)
        return {k: v for k, v in own.items() if k in self.student or (self.takes_all and k not in self.others)}


@dataclass(frozen=True)
class StudentOnly:
    """Collates examples for a student alone; an object, since workers are sent it."""

    collate: Collate
    entries: Entries

    def __call__(self, examples: Sequence[Any]) -> Any:
        """A batch without what is for the teacher."""
        return self.entries.of_student(self.collate(examples))


@dataclass(frozen=True)
class SpansWithin:
    """Collates examples; an answer that begins or ends beyond the text does not count, as in transformers' models.

    Example:
        >>> batch = {"input_ids": torch.zeros(2, 5), "start_positions": torch.tensor([4, 5])}
        >>> SpansWithin(lambda examples: batch)([])["start_positions"]
        tensor([   4, -100])
    """

    collate: Collate

    def __call__(self, examples: Sequence[Any]) -> Any:
        """A batch whose positions lie within its texts, or are marked."""
        batch = self.collate(examples)
        texts = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(texts, Tensor):
            return batch
        marked = {
            key: torch.where(batch[key] < texts.shape[1], batch[key], IGNORE_INDEX)
            for key in SPANS
            if isinstance(batch.get(key), Tensor)
        }
        return {**batch, **marked}


class GivenIn(Dataset):  # type: ignore[type-arg]
    """A data set one of whose columns is what the teacher said, for a trainer with ``teacher=Given()``.

    Args:
        examples: A data set with a length.
        column: Under which an example has the teacher's logits.

    Raises:
        ValueError: a stream, or one whose examples have no such column.

    Example:
        >>> GivenIn([{"x": 1, "teacher_logits": [0.5, 2.0]}])[0]
        {'x': 1, 'teacher_cache': [0.5, 2.0]}
    """

    def __init__(self, examples: Any, column: str = "teacher_logits") -> None:
        if isinstance(examples, IterableDataset):
            raise ValueError(f"{column} are read from data with a length, not from a stream; load it")
        if not has_column(examples, column):
            raise ValueError(f"the first example has no {column!r}; write there what the teacher said")
        self.examples, self.column = examples, column

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {TEACHER_CACHE if key == self.column else key: v for key, v in self.examples[index].items()}


def has_column(dataset: Any, column: str) -> bool:
    """Whether the first example of a data set has a column.

    Raises:
        ValueError: there is no example.

    Example:
        >>> has_column([{"x": 1}], "y")
        False
    """
    return column in _first(dataset)


def _reads(teacher: Teacher) -> list[str] | None:
    """The entries that one kind of teacher reads by itself; None where that is not known."""
    if isinstance(teacher, ModuleTeacher):
        call = ModuleInputs(teacher.module)
        return None if call.is_open and not call.named - {TASK} else sorted(call.named)
    if isinstance(teacher, Remote):
        return ["input_ids", "attention_mask", *FIELD.findall(teacher.prompt or "")]
    known = isinstance(teacher, (Combined, Given, Self, Average, WithoutAdapter))
    return [] if known else None


def _asked(teacher: Teacher | None, terms: Sequence[Term]) -> list[str]:
    """What is read of an example beside models' inputs: its task, and its number."""
    by_task = any(t.task is not None for t in terms) or any(isinstance(t, ByTask) for _, t in within(teacher))
    numbered = any(EXAMPLE_ID in t.comparison.asks for t in terms)
    return [TASK] * by_task + [EXAMPLE_ID] * numbered


def without_texts(dataset: Any, names: Collection[str]) -> Any:
    """A `datasets.Dataset` without those of the named columns that are texts.

    Example:
        >>> import datasets
        >>> without_texts(datasets.Dataset.from_dict({"x": [1], "teacher": ["Ann"]}), ["teacher"]).column_names
        ['x']
    """
    texts = [c for c in names if c in dataset.column_names and getattr(dataset.features[c], "dtype", "") in TEXTS]
    return dataset.remove_columns(texts) if texts else dataset


def samples(loader: Any, tasks: Sequence[str]) -> Iterator[Any]:
    """Batches of two examples of the data behind a loader, one for each task; nothing is taken from the loader.

    Random numbers are drawn; who calls puts them back.

    Raises:
        ValueError: there are no examples.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> list(samples(DataLoader([1, 2, 3], batch_size=3), ()))
        [tensor([1, 2])]
    """
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        first = list(islice(iter(loader.dataset), SAMPLE))
        if not first:
            raise ValueError(EMPTY)
        yield loader.collate_fn(first)
        return
    missing, batch = set(tasks), None
    for indices in loader.batch_sampler:
        batch = loader.collate_fn([loader.dataset[i] for i in islice(indices, SAMPLE)])
        if tasks and task_of(as_batch(batch)) not in missing:
            continue
        yield batch
        if not tasks:
            return
        missing.discard(task_of(as_batch(batch)))
        if not missing:
            return
    if batch is None:
        raise ValueError(EMPTY)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Look at data and models, and leave the random generators where they were."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def labels_of_first(dataset: Any) -> Tensor | None:
    """The labels of a data set's first example, under any of the names that transformers takes, or None.

    Raises:
        ValueError: there is no example.
    """
    example = _first(dataset)
    found = next((example[key] for key in (LABELS, "label", "label_ids") if key in example), None)
    return None if found is None else torch.as_tensor(found)


def _first(dataset: Any) -> Any:
    with undisturbed():
        example = next(iter(dataset), None)
    if example is None:
        raise ValueError(EMPTY)
    return example
