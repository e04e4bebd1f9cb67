"""Tasks: data with labels, models with the right head, metrics. A new kind is one file that registers itself."""

import importlib

from limbeck.registry import nearest
from limbeck.tasks.base import HOLDOUT, TASKS, TRAIN, VALIDATION, Loaded, Rows, Task, TaskOptions, is_regression

__all__ = [
    "HOLDOUT",
    "TASKS",
    "TRAIN",
    "VALIDATION",
    "Loaded",
    "Rows",
    "Task",
    "TaskOptions",
    "is_regression",
    "make_task",
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
