"""The space of a search: which values of a recipe may be tried, checked before anything is trained."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.losses import LOSSES
from limbeck.losses.describe import describe
from limbeck.recipe import Recipe
from limbeck.registry import nearest
from limbeck.search.distributions import Distribution
from limbeck.students.spec import ShrinkSpec

FIXED = {
    "task": "it says which data there are and what is held out to judge by, and all trials share that",
    "teacher": "all trials learn from one teacher, which is fine-tuned once",
    "extra": "all trials learn from the same examples",
    "preset": "it stands for a whole recipe; search the paths that it sets",
    "cache": "all trials share what the teacher said",
    "store": "it says where teachers are kept",
    "seeds": "it says how often the final proof is trained; --seeds sets it",
    "baseline": "it says what the final proof is compared with",
    "baseline_training": "no trial trains a baseline",
    "training.seed": "the best seed is luck, and no setting",
    "training.precision": "what the teacher said is kept as it was computed",
    "training.evaluate_every": "all trials are evaluated at the same shares of their training",
    "training.checkpoint_every": "a trial is saved where it is evaluated",
    "training.time_limit": "--time-limit sets how long a search takes",
}
"""What is not for a search, and why."""

FREE = ("student.config", "student.options", "training.optimizer_options")
"""Mappings whose keys are not the recipe's to know."""

ARCHITECTURES = 32
"""So many combinations of a student's values are measured before the first trial."""


@dataclass(frozen=True)
class Space:
    """What may be tried, by dotted path of the recipe.

    Example:
        >>> space = Space.parse({"training.epochs": "int(2, 6)", "student.layers": "choice([0], [1])"})
        >>> space.combinations, list(space.one_by_one())[0]
        (10, {'training.epochs': 2})
    """

    distributions: Mapping[str, Distribution]

    @classmethod
    def parse(cls, written: Mapping[str, Any]) -> Space:
        """Read the part ``search:`` of a recipe: distributions by path, dotted or nested.

        Raises:
            ValueError: nothing in it, or a distribution that cannot be read.
        """
        found: dict[str, Distribution] = {}
        for path, text in flat(written).items():
            try:
                found[path] = Distribution.parse(text)
            except ValueError as error:
                torn = text is None or str(text).count("(") != str(text).count(")")
                cut = "; in {...} a distribution needs quotation marks" if torn else ""
                raise ValueError(f"search.{path}: {error}{cut}") from None
        if not found:
            raise ValueError(
                "the search space is empty; write distributions by path under search:, or --space "
                "'training.epochs=int(2, 6)'; without search: there is a default one"
            )
        return cls(found)

    @property
    def combinations(self) -> int | None:
        """How many different trials there can be; None where there is no end of them."""
        counts = [distribution.count for distribution in self.distributions.values()]
        return None if None in counts else math.prod(count or 1 for count in counts)

    def one_by_one(self) -> Iterator[dict[str, Any]]:
        """Every end of a range and every value of a choice, alone."""
        for path, distribution in self.distributions.items():
            yield from ({path: value} for value in distribution.ends)

    def architectures(self) -> list[dict[str, Any]]:
        """Every combination of what makes a student, if these are few; none where there is nothing of it."""
        own = {path: d for path, d in self.distributions.items() if path.startswith("student.")}
        if any(d.kind != "choice" for d in own.values()):
            return []
        values = [[(path, value) for value in d.choices] for path, d in own.items()]
        count = math.prod(len(each) for each in values)
        return [dict(each) for each in itertools.product(*values)] if own and count <= ARCHITECTURES else []

    def written(self) -> dict[str, str]:
        """The space as a recipe would have it, for reports and to tell two searches apart."""
        return {path: str(distribution) for path, distribution in self.distributions.items()}

    def own_values(self, recipe: Recipe) -> dict[str, Any] | None:
        """The recipe's own values, to be tried first; None where one of them is not in the space."""
        data = recipe.model_dump(mode="json")
        found = {path: _own(recipe, data, path) for path in self.distributions}
        return found if all(self.distributions[path].holds(value) for path, value in found.items()) else None

    def check(self, recipe: Recipe) -> None:
        """Refuse what cannot be searched in a recipe.

        Args:
            recipe: With its terms spelled out.

        Raises:
            ValueError: a path that is not in it or not for a search, two that exclude each other, or a value that
                it refuses.
        """
        known = known_paths(recipe)
        for path in self.distributions:
            _check_path(path, known)
        for path in self.distributions:
            inside = next((other for other in self.distributions if other.startswith(f"{path}.")), None)
            if inside is not None:
                raise ValueError(f"search: {inside} is a part of {path}; search one of the two")
        if "training.epochs" in self.distributions and (
            "training.steps" in self.distributions or recipe.training.steps is not None
        ):
            raise ValueError("search: training.epochs counts for nothing beside training.steps; drop one")
        _check_temperatures(self.distributions, recipe)
        for values in self.one_by_one():
            with_values(recipe, values)


def _check_path(path: str, known: Sequence[str]) -> None:
    why = next((why for fixed, why in FIXED.items() if path == fixed or path.startswith(f"{fixed}.")), None)
    if why is not None:
        raise ValueError(f"search: {path} is not for a search: {why}; drop it")
    if path not in known and not any(path.startswith(f"{free}.") for free in FREE):
        raise ValueError(f"search: the recipe has no {path!r}; {nearest(path, known)}")


def _check_temperatures(distributions: Mapping[str, Distribution], recipe: Recipe) -> None:
    """A few logits are kept at fixed temperatures, which trials would change."""
    path = next((path for path in distributions if path.endswith(".temperature")), None)
    if path is not None and recipe.cache.logits != "dense":
        raise ValueError(
            f"search: {path} changes the temperature, and cache.logits={recipe.cache.logits} keeps a few logits "
            "at fixed ones; keep all of them (cache.logits=dense), or drop it"
        )


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with other values, by dotted path.

    Raises:
        ValueError: it refuses one; the message says which were set.

    Example:
        >>> recipe = Recipe.parse({"task": "glue/rte", "teacher": "bert-base-uncased", "student": "layers:0,2"})
        >>> with_values(recipe, {"training.epochs": 5, "student.layers": [1]}).student.layers
        (1,)
    """
    data = recipe.model_dump(mode="json")
    for path, value in values.items():
        *parents, last = path.split(".")
        place = data
        for key in parents:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[last] = value
    try:
        return Recipe.parse(data)
    except (ValueError, TypeError) as error:
        said = ", ".join(f"{path}={json.dumps(value)}" for path, value in values.items())
        raise ValueError(f"search: the recipe refuses {said}: {error}") from None


def known_paths(recipe: Recipe) -> list[str]:
    """All that a recipe has or could have, by dotted path; of its terms also what their losses could be told."""
    data = recipe.model_dump(mode="json")
    found = [path for path, _ in _nodes(data)]
    for name, spec in recipe.terms.items():
        found += [f"terms.{name}.{option}" for option in describe(LOSSES.get(spec.loss), spec.loss).options]
    found += [f"student.shrink.{field}" for field in ShrinkSpec.model_fields]
    return sorted(set(found))


def default_space(recipe: Recipe, layers: int) -> Space:
    """What is tried where a recipe does not say: depth, learning rate, length of training, temperature, weights.

    Args:
        recipe: With its terms spelled out. Ranges lie around its own values.
        layers: Layers of the teacher, from which a student by layers is taken; 0 where they are not known.

    Example:
        >>> recipe = Recipe.parse({"task": "glue/rte", "teacher": "bert-base-uncased", "student": "layers:1,3"})
        >>> list(default_space(recipe.resolved(regression=False), layers=4).written())[:2]
        ['student.layers', 'training.learning_rate']
    """
    training = recipe.training
    found: dict[str, str] = {}
    if recipe.student.layers is not None and layers:
        found["student.layers"] = f"choice({', '.join(map(str, depths(layers, recipe.student.layers)))})"
    found["training.learning_rate"] = f"loguniform({training.learning_rate / 4}, {training.learning_rate * 4})"
    if training.steps is not None:
        found["training.steps"] = f"logint({max(1, training.steps // 2)}, {2 * training.steps})"
    else:
        found["training.epochs"] = f"uniform({training.epochs / 2}, {training.epochs * 2})"
    weighted = []
    for name, spec in recipe.terms.items():
        options = describe(LOSSES.get(spec.loss), spec.loss).options
        own = (spec.model_extra or {}).get("temperature", options.get("temperature"))
        if isinstance(own, (int, float)) and recipe.cache.logits == "dense":
            found[f"terms.{name}.temperature"] = f"loguniform({min(1, own)}, {max(10, own)})"
        if isinstance(spec.weight, float) and spec.weight > 0:
            weighted.append((name, spec.weight))
    for name, weight in weighted[1:]:  # what counts is the weights' ratio to the first
        found[f"terms.{name}.weight"] = f"loguniform({weight / 5}, {weight * 5})"
    return Space.parse(found)


def depths(layers: int, own: Sequence[int]) -> list[list[int]]:
    """Students of a sixth to two thirds of a teacher's layers, spaced evenly with the last, and the recipe's own.

    Example:
        >>> depths(6, [0, 2, 4])
        [[5], [2, 5], [1, 3, 5], [0, 2, 4], [1, 2, 4, 5]]
    """
    counts = sorted({max(1, round(layers * share)) for share in (1 / 6, 1 / 3, 1 / 2, 2 / 3)})
    found = [[math.ceil((i + 1) * layers / count) - 1 for i in range(count)] for count in counts]
    return sorted(found + [list(own)] * (list(own) not in found), key=len)


def flat(written: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as dotted paths.

    Raises:
        ValueError: a path twice, dotted and nested.

    Example:
        >>> flat({"training": {"epochs": "int(2, 6)"}, "student.layers": "choice([0])"})
        {'training.epochs': 'int(2, 6)', 'student.layers': 'choice([0])'}
    """
    found = {}
    for path, value in _nodes(written):
        if path in found:
            raise ValueError(f"search names {path} twice, dotted and nested; drop one")
        if not isinstance(value, Mapping):
            found[path] = value
    return found


def _nodes(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        yield f"{before}{key}", value
        if isinstance(value, Mapping):
            yield from _nodes(value, f"{before}{key}.")


def _own(recipe: Recipe, data: Any, path: str) -> Any:
    """The value at a path; of an option that a recipe does not name, the loss's default."""
    keys = path.split(".")
    if keys[0] == "terms" and len(keys) == 3 and keys[2] not in data["terms"][keys[1]]:
        loss = recipe.terms[keys[1]].loss
        return describe(LOSSES.get(loss), loss).options.get(keys[2])
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data
