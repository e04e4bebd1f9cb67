"""What is remembered within a teacher."""

from __future__ import annotations

import warnings

from limbeck.teachers.base import Teacher, within
from limbeck.teachers.cached import Cached

NEW_EACH_TIME = (
    "what the teacher says is no longer remembered: the examples of the second epoch were not those of the first, "
    "as where data is augmented at random; limbeck.Examples(..., augment=, variants=) repeats what it draws"
)


def remembering(teacher: Teacher | None) -> list[Cached]:
    """All within a teacher that remember, each once: one may stand for several tasks."""
    found = (inner for _, inner in within(teacher) if isinstance(inner, Cached))
    return list({id(cached): cached for cached in found}.values())


def forget_in_vain(teacher: Teacher | None, share: float) -> None:
    """Let those forget, with a warning, that remember what is new each time; see `Cached.is_in_vain`."""
    for cached in remembering(teacher):
        if cached.is_in_vain(share):
            cached.forget()
            warnings.warn(NEW_EACH_TIME, stacklevel=3)
