"""What stands behind a teacher: the members of ensembles, and what caches remember."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from limbeck.teachers.average import Average
from limbeck.teachers.base import Stateful, Teacher
from limbeck.teachers.cached import Cached
from limbeck.teachers.ensemble import SEPARATOR, Ensemble
from limbeck.teachers.own import WithoutAdapter


def behind(teacher: Teacher | None) -> Iterator[tuple[str, Teacher]]:
    """Every teacher that there is, those that hold others too, with what stands before its taps.

    Example:
        >>> from torch import nn
        >>> [(prefix, type(t).__name__) for prefix, t in behind(Ensemble({"bert": nn.Linear(2, 3)}))]
        [('', 'Ensemble'), ('bert:', 'ModuleTeacher')]
    """
    if teacher is not None:
        yield "", teacher
    if isinstance(teacher, Cached):
        yield from behind(teacher.teacher)
    if isinstance(teacher, Ensemble):
        for name, member in teacher.members.items():
            for prefix, inner in behind(member):
                yield f"{name}{SEPARATOR}{prefix}", inner


def check_students(student: nn.Module, teacher: Teacher | None) -> None:
    """Check teachers that live on the student's weights.

    Raises:
        ValueError: such a teacher is of another model, or a cache would keep what changes in training.
    """
    for _, inner in behind(teacher):
        kind = type(inner).__name__
        if isinstance(inner, (Average, WithoutAdapter)) and inner.student is not student:
            raise ValueError(f"the {kind} is of another model than the student; pass {kind}(student)")
        if isinstance(inner, Cached) and states(inner):
            raise ValueError("a cache would keep what a teacher said once, and this one changes; leave Cached out")


def states(teacher: Teacher | None) -> dict[str, Any]:
    """The states of teachers that change in training, for a checkpoint."""
    return {prefix: inner.state() for prefix, inner in behind(teacher) if isinstance(inner, Stateful)}


def load_states(teacher: Teacher | None, states: Mapping[str, Any]) -> None:
    """Bring back what `states` gave.

    Raises:
        ValueError: it is of other teachers.
    """
    changing = {prefix: inner for prefix, inner in behind(teacher) if isinstance(inner, Stateful)}
    if changing.keys() != states.keys():
        there, here = (f"{len(found)} that change" for found in (states, changing))
        raise ValueError(
            f"the checkpoint's training had other teachers ({there} there, {here} here); take those, or begin in "
            "another folder"
        )
    for prefix, inner in changing.items():
        inner.load_state(states[prefix])
