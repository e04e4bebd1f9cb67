"""Teachers: sources of what a student learns. Each kind is one file; all of them give a Signal for a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.pretrained import load_pretrained
from limbeck.taps import Read
from limbeck.teachers.base import Combined, Identified, Teacher, within
from limbeck.teachers.by_task import ByTask
from limbeck.teachers.cached import Cached
from limbeck.teachers.client import Client
from limbeck.teachers.given import Given
from limbeck.teachers.module import ModuleInputs, ModuleTeacher, record
from limbeck.teachers.own import Self
from limbeck.teachers.remote import Remote

__all__ = [
    "ByTask",
    "Cached",
    "Client",
    "Combined",
    "Given",
    "Identified",
    "ModuleInputs",
    "ModuleTeacher",
    "Remote",
    "Self",
    "Teacher",
    "as_teacher",
    "load_pretrained",
    "record",
    "within",
]

TeacherLike = Teacher | nn.Module | Callable[[], nn.Module] | tuple[Any, ...] | str | Path | Mapping[str, Any]


def as_teacher(source: TeacherLike, read: Read | None = None) -> Teacher:
    """Make a teacher from whatever a user has.

    Args:
        source: A Teacher; a module; a function that makes one; ``(class, args, kwargs)``; the path or hub id of a
            transformers model; or a mapping of such by task, where a student learns several.
        read: Names the module's outputs where they have no names.

    Raises:
        TypeError: none of these.
        ValueError: nothing can be loaded from the path or id.

    Example:
        >>> teacher = as_teacher((nn.Linear, (2, 3), {"bias": False}))
        >>> teacher.module
        Linear(in_features=2, out_features=3, bias=False)
    """
    if isinstance(source, nn.Module):
        return ModuleTeacher(source, read)
    if isinstance(source, Teacher):
        return source
    if isinstance(source, Mapping) and source:
        return ByTask(source, read)
    if isinstance(source, (str, Path)):
        return ModuleTeacher(load_pretrained(source), read)
    if isinstance(source, tuple) and source and callable(source[0]):
        make = source[0]
        args, kwargs = (source[1:] + ((), {})[len(source) - 1 :])[:2]
        return as_teacher(make(*args, **kwargs), read)
    if callable(source):
        return as_teacher(source(), read)
    raise TypeError(
        f"a {type(source).__name__} is no teacher; pass a module, a function that makes one, "
        "(class, args, kwargs), or the path or hub id of a transformers model"
    )
