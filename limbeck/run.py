"""What a run does, from top to bottom: teacher, plan, baseline, student, report. Each stage is kept."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

import limbeck
from limbeck.distiller import Distiller, PlannedTerm
from limbeck.evaluate import Bootstrap, compare, count_parameters, measure_speed, size_in_bytes
from limbeck.metrics import get_metric
from limbeck.models import TeacherStore, find_depths, load_model, make_student, save_model
from limbeck.recipe import Recipe, plain_terms
from limbeck.report import Report, write_report
from limbeck.report.report import Curve, Interval, ModelResult
from limbeck.stage import Stage, StageResult
from limbeck.tasks import TRAIN, VALIDATION, Loaded, Task, is_regression, make_task
from limbeck.terms import Term
from limbeck.train import Callback, Examples, Settings, read_log
from limbeck.train.data import ExampleBatches

RECIPE = "recipe.yaml"
LOG = "log.jsonl"
HOLDOUT = "holdout"
THROUGHPUT_BATCH = 32


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, as the preflight found it.

    Attributes:
        task: The task's name.
        examples: Number of examples by split.
        terms: What each term reads and is worth.
        parameters: Number of parameters of teacher and student.
        steps: Updates of the student's training, and of the teacher's where it is fine-tuned.
        teacher: What happens with the teacher, in words.
    """

    task: str
    examples: dict[str, int]
    terms: list[PlannedTerm]
    parameters: dict[str, int]
    steps: dict[str, int]
    teacher: str


class Observer:
    """Watches a run; the command line's draws bars. Override what you need."""

    def on_plan(self, plan: Plan) -> None:
        """The preflight is done; training begins."""

    def on_stage(self, name: str) -> None:
        """A stage begins: teacher, baseline-0, student-0, evaluation."""

    def callbacks(self, stage: str) -> list[Callback]:
        """What watches the training of this stage."""
        return []


def distill(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    retrain: bool = False,
    observer: Observer | None = None,
    command: str = "",
) -> Report:
    """Do all that a recipe says: fine-tune the teacher if needed, train baseline and student, compare, report.

    Args:
        recipe: A Recipe, its content as a mapping, or the path of its YAML file.
        out: The folder for everything; by default ``runs/`` and the task's name. If it holds the same run,
            unfinished, that one goes on.
        overwrite: Delete what is in the folder and start anew.
        retrain: Fine-tune the teacher even if it is in the store.
        observer: What watches.
        command: What was typed, for the report.

    Returns:
        The report. The folder holds it as ``report.json``, ``report.html`` and ``README.md``, beside
        ``student/``, ``recipe.yaml``, ``log.jsonl`` and ``checkpoints/``.

    Raises:
        ValueError: anything wrong with the recipe, the data or the models, before any training.

    Example:
        >>> import tempfile
        >>> place, network = tempfile.mkdtemp(), "limbeck.tasks.image:fresh_resnet"
        >>> report = distill({
        ...     "task": {"name": "digits", "train_examples": 64, "eval_examples": 32},
        ...     "teacher": {"model": network, "training": {"steps": 2}},
        ...     "student": {"model": network, "options": {"widths": [8, 16], "depth": 1}},
        ...     "training": {"steps": 2},
        ...     "store": place,
        ... }, place + "/run")
        >>> report.student.parameters < report.teacher.parameters
        True
    """
    recipe = as_recipe(recipe)
    task = make_task(recipe.task)
    recipe = recipe.resolved(is_regression(task))
    folder = Path(out) if out is not None else default_folder(recipe)
    run = Run(recipe, task, folder, observer or Observer(), command)
    run.open_folder(overwrite)
    return run.execute(retrain)


def as_recipe(source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Make a Recipe of what a user has; see `distill`."""
    if isinstance(source, Recipe):
        return source
    return Recipe.parse(source) if isinstance(source, Mapping) else Recipe.load(source)


def default_folder(recipe: Recipe) -> Path:
    """Where a run goes that names no folder."""
    return Path("runs") / recipe.task.name.replace("/", "-").replace(":", "-")


class Run:
    """One run: the variables that its stages share.

    Args:
        recipe: What to do, with every term spelled out.
        task: The task with its data.
        folder: Where everything goes.
        observer: What watches.
        command: What was typed.
    """

    def __init__(self, recipe: Recipe, task: Task, folder: Path, observer: Observer, command: str) -> None:
        self.recipe = recipe
        self.task = task
        self.folder = folder
        self.observer = observer
        self.command = command or f"limbeck distill {folder / RECIPE}"
        self.regression = is_regression(task)
        self.data: dict[str, Examples] = {}
        self.seeds = list(range(recipe.training.seed, recipe.training.seed + recipe.seeds))

    def open_folder(self, overwrite: bool) -> None:
        """Make the folder, or go on in it if it holds this very run.

        Raises:
            ValueError: it holds something else.
        """
        if overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
        kept = self.folder / RECIPE
        if kept.is_file():
            difference = first_difference(yaml.safe_load(kept.read_text()), self.recipe.model_dump(mode="json"))
            if difference:
                raise ValueError(
                    f"{self.folder} holds another run ({difference}); choose another --out, or pass --overwrite"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other files; choose an empty folder with --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(self.recipe.to_yaml())

    def execute(self, retrain: bool = False) -> Report:
        """The run, from top to bottom."""
        recipe = self.recipe
        store = TeacherStore(recipe, self.task)
        if retrain:
            store.forget()
        teacher, tuned = self.load_teacher(store)
        self.data = {name: self.task.encode(rows, teacher.processor) for name, rows in self.task.splits.items()}
        plan = self.preflight(teacher, tuned)
        self.observer.on_plan(plan)

        teacher, teacher_result = self.finetune(teacher, tuned, store)
        students, baselines = [], []
        student_model: nn.Module | None = None
        baseline_model: nn.Module | None = None
        for seed in self.seeds:
            if recipe.baseline:
                twin, result = self.train(f"baseline-{seed}", teacher, seed, distil=False)
                baseline_model = baseline_model or twin
                baselines.append(result)
            model, result = self.train(f"student-{seed}", teacher, seed, distil=True)
            student_model = student_model or model
            students.append(result)

        assert student_model is not None
        models = {"teacher": teacher.model, "baseline": baseline_model, "student": student_model}
        results = {"teacher": [teacher_result], "baseline": baselines, "student": students}
        report = self.report({r: m for r, m in models.items() if m is not None}, results, plan)
        save_model(student_model.cpu(), teacher.processor, self.folder / "student")
        write_report(report, self.folder)
        return report

    def load_teacher(self, store: TeacherStore) -> tuple[Loaded, bool]:
        """Load the teacher, and say whether it is ready or has to be fine-tuned."""
        spec = self.recipe.teacher
        if spec.finetune != "never" and store.holds():
            return store.load(self.task), True
        loaded = load_model(self.task, spec.model, spec.options, spec.training.seed)
        ready = spec.finetune == "never" or (spec.finetune == "auto" and loaded.head_is_trained)
        return loaded, ready

    def preflight(self, teacher: Loaded, tuned: bool) -> Plan:
        """Check models, taps, shapes and terms before anything is trained."""
        recipe = self.recipe
        student = make_student(recipe.student, self.task, teacher, recipe.training.seed)
        distiller = Distiller(student, teacher.model, self.terms(student, teacher.model))
        batches = ExampleBatches(self.data[TRAIN], recipe.training)
        steps = {"student": recipe.training.total_steps(len(batches))}
        if not tuned:
            training = recipe.teacher.training
            steps["teacher"] = training.total_steps(len(ExampleBatches(self.data[TRAIN], training)))
        return Plan(
            task=self.task.name,
            examples={name: len(rows) for name, rows in self.task.splits.items()},
            terms=distiller.preflight(batches.sample()),
            parameters={"teacher": count_parameters(teacher.model), "student": count_parameters(student)},
            steps=steps,
            teacher="ready" if tuned else "to be fine-tuned on the task first",
        )

    def terms(self, student: nn.Module, teacher: nn.Module) -> list[Term]:
        """The terms of the recipe for these two models."""
        return self.recipe.build_terms(find_depths(student, teacher, self.recipe.student.path), self.regression)

    def finetune(self, teacher: Loaded, tuned: bool, store: TeacherStore) -> tuple[Loaded, StageResult]:
        """Fine-tune the teacher if that is needed, and keep it; predict with it."""
        stage = self.stage("teacher")
        if tuned:
            return teacher, StageResult(None, stage.predict(teacher.model))
        model = teacher.model.requires_grad_(True)
        distiller = Distiller(model, None, plain_terms((), self.regression))
        model, result = self._train(stage, distiller, self.recipe.teacher.training)
        store.keep(model, teacher.processor)
        return Loaded(model, teacher.processor, head_is_trained=True), result

    def train(self, name: str, teacher: Loaded, seed: int, distil: bool) -> tuple[nn.Module, StageResult]:
        """Train a student, or its twin without distillation, from the same start."""
        student = make_student(self.recipe.student, self.task, teacher, seed)
        terms = self.terms(student, teacher.model)
        if distil:
            distiller = Distiller(student, teacher.model, terms)
        else:
            distiller = Distiller(student, None, plain_terms(terms, self.regression))
        return self._train(self.stage(name), distiller, self.recipe.training.model_copy(update={"seed": seed}))

    def _train(self, stage: Stage, distiller: Distiller, settings: Settings) -> tuple[nn.Module, StageResult]:
        self.observer.on_stage(stage.name)
        return stage.run(distiller, settings, self.observer.callbacks(stage.name))

    def stage(self, name: str) -> Stage:
        """Where a stage keeps its things."""
        return Stage(
            name=name,
            folder=self.folder / "checkpoints" / name,
            log=self.folder / LOG,
            train=self.data[TRAIN],
            choose=self.data.get(HOLDOUT, self.data[VALIDATION]),
            evaluate={n: d for n, d in self.data.items() if n not in (TRAIN, HOLDOUT)},
            metric=self.task.metrics[0],
        )

    def report(
        self, models: Mapping[str, nn.Module], results: Mapping[str, list[StageResult]], plan: Plan
    ) -> Report:
        """Put teacher, baseline and student side by side."""
        self.observer.on_stage("evaluation")
        metric = get_metric(self.task.metrics[0])
        labels = np.asarray(self.task.splits[VALIDATION].labels)
        bootstrap = Bootstrap(labels, metric, self.recipe.seeds)
        logits = {role: [r.logits[VALIDATION] for r in results[role]] for role in models}
        speed = self.speed(models)
        columns = {
            role: self.column(role, model, results[role], bootstrap, speed[role]) for role, model in models.items()
        }
        return Report(
            task=self.task.name,
            metric=metric.name,
            higher_is_better=metric.higher_is_better,
            examples=plan.examples,
            teacher=columns["teacher"],
            baseline=columns.get("baseline"),
            student=columns["student"],
            comparison=compare(bootstrap, **logits) if "baseline" in logits else None,
            plan=[plan_row(p) for p in plan.terms],
            curves=curves(read_log(self.folder / LOG), plan.terms),
            seeds=self.seeds,
            environment=environment(),
            recipe=self.recipe.model_dump(mode="json"),
            command=self.command,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            regression=self.regression,
            throughput_batch=self.throughput_batch(),
            student_class=type(models["student"]).__name__,
        )

    def column(
        self,
        role: str,
        model: nn.Module,
        results: list[StageResult],
        bootstrap: Bootstrap,
        speed: tuple[Interval, Interval],
    ) -> ModelResult:
        """One model's column of the report."""
        fitted = [r.fitted for r in results if r.fitted is not None]
        scores = bootstrap.scores([r.logits[VALIDATION] for r in results])
        latency, batch = speed
        return ModelResult(
            role=role,
            score=bootstrap.interval(scores),
            metrics=self.metrics(results),
            parameters=count_parameters(model),
            size_bytes=size_in_bytes(model),
            latency_ms=latency.map(lambda seconds: 1000 * seconds),
            throughput=batch.map(lambda seconds: self.throughput_batch() / seconds),
            training_seconds=mean(f.seconds for f in fitted),
            teacher_seconds=mean(f.teacher_seconds for f in fitted),
            scores_by_seed=[bootstrap.metric(r.logits[VALIDATION], bootstrap.labels) for r in results],
        )

    def metrics(self, results: list[StageResult]) -> dict[str, float]:
        """All metrics on all evaluation splits, the mean over seeds."""
        found = {}
        for split in results[0].logits:
            labels = np.asarray(self.task.splits[split].labels)
            suffix = "" if split == VALIDATION else f" ({split.removeprefix('validation_')})"
            for name in self.task.metrics:
                metric = get_metric(name)
                found[name + suffix] = mean(metric(r.logits[split], labels) for r in results)
        return found

    def speed(self, models: Mapping[str, nn.Module]) -> dict[str, tuple[Interval, Interval]]:
        """Seconds for one example and for a batch, by role; the models take turns."""
        data = self.data[VALIDATION]
        one = measure_speed(models, data, batch_size=1, repeats=60)
        many = measure_speed(models, data, batch_size=self.throughput_batch(), repeats=15)
        return {role: (one[role], many[role]) for role in models}

    def throughput_batch(self) -> int:
        """The batch size that throughput is measured at."""
        return min(THROUGHPUT_BATCH, len(self.data[VALIDATION]))


def mean(values: Iterable[float]) -> float:
    """The mean, 0 of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def plan_row(planned: PlannedTerm) -> dict[str, Any]:
    """A term as a row of the report."""
    term = planned.term
    return {
        "name": term.name,
        "loss": term.loss_name,
        "tap": term.tap,
        "teacher_tap": term.teacher_tap,
        "weight": term.weight,
        "options": dict(term.options),
        "projection": term.project,
        "parameters": planned.parameters,
        "student_shape": list(planned.student_shape),
        "teacher_shape": list(planned.teacher_shape),
    }


def curves(log: list[dict[str, Any]], terms: Sequence[PlannedTerm]) -> list[Curve]:
    """The log as curves, one for each training."""
    weights = {p.term.name: p.term.weight for p in terms}
    found = []
    for stage in dict.fromkeys(line["stage"] for line in log):
        role, _, seed = stage.partition("-")
        steps = [line for line in log if line["stage"] == stage and "terms" in line]
        scores = [line for line in log if line["stage"] == stage and "scores" in line]
        names = list(dict.fromkeys(name for line in steps for name in line["terms"]))
        own = weights if role == "student" else dict.fromkeys(names, 1.0)
        found.append(
            Curve(
                role=role,
                seed=int(seed or 0),
                steps=[line["step"] for line in steps],
                terms={name: [line["terms"][name] for line in steps] for name in names},
                weights={name: own[name] for name in names},
                learning_rate=[line["learning_rate"] for line in steps],
                score_steps=[line["step"] for line in scores],
                scores=[next(iter(line["scores"].values())) for line in scores],
            )
        )
    return found


def environment() -> dict[str, Any]:
    """Where the numbers were measured."""
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "limbeck": limbeck.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def first_difference(kept: Any, wanted: Any, place: str = "") -> str:
    """Say where two nested mappings differ first, or nothing.

    Example:
        >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
        'a.b is 1 there and 2 here'
    """
    if isinstance(kept, dict) and isinstance(wanted, dict):
        for key in [*kept, *(k for k in wanted if k not in kept)]:
            inner = f"{place}.{key}" if place else str(key)
            found = first_difference(kept.get(key), wanted.get(key), inner)
            if found:
                return found
        return ""
    return "" if kept == wanted else f"{place} is {kept!r} there and {wanted!r} here"
