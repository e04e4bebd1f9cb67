"""Models of a run: the teacher and where it is kept, and the student made from it."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from limbeck.baseline import PRETRAINED, STUDENT
from limbeck.encodings import Encoded
from limbeck.pretrained import UNREADABLE, first_line, is_path, quiet_transformers
from limbeck.recipe import Recipe, StudentSpec
from limbeck.registry import check_options, import_object
from limbeck.tasks import Loaded, Task
from limbeck.tasks.networks import named_network
from limbeck.tasks.pictures import PictureTask
from limbeck.tasks.pixels import Pixels
from limbeck.train import Examples
from limbeck.train.checkpoint import load_weights, save_weights

STORE = Path("~/.cache/limbeck")
MADE_BY = "made-by.json"
WEIGHTS = "weights.safetensors"
DIGESTS = "digests.json"
FORMAT = 1


def load_model(task: Task, source: str, options: dict[str, Any], seed: int, processor: Any = None) -> Loaded:
    """Load a model by folder or hub id, or make one with ``package.module:function``.

    Such a function is called with the task and its options; it may ask for the teacher's tokenizer (or what the
    teacher makes of images) by a keyword-only parameter ``processor``. ``transformers:TYPE`` and ``timm:NAME`` are
    such functions too.

    Raises:
        ValueError: nothing can be loaded.
        TypeError: an option that the function does not have, or a function that gives no model.
    """
    torch.manual_seed(seed)
    if not is_function(source):
        return _with_processor(task.load(source), task, processor)
    make: Callable[..., Any] = named_network(source) or import_object(source)
    check_options(make, options, ("processor",), source)
    asks = "processor" in inspect.signature(make).parameters
    made = make(task, **options, **({"processor": processor} if asks else {}))
    if isinstance(made, nn.Module):
        made = Loaded(made, None, head_is_trained=False)
    if isinstance(made, Loaded):
        return _with_processor(made, task, processor)
    raise TypeError(f"{source} returned a {type(made).__name__}; return a module, or limbeck.tasks.Loaded")


def _with_processor(loaded: Loaded, task: Task, processor: Any) -> Loaded:
    """A model that brings no processor takes the teacher's; the first one to read images takes the task's."""
    if loaded.processor is not None:
        return loaded
    own = task.pixels if processor is None and isinstance(task, PictureTask) else processor
    return replace(loaded, processor=own)


def is_function(source: str) -> bool:
    """Whether a model's source is an import path and not a folder or hub id."""
    return ":" in source and not Path(source).exists()


def make_student(spec: StudentSpec, task: Task, teacher: Loaded, seed: int) -> Loaded:
    """Make the student: of the teacher, or a model of its own. The same seed gives the same start.

    Its processor is the very object that the teacher has, unless its tokenizer knows other tokens.

    Raises:
        TypeError: a teacher or a change of its config from which no student can be made.
        ValueError: no such layers or sizes, nothing to load, or a student that reads other images than its
            teacher.
    """
    if spec.model is None:
        return Loaded(spec.made_of(teacher.model, seed), teacher.processor, head_is_trained=False)
    loaded = load_model(task, spec.model, spec.options, seed, teacher.processor)
    _check_same_images(loaded.processor, teacher.processor, spec.model)
    if _vocabulary(loaded.processor) == _vocabulary(teacher.processor):
        return replace(loaded, processor=teacher.processor)
    return loaded


def baseline_start(recipe: Recipe, task: Task, student: nn.Module, processor: Any, seed: int) -> nn.Module:
    """The baseline as it begins: as the student does, or made likewise of a model that is not fine-tuned.

    Args:
        recipe: Its ``baseline_training.start`` says where.
        task: What it is trained on.
        student: As it begins.
        processor: What encodes the student's inputs.
        seed: Of new weights.

    Raises:
        ValueError: no such model, one of which no student of that size comes, or a start that means nothing here.
    """
    start = recipe.baseline_training.start
    if start == STUDENT:
        return student
    if not recipe.student.from_weights:
        raise ValueError(
            f"baseline_training.start={start} is for a student made of the teacher's weights, and this one is "
            "not: its baseline begins as it does; leave it out"
        )
    of_teacher = start == PRETRAINED
    options = recipe.teacher.options if of_teacher else {}
    before = load_model(task, recipe.teacher.model if of_teacher else start, options, seed, processor)
    if of_teacher and before.head_is_trained:
        raise ValueError(
            f"baseline_training.start=pretrained: the teacher {recipe.teacher.model} is fine-tuned already; set "
            "it to the folder or hub id of the model from before"
        )
    made = make_student(recipe.student, task, before, seed).model
    if {k: v.shape for k, v in made.state_dict().items()} != {k: v.shape for k, v in student.state_dict().items()}:
        raise ValueError(f"a student made of {start} has other weights than one made of the teacher; name another")
    return made


def _check_same_images(student: Any, teacher: Any, source: str) -> None:
    """Refuse a student that reads images otherwise than its teacher: both see them augmented alike."""
    if isinstance(student, Pixels) and isinstance(teacher, Pixels) and student != teacher:
        raise ValueError(
            f"the student {source} reads images as {student}, and the teacher as {teacher}; copy the "
            "teacher's preprocessor_config.json to the student, which will be trained on such images"
        )


def _vocabulary(processor: Any) -> dict[str, int]:
    """A tokenizer's tokens by number; none where inputs need no tokenizer."""
    return {} if processor is None or isinstance(processor, Pixels) else dict(processor.get_vocab())


def check_lengths(limits: Mapping[str, int | None], data: Encoded) -> None:
    """Refuse texts that are longer than a model can read.

    Args:
        limits: The most tokens that a model reads, by role, ``"teacher"`` and ``"student"``; None for no limit.
        data: The encoded examples.

    Raises:
        ValueError: the message names the length to set.
    """
    for role, most in limits.items():
        for examples in data.by_role(role).values():
            check_length(f"the {role}", most, examples, f"task.max_length={most}")


def check_length(who: str, most: int | None, examples: Examples, cure: str) -> None:
    """Refuse texts that are longer than a model can read.

    Args:
        who: The model, in the message.
        most: The most tokens that it reads; None for no limit.
        examples: Encoded texts.
        cure: What to set.

    Raises:
        ValueError: the message names the length to set.
    """
    longest = max(examples.lengths or (), default=0)
    if most is not None and longest > most:
        raise ValueError(f"{who} reads at most {most} tokens, and the longest text has {longest}; set {cure}")


class TeacherStore:
    """Fine-tuned teachers, kept by what made them. Several processes may use one folder.

    Args:
        recipe: The recipe, whose teacher, task and teacher's training make the key.
        task: The task with its data.

    Raises:
        ValueError: the folder to keep them in is a file.
    """

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.root = Path(recipe.store or STORE).expanduser()
        for place in (self.root, *self.root.parents):
            if place.is_file():
                raise ValueError(
                    f"fine-tuned models are kept in a folder, and {place} is a file; name another "
                    "--finetuned-cache"
                )
        self.source = recipe.teacher
        self.made_by = {
            "format": FORMAT,
            "model": recipe.teacher.model,
            "content": fingerprint(recipe.teacher.model),
            "options": recipe.teacher.options,
            # without what is not set, so that a setting that a later version adds makes no other teacher
            "training": recipe.teacher.training.model_dump(mode="json", exclude_none=True),
            "task": task.name,
            "labels": list(task.labels),
            "metric": task.metrics[0],
            "data": {name: rows.fingerprint() for name, rows in task.splits.items()},
            "max_length": recipe.task.max_length,
            **({"images": images} if (images := _images_as(task)) else {}),
        }
        key = hashlib.sha256(json.dumps(self.made_by, sort_keys=True).encode()).hexdigest()
        self.folder = self.root / "teachers" / key[:20]

    def holds(self) -> bool:
        """Whether this teacher is there."""
        return (self.folder / MADE_BY).is_file()

    def load(self, task: Task) -> Loaded:
        """Load this teacher; what a function makes is made first and then gets its weights.

        Raises:
            ValueError: its folder is damaged.
        """
        if is_function(self.source.model):
            made = load_model(task, self.source.model, self.source.options, seed=0)
        try:
            with self._alone():
                self._check_files()
                if not is_function(self.source.model):
                    return task.load(self.folder)
                load_weights(made.model, self.folder / WEIGHTS)
        except UNREADABLE as error:
            raise ValueError(
                f"the fine-tuned teacher in {self.folder} is damaged ({first_line(error)}); pass --retrain to "
                "make it anew, or delete that folder"
            ) from None
        return made

    def check_room(self) -> None:
        """Refuse a folder that nothing can be kept in, before anything is trained.

        Raises:
            ValueError: it cannot be written.
        """
        there = next(place for place in (self.root, *self.root.absolute().parents) if place.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(
                f"fine-tuned models cannot be kept in {self.root}, for {there} cannot be written; name another "
                "--finetuned-cache"
            )

    def keep(self, model: nn.Module, processor: Any) -> None:
        """Save a teacher in the place of one that is there; a folder of that name is always whole."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".partial-"))
        try:
            self._write(model, processor, partial)
            with self._alone():
                shutil.rmtree(self.folder, ignore_errors=True)
                partial.rename(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write(self, model: nn.Module, processor: Any, folder: Path) -> None:
        folder.chmod(0o755)  # a temporary folder is for its owner alone, and the store may be for several
        save_model(model, processor, folder)
        if is_function(self.source.model):
            save_weights(model, folder / WEIGHTS)
        (folder / MADE_BY).write_text(json.dumps(self.made_by, indent=2))
        digests = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
        (folder / DIGESTS).write_text(json.dumps(digests, indent=2))

    def _check_files(self) -> None:
        """Compare every file with its digest; teachers kept by earlier versions have none.

        Raises:
            ValueError: a file is missing, or is not what was written.
        """
        if not (self.folder / DIGESTS).is_file():
            return
        for name, digest in json.loads((self.folder / DIGESTS).read_text()).items():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if file_digest(path) != digest:
                raise ValueError(f"{name} is not what was written")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from this teacher; where nothing can be written, nobody replaces it either."""
        locks = self.root / "locks"
        if not os.access(locks if locks.exists() else self.root, os.W_OK):
            yield
            return
        locks.mkdir(exist_ok=True)
        with FileLock(locks / f"{self.folder.name}.lock"):
            yield


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     file_digest(Path(file.name))[:12]
        'e3b0c44298fc'
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _images_as(task: Task) -> dict[str, Any]:
    """How a task shows its images to a teacher in training; nothing for other tasks."""
    return {"size": task.size, "augmentation": list(task.augmentation)} if isinstance(task, PictureTask) else {}


def fingerprint(source: str) -> str:
    """A hash of what makes a model: a folder's files, or the source of a function's module.

    A hub id stands for itself, with its commit.
    """
    folder = Path(source)
    if is_function(source) and named_network(source):
        return source
    if is_function(source):
        module = inspect.getmodule(import_object(source))
        return hashlib.sha256(inspect.getsource(module).encode() if module else b"").hexdigest()
    if not folder.is_dir():
        return f"{source}@{'' if is_path(source) else _commit(source)}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt", ".model") and path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def _commit(repository: str) -> str:
    """The commit of a hub model, whose config is fetched if it is not here; empty where there is no such model.

    Without the fetching, the first run would have another key than the next ones.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(repository, "config.json")).parent.name
    except (HFValidationError, OSError, ValueError):  # the loading that follows says what is wrong
        return ""


def save_model(model: nn.Module, processor: Any, folder: Path) -> None:
    """Save a model so that others can load it: a transformers folder, or plain safetensors for other modules."""
    from transformers import PreTrainedModel

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        with quiet_transformers():
            model.save_pretrained(folder)
    else:
        save_weights(model, folder / "model.safetensors")
    if processor is not None:
        processor.save_pretrained(folder)
