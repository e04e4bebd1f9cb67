"""Any table with text columns and a label column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from limbeck.tasks.base import TASKS, TRAIN, VALIDATION, Rows, TaskOptions, shorten, with_first
from limbeck.tasks.tables import SUFFIXES, column, find_split, read_table, split_rows, text_rows
from limbeck.tasks.text import TextTask

EVALUATION_NAMES = (VALIDATION, "valid", "val", "dev", "test")
MOST_CLASSES = 0.5
"""Share of distinct labels among the examples above which they are no classes."""


@TASKS.register_as("table")
def table(options: TaskOptions) -> TextTask:
    """Make a task from a file, or a folder with one file for each split.

    A single file is split: one fifth of the distinct inputs becomes the validation split. A column of floats is a
    number to predict; anything else is a class.

    Raises:
        ValueError: a file or column that is not there, labels that make no task.
    """
    if options.data is None or not options.text or options.label is None:
        raise ValueError("the table task needs --data FILE, --text COLUMN and --label COLUMN")
    raw = _read(Path(options.data), options)
    labels = [label for _, found in raw.values() for label in found]
    if all(isinstance(label, float) for label in labels):
        names: tuple[str, ...] = ()
        splits = {name: Rows(texts, [float(str(v)) for v in found]) for name, (texts, found) in raw.items()}
    else:
        names = class_names(labels)
        number = {name: i for i, name in enumerate(names)}
        splits = {name: Rows(texts, [number[str(v)] for v in found]) for name, (texts, found) in raw.items()}
    if VALIDATION not in splits:
        splits[TRAIN], splits[VALIDATION] = split_rows(splits[TRAIN])
    default = ("accuracy", "macro_f1") if names else ("pearson", "spearman", "mse")
    metrics = with_first(options.metric, default)
    return TextTask("table", names, metrics, shorten(splits, options), options.max_length)


def _read(path: Path, options: TaskOptions) -> dict[str, tuple[list[tuple[str, ...]], list[object]]]:
    """Texts and raw labels by split."""
    if not path.is_dir():
        files = {TRAIN: path}
    else:
        train = find_split(path, TRAIN)
        if train is None:
            raise ValueError(f"{path} has no train file; looked for train with {', '.join(SUFFIXES)}")
        found = [find_split(path, name) for name in EVALUATION_NAMES]
        evaluation = next((f for f in found if f is not None), None)
        files = {TRAIN: train} if evaluation is None else {TRAIN: train, VALIDATION: evaluation}
    split = {}
    for name, file in files.items():
        frame = read_table(file)
        assert options.label is not None
        split[name] = (text_rows(frame, options.text, str(file)), column(frame, options.label, str(file)))
    return split


def class_names(labels: Sequence[object]) -> tuple[str, ...]:
    """The distinct labels as text, in order: numbers by size, words by alphabet.

    Raises:
        ValueError: one class only, or so many that the column cannot be a class.

    Example:
        >>> class_names([10, 9, 9, 10])
        ('9', '10')
    """
    numbers = all(isinstance(v, int) for v in labels)
    distinct = sorted(set(labels), key=(lambda v: int(str(v))) if numbers else str)
    if len(distinct) < 2:
        raise ValueError(f"the label column holds {distinct!r} only; a task needs two classes or more")
    if len(distinct) > max(2, MOST_CLASSES * len(labels)):
        raise ValueError(
            f"the label column holds {len(distinct)} distinct values in {len(labels)} rows, too many for classes; "
            "is it the right column? (numbers to predict are written with a decimal point)"
        )
    return tuple(str(v) for v in distinct)
