"""Presets: recipes that ship with limbeck and lie beneath what the user writes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, Field

from limbeck.registry import nearest
from limbeck.strict import Strict, inner_model

PRESETS = ("fast", "balanced", "best")

Specs = dict[str, dict[str, Any]]
"""Terms as a recipe writes them, by name."""


class TermChoice(Strict):
    """Terms for each kind of task and of student.

    Example:
        >>> kd, hidden = {"loss": "mse"}, {"tap": "layers", "loss": "mse"}
        >>> choice = TermChoice(classes={"kd": kd}, numbers={"kd": kd}, layers={"hidden": hidden})
        >>> list(choice.suited(regression=False, hidden=True, narrower=False))
        ['kd', 'hidden']
    """

    classes: Specs = Field(description="where a class is to be predicted")
    numbers: Specs = Field(description="where a number is to be predicted")
    layers: Specs = Field(
        default_factory=dict, description="added where the student begins with weights of the teacher"
    )

    def suited(self, regression: bool, hidden: bool, narrower: bool) -> Specs:
        """The terms for a run.

        Args:
            regression: Whether a number is to be predicted.
            hidden: Whether the student begins with weights of the teacher, so that their layers compare.
            narrower: Whether it is narrower than the teacher; what is read inside is projected then.
        """
        inside = self.layers if hidden else {}
        project = {"project": "linear"} if narrower else {}
        chosen = self.numbers if regression else self.classes
        return {**chosen, **{name: {**project, **spec} for name, spec in inside.items()}}


class Preset(Strict):
    """A recipe that ships: what it says is used where the user says nothing.

    Attributes:
        about: What it is for, in a line.
        like: Another preset, which lies beneath this one.
        recipe: Parts of a recipe.
        texts: Further parts, for tasks whose inputs are texts.
        terms: What the student learns; without it, what it learns without a preset.
    """

    about: str
    like: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    texts: dict[str, Any] = Field(default_factory=dict)
    terms: TermChoice | None = None

    def beneath(self, given: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
        """What the user wrote, and below it this preset.

        The parts for texts come in here where the user wrote some of them; where not, the task decides.
        """
        begun = {key: part for key, part in self.texts.items() if isinstance(given.get(key), Mapping)}
        return fill(given, {**self.recipe, **begun}, model)


def load_preset(name: str) -> Preset:
    """Read a preset.

    Raises:
        ValueError: there is none of that name.

    Example:
        >>> load_preset("bets")
        Traceback (most recent call last):
        ValueError: there is no preset 'bets'; did you mean 'best'?
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; {nearest(name, PRESETS)}")
    return Preset.model_validate(_content(name))


def _content(name: str) -> dict[str, Any]:
    text = (resources.files("limbeck") / "recipes" / f"preset-{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return _laid_over(_content(content["like"]), content) if "like" in content else content


def _laid_over(beneath: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one: what stands above counts, key by key."""
    both = [key for key in above if isinstance(above[key], dict) and isinstance(beneath.get(key), dict)]
    return {**beneath, **above, **{key: _laid_over(beneath[key], above[key]) for key in both}}


def fill(given: Mapping[str, Any], beneath: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Fill what is not given. Parts with keys of their own are filled key by key, all else is taken whole.

    Args:
        given: What counts.
        beneath: What counts where nothing is given.
        model: Whose fields these are, to tell parts from values that are mappings themselves.

    Example:
        >>> from limbeck.recipe import Recipe
        >>> fill({"training": {"epochs": 2}}, {"training": {"epochs": 9, "batch_size": 16}, "seeds": 3}, Recipe)
        {'training': {'epochs': 2, 'batch_size': 16}, 'seeds': 3}
    """
    filled = {**beneath, **given}
    for key in beneath.keys() & given.keys():
        part = inner_model(model, key)
        if part is not None and isinstance(given[key], Mapping) and isinstance(beneath[key], Mapping):
            filled[key] = fill(given[key], beneath[key], part)
    return filled
