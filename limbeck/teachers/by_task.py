"""A teacher for each task of a student that learns several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from limbeck.batch import task_of
from limbeck.registry import nearest
from limbeck.teachers.base import Identified, Teacher
from limbeck.types import TASK, Batch, Signal


class ByTask:
    """Asks, for each batch, the teacher of its task.

    A batch names its task under ``task``; the teacher that is asked does not see that entry, so that what is kept
    of it (`Cached`) is the same whether it teaches alone or among others.

    Args:
        teachers: Teachers by task; each whatever `as_teacher` takes.
        read: Names the outputs of modules where they have no names.

    Raises:
        ValueError: there is no teacher.
        TypeError: something that is no teacher.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> teacher = ByTask({"rte": nn.Linear(2, 2), "mnli": nn.Linear(2, 3)})
        >>> teacher.signal({"input": torch.ones(4, 2), "task": "mnli"}, ["logits"])["logits"].shape
        torch.Size([4, 3])
    """

    def __init__(self, teachers: Mapping[str, Any], read: Any = None) -> None:
        from limbeck.teachers import as_teacher  # which makes one of these from a mapping

        if not teachers:
            raise ValueError("a teacher for each task needs a task; pass {name: teacher}")
        self.teachers: dict[str, Teacher] = {task: as_teacher(t, read) for task, t in teachers.items()}

    def of(self, task: str) -> Teacher:
        """The teacher of a task.

        Raises:
            ValueError: there is none.
        """
        if task not in self.teachers:
            raise ValueError(f"there is no teacher for task {task!r}; {nearest(task, self.teachers)}")
        return self.teachers[task]

    def parts(self) -> Mapping[str, Teacher]:
        """The teachers of all tasks."""
        return {f"{task}/": teacher for task, teacher in self.teachers.items()}

    def offers(self, tap: str) -> bool:
        """Whether the teacher of every task has this tap; of one task, ask `of`."""
        return all(teacher.offers(tap) for teacher in self.teachers.values())

    def names(self) -> Iterable[str]:
        """What all of them have."""
        return [name for name in next(iter(self.teachers.values())).names() if self.offers(name)]

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Ask the teacher of the batch's task.

        Raises:
            ValueError: the batch names no task, or one without a teacher.
        """
        teacher = self.of(task_of(batch))
        return teacher.signal({key: value for key, value in batch.items() if key != TASK}, wants)

    def identity(self) -> Mapping[str, Any]:
        """That of each task's teacher.

        Raises:
            TypeError: one of them cannot say what its signals depend on.
        """
        found: dict[str, Any] = {}
        for task, teacher in self.teachers.items():
            if not isinstance(teacher, Identified):
                raise TypeError(
                    f"the teacher of task {task!r}, a {type(teacher).__name__}, cannot say what its signals "
                    "depend on; give it an identity(), or keep no signals of it"
                )
            found |= {f"{task}: {key}": value for key, value in teacher.identity().items()}
        return found
