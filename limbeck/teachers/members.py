"""Teachers that change with the student, wherever they stand: alone, in ensembles, behind caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from limbeck.teachers.average import Average
from limbeck.teachers.base import Stateful, Teacher, within
from limbeck.teachers.cached import Cached
from limbeck.teachers.own import WithoutAdapter


def check_students(student: nn.Module, teacher: Teacher | None) -> None:
    """Check teachers that live on the student's weights.

    Raises:
        ValueError: such a teacher is of another model, or a cache would keep what changes in training.
    """
    for _, inner in within(teacher):
        kind = type(inner).__name__
        if isinstance(inner, (Average, WithoutAdapter)) and inner.student is not student:
            raise ValueError(f"the {kind} is of another model than the student; pass {kind}(student)")
        if isinstance(inner, Cached) and states(inner):
            raise ValueError("a cache would keep what a teacher said once, and this one changes; leave Cached out")


def states(teacher: Teacher | None) -> dict[str, Any]:
    """The states of teachers that change in training, for a checkpoint."""
    return {prefix: inner.state() for prefix, inner in within(teacher) if isinstance(inner, Stateful)}


def load_states(teacher: Teacher | None, states: Mapping[str, Any]) -> None:
    """Bring back what `states` gave.

    Raises:
        ValueError: it is of other teachers.
    """
    changing = {prefix: inner for prefix, inner in within(teacher) if isinstance(inner, Stateful)}
    if changing.keys() != states.keys():
        there, here = (f"{len(found)} that change" for found in (states, changing))
        raise ValueError(
            f"the checkpoint's training had other teachers ({there} there, {here} here); take those, or begin in "
            "another folder"
        )
    for prefix, inner in changing.items():
        inner.load_state(states[prefix])
