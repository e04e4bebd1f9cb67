"""Any table with text columns and a label column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from limbeck.tasks.base import (
    TASKS,
    TRAIN,
    VALIDATION,
    Rows,
    TaskOptions,
    check_taken,
    shorten,
    split_rows,
    with_first,
)
from limbeck.tasks.tables import SUFFIXES, column, find_split, read_tables, text_rows
from limbeck.tasks.text import TextTask

EVALUATION_NAMES = (VALIDATION, "valid", "val", "dev", "test")
MOST_CLASSES = 0.5
"""Share of distinct labels among the examples above which they are no classes."""


@TASKS.register_as("table")
def table(options: TaskOptions) -> TextTask:
    """Text with a label each, from a file or a folder with one file for each split.

    A single file is split: one fifth of the distinct inputs becomes the validation split. A column of floats is a
    number to predict; anything else is a class.

    Raises:
        ValueError: a file or column that is not there, labels that make no task.
    """
    if options.data is None or not options.text or options.label is None:
        raise ValueError("the table task needs --data FILE, --text COLUMN and --label COLUMN")
    check_taken(options, ["data", "text", "label", "max_length"])
    raw = _read(Path(options.data), options)
    labels = [label for _, found in raw.values() for label in found]
    if are_scores(labels):
        names: tuple[str, ...] = ()
        splits = {name: Rows(texts, [float(str(v)) for v in found]) for name, (texts, found) in raw.items()}
    else:
        names = class_names(labels)
        _check_known(raw.get(VALIDATION, raw[TRAIN])[1], raw[TRAIN][1], Path(options.data))
        number = {name: i for i, name in enumerate(names)}
        splits = {name: Rows(texts, [number[str(v)] for v in found]) for name, (texts, found) in raw.items()}
    if VALIDATION not in splits:
        splits[TRAIN], splits[VALIDATION] = split_rows(splits[TRAIN])
    default = ("accuracy", "macro_f1") if names else ("pearson", "spearman", "mse")
    metrics = with_first(options.metric, default)
    return TextTask("table", names, metrics, shorten(splits, options), options.max_length)


def _read(path: Path, options: TaskOptions) -> dict[str, tuple[list[tuple[str, ...]], list[object]]]:
    """Texts and raw labels by split."""
    split = {}
    for name, files in _files(path).items():
        frame, source = read_tables(files), str(files[0])
        assert options.label is not None
        split[name] = (text_rows(frame, options.text, source), column(frame, options.label, source))
    return split


def _check_known(labels: Sequence[object], trained: Sequence[object], path: Path) -> None:
    """Refuse evaluation examples of a class that no training example has: none would be right."""
    known = {str(label) for label in trained}
    wrong = [str(label) for label in labels if str(label) not in known]
    if wrong:
        raise ValueError(
            f"the evaluation file in {path} has the label {wrong[0]!r}, which the train file never has (rows with "
            f"such labels: {len(wrong)} of {len(labels)}); correct them, or drop them"
        )


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each split."""
    if not path.is_dir():
        return {TRAIN: [path]}
    train = find_split(path, TRAIN)
    if not train:
        raise ValueError(f"{path} has no train file; looked for train with {', '.join(SUFFIXES)}")
    evaluation = next((files for name in EVALUATION_NAMES if (files := find_split(path, name))), None)
    return {TRAIN: train, **({VALIDATION: evaluation} if evaluation else {})}


def are_scores(labels: Sequence[object]) -> bool:
    """Whether labels are numbers to predict: numbers all, and some with a decimal point.

    Example:
        >>> are_scores([1.0, 2.5]), are_scores([1, 2]), are_scores([True, 0.5])
        (True, False, False)
    """
    kinds = {type(label) for label in labels}
    return float in kinds and kinds <= {int, float}


def class_names(labels: Sequence[object]) -> tuple[str, ...]:
    """The distinct labels as text, in order: whole numbers by size, anything else by alphabet.

    Raises:
        ValueError: one class only, or so many that the column cannot be a class.

    Example:
        >>> class_names([10, 9, 9, 10])
        ('9', '10')
        >>> class_names([True, False])
        ('False', 'True')
    """
    numbers = all(type(v) is int for v in labels)  # a bool is an int too, and no number here
    distinct = sorted({str(v) for v in labels}, key=int if numbers else str)
    if len(distinct) < 2:
        raise ValueError(f"the label column holds {distinct!r} only; a task needs two classes or more")
    if len(distinct) > max(2, MOST_CLASSES * len(labels)):
        raise ValueError(
            f"the label column holds {len(distinct)} distinct values in {len(labels)} rows, too many for classes; "
            "is it the right column? (numbers to predict are written with a decimal point)"
        )
    return tuple(distinct)
