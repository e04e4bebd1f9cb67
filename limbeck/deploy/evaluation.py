"""Models side by side on one task, whatever runs them: PyTorch, ONNX, ONNX int8, ``.pt2``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from limbeck.deploy.manifest import MANIFEST, Manifest, versions
from limbeck.deploy.served import open_onnx, open_program
from limbeck.deploy.sources import ROLES, check_is_model, cut_after, is_run, load_for, load_of_run, read_run
from limbeck.evaluate import Bootstrap, agreement, count_parameters, quartiles, size_in_bytes, time_in_turns
from limbeck.metrics import Array, get_metric
from limbeck.models import check_length
from limbeck.pretrained import load_tokenizer, most_tokens
from limbeck.report.report import Interval
from limbeck.tasks import VALIDATION, Rows, Task, TaskOptions, is_regression, make_task
from limbeck.tasks.pixels import load_pixels
from limbeck.tasks.text import Padding, TextTask
from limbeck.train import Examples, predict
from limbeck.types import STUDENT

REPEATS, WARMUP = 60, 5
FORMAT = 1


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be asked.

    Attributes:
        name: What the user called it.
        runtime: ``"PyTorch"``, ``"ONNX"``, ``"ONNX int8"`` or ``"torch.export"``.
        model: The model.
        processor: What encodes its inputs.
        parameters: Number of parameters of the model that it came from.
        size_bytes: Of its weights, or of its file.
        most_tokens: That it reads at once; None where nobody says.
        max_tokens: After which its texts are cut when it is served; None where that is the task's to say.
    """

    name: str
    runtime: str
    model: nn.Module
    processor: Any
    parameters: int
    size_bytes: int
    most_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Measured:
    """One model of an evaluation.

    Attributes:
        name: What the user called it.
        runtime: What runs it.
        score: The main metric with its 95 % interval.
        difference: Its score minus that of the first model, paired over the examples; None for the first.
        agreement: Share of the examples on which it decides as the first model does; a correlation for numbers.
        parameters: Number of parameters.
        size_bytes: Of its weights, or of its file.
        latency_ms: Milliseconds for a batch: median and quartiles.
        speedup: The first model's time over its own, of the same turn: median and quartiles.
    """

    name: str
    runtime: str
    score: Interval
    difference: Interval | None
    agreement: Interval | None
    parameters: int
    size_bytes: int
    latency_ms: Interval
    speedup: Interval


@dataclass(frozen=True)
class Evaluation:
    """Models side by side.

    Attributes:
        task: Name of the task.
        metric: Its main metric.
        examples: On how many examples they were scored.
        batch_size: Examples in a timed batch.
        length: Tokens to which timed texts were cut and padded; None for their own.
        threads: Of each model.
        method: How times were taken, in words.
        models: The models, in the order in which they were named.
        versions: Of the software.

    Example:
        >>> point = Interval(1.0, 1.0, 1.0)
        >>> one = Measured("a", "ONNX", point, None, None, 2, 8, point, point)
        >>> json.loads(Evaluation("t", "accuracy", 9, 1, None, 1, "", [one], {}).to_json())["models"][0]["name"]
        'a'
    """

    task: str
    metric: str
    examples: int
    batch_size: int
    length: int | None
    threads: int
    method: str
    models: list[Measured]
    versions: dict[str, str]

    def to_json(self) -> str:
        """Write it as JSON."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False)


def evaluate(
    models: Sequence[str],
    options: TaskOptions | None = None,
    *,
    batch_size: int = 1,
    length: int | None = None,
    threads: int | None = None,
    repeats: int = REPEATS,
) -> Evaluation:
    """Score and time models side by side, on the evaluation data of one task.

    Args:
        models: Each an export's folder, a run's folder (``RUN`` for its student, ``RUN:teacher`` for its teacher),
            a transformers folder or a hub id. The first one is what the others are compared with.
        options: The task; by default that of the first run or export that is named. Unless it says after how many
            tokens texts are cut, runs and exports have them cut as they were made for.
        batch_size: Examples in a timed batch.
        length: Tokens to which texts are cut and padded for timing; by default their own. Scores are always of
            whole texts.
        threads: Of each model; by default as many as PyTorch has.
        repeats: Timed turns.

    Raises:
        ValueError: a model that cannot be opened or was made for other labels, no task, or a length that texts
            do not have.

    Example:
        >>> evaluate(["no/such/model/here"], TaskOptions(name="digits"))
        Traceback (most recent call last):
        ValueError: there is no model at no/such/model/here; name a run, a transformers folder or a hub id
    """
    if not models:
        raise ValueError("there is nothing to evaluate; name a model")
    twice = next((name for name in models if list(models).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; name each model once")
    if min(batch_size, repeats) < 1:
        raise ValueError("batch size and repeats must be 1 at least")
    for name in models:
        folder, _ = split_role(name)
        if not ((folder / MANIFEST).is_file() or is_run(folder)):
            check_is_model(name)
    task = make_task(options or task_of(models))
    named = options is not None and "max_length" in options.model_fields_set
    with thread_count(threads):
        opened = [open_model(name, task) for name in models]
        rows = task.splits[VALIDATION]
        data = {
            one.name: _cut(task, None if named else one.max_tokens).encode(rows, one.processor) for one in opened
        }
        for one in opened:
            check_length(one.name, one.most_tokens, data[one.name], f"--max-length {one.most_tokens}")
        timed = data
        if length is not None:
            timed = {one.name: of_length(task, rows, one, length) for one in opened}
        logits = {one.name: predict(one.model, data[one.name]).logits for one in opened}
        times = time_in_turns(
            {one.name: one.model for one in opened}, timed, batch_size=batch_size, repeats=repeats, warmup=WARMUP
        )
        return Evaluation(
            task=task.name,
            metric=task.metrics[0],
            examples=len(rows),
            batch_size=min(batch_size, len(rows)),
            length=length,
            threads=torch.get_num_threads(),
            method=(
                f"models take turns on every batch; median and quartiles of {repeats} turns after {WARMUP}; CPU, "
                f"{os.cpu_count()} cores"
            ),
            models=_measured(opened, task, logits, times),
            versions=versions(),
        )


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Let PyTorch, and sessions that are opened inside the block, compute with so many threads.

    Example:
        >>> with thread_count(1):
        ...     torch.get_num_threads()
        1
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; a model needs one at least")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def task_of(models: Sequence[str]) -> TaskOptions:
    """The task of the first run or export among some models.

    Raises:
        ValueError: none of them has one.
    """
    for name in models:
        folder, _ = split_role(name)
        if (folder / MANIFEST).is_file():
            task = Manifest.load(folder).task
            if task is not None:
                return TaskOptions.model_validate(task)
        elif is_run(folder):
            return read_run(folder)[0].task
    raise ValueError("name the data to evaluate on: --task NAME, with --data where it is not on the hub")


def split_role(name: str) -> tuple[Path, str]:
    """The folder and the role that a user names: ``RUN`` or ``RUN:teacher``.

    Example:
        >>> split_role("runs/rte:teacher")
        (PosixPath('runs/rte'), 'teacher')
    """
    folder, _, role = name.rpartition(":")
    return (Path(folder), role) if role in ROLES and folder else (Path(name), STUDENT)


def open_model(name: str, task: Task) -> Opened:
    """Open an export, a model of a run, or a transformers model; see `evaluate`.

    Raises:
        ValueError: nothing can be opened, or it was made for other labels.

    Example:
        >>> open_model("./nothing", make_task(TaskOptions(name="digits")))
        Traceback (most recent call last):
        ValueError: there is no model at ./nothing; name a run, a transformers folder or a hub id
    """
    folder, role = split_role(name)
    if (folder / MANIFEST).is_file():
        return _open_export(name, folder, task)
    if is_run(folder):
        recipe, _ = read_run(folder)
        own = make_task(recipe.task)
        loaded = load_of_run(folder, role, recipe, own)
        labels, cut = own.labels, cut_after(own, loaded.model)
    else:
        check_is_model(name)
        loaded, labels, cut = load_for(name, task), task.labels, None
    _check_labels(name, labels, task)
    model = loaded.model.cpu().eval()
    size = count_parameters(model), size_in_bytes(model)
    return Opened(name, "PyTorch", model, loaded.processor, *size, most_tokens(model), cut)


def _open_export(name: str, folder: Path, task: Task) -> Opened:
    made = Manifest.load(folder)
    _check_labels(name, tuple(made.labels), task)
    path = folder / made.file
    model = open_program(path, made.inputs) if made.kind == "torch" else open_onnx(path)
    texts = made.max_tokens is not None
    processor = load_tokenizer(folder) if texts else load_pixels(folder)
    size = made.parameters, made.size_bytes
    return Opened(name, made.runtime, model, processor, *size, made.most_tokens, made.max_tokens)


def _cut(task: Task, length: int | None) -> Task:
    """The task with its texts cut after so many tokens; as it is without a number, or without texts."""
    return replace(task, max_length=length) if length is not None and isinstance(task, TextTask) else task


def _check_labels(name: str, labels: tuple[str, ...], task: Task) -> None:
    if labels != task.labels and not (not task.labels and len(labels) == 1):
        wanted = list(task.labels) or "a number to predict"
        raise ValueError(f"{name} was made for the labels {list(labels)}, the task has {wanted}")


def of_length(task: Task, rows: Rows, opened: Opened, length: int) -> Examples:
    """Texts cut and padded to one length, for timing.

    Raises:
        ValueError: the task has no texts, or the model reads fewer tokens.
    """
    if not isinstance(task, TextTask):
        raise ValueError(f"length {length} is for texts, and {task.name} has none; leave --length out")
    most = opened.most_tokens
    if length < 3 or (most is not None and length > most):
        raise ValueError(f"length {length} is not between 3 and {most}, the tokens that {opened.name} reads")
    tokenizer = opened.processor
    examples = replace(task, max_length=length).encode(rows, tokenizer)
    padding = Padding(tokenizer.pad_token_id, is_regression(task), length=length)
    return Examples(examples.items, padding)


def _measured(
    opened: Sequence[Opened], task: Task, logits: dict[str, Array], times: dict[str, Array]
) -> list[Measured]:
    bootstrap = Bootstrap(np.asarray(task.splits[VALIDATION].labels), get_metric(task.metrics[0]))
    reference = opened[0].name
    scores = {name: bootstrap.scores([each]) for name, each in logits.items()}
    found = []
    for one in opened:
        other = one.name != reference
        found.append(
            Measured(
                name=one.name,
                runtime=one.runtime,
                score=bootstrap.interval(scores[one.name]),
                difference=bootstrap.interval(scores[one.name] - scores[reference]) if other else None,
                agreement=agreement(bootstrap, logits[reference], [logits[one.name]]) if other else None,
                parameters=one.parameters,
                size_bytes=one.size_bytes,
                latency_ms=quartiles(times[one.name]).map(lambda seconds: 1000 * seconds),
                speedup=quartiles(times[reference] / times[one.name]),
            )
        )
    return found
