"""Recipes: what a run is, as data. YAML is only its spelling; an unknown key is an error.

A recipe knows how to build its parts, the terms and the student; `limbeck.run` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from limbeck.baseline import BaselineSpec
from limbeck.matching import regex_pairs
from limbeck.presets import TermChoice, load_preset
from limbeck.strict import Several, Strict, explain
from limbeck.students.spec import StudentSpec as StudentSpec
from limbeck.students.spec import refuse_options
from limbeck.tasks import TaskOptions
from limbeck.tasks.extra import ExtraSpec
from limbeck.terms import FOUND, Term, check_term_options, layer_pairs, share_of, spread
from limbeck.train import Settings
from limbeck.yaml_options import read_yaml as read_yaml
from limbeck.yaml_options import set_value

LAYERS = "layers"
"""The tap of a term that is spread over the layers of both models."""

MODULES = "modules"
"""The tap of a term that is spread over modules whose names belong together."""

SEARCH = "search"
"""The part of a recipe that says what a search may try; for all else it is not there."""

EXAMPLES = {
    "task": "name: glue/rte",
    "teacher": "model: PATH",
    "student": "layers: [1, 3]",
    "cache": "place: memory",
    "extra": "augment: delete",
}


class TeacherSpec(Strict):
    """The ``teacher:`` part: which model, and whether it is fine-tuned on the task first."""

    model: str = Field(description="a folder, a hub id, or package.module:function called with the task")
    options: dict[str, Any] = Field(default_factory=dict, description="options of such a function")
    finetune: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: if its head was not trained for the task"
    )
    training: Settings = Field(default_factory=Settings)
    device: str | None = Field(None, description="where it teaches, by default where the student is")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="in which precision it teaches; by default that of the training"
    )
    int8: bool = Field(False, description="quantise its linear layers, on a CPU")
    compile: bool = Field(False, description="torch.compile it")

    @model_validator(mode="after")
    def _options_have_a_taker(self) -> TeacherSpec:
        refuse_options(self.model, self.options)
        if self.model.startswith("cache:") and self.ways():
            raise ValueError(
                f"{', '.join(self.ways())} say how a teacher runs, and a cache does not run; drop them"
            )
        return self

    def ways(self) -> dict[str, Any]:
        """How it is run when it teaches, as `limbeck.teachers.ModuleTeacher` takes it; nothing by default."""
        chosen = {"device": self.device, "dtype": self.dtype, "int8": self.int8, "compile": self.compile}
        return {name: value for name, value in chosen.items() if value}


class CacheSpec(Strict):
    """The ``cache:`` part: whether and where what the teacher says is remembered."""

    place: str = Field(
        "memory", description="off; memory, for this run; or a folder, which serves the next runs too"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="in which numbers are kept")
    gib: float = Field(16.0, gt=0, description="what is held in memory at most; more goes to the disk")
    logits: Literal["dense", "topk", "sampled", "hybrid"] = Field(
        "dense", description="how logits are kept: all; the k largest and the rest; draws; k largest and draws"
    )
    k: int = Field(32, gt=0, description="largest logits that are kept")
    draws: int = Field(50, gt=0, description="entries that are drawn")
    temperatures: tuple[float, ...] = Field(
        (), description="at which they can be used, where not all are kept; by default those of the terms"
    )
    shard_mib: float = Field(64.0, gt=0, description="size of the files; a killed process loses one at most")

    @field_validator("place", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, place: Any) -> Any:
        return "off" if place is False else place  # which YAML makes of the plain word


class NamePairs(Strict):
    """Modules paired by name: the teacher's path is the student's with a regular expression replaced."""

    pattern: str
    replacement: str


class TermSpec(Strict):
    """One entry of ``terms:``; keys that are not listed here are options of the loss."""

    model_config = ConfigDict(extra="allow", frozen=True)

    tap: str | tuple[str, ...] = Field(
        "logits",
        description="where to read the student, or several places; 'layers' for all layers of both models",
    )
    teacher_tap: str | tuple[str, ...] | None = None
    loss: str
    weight: float | dict[str, Any] = Field(1.0, description="a number, or {schedule: name, base: 1.0}")
    project: str | dict[str, Any] | None = None
    mask: str | None = None
    transforms: Annotated[tuple[str | dict[str, Any], ...], Several] = Field(
        (), description="what is done to both sides first: standardize, ..."
    )
    map: str | tuple[tuple[int, int], ...] | NamePairs | None = Field(
        None,
        description="which layers teach which, with tap: layers: uniform (default), last, skip, pairs of numbers, "
        "or cka and emd, which find them from data; with tap: modules, {pattern, replacement}",
    )
    inside: str | tuple[str, ...] = Field(
        "", description="with tap: layers, the places to read inside each layer: attention.self.query, ..."
    )

    @model_validator(mode="after")
    def _either_one_tap_or_all_layers(self) -> TermSpec:
        if self.tap in (LAYERS, MODULES) and self.teacher_tap is not None:
            raise ValueError(f"tap: {self.tap} reads both models; drop teacher_tap")
        if (self.tap == MODULES) != isinstance(self.map, NamePairs):
            raise ValueError(
                "tap: modules goes with map: {pattern: ..., replacement: ...}, and that with it alone"
            )
        if self.tap not in (LAYERS, MODULES) and (self.map is not None or self.inside):
            raise ValueError("map and inside are for tap: layers; drop them, or set tap: layers")
        return self

    def build(self, name: str, places: Places) -> list[Term]:
        """Make the term, or one for each pair of layers or modules.

        Args:
            name: Its name.
            places: What is known of the two models.

        Raises:
            ValueError: a value that does not fit.
            TypeError: an option that the loss does not have.
        """
        options = self.model_extra or {}
        arguments: dict[str, Any] = {"loss": self.loss, "project": self.project, "mask": self.mask}
        arguments |= {"transforms": self.transforms, **options}
        try:
            check_term_options(self.loss, options, also=type(self).model_fields)
            if isinstance(self.map, NamePairs):
                return self._by_name(name, places, arguments)
            if self.tap == LAYERS:
                return self._by_layer(name, places, arguments)
            return [Term(self.tap, self.teacher_tap, name=name, weight=self.weight, **arguments)]
        except (TypeError, ValueError) as error:
            raise type(error)(f"terms.{name}: {error}") from None

    def _by_layer(self, name: str, places: Places, arguments: dict[str, Any]) -> list[Term]:
        if not (places.student and places.teacher):
            raise ValueError("both models need a list of layers; name the taps instead of 'layers'")
        taps = self._inside(places.student_path), self._inside(places.teacher_path)
        found = places.matches.get(self.map) if isinstance(self.map, str) else None
        if self.map in FOUND and found is None:
            raise ValueError(f"map {self.map} is found from data, in a run; write the pairs out")
        assert not isinstance(self.map, NamePairs)
        pairs = found.pairs if found else layer_pairs(self.map or "uniform", places.student, places.teacher)
        shares = found.shares if found else None
        return spread(*taps, pairs, name=name, weight=self.weight, shares=shares, **arguments)

    def _by_name(self, name: str, places: Places, arguments: dict[str, Any]) -> list[Term]:
        assert isinstance(self.map, NamePairs)
        pairs = regex_pairs(places.student_modules, places.teacher_modules, self.map.pattern, self.map.replacement)
        part = share_of(self.weight, 1 / len(pairs))
        return [Term(own, its, name=f"{name}.{own}", weight=part, **arguments) for own, its in pairs]

    def _inside(self, path: str) -> list[str]:
        """The taps in one layer of a model that keeps its layers at `path`."""
        places = (self.inside,) if isinstance(self.inside, str) else self.inside
        return [f"{path}.{{}}.{place}" if place else f"{path}.{{}}" for place in places]


class LayerMatch(Strict):
    """Pairs of layers that were found from data, and what part of a term's weight each gets."""

    pairs: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]


class Places(Strict):
    """What a recipe's terms have to know of the two models: where their layers are, and what modules they have."""

    student_path: str = ""
    teacher_path: str = ""
    student: int = 0
    teacher: int = 0
    student_modules: tuple[str, ...] = ()
    teacher_modules: tuple[str, ...] = ()
    matches: dict[str, LayerMatch] = Field(default_factory=dict)


class Recipe(Strict):
    """All that determines a run.

    Example:
        >>> recipe = Recipe.parse({
        ...     "task": {"name": "glue/rte"},
        ...     "teacher": {"model": "bert-base-uncased"},
        ...     "student": {"layers": [1, 3, 5]},
        ... }, ["training.epochs=2"])
        >>> recipe.training.epochs
        2.0
        >>> Recipe.parse({"studnt": {}})
        Traceback (most recent call last):
        ValueError: the recipe has no key 'studnt'; did you mean 'student'?

    A part that needs one thing only may be written as that, ``{"task": "glue/rte"}``; see `spelled_out`.
    """

    preset: str | None = Field(None, description="fast, balanced or best: where what is not said here comes from")
    task: TaskOptions
    teacher: TeacherSpec
    student: StudentSpec
    terms: dict[str, TermSpec] = Field(default_factory=dict, description="by default those for the task")
    cache: CacheSpec = Field(default_factory=CacheSpec)
    balance: str | dict[str, Any] = Field(
        "static", description="how terms become one loss: static, uncertainty, matched_scale, gradient_norm"
    )
    training: Settings = Field(default_factory=Settings, description="of student and baseline")
    extra: ExtraSpec | None = Field(
        None, description="more examples for the student, labelled by the teacher alone"
    )
    baseline: bool = Field(True, description="train the student's twin without distillation, to compare")
    baseline_training: BaselineSpec = Field(
        default_factory=BaselineSpec, description="what of the twin's start and training differs"
    )
    seeds: int = Field(1, gt=0, description="how often baseline and student are trained")
    store: str | None = Field(None, description="where fine-tuned teachers are kept; ~/.cache/limbeck")
    by_task: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="for several tasks: what differs for one, by its short name"
    )

    @model_validator(mode="after")
    def _choose_on_training_data(self) -> Recipe:
        """Choosing a model needs examples that are not those of the report."""
        chooses = any(s.best or s.patience for s in (self.training, self.teacher.training))
        if chooses and not self.task.holdout:
            raise ValueError(
                "best and patience choose a model, which must not be done on the examples of the report; "
                "set task.holdout=0.1 to keep a tenth of the training data for it"
            )
        return self

    @classmethod
    def parse(cls, source: Mapping[str, Any], changes: Sequence[str] = ()) -> Recipe:
        """Check a nested mapping, after changes of the form ``a.b=value``.

        Its part ``search:`` is for `limbeck.search` and no part of the Recipe.

        Raises:
            ValueError: an unknown key or a wrong value; the message names its place.
        """
        data = spelled_out(source)
        for change in changes:
            set_value(data, change)
        data = spelled_out(data)
        data.pop(SEARCH, None)
        if data.get("preset") is not None:
            data = load_preset(data["preset"]).beneath(data, cls)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(explain(error, cls, "the recipe")) from None

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            ValueError: no such file, no YAML, or not a recipe.
        """
        return cls.parse(read_yaml(Path(path)), changes)

    def to_yaml(self) -> str:
        """Write the recipe with every value spelled out; loading it gives the same recipe."""
        data = self.model_dump(mode="json", exclude=set(self._left_to_the_task()))
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    @property
    def found_maps(self) -> set[str]:
        """The layer maps that have to be found from data."""
        return {spec.map for spec in self.terms.values() if isinstance(spec.map, str)} & set(FOUND)

    def build_terms(self, places: Places, regression: bool) -> list[Term]:
        """Make the terms; without any in the recipe, those that suit the task."""
        return [t for name, spec in self._terms_for(regression).items() for t in spec.build(name, places)]

    def resolved(self, regression: bool, texts: bool = True) -> Recipe:
        """The recipe with all that depends on the task spelled out: its terms, and a preset's parts for texts.

        Args:
            regression: Whether a number is to be predicted.
            texts: Whether the inputs are texts.
        """
        return self.with_preset(texts).model_copy(update={"terms": self._terms_for(regression)})

    def with_preset(self, texts: bool) -> Recipe:
        """The recipe with its preset's parts for texts, or without; none of them is left to the task."""
        chosen = self._left_to_the_task() if texts else {}
        return type(self).model_validate({**self.model_dump(), **chosen}) if self.preset else self

    def _left_to_the_task(self) -> dict[str, Any]:
        """A preset's parts for texts, of which the user says nothing."""
        parts = load_preset(self.preset).texts if self.preset else {}
        return {key: part for key, part in parts.items() if key not in self.model_fields_set}

    def _terms_for(self, regression: bool) -> dict[str, TermSpec]:
        narrower = self.student.shrink is not None
        return self.terms or default_terms(regression, self.student.from_weights, narrower, self.preset)


DEFAULT_TERMS = TermChoice(
    classes={
        "kd": {"loss": "forward_kl", "temperature": 2.0},
        "labels": {"tap": "labels", "loss": "cross_entropy", "weight": 0.5},
    },
    numbers={"kd": {"loss": "mse"}, "labels": {"tap": "labels", "loss": "label_mse", "weight": 0.5}},
    layers={"hidden": {"tap": LAYERS, "loss": "mse", "weight": 1.0}},
)


def default_terms(
    regression: bool, hidden: bool, narrower: bool = False, preset: str | None = None
) -> dict[str, TermSpec]:
    """What a student learns unless the recipe says: the teacher's answers, its layers, and the labels.

    Args:
        regression: Whether a number is to be predicted.
        hidden: Whether the student begins with weights of the teacher.
        narrower: Whether it is narrower than the teacher.
        preset: Whose terms they are, if it has any.
    """
    choice = (load_preset(preset).terms if preset else None) or DEFAULT_TERMS
    specs = choice.suited(regression, hidden, narrower)
    return {name: TermSpec.model_validate(spec) for name, spec in specs.items()}


WRITTEN_OUT: dict[str, Callable[[Any], dict[str, Any]]] = {
    "task": lambda name: {"name": name},
    "teacher": lambda model: {"model": model},
    "student": lambda text: StudentSpec.parse(text).model_dump(exclude_none=True, exclude_defaults=True),
    "cache": lambda place: {"place": place},
    "extra": lambda data: {"data": data},
}
"""What stands for a part of a recipe that is one text."""


def spelled_out(source: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe in which each part has its keys.

    Raises:
        ValueError: a part is neither keys nor one text.

    Example:
        >>> spelled_out({"task": "glue/rte", "student": "layers:0,2"})
        {'task': {'name': 'glue/rte'}, 'student': {'layers': (0, 2)}}
    """
    data: dict[str, Any] = _copied(source)
    for key, write_out in WRITTEN_OUT.items():
        given = data.get(key)
        if isinstance(given, str) or given is False:
            data[key] = write_out(given)
        elif given is not None and not isinstance(given, dict):
            raise ValueError(f"{key!r} in the recipe is {given!r}; write keys of its own, such as {EXAMPLES[key]}")
    return data


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value
