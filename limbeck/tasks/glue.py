"""The nine tasks of GLUE with their official metrics, from the hub or a local folder.

Reference:
    Wang et al. 2019, GLUE, arXiv:1804.07461.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.pretrained import first_line
from limbeck.registry import nearest
from limbeck.tasks.base import TASKS, TRAIN, VALIDATION, Rows, TaskOptions, check_taken, shorten, with_first
from limbeck.tasks.tables import column, find_split, read_tables, text_rows
from limbeck.tasks.text import TextTask

if TYPE_CHECKING:
    import pandas as pd

HUB = "nyu-mll/glue"
ALL = "all"


@dataclass(frozen=True)
class Description:
    """Columns, labels and metrics of one GLUE task; the first metric is the one that GLUE scores."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]

    def summary(self) -> str:
        """The task in one line."""
        return f"{' and '.join(self.texts)}: {', '.join(self.labels) or 'a score'} ({self.metrics[0]})"


ENTAILMENT = ("entailment", "not_entailment")
SCORES = (0.0, 5.0)
"""Least and greatest similarity in STS-B."""

PAIR_METRICS = ("accuracy_and_f1", "accuracy", "f1")

GLUE = {
    "cola": Description(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": Description(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": Description(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), PAIR_METRICS),
    "stsb": Description(("sentence1", "sentence2"), (), ("pearson_and_spearman", "pearson", "spearman")),
    "qqp": Description(("question1", "question2"), ("not_duplicate", "duplicate"), PAIR_METRICS),
    "mnli": Description(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": Description(("question", "sentence"), ENTAILMENT, ("accuracy",)),
    "rte": Description(("sentence1", "sentence2"), ENTAILMENT, ("accuracy",)),
    "wnli": Description(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}

LEFT_OUT = ("wnli",)
"""Of all tasks: WNLI's validation sentences come back from training with the opposite label."""

SPLITS = {TRAIN: (TRAIN,), VALIDATION: (VALIDATION, "validation_matched")}
MNLI_SPLITS = {**SPLITS, "validation_mismatched": ("validation_mismatched",)}


def tasks_of_suite(name: str) -> tuple[str, ...]:
    """The tasks that a name stands for, where it stands for several: ``glue/all``, ``glue/cola,rte``.

    Returns:
        Their short names; none where the name is that of one task.

    Raises:
        ValueError: a task that there is not, or that stands twice.

    Example:
        >>> tasks_of_suite("glue/all")
        ('cola', 'sst2', 'mrpc', 'stsb', 'qqp', 'mnli', 'qnli', 'rte')
        >>> tasks_of_suite("glue/cola,rte"), tasks_of_suite("glue/rte"), tasks_of_suite("table")
        (('cola', 'rte'), (), ())
    """
    kind, _, names = name.partition("/")
    if kind != "glue" or (names != ALL and "," not in names):
        return ()
    if names == ALL:
        return tuple(one for one in GLUE if one not in LEFT_OUT)
    chosen = tuple(one.strip() for one in names.split(","))
    for one in chosen:
        if one not in GLUE:
            raise ValueError(f"unknown GLUE task {one!r} in {name!r}; {nearest(one, GLUE)}")
        if chosen.count(one) > 1:
            raise ValueError(f"the task {one!r} stands twice in {name!r}; name it once")
    return chosen


@TASKS.register_as("glue")
def glue(options: TaskOptions) -> TextTask:
    """Make a GLUE task from ``glue/rte`` and the like.

    Raises:
        ValueError: no such task, an option that GLUE does not use, or data that is neither in the folder nor to
            be had from the hub.
    """
    name = options.name.removeprefix("glue/")
    if tasks_of_suite(options.name):
        raise ValueError(
            f"{options.name} names several tasks, and this is for one; limbeck distill runs them one by one, and "
            "in Python limbeck.suite.distill_suite"
        )
    if name not in GLUE:
        raise ValueError(f"unknown GLUE task {name!r}; {nearest(name, GLUE)}")
    check_taken(options, ["data", "max_length"])
    about = GLUE[name]
    splits = {}
    for split, candidates in (MNLI_SPLITS if name == "mnli" else SPLITS).items():
        table, source = load_split(name, candidates, options.data)
        labels = [float(str(v)) for v in column(table, "label", source)]
        _check_range(labels, about, source)
        values = labels if not about.labels else [int(v) for v in labels]
        splits[split] = Rows(text_rows(table, about.texts, source), values)
    metrics = with_first(options.metric, about.metrics)
    return TextTask(options.name, about.labels, metrics, shorten(splits, options), options.max_length)


def _check_range(labels: list[float], about: Description, source: str) -> None:
    if about.labels:
        wrong = {v for v in labels if v not in range(len(about.labels))}
    else:
        wrong = {v for v in labels if not SCORES[0] <= v <= SCORES[1]}
    if wrong:
        known = list(about.labels) or f"{SCORES[0]:g} to {SCORES[1]:g}"
        raise ValueError(f"{source} has the label {min(wrong):g}, outside {known}; a test split has none")


def load_split(name: str, candidates: tuple[str, ...], data: str | None) -> tuple[pd.DataFrame, str]:
    """Read one split of a GLUE task and say where from.

    Raises:
        ValueError: it cannot be found.
    """
    if data is None:
        return _from_hub(name, candidates)
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; --data names a folder with {name}/train.parquet")
    for place in (folder / name, folder):
        for candidate in candidates:
            paths = find_split(place, candidate)
            if paths:
                return read_tables(paths), str(paths[0])
    raise ValueError(
        f"{folder} has no {candidates[0]} split of glue/{name}; looked for {name}/{candidates[0]}.parquet"
    )


def _from_hub(name: str, candidates: tuple[str, ...]) -> tuple[pd.DataFrame, str]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(HUB, name)
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(
            f"cannot load {HUB} ({name}) from the hub: {first_line(error)}; name a local folder with --data"
        ) from None
    split = next(c for c in candidates if c in loaded)
    return loaded[split].to_pandas(), f"{HUB}/{name}/{split}"
