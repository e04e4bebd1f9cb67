"""Teachers: sources of what a student learns. Each kind is one file; all of them give a Signal for a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.taps import Read
from limbeck.teachers.base import Teacher
from limbeck.teachers.module import ModuleInputs, ModuleTeacher, record

__all__ = ["ModuleInputs", "ModuleTeacher", "Teacher", "as_teacher", "load_pretrained", "record"]

TeacherLike = Teacher | nn.Module | Callable[[], nn.Module] | tuple[Any, ...] | str | Path


def as_teacher(source: TeacherLike, read: Read | None = None) -> Teacher:
    """Make a teacher from whatever a user has.

    Args:
        source: A Teacher; a module; a function that makes one; ``(class, args, kwargs)``; or the path or hub id
            of a transformers model.
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


def load_pretrained(source: str | Path) -> nn.Module:
    """Load a transformers model as the class that its config names.

    Raises:
        ValueError: there is no such folder or hub model, its config names no class, or weights are missing.

    Example:
        >>> load_pretrained("no/such/folder/here")
        Traceback (most recent call last):
        ValueError: cannot load a model from 'no/such/folder/here': ...
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load a model from {str(source)!r}: {first}") from None
    names = config.architectures or ["no class"]
    model_class: Any = getattr(transformers, names[0], None)
    if not _is_model_class(model_class, transformers.PreTrainedModel):
        raise ValueError(f"the config of {str(source)!r} names {names[0]}, which transformers lacks")
    try:
        model, loading = model_class.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load a model from {str(source)!r} as safetensors: {first}") from None
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"the weights of {str(source)!r} lack {', '.join(missing[:3])}, which would be random")
    loaded: nn.Module = model
    return loaded


def _is_model_class(found: Any, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)
