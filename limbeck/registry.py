"""From a name to an object: the one way in which recipes, the command line and terms find losses and the rest.

An object is found by its registered name or by ``"package.module:object"``, so a plug-in needs no entry point.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


def nearest(name: str, known: Iterable[str], also: Iterable[str] = ()) -> str:
    """Say which known names come nearest to a wrong one, as the end of an error message.

    Args:
        name: The wrong name.
        known: The right ones; they are listed where none comes near.
        also: Names from elsewhere that may be meant, proposed only where they come near.

    Example:
        >>> nearest("forwrd_kl", ["forward_kl", "mse"])
        "did you mean 'forward_kl'?"
        >>> nearest("zzz", ["forward_kl", "mse"])
        'known: forward_kl, mse'
    """
    name, known = str(name), sorted(one for one in known if one)  # keys that users write need not be text
    close = [*closest(name, known), *closest(name, also, cutoff=0.7)]
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {shown or 'none'}"


def closest(name: str, known: Iterable[str], cutoff: float = 0.55) -> list[str]:
    """At most three known names that come near a wrong one, the nearest first.

    Nearest are paths that it lacks only the start of.

    Example:
        >>> closest("layer.1", ["layer", "bert.layer.1", "bert.layer.11", "head.layer.1"])
        ['bert.layer.1', 'head.layer.1', 'layer']
    """
    known = sorted(known)
    endings = [path for path in known if path.endswith((f".{name}", f":{name}"))] if name else []
    alike = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return [*endings, *(path for path in alike if path not in endings)][:3]


def import_object(path: str) -> Any:
    """Import ``"package.module:object"``.

    Raises:
        ValueError: the path has no colon, or the module or the object cannot be found.

    Example:
        >>> import_object("math:tau") > 6
        True
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not attribute:
        raise ValueError(f"{path!r} is no import path; write it as 'package.module:object'")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} for {path!r}: {error}") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name!r} has no {attribute!r}; {nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def refuse_unknown(options: Iterable[str], known: Iterable[str], what: str, also: Iterable[str] = ()) -> None:
    """Refuse the first option that is not known.

    Args:
        options: What the user wrote.
        known: What there is.
        what: What takes the options, in the error message.
        also: Names of other things that stand beside the options and may be meant.

    Raises:
        TypeError: the option is not known.

    Example:
        >>> refuse_unknown(["bets"], ["betas", "foreach"], "optimizer 'adamw'")
        Traceback (most recent call last):
        TypeError: optimizer 'adamw' has no option 'bets'; did you mean 'betas'?
    """
    known = set(known)
    for name in options:
        if name not in known:
            raise TypeError(f"{what} has no option {name!r}; {nearest(name, known, also)}")


def check_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    supplied: Iterable[str],
    what: str,
    also: Iterable[str] = (),
) -> None:
    """Check that `options` bind to the keyword-only parameters of `function`.

    Args:
        function: The callable that will receive the options.
        options: What the user wrote.
        supplied: Names that the caller fills in at each call (``mask``, ``labels``); a user may not set them.
        what: How the function is named in an error message.
        also: See `refuse_unknown`.

    Raises:
        TypeError: an option that the function does not have, or a required one that is missing.

    Example:
        >>> def loss(student, teacher, *, temperature=1.0, mask=None): ...
        >>> check_options(loss, {"temprature": 2}, {"mask"}, "loss 'kl'")
        Traceback (most recent call last):
        TypeError: loss 'kl' has no option 'temprature'; did you mean 'temperature'?
    """
    supplied = set(supplied)
    parameters = inspect.signature(function).parameters
    keyword = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in supplied}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not open_ended:
        refuse_unknown(options, keyword, what, also)
    missing = [n for n, p in keyword.items() if p.default is p.empty and n not in options]
    if missing:
        raise TypeError(f"{what} needs the option {missing[0]!r}; add it to the term")


class Registry(Generic[T]):
    """A named set of objects of one kind, filled by a decorator.

    Args:
        kind: What the objects are, in error messages (``"loss"``).
        load: Called before the first look-up; imports the modules that register.

    Example:
        >>> shapes: Registry[object] = Registry("shape")
        >>> @shapes.register
        ... def circle(): ...
        >>> shapes.get("cirle")
        Traceback (most recent call last):
        ValueError: unknown shape 'cirle'; did you mean 'circle'?
    """

    def __init__(self, kind: str, load: Callable[[], None] = lambda: None) -> None:
        self.kind = kind
        self._load = load
        self._objects: dict[str, T] = {}

    def register(self, thing: C) -> C:
        """Add a function or class under its own name; used as a decorator."""
        return self.register_as(thing.__name__)(thing)

    def register_as(self, name: str) -> Callable[[C], C]:
        """Add a function or class under `name`; used as a decorator.

        Raises:
            ValueError: the name is taken by another object.
        """

        def add(thing: C) -> C:
            known = self._objects.get(name)
            if known is not None and known.__module__ != thing.__module__:
                raise ValueError(f"{self.kind} {name!r} is already registered by {known.__module__}")
            self._objects[name] = thing  # type: ignore[assignment]
            return thing

        return add

    def get(self, name: str) -> T:
        """Find an object by its registered name or by ``"package.module:object"``.

        Raises:
            ValueError: nothing has that name; the message lists the nearest ones.
        """
        self._load()
        if name in self._objects:
            return self._objects[name]
        if ":" in name:
            return import_object(name)  # type: ignore[no-any-return]
        raise ValueError(f"unknown {self.kind} {name!r}; {nearest(name, self._objects)}")

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._objects))
