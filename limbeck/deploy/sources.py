"""What can be exported: the student or teacher of a finished run, or a transformers folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.cache.keys import weights_digest
from limbeck.deploy.manifest import MANIFEST
from limbeck.hub import check_findable
from limbeck.models import MADE_BY, TeacherStore, check_length, load_model, make_student
from limbeck.pretrained import is_path, load_pretrained, load_tokenizer, most_tokens
from limbeck.recipe import Recipe
from limbeck.registry import nearest
from limbeck.report import Report
from limbeck.report.search import is_search
from limbeck.report.suite import is_suite_folder
from limbeck.stage import WEIGHTS
from limbeck.tasks import VALIDATION, Loaded, Task, TaskOptions, make_task
from limbeck.tasks.text import TextTask, encode_texts
from limbeck.train import Examples
from limbeck.train.checkpoint import load_weights
from limbeck.types import STUDENT, TEACHER

ROLES = (STUDENT, TEACHER)
RECIPE = "recipe.yaml"
CONFIG = "config.json"
TRIALS, BEST = "trials", "best"
"""Of a search: its trials, and the run of its choice."""
SAVED = "model.safetensors"


@dataclass(frozen=True)
class Source:
    """A model with real inputs for it, and where both come from.

    Attributes:
        model: The model.
        processor: What encodes its inputs, and is saved beside it; None where they need nothing.
        examples: Inputs to check an export with.
        inputs: What they are, in words.
        metric: The metric of their labels; None where they have none.
        labels: Names of the classes.
        max_tokens: After which a text is cut; None for other inputs.
        task: The ``task:`` part of a recipe; None where no task was named.
        lineage: Hashes and names of what the model was made of.
    """

    model: nn.Module
    processor: Any
    examples: Examples
    inputs: str
    metric: str | None
    labels: tuple[str, ...]
    max_tokens: int | None
    task: dict[str, Any] | None
    lineage: dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (folder / MADE_BY).is_file() and (folder / RECIPE).is_file()


def read_run(folder: Path) -> tuple[Recipe, Report]:
    """The recipe and the report of a finished run.

    Raises:
        ValueError: it is not finished, or it is a search, which has runs in it.
    """
    if is_search(folder) or (folder / TRIALS).is_dir():
        raise ValueError(f"{folder} is a search; name the run of its choice: {folder / BEST}")
    if not (folder / "report.json").is_file():
        raise ValueError(
            f"the run in {folder} is not finished; go on with it: limbeck distill {folder / RECIPE} --out {folder}"
        )
    return Recipe.load(folder / RECIPE), Report.load(folder)


def find_source(
    where: str, role: str = STUDENT, options: TaskOptions | None = None, texts: Path | None = None
) -> Source:
    """Load what is to be exported, with real inputs.

    Args:
        where: The folder of a run, or a transformers folder or hub id.
        role: Which model of a run.
        options: The task, for a model that comes without a run.
        texts: A file of texts instead, one in a line; a pair has a tab between.

    Raises:
        ValueError: no model, a run that is not finished, or no inputs to check an export with.

    Example:
        >>> find_source("./nothing")
        Traceback (most recent call last):
        ValueError: there is no model at ./nothing; name a run, a transformers folder or a hub id
    """
    folder = Path(where)
    if role not in ROLES:
        raise ValueError(f"a run has no {role!r} to export; {nearest(role, ROLES)}")
    if is_run(folder):
        if options is not None or texts is not None:
            raise ValueError(f"{folder} is a run, which has its task and data; leave --task and --texts out")
        return _of_run(folder, role)
    check_is_model(where)
    if role != STUDENT:
        raise ValueError(f"{where} is one model and no run; leave --role out")
    if (options is None) == (texts is None):
        raise ValueError(f"name real inputs to check the export of {where} with: either --task or --texts FILE")
    return _of_texts(where, texts) if texts is not None else _of_task(where, options)


def check_is_model(where: str) -> None:
    """Refuse a place that holds no transformers model.

    Raises:
        ValueError: there is no such folder or hub id, or it holds something else.
    """
    folder = Path(where)
    if not folder.exists():
        if is_path(where):
            raise ValueError(f"there is no model at {where}; name a run, a transformers folder or a hub id")
        check_findable(where)
        return
    if not folder.is_dir():
        raise ValueError(f"{where} is a file; name the folder of a run or of a transformers model")
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{where} holds a model that was exported already; name the run or model it came from")
    if is_suite_folder(folder):
        runs = sorted(str(each.parent) for each in folder.glob("*/report.json"))
        raise ValueError(f"{where} is a suite; name one of its runs: {', '.join(runs) or 'none is finished yet'}")
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{where} holds neither a run nor a transformers model; it has no {RECIPE} and no {CONFIG}"
        )


def _of_run(folder: Path, role: str) -> Source:
    recipe, _ = read_run(folder)
    task = make_task(recipe.task)
    loaded = load_of_run(folder, role, recipe, task)
    made_by = json.loads((folder / MADE_BY).read_text(encoding="utf-8"))
    lineage = {
        "role": role,
        "run": str(folder),
        "recipe": hashlib.sha256((folder / RECIPE).read_bytes()).hexdigest(),
        "teacher": made_by["teacher"],
        "data": made_by["data"],
    }
    return _with_task(loaded, task, recipe.task, lineage)


def load_of_run(folder: Path, role: str, recipe: Recipe, task: Task) -> Loaded:
    """Load a model of a finished run.

    Raises:
        ValueError: the teacher is a cache, or it was fine-tuned and is not kept any more.
    """
    if role == TEACHER:
        return _teacher(folder, recipe, task)
    saved = folder / STUDENT
    if (saved / CONFIG).is_file():
        return task.load(saved)
    if not (saved / SAVED).is_file():
        raise ValueError(f"{saved} holds no student; make the run again")
    made = make_student(recipe.student, task, _teacher(folder, recipe, task), recipe.training.seed)
    load_weights(made.model, saved / SAVED)
    return made


def _teacher(folder: Path, recipe: Recipe, task: Task) -> Loaded:
    """The teacher: as this run fine-tuned it, as the store has it, or as it came."""
    spec, own = recipe.teacher, folder / "checkpoints" / TEACHER / WEIGHTS
    if spec.model.startswith("cache:"):
        raise ValueError(f"the teacher of {folder} is a cache of answers, and no model that could be exported")
    store = TeacherStore(recipe, task)
    if not own.is_file() and spec.finetune != "never" and store.holds():
        return store.load(task)
    loaded = load_model(task, spec.model, spec.options, spec.training.seed)
    if own.is_file():
        load_weights(loaded.model, own)
    elif spec.finetune == "always" or (spec.finetune == "auto" and not loaded.head_is_trained):
        raise ValueError(
            f"the fine-tuned teacher of {folder} is no longer in {store.folder}; make the run anew (--overwrite)"
        )
    return loaded


def _of_task(where: str, options: TaskOptions | None) -> Source:
    assert options is not None
    task = make_task(options)
    loaded = load_for(where, task)
    return _with_task(loaded, task, options, {"source": where})


def load_for(where: str, task: Task) -> Loaded:
    """Load a transformers folder or hub id whose head was trained for a task.

    Raises:
        ValueError: there is none, or its head is new.
    """
    loaded = task.load(where)
    if not loaded.head_is_trained:
        raise ValueError(f"{where} has no head that was trained for {task.name}: what it says would be random")
    return loaded


def _of_texts(where: str, file: Path) -> Source:
    model, tokenizer = load_pretrained(where), load_tokenizer(where)
    texts = read_texts(file)
    most = most_tokens(model) or tokenizer.model_max_length
    examples = encode_texts(texts, [0] * len(texts), tokenizer, most)
    config: Any = model.config
    labels = tuple(str(config.id2label[i]) for i in sorted(config.id2label)) if config.id2label else ()
    lineage = {"role": "model", "source": where, "model": weights_digest(model)}
    return Source(model, tokenizer, examples, f"texts of {file.name}", None, labels, most, None, lineage)


def read_texts(file: Path) -> list[tuple[str, ...]]:
    """Texts of a file, one in a line; a pair has a tab between.

    Raises:
        ValueError: there is no such file, no text in it, or some lines have a pair and others none.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}; --texts names one with a text in each line")
    rows = [tuple(line.split("\t")) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"{file} has {'lines with and without a tab' if rows else 'no text'}; write one text a line"
        )
    return rows


def cut_after(task: Task, model: nn.Module) -> int | None:
    """Tokens after which a text is cut when the model is served: those of the task, and no more than it reads."""
    if not isinstance(task, TextTask):
        return None
    return min(task.max_length, most_tokens(model) or task.max_length)


def _with_task(loaded: Loaded, task: Task, options: TaskOptions, lineage: dict[str, Any]) -> Source:
    rows = task.splits[VALIDATION]
    examples, most = task.encode(rows, loaded.processor), most_tokens(loaded.model)
    check_length("the model", most, examples, f"--max-length {most}")
    data = {"data": {name: each.fingerprint() for name, each in task.splits.items()}}
    return Source(
        model=loaded.model,
        processor=loaded.processor,
        examples=examples,
        inputs=f"validation data of {task.name}",
        metric=task.metrics[0],
        labels=task.labels,
        max_tokens=cut_after(task, loaded.model),
        task=options.model_dump(mode="json"),
        lineage={"role": "model", **data, **lineage, "model": weights_digest(loaded.model)},
    )
