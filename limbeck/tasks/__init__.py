"""Tasks: data with labels, models with the right head, metrics. A new kind is one file that registers itself."""

import importlib
import inspect

from limbeck.registry import nearest
from limbeck.tasks.base import (
    EXTRA,
    HOLDOUT,
    TASKS,
    TRAIN,
    VALIDATION,
    Loaded,
    Rows,
    Task,
    TaskOptions,
    is_regression,
    reads_texts,
)

__all__ = [
    "EXTRA",
    "HOLDOUT",
    "TASKS",
    "TRAIN",
    "VALIDATION",
    "Loaded",
    "Rows",
    "Task",
    "TaskOptions",
    "about_tasks",
    "is_regression",
    "make_task",
    "reads_texts",
    "task_names",
]

KINDS = ("builtin", "glue", "image", "pictures", "table")


def _import_kinds() -> None:
    for kind in KINDS:
        importlib.import_module(f"limbeck.tasks.{kind}")


def task_names() -> list[str]:
    """The names that `make_task` knows, the single GLUE tasks among them.

    Example:
        >>> "glue/rte" in task_names()
        True
    """
    _import_kinds()
    from limbeck.tasks.glue import GLUE

    return sorted({*(name for name in TASKS if name != "glue"), *(f"glue/{name}" for name in GLUE)})


def about_tasks() -> dict[str, str]:
    """What each task is, in one line, by the names that `make_task` knows.

    Example:
        >>> about_tasks()["glue/rte"]
        'sentence1 and sentence2: entailment, not_entailment (accuracy)'
    """
    names = task_names()
    from limbeck.tasks.glue import GLUE

    glue = {f"glue/{name}": about.summary() for name, about in GLUE.items()}
    return {name: glue.get(name) or _first_line(TASKS.get(name)) for name in names}


def _first_line(make: object) -> str:
    return (inspect.getdoc(make) or "").partition("\n")[0]


def make_task(options: TaskOptions) -> Task:
    """Make a task by name: ``glue/rte``, ``table``, ``image``, ``digits``, ... or ``package.module:function``.

    Raises:
        ValueError: no such task, or its data cannot be had.

    Example:
        >>> len(make_task(TaskOptions(name="digits")).splits["validation"])
        359
    """
    names = task_names()
    kind = options.name.partition("/")[0] if options.name.startswith("glue/") else options.name
    if ":" not in kind and options.name not in names and not options.name.startswith("glue/"):
        raise ValueError(f"unknown task {options.name!r}; {nearest(options.name, names)}")
    return TASKS.get(kind)(options)
