"""Teachers: sources of what a student learns. Each kind is one file; all of them give a Signal for a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.pretrained import load_pretrained
from limbeck.registry import check_options
from limbeck.taps import Read
from limbeck.teachers.average import Average
from limbeck.teachers.base import Combined, Identified, Stateful, Teacher, within
from limbeck.teachers.by_task import ByTask
from limbeck.teachers.cached import Cached
from limbeck.teachers.client import Client
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.given import Given
from limbeck.teachers.inputs import ModuleInputs
from limbeck.teachers.module import ModuleTeacher, record
from limbeck.teachers.own import Self, WithoutAdapter
from limbeck.teachers.remote import Remote

__all__ = [
    "Average",
    "ByTask",
    "Cached",
    "Client",
    "Combined",
    "Ensemble",
    "Given",
    "Identified",
    "ModuleInputs",
    "ModuleTeacher",
    "Remote",
    "Self",
    "Stateful",
    "Teacher",
    "WithoutAdapter",
    "as_teacher",
    "load_pretrained",
    "record",
    "within",
]

TeacherLike = Teacher | nn.Module | Callable[[], nn.Module] | tuple[Any, ...] | str | Path | Mapping[str, Any]


def as_teacher(source: TeacherLike, read: Read | None = None, **options: Any) -> Teacher:
    """Make a teacher from whatever a user has.

    Args:
        source: A Teacher; a module; a function that makes one; ``(class, args, kwargs)``; the path or hub id of a
            transformers model; or a mapping of such by task, where a student learns several.
        read: Names the module's outputs where they have no names.
        **options: Of a `ModuleTeacher`: ``device``, ``dtype``, ``int8``, ``compile``.

    Raises:
        TypeError: none of these, or an option that there is not.
        ValueError: nothing can be loaded from the path or id.

    Example:
        >>> teacher = as_teacher((nn.Linear, (2, 3), {"bias": False}))
        >>> teacher.module
        Linear(in_features=2, out_features=3, bias=False)
    """
    check_options(ModuleTeacher, options, (), "a teacher")
    if isinstance(source, nn.Module):
        return ModuleTeacher(source, read, **options)
    if isinstance(source, Teacher):
        if options:
            kind, option = type(source).__name__, next(iter(options))
            raise TypeError(f"a {kind} takes no {option!r} any more; set it where the teacher is made")
        return source
    if isinstance(source, Mapping) and source:
        return ByTask(source, read)
    if isinstance(source, (str, Path)):
        return ModuleTeacher(load_pretrained(source), read, **options)
    if isinstance(source, tuple) and source and callable(source[0]):
        make = source[0]
        args, kwargs = (source[1:] + ((), {})[len(source) - 1 :])[:2]
        return as_teacher(make(*args, **kwargs), read, **options)
    if callable(source):
        return as_teacher(source(), read, **options)
    raise TypeError(
        f"a {type(source).__name__} is no teacher; pass a module, a function that makes one, "
        "(class, args, kwargs), or the path or hub id of a transformers model"
    )
