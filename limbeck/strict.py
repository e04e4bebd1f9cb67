"""Parts of a recipe: strict models, whose mistakes are told in one line with the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from limbeck.registry import nearest

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Explained(ModelMetaclass):
    """Makes the call of a class raise one line; pydantic makes its nested parts without such a call."""

    def __call__(self, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            assert issubclass(self, BaseModel)
            raise ValueError(explain(error, self, self.__name__)) from None


class Strict(BaseModel, metaclass=_Explained):
    """A frozen model that refuses unknown keys.

    Raises:
        ValueError: an unknown key or a wrong value, in one line.

    Example:
        >>> class Sizes(Strict):
        ...     width: int = 1
        >>> Sizes(wdth=3)
        Traceback (most recent call last):
        ValueError: Sizes has no key 'wdth'; did you mean 'width'?
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


def _as_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Several = BeforeValidator(_as_several)
"""Marks a field of several entries that may be written as one text: ``text: review``."""

Texts = Annotated[tuple[str, ...], Several]


def explain(error: ValidationError, model: type[BaseModel], what: str) -> str:
    """Turn pydantic's report into one line: an unknown key first, or the first problem, and its place.

    Args:
        error: The report.
        model: The outermost model.
        what: What the model is called where the place is the model itself: ``"the recipe"``.
    """
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    place, given = [str(part) for part in problem["loc"]], problem["input"]
    if problem["type"] == "extra_forbidden":
        where = ".".join(place[:-1])
        known = _fields_at(model, place[:-1])
        return f"{repr(where) if where else what} has no key {place[-1]!r}; {nearest(place[-1], known)}"
    if problem["type"] == "missing":
        written = difflib.get_close_matches(place[-1], list(given) if isinstance(given, dict) else [], n=1)
        cure = f"is {written[0]!r} meant for it?" if written else "add it"
        return f"{what} lacks {'.'.join(place)!r}; {cure}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, (dict, BaseModel)) else f" (got {given!r})"
    return f"{'.'.join(place) or what}: {message}{shown}"


def inner_model(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The model that a field holds, if it holds one; ``Sizes | None`` holds Sizes.

    Example:
        >>> from limbeck.recipe import Recipe
        >>> inner_model(Recipe, "training").__name__, inner_model(Recipe, "seeds")
        ('Settings', None)
    """
    annotation = model.model_fields[field].annotation if field in model.model_fields else None
    choices = get_args(annotation) or (annotation,)
    inner = (choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel))
    return next(inner, None)


def _fields_at(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    for part in place:
        inner = inner_model(model, part)
        if inner is None:
            break
        model = inner
    return list(model.model_fields)
