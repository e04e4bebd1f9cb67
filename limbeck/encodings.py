"""Two encodings of the same examples: one as the student reads them, one as the teacher does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.batch import as_batch
from limbeck.pretrained import is_path, load_tokenizer
from limbeck.registry import nearest
from limbeck.tasks.base import EXTRA, MOST_TEXTS, TRAIN, Rows, Task
from limbeck.tasks.table import are_scores
from limbeck.tasks.tables import column, text_rows
from limbeck.tasks.text import encode_texts
from limbeck.train import Examples
from limbeck.train.data import Indexed
from limbeck.types import EXAMPLE_ID, IGNORE_INDEX, LABELS, STUDENT, TEACHER, Batch

SOURCE = "the data set"


def paired(
    dataset: Any,
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    text: str | tuple[str, str] = "text",
    label: str | None = "label",
    classes: Sequence[str] = (),
    max_length: int = 128,
) -> Examples:
    """Encode texts twice, for a student and a teacher with different tokenizers (a BERT and a RoBERTa).

    A batch is ``{"student": {...}, "teacher": {...}, "labels": ..., "example_id": ...}``. Each side is padded to
    its own longest text, (B, L_student) and (B, L_teacher); texts of like length (the student's) come together.

    Terms may compare the logits, or one vector of each text (``"bert.pooler"``, ``"classifier.out_proj#input"``).
    Token by token there is nothing to compare, and a term that does is refused.

    Args:
        dataset: One split of a Hugging Face data set, a list of dicts, or a pandas DataFrame.
        student_tokenizer: The student's tokenizer, or the folder or hub id of one.
        teacher_tokenizer: The teacher's; or a mapping of such by name, for an `Ensemble` of teachers so called.
        text: The column with the text, or a pair of columns, which the tokenizers join.
        label: The column with labels: class numbers, names of classes, or numbers to predict (with a decimal
            point); None where there are none.
        classes: Names of the classes in the order of the models' logits, where the labels are names.
        max_length: Tokens after which a text is cut, for each tokenizer.

    Returns:
        Examples for `limbeck.fit`, to train and to evaluate on.

    Raises:
        TypeError: no data set of rows, or no tokenizer.
        ValueError: a column that is not there or lacks values, texts that are none, labels that fit no class, a
            tokenizer that cannot pad, or a length below 1.

    Example:
        >>> from limbeck.tasks.builtin import train_tokenizer
        >>> rows = [{"text": "a fine film", "label": 1}, {"text": "a dull and cold book", "label": 0}]
        >>> coarse, fine = (train_tokenizer([row["text"] for row in rows], vocabulary=n) for n in (90, 25))
        >>> batch = paired(rows, coarse, fine).batch([0, 1])
        >>> sorted(batch), batch["student"]["input_ids"].shape, batch["teacher"]["input_ids"].shape
        (['example_id', 'labels', 'student', 'teacher'], torch.Size([2, 7]), torch.Size([2, 12]))
    """
    names = (text,) if isinstance(text, str) else tuple(text)
    if not 1 <= len(names) <= MOST_TEXTS:
        raise ValueError(f"a model reads one text or a pair of texts, and {len(names)} columns are named")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length is {max_length!r}; give a whole number of tokens of at least 1")
    frame = _frame(dataset, names, label)
    texts = text_rows(frame, names, SOURCE)
    labels = None if label is None else _labels(column(frame, label, SOURCE), classes)
    regression = not classes and are_scores(labels or ())

    def encoded(tokenizer: Any, side: str) -> Examples:
        return encode_texts(texts, labels, _tokenizer(tokenizer, side), max_length, regression)

    own = encoded(student_tokenizer, STUDENT)
    if not isinstance(teacher_tokenizer, Mapping):
        return pair(own, encoded(teacher_tokenizer, TEACHER))
    return pair(own, beside({name: encoded(each, name) for name, each in teacher_tokenizer.items()}))


def pair(student: Examples, teacher: Examples) -> Examples:
    """Put two encodings of the same examples beside each other, as batches of two sides.

    Args:
        student: The examples as the student reads them; their labels, numbers and lengths are the pair's.
        teacher: The same examples, in the same order, as the teacher reads them.

    Raises:
        ValueError: different numbers of examples, or examples that are augmented, each side otherwise.

    Example:
        >>> import torch
        >>> sides = [Examples([{"x": torch.zeros(n), "labels": 1}] * 2) for n in (3, 5)]
        >>> {key: list(value) for key, value in pair(*sides).batch([0]).items() if key != "labels"}
        {'student': ['x'], 'teacher': ['x']}
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"the student has {len(student)} examples and the teacher {len(teacher)}; encode the same ones twice"
        )
    if student.augment is not None or teacher.augment is not None:
        raise ValueError("augmented examples would be augmented otherwise on each side; pair them without")
    return beside({STUDENT: student, TEACHER: teacher})


def beside(sides: Mapping[str, Examples]) -> Examples:
    """Encodings of the same examples as the parts of a batch, by name; the first one's lengths are theirs.

    Raises:
        ValueError: there is none.
    """
    if not sides:
        raise ValueError("there is no encoding to put beside another; name a tokenizer for each teacher")
    items = _Beside({name: side.items for name, side in sides.items()})
    collate = _Collate({name: side.collate for name, side in sides.items()})
    return Examples(items, collate, next(iter(sides.values())).lengths)


@dataclass(frozen=True)
class Encoded:
    """The examples of a run, as each of the two models reads them.

    Attributes:
        teacher: By split, as the teacher reads them; extra examples too.
        student: By split, as the student does; the same object where both read the same.
        training: What the student trains on, for both at once: the training split, and then the extra examples.
        asked: The same as the teacher reads it.
    """

    teacher: dict[str, Examples]
    student: dict[str, Examples]
    training: Examples
    asked: Examples

    def by_role(self, role: str) -> dict[str, Examples]:
        """What the teacher, the student or the baseline reads."""
        return self.teacher if role == TEACHER else self.student

    def longest(self) -> Batch:
        """The longest training example, which needs the most of a model, and the longest other one with a label.

        Drawn as in training, for a cache has no others to show.
        """
        lengths = self.training.lengths or [0] * len(self.training)
        order = sorted(range(len(self.training)), key=lambda i: -lengths[i])
        labelled = [i for i in order[1:] if i < len(self.teacher[TRAIN])]
        return self.training.batch([*order[:1], *labelled[:1]], (0, 0))

    @property
    def labelled(self) -> Examples:
        """What the student trains on without the extra examples."""
        return part_of(self.training, 0, len(self.teacher[TRAIN]))


def encode_for(task: Task, student: Any, teacher: Any, extra: Rows | None = None) -> Encoded:
    """Encode a task's examples once, or twice where student and teacher have tokenizers of their own.

    Args:
        task: The task with its data.
        student: The student's processor.
        teacher: The teacher's; where it is the very object, both read the same.
        extra: Further examples for the student's training.
    """
    its, asked = _splits(task, teacher, extra)
    if student is teacher:
        return Encoded(its, its, asked, asked)
    own, read = _splits(task, student, extra)
    return Encoded(its, own, pair(read, asked), asked)


def _splits(task: Task, processor: Any, extra: Rows | None) -> tuple[dict[str, Examples], Examples]:
    """Each split as one model reads it, and all that is for training; extra examples come last."""
    if extra is None:
        found = {name: task.encode(rows, processor) for name, rows in task.splits.items()}
        return found, found[TRAIN]
    rows, count = task.splits[TRAIN], len(task.splits[TRAIN])
    every = task.encode(Rows([*rows.inputs, *extra.inputs], [*rows.labels, *extra.labels]), processor)
    parts = {TRAIN: part_of(every, 0, count), EXTRA: part_of(every, count, len(every))}
    rest = {name: task.encode(rows, processor) for name, rows in task.splits.items() if name != TRAIN}
    return {**parts, **rest}, every


def part_of(examples: Examples, start: int, stop: int) -> Examples:
    """Examples that follow each other, as they are.

    Example:
        >>> import torch
        >>> every = Examples([{"x": torch.tensor(n)} for n in range(4)])
        >>> part_of(every, 1, 3).batch([0, 1])
        {'x': tensor([1, 2])}
    """
    lengths = None if examples.lengths is None else examples.lengths[start:stop]
    return replace(examples, items=_Part(examples.items, range(start, stop)), lengths=lengths)


@dataclass(frozen=True)
class _Part:
    """Some of the examples."""

    items: Indexed
    places: range

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> Any:
        return self.items[self.places[index]]


@dataclass(frozen=True)
class _Beside:
    """The examples of all sides, together."""

    sides: Mapping[str, Indexed]

    def __len__(self) -> int:
        return len(next(iter(self.sides.values())))

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {name: items[index] for name, items in self.sides.items()}


@dataclass(frozen=True)
class _Collate:
    """Makes a batch of each side; labels and example numbers, which all have, stand beside them."""

    sides: Mapping[str, Callable[[list[Any]], Any]]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        parts = {name: as_batch(make([item[name] for item in items])) for name, make in self.sides.items()}
        first = next(iter(parts.values()))
        common = {key: first[key] for key in (LABELS, EXAMPLE_ID) if key in first}
        return {**{name: _without(part, LABELS, EXAMPLE_ID) for name, part in parts.items()}, **common}


def _without(batch: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in keys}


def _tokenizer(source: Any, side: str) -> Any:
    """A tokenizer that can pad."""
    if isinstance(source, (str, Path)) and is_path(source) and not Path(source).is_dir():
        raise ValueError(f"there is no folder {str(source)!r} with the {side}'s tokenizer; correct the path")
    tokenizer = load_tokenizer(source) if isinstance(source, (str, Path)) else source
    if not callable(tokenizer):
        raise TypeError(
            f"the {side}'s tokenizer is a {type(source).__name__}; pass a tokenizer of transformers, or the "
            "folder or hub id of one"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the {side}'s tokenizer has no token to pad with; set tokenizer.pad_token = tokenizer.eos_token"
        )
    return tokenizer


def _frame(dataset: Any, texts: Sequence[str], label: str | None) -> Any:
    """The columns of a data set that are asked for, as a DataFrame."""
    import pandas as pd

    is_frame, known = isinstance(dataset, pd.DataFrame), _columns(dataset)
    wanted = [*texts, *(() if label is None else (label,))]
    for name in wanted:
        if name not in known:
            cure = "; without labels, pass label=None" if name == label else ""
            raise ValueError(f"{SOURCE} has no column {name!r}; {nearest(name, known)}{cure}")
    if is_frame:
        return dataset
    if isinstance(dataset, Sequence):
        return pd.DataFrame({name: pd.Series([row.get(name) for row in dataset]) for name in wanted})
    # Of a Hugging Face data set these columns alone are read: others may hold images, which would be decoded.
    return pd.DataFrame({name: pd.Series(list(dataset[name])) for name in wanted})


def _columns(dataset: Any) -> list[str]:
    """The names of the columns of a data set, by its first row.

    Raises:
        TypeError: no data set of rows.
        ValueError: there are no rows.
    """
    import pandas as pd

    is_rows = isinstance(dataset, Indexed) and not isinstance(dataset, (str, Mapping))
    if is_rows and not len(dataset):
        raise ValueError("the data set is empty; check the split and the file")
    if isinstance(dataset, pd.DataFrame):
        return [str(name) for name in dataset.columns]
    first = dataset[0] if is_rows else None
    if isinstance(first, Mapping):
        return [str(name) for name in first]
    raise TypeError(
        f"cannot read texts from a {type(dataset).__name__}; pass one split of a Hugging Face data set, a list of "
        "dicts, or a DataFrame"
    )


def _labels(found: Sequence[Any], classes: Sequence[str]) -> list[float]:
    """Class numbers, or numbers to predict."""
    if classes:
        number = {str(name): i for i, name in enumerate(classes)}
        wrong = next((value for value in found if str(value) not in number), None)
        if wrong is not None:
            raise ValueError(
                f"the label {wrong!r} is none of the classes {list(classes)}; add it, or correct the data"
            )
        return [number[str(value)] for value in found]
    wrong = next((value for value in found if not isinstance(value, (int, float))), None)
    if wrong is not None:
        raise ValueError(
            f"the label {wrong!r} is no number; name the classes in the order of the models' logits, classes=[...]"
        )
    if are_scores(found):
        return [float(value) for value in found]
    wrong = next((value for value in found if value < 0 and value != IGNORE_INDEX), None)
    if wrong is not None:
        raise ValueError(
            f"the label {wrong!r} is no class number, as in test splits that come without labels; pass label=None"
        )
    return [int(value) for value in found]
