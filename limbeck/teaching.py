"""The teacher of a run: a model in this process, or a cache that holds all it said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from limbeck.atomic import write_tensors, write_text
from limbeck.baseline import PRETRAINED
from limbeck.cache import (
    MANIFEST,
    Form,
    Store,
    describe,
    example_keys,
    first_difference,
    json_digest,
    read_manifest,
    tensors_digest,
)
from limbeck.cache.folder import ABOUT, ANSWERS, START, TEACHER
from limbeck.evaluate import count_parameters, size_in_bytes
from limbeck.metrics import Array
from limbeck.models import MADE_BY, TeacherStore, file_digest, fingerprint, make_student, save_model
from limbeck.pairing import Layers, layers_of
from limbeck.pretrained import load_tokenizer, most_tokens
from limbeck.recipe import Recipe, StudentSpec
from limbeck.tasks import TRAIN, Loaded, Task
from limbeck.tasks.pixels import PREPROCESSOR, load_pixels
from limbeck.teachers import Cached, ModuleTeacher, Teacher
from limbeck.train import Examples

KEPT = "cache:"
"""How a recipe's teacher begins of which only a cache is there."""

TOKENIZER, CONFIG = "tokenizer_config.json", "config.json"
COUNTED_AT_ONCE = 256


@dataclass(frozen=True)
class About:
    """What a run has to know of a teacher beside what it says.

    Attributes:
        task: The task's name.
        labels: Names of the classes, in the order of the logits.
        data: Hashes of the splits that it answered, by name.
        parameters: Number of its parameters.
        size_bytes: Bytes of its weights.
        most_tokens: How many tokens it reads; None where there is no limit.
        layers: Where its layers are, and its modules.
        answers: Digest of its predictions on the evaluation splits.
        max_length: Tokens after which its texts were cut.
        files: SHA-256 of every file beside the signals, by its path in the folder.
        taken: Its layers that the student beside it begins with, if it does.
    """

    task: str
    labels: tuple[str, ...]
    data: dict[str, str]
    parameters: int
    size_bytes: int
    most_tokens: int | None
    layers: Layers
    answers: str = ""
    max_length: int = 0
    files: dict[str, str] = field(default_factory=dict)
    taken: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher whose model is in this process.

    Attributes:
        loaded: The model with its processor.
        ways: How it is run when it teaches; see `limbeck.recipe.TeacherSpec.ways`.
    """

    loaded: Loaded
    ways: Mapping[str, Any] = field(default_factory=dict)

    @property
    def processor(self) -> Any:
        """What encodes its inputs."""
        return self.loaded.processor

    @property
    def models(self) -> dict[str, nn.Module]:
        """The model, to be evaluated and timed."""
        return {"teacher": self.loaded.model}

    def about(self, task: Task, path: str | None = None) -> About:
        """What a run has to know of it; `path` says where it keeps its layers, if that cannot be found."""
        model = self.loaded.model
        data = {name: rows.fingerprint() for name, rows in task.splits.items() if name != TRAIN}
        layers = layers_of(model, path)
        sizes = count_parameters(model), size_in_bytes(model), most_tokens(model)
        return About(task.name, tuple(task.labels), data, *sizes, layers)

    def source(self) -> ModuleTeacher:
        """What says something to a student."""
        return self._source

    def as_kept(self, forms: Mapping[str, Form]) -> Teacher:
        """The same for the plan: what it says comes in the forms in which it will be kept."""
        return Cached(self.source(), forms=forms) if forms else self.source()

    def state(self, tuned: bool) -> str:
        """What happens with it, in words."""
        return "ready" if tuned else "to be fine-tuned on the task first"

    @cached_property
    def _source(self) -> ModuleTeacher:  # once, since some ways take a copy
        return ModuleTeacher(self.loaded.model, **self.ways)

    def student(self, spec: StudentSpec, task: Task, seed: int) -> Loaded:
        """Make the student; see `limbeck.models.make_student`."""
        return make_student(spec, task, self.loaded, seed)


@dataclass(frozen=True)
class KeptTeacher:
    """A teacher that is not here, with a cache of all it said.

    Attributes:
        folder: The cache.
        store: What is in it.
        described: What is known of the teacher.
        processor: What encoded its inputs.
        answers: Its predictions by evaluation split.
    """

    folder: Path
    store: Store
    described: About
    processor: Any
    answers: dict[str, Array]

    @classmethod
    def open(cls, source: str, task: Task) -> KeptTeacher:
        """Open ``cache:DIR``.

        Raises:
            ValueError: no cache, one that was not built to the end, or one of another task, other labels or other
                evaluation data.
        """
        folder = Path(source.removeprefix(KEPT)).expanduser()
        store = Store(read_manifest(folder), folder)
        own = folder / TEACHER
        if not (own / ABOUT).is_file():
            raise ValueError(
                f"{folder} holds signals and no teacher to stand for; finish it with limbeck cache build"
            )
        described = _read_about(own / ABOUT)
        _check_files(folder, described)
        _check_task(folder, described, task)
        return cls(folder, store, described, _load_processor(own), _read_answers(own / ANSWERS, described))

    @property
    def models(self) -> dict[str, nn.Module]:
        """None."""
        return {}

    def about(self, task: Task, path: str | None = None) -> About:
        """What a run has to know of it."""
        return self.described

    def source(self) -> Teacher:
        """What says something to a student."""
        return Cached(None, self.store)

    def as_kept(self, forms: Mapping[str, Form]) -> Teacher:
        """The same, for it says what is kept.

        Raises:
            ValueError: a recipe wants logits in another form, or more or fewer of them.
        """
        for tap in forms.keys() & self.store.taps():
            kept = self.store.form(tap)
            wanted = {key: value for key, value in describe(forms[tap]).items() if key in ("form", "k", "draws")}
            difference = first_difference(wanted, {key: kept.get(key) for key in wanted})
            if difference:
                raise ValueError(
                    f"{self.folder} keeps {tap!r} otherwise than the recipe wants it ({difference}); change the "
                    "recipe's cache, or build another one"
                )
        return self.source()

    def state(self, tuned: bool) -> str:
        """What happens with it, in words."""
        return "not here, its signals are"

    def student(self, spec: StudentSpec, task: Task, seed: int) -> Loaded:
        """Make the student, from the start that was kept with the cache or from a model of its own.

        Raises:
            ValueError: other layers than those that were kept.
        """
        here = Loaded(nn.Identity(), self.processor, head_is_trained=True)
        if spec.model is not None:
            return make_student(spec, task, here, seed)
        if spec.layers is None or spec.shrink is not None:
            raise ValueError(
                f"a student by shrink or config is made of the teacher, which is not here; {self.folder} keeps "
                "its answers: name a model as the student, or take layers that the cache keeps"
            )
        if spec.layers != self.described.taken:
            kept = "none" if self.described.taken is None else list(self.described.taken)
            raise ValueError(
                f"layers {list(spec.layers)} come from the teacher's weights, which are not here; {self.folder} "
                f"keeps those of {kept}: build it with a recipe that takes these, or name a model as the student"
            )
        return make_student(StudentSpec(model=str(self.folder / START)), task, here, seed)

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse what a recipe says of a teacher's signals that these are not, or cannot be.

        Raises:
            ValueError: the message names both sides.
        """
        cache, kept, task = recipe.cache, self.store.belongs.get("kept in"), recipe.task
        if cache.place != "memory":
            raise ValueError(
                f"cache.place={cache.place} is for a teacher that runs, and this one is a cache; drop it"
            )
        if cache.dtype not in ("fp32", kept):
            raise ValueError(
                f"{self.folder} is kept in {kept}, and the recipe has cache.dtype={cache.dtype}; drop it"
            )
        if recipe.found_maps:
            found = ", ".join(sorted(recipe.found_maps))
            raise ValueError(
                f"map {found} is found from the teacher's layers, which are not here; write the pairs"
            )
        if recipe.baseline and recipe.baseline_training.start == PRETRAINED:
            raise ValueError(
                "baseline_training.start=pretrained: of this teacher only a cache is here; set it to the folder "
                "or hub id of the model that it was fine-tuned from"
            )
        if self.described.max_length not in (0, task.max_length):
            raise ValueError(
                f"{self.folder} was built with task.max_length={self.described.max_length}, and the recipe has "
                f"{task.max_length}; texts are cut elsewhere: set the same, or build another cache"
            )

    def check_holds(self, data: Examples, wants: Sequence[str]) -> None:
        """Count the examples that are not in the cache, before anything is trained.

        Raises:
            ValueError: there are some; the message says how many. Or examples are new in every epoch.
        """
        check_repeats(data)
        absent = next((tap for tap in wants if self.store.taps() and tap not in self.store.taps()), None)
        if absent is not None:
            kept = ", ".join(map(repr, sorted(self.store.taps())))
            raise ValueError(
                f"{self.folder} keeps {kept} of the teacher, and the terms read {absent!r} too; build it again "
                "with these terms, leave that term out, or name the teacher itself"
            )
        starts = range(0, len(data), COUNTED_AT_ONCE)
        keys = (
            key.tobytes()
            for variant in range(data.variants or 1)
            for start in starts
            for key in example_keys(data.batch(range(len(data))[start : start + COUNTED_AT_ONCE], (0, variant)))
        )
        missing = sum(not all(self.store.holds(key, tap) for tap in wants) for key in keys)
        if missing:
            raise ValueError(
                f"{missing:,} of {len(data) * (data.variants or 1):,} training examples are not in {self.folder}, "
                "and there is no teacher to ask; ask the very teacher that it was built from about these data "
                "(limbeck cache build; a recipe that fine-tunes on other data makes another teacher: name the "
                "tuned one as teacher.model), or take fewer examples"
            )


def check_repeats(data: Examples) -> None:
    """Refuse examples of which none comes twice.

    Raises:
        ValueError: they are augmented anew in every epoch.
    """
    if data.augment is not None and data.variants is None:
        raise ValueError("images are augmented anew in every epoch; set task.variants=4, or no augmentation")


def is_kept(source: str) -> bool:
    """Whether a recipe's teacher is a cache.

    Example:
        >>> is_kept("cache:signals"), is_kept("bert-base-uncased")
        (True, False)
    """
    return source.startswith(KEPT)


def teacher_fingerprint(source: str) -> str:
    """A hash of what makes a teacher, which may be a cache; see `limbeck.models.fingerprint`."""
    if is_kept(source):
        return json_digest(read_manifest(Path(source.removeprefix(KEPT)).expanduser()))
    return fingerprint(source)


def claim_for(folder: Path, store: TeacherStore, tuned: bool) -> None:
    """Note by which recipe a cache's teacher is made, before it is, and refuse to make another one for it.

    Raises:
        ValueError: the folder is that of another teacher.
    """
    noted = folder / TEACHER / MADE_BY
    wanted = json.loads(json.dumps(store.made_by))
    if not (noted.is_file() and (folder / MANIFEST).is_file()):  # of another, nothing is kept yet
        noted.parent.mkdir(parents=True, exist_ok=True)
        write_text(noted, json.dumps(wanted, indent=2))
        return
    difference = first_difference(wanted, json.loads(noted.read_text(encoding="utf-8")))
    if difference and not tuned:
        raise ValueError(
            f"{folder} is of another teacher ({difference}), and this one would be fine-tuned first; choose "
            "another folder, or name the tuned teacher itself (teacher.model=FOLDER)"
        )


def keep_teacher(
    folder: Path, teacher: LiveTeacher, task: Task, recipe: Recipe, answers: Mapping[str, Array]
) -> None:
    """Lay beside a cache what a run has to know of its teacher, and the start of a student made of its layers.

    Args:
        folder: The cache.
        teacher: The teacher.
        task: The task that it was asked about.
        recipe: The recipe, with the student that it wants.
        answers: The teacher's predictions by evaluation split.
    """
    own, spec = folder / TEACHER, recipe.student
    own.mkdir(exist_ok=True)
    if teacher.processor is not None:
        teacher.processor.save_pretrained(own)
    taken = spec.layers if spec.shrink is None else None
    if taken is not None:
        save_model(teacher.student(spec, task, seed=0).model, teacher.processor, folder / START)
        taken = taken if (folder / START / CONFIG).is_file() else None  # else nothing can load it again
    write_tensors(own / ANSWERS, {name: torch.from_numpy(logits) for name, logits in answers.items()})
    digest = tensors_digest({name: torch.from_numpy(logits) for name, logits in answers.items()})
    about = dataclasses.replace(
        teacher.about(task, spec.path),
        taken=taken,
        answers=digest,
        max_length=recipe.task.max_length,
        files={name: file_digest(folder / name) for name in _beside(folder)},
    )
    write_text(own / ABOUT, json.dumps(dataclasses.asdict(about), indent=2))


def _beside(folder: Path) -> list[str]:
    """The files that lie beside signals, by their paths in the folder."""
    files = (path for part in (TEACHER, START) for path in sorted((folder / part).glob("*")))
    return [
        str(path.relative_to(folder)) for path in files if path.is_file() and path.name not in (ABOUT, MADE_BY)
    ]


def _check_files(folder: Path, about: About) -> None:
    for name, digest in about.files.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            wrong = "is damaged" if path.exists() else "is missing"
            raise ValueError(f"{path} {wrong}; finish the cache again with limbeck cache build")


def _read_about(path: Path) -> About:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found |= {"labels": tuple(found["labels"]), "layers": Layers(**_tuples(found["layers"]))}
        found["taken"] = None if found["taken"] is None else tuple(found["taken"])
        return About(**found)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; finish the cache again with limbeck cache build") from None


def _read_answers(path: Path, about: About) -> dict[str, Array]:
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        found = {}
    if tensors_digest(found) != about.answers:
        raise ValueError(f"{path} is damaged; finish the cache again with limbeck cache build")
    return {name: tensor.numpy() for name, tensor in found.items()}


def _tuples(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _check_task(folder: Path, about: About, task: Task) -> None:
    if tuple(task.labels) != about.labels:
        raise ValueError(
            f"the teacher in {folder} answers with the labels {list(about.labels)}, and the task has "
            f"{list(task.labels)} in this order; take the cache of a teacher of this task"
        )
    for name, rows in task.splits.items():
        if name in about.data and rows.fingerprint() != about.data[name]:
            raise ValueError(
                f"the teacher in {folder} answered another {name} split of {about.task}; its score cannot be "
                "compared with the student's: use the data it was built with, or build it again"
            )


def _load_processor(folder: Path) -> Any:
    if (folder / TOKENIZER).is_file():
        return load_tokenizer(folder)
    return load_pixels(folder) if (folder / PREPROCESSOR).is_file() else None


def wanted(terms: Iterable[Any]) -> list[str]:
    """The teacher's taps that planned terms read."""
    taps = (tap for planned in terms if not planned.term.reads_labels for tap in planned.term.teacher_taps)
    return list(dict.fromkeys(taps))
