"""What a run does, from top to bottom: teacher, plan, baseline, student, report. Each stage is kept."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.atomic import write_tensors, write_text
from limbeck.baseline import PRETRAINED, STUDENT, plain_terms
from limbeck.belonging import MADE_BY, holds_this
from limbeck.distiller import Distiller, read_of_teacher
from limbeck.encodings import Encoded, encode_for
from limbeck.enlarging import Wanted, alike, brought
from limbeck.evaluate import count_parameters
from limbeck.keeping import forms_of
from limbeck.models import TeacherStore, baseline_start, check_lengths, fingerprint, load_model, save_model
from limbeck.pairing import expose_attention, find_places, layers_of, match_places
from limbeck.plan import Observer, Plan
from limbeck.pretrained import most_tokens
from limbeck.recipe import LayerMatch, Places, Recipe
from limbeck.remember import SIGNALS, Memory, recall
from limbeck.report import Report, write_report
from limbeck.stage import RESULT, Stage, StageResult
from limbeck.summary import WITHOUT_EXTRA, Summary, example_counts
from limbeck.tasks import EXTRA, HOLDOUT, TRAIN, VALIDATION, Loaded, Task, is_regression, make_task
from limbeck.tasks.base import reads_texts
from limbeck.tasks.extra import Extra, check_texts
from limbeck.teaching import KeptTeacher, LiveTeacher, is_kept, teacher_fingerprint
from limbeck.terms import Term
from limbeck.train import Examples, Settings, read_log
from limbeck.train.data import ExampleBatches
from limbeck.train.ranks import process_state

RECIPE, LOG, REPORT = "recipe.yaml", "log.jsonl", "report.json"
RESAMPLES = "resamples.safetensors"  # the main metric in every resample, which the intervals come from
MATCHED_EXAMPLES = 256
"""Training examples from which pairs of layers are found."""

OWN = (RECIPE, LOG, MADE_BY, REPORT, RESAMPLES, "report.html", "README.md", "student", "checkpoints", SIGNALS)
"""All that a run writes into its folder, and all that overwriting deletes of it."""

STUDENTS = ("student", WITHOUT_EXTRA)


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
                unfinished, that one goes on; if it holds it finished, its report is returned.
        overwrite: Delete the run that is in the folder and start anew.
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
    if recipe.by_task:
        raise ValueError("by_task is for several tasks, and this recipe has one; leave it out")
    task = make_task(recipe.task)
    recipe = recipe.resolved(is_regression(task), reads_texts(task))
    folder = Path(out) if out is not None else default_folder(recipe)
    run = Run(recipe, task, folder, observer or Observer(), command)
    return run.execute(overwrite, retrain)


def as_recipe(source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Make a Recipe of what a user has; see `distill`."""
    if isinstance(source, Recipe):
        return source
    return Recipe.parse(source) if isinstance(source, Mapping) else Recipe.load(source)


def default_folder(recipe: Recipe) -> Path:
    """Where a run goes that names no folder."""
    return Path("runs") / recipe.task.name.replace("/", "-").replace(":", "-")


def delete_run(folder: Path) -> None:
    """Delete of a folder what a run writes, and nothing else."""
    for name in OWN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Run:
    """One run: the variables that its stages share.

    Args:
        recipe: What to do, with every term spelled out.
        task: The task with its data.
        folder: Where everything goes.
        observer: What watches.
        command: What was typed.
        several: Whether this may be one of several processes.
        judged: The splits on which models predict; by default all but those that are for training.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        folder: Path,
        observer: Observer,
        command: str = "",
        several: bool = False,
        judged: Sequence[str] = (),
    ) -> None:
        self.recipe = recipe
        self.task = task
        self.folder = folder
        self.observer = observer
        self.command = command or f"limbeck distill {folder / RECIPE}"
        self.regression = is_regression(task)
        self.judged = judged or [name for name in task.splits if name not in (TRAIN, HOLDOUT, EXTRA)]
        self.data = Encoded({}, {}, Examples([]), Examples([]))
        self.extra: Extra | None = None
        self.processor: Any = None
        self.seeds = list(range(recipe.training.seed, recipe.training.seed + recipe.seeds))
        self.ranks = process_state(several)
        self.device: torch.device = self.ranks.device
        self.matches: dict[str, LayerMatch] = {}
        self.teacher: LiveTeacher | KeptTeacher
        self.memory = Memory(None, "")
        self.made_by = {
            "recipe": recipe.model_dump(mode="json"),
            "data": {name: rows.fingerprint() for name, rows in task.splits.items()},
            "teacher": teacher_fingerprint(recipe.teacher.model),
            "student": recipe.student.model and fingerprint(recipe.student.model),
        }
        if recipe.baseline_training.start not in (STUDENT, PRETRAINED):
            self.made_by["baseline"] = fingerprint(recipe.baseline_training.start)
        if recipe.extra is not None:
            check_texts(task)
            self.made_by |= {"extra": recipe.extra.digest(), **brought(recipe.extra)}

    def lend(self, recipe: Recipe, folder: Path, observer: Observer) -> Run:
        """Another run on the ground of this one: its task, its teacher, which is ready, and what that said.

        Args:
            recipe: What to do there; it differs in the student, the terms or the training.
            folder: Where that goes.
            observer: What watches.
        """
        other = copy.copy(self)
        other.recipe, other.folder, other.observer, other.matches = recipe, folder, observer, {}
        if recipe.student.model != self.recipe.student.model:  # which may read the data otherwise
            other._take(self.teacher)
        return other

    def execute(self, overwrite: bool = False, retrain: bool = False) -> Report:
        """The run, from top to bottom."""
        recipe = self.recipe
        self.check_folder(overwrite, retrain)
        if not overwrite and (self.folder / REPORT).is_file():
            return Report.load(self.folder)
        plan, teacher_result = self.teach(lambda _: self.open_folder(overwrite), retrain)
        self.memory = self.remember(plan)
        self.observer.on_note(f"what the teacher says is {self.memory.note}")
        models: dict[str, nn.Module] = dict(self.teacher.models)
        results: dict[str, list[StageResult]] = {"teacher": [teacher_result]}
        for seed in self.seeds:
            for role in self.roles():
                model, result = self.train(role, seed)
                if role != WITHOUT_EXTRA:  # it is as large and as fast as the student
                    models.setdefault(role, model)
                results.setdefault(role, []).append(result)

        self.observer.on_stage("evaluation")
        about = self.teacher.about(self.task)
        summary = Summary(recipe, self.task, self.data, self.device, about, self.extra)
        report, resamples = summary.report(models, results, plan.terms, read_log(self.folder / LOG), self.command)
        write_tensors(self.folder / RESAMPLES, {name: torch.from_numpy(each) for name, each in resamples.items()})
        save_model(models["student"].cpu(), self.processor, self.folder / "student")
        write_report(report, self.folder)
        self.memory.end()
        return report

    def roles(self) -> list[str]:
        """What is trained for each seed."""
        compared = self.recipe.extra is not None and self.recipe.extra.compare
        return [*(["baseline"] if self.recipe.baseline else []), "student", *([WITHOUT_EXTRA] if compared else [])]

    def teach(self, begin: Callable[[bool], None], retrain: bool = False) -> tuple[Plan, StageResult]:
        """Make the teacher ready to teach: load it, check everything, fine-tune it if needed, let it predict.

        Args:
            begin: Called when everything is checked and before anything is trained, with whether the teacher
                is ready.
            retrain: Fine-tune the teacher even if it is in the store.

        Returns:
            The plan, and the teacher's predictions.
        """
        if is_kept(self.recipe.teacher.model):
            return self._teach_from_cache(begin, retrain)
        store = TeacherStore(self.recipe, self.task)
        loaded, tuned = self.load_teacher(store, retrain)
        trained = [p for p in loaded.model.parameters() if p.requires_grad]  # before the plan freezes them
        plan = self.preflight(self._take(LiveTeacher(loaded, self.recipe.teacher.ways())), tuned)
        begin(tuned)
        self._show(plan)
        loaded, result = self.finetune(loaded, tuned, trained, store)
        self.teacher = LiveTeacher(loaded, self.recipe.teacher.ways())
        if self.recipe.found_maps and not tuned:  # another teacher may pair its layers otherwise
            self.matches = {}
            plan = self.preflight(self.student().model, tuned=True)
            self.observer.on_plan(plan)
        return plan, result

    def _teach_from_cache(self, begin: Callable[[bool], None], retrain: bool) -> tuple[Plan, StageResult]:
        if retrain:
            raise ValueError("a teacher that is a cache cannot be fine-tuned; leave --retrain out")
        teacher = KeptTeacher.open(self.recipe.teacher.model, self.task)
        teacher.check_recipe(self.recipe)
        plan = self.preflight(self._take(teacher), tuned=True)
        begin(True)
        self._show(plan)
        return plan, StageResult(None, teacher.answers)

    def _take(self, teacher: LiveTeacher | KeptTeacher) -> nn.Module:
        """Take a teacher, make the student, and encode the data as both read them."""
        self.teacher = teacher
        student = self.student()
        self.processor = student.processor
        self.extra = self._more_data(teacher)
        rows = None if self.extra is None else self.extra.rows
        self.data = encode_for(self.task, student.processor, teacher.processor, rows)
        return student.model

    def _more_data(self, teacher: LiveTeacher | KeptTeacher) -> Extra | None:
        """The extra examples; of several processes the first one makes them."""
        wanted = Wanted.by(self.recipe, self.task, teacher.processor)
        if wanted is None:
            return None
        with self.ranks.main_process_first():
            return wanted.make(teacher.folder if isinstance(teacher, KeptTeacher) else None, self.observer)

    def _show(self, plan: Plan) -> None:
        self.observer.on_plan(plan)
        if self.extra is not None:
            self.observer.on_note(self.extra.in_words())
        if self.processor is not self.teacher.processor:
            self.observer.on_note("student and teacher have different tokenizers: each reads the texts by its own")

    def remember(self, plan: Plan) -> Memory:
        """Where what the teacher says is kept."""
        if isinstance(self.teacher, KeptTeacher):
            return Memory(None, f"read from {self.teacher.folder}")
        return recall(self.recipe, self.teacher, self.data.asked, plan.terms, self.folder)

    def check_folder(self, overwrite: bool, retrain: bool) -> None:
        """Refuse a folder that holds anything but this run; change nothing.

        Raises:
            ValueError: it holds another run, other files, or what came of a teacher that `retrain` would replace.
        """
        if overwrite and (self.folder / MADE_BY).is_file():
            return
        if not holds_this(self.folder, self.made_by, "run", "choose another --out, or pass --overwrite"):
            return
        begun, finished = (self.folder / "checkpoints").exists(), (self.folder / REPORT).is_file()
        if retrain and begun and (finished or not self.stage_folder("teacher").exists()):
            raise ValueError(f"{self.folder} holds a run with its teacher; to make it anew, pass --overwrite too")

    def open_folder(self, overwrite: bool) -> None:
        """Make the folder; with `overwrite`, delete of it what a run writes, and nothing else."""
        if overwrite:
            delete_run(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RECIPE, self.recipe.to_yaml())
        write_text(self.folder / MADE_BY, json.dumps(self.made_by, indent=2))

    def load_teacher(self, store: TeacherStore, retrain: bool) -> tuple[Loaded, bool]:
        """Load the teacher, and say whether it is ready or has to be fine-tuned.

        One whose fine-tuning began in this folder goes on there, whatever the store has.

        Raises:
            ValueError: nothing to load, or `retrain` for a teacher that needs no training.
        """
        spec, own = self.recipe.teacher, self.stage_folder("teacher")
        begun = own.exists() and not (own / RESULT).is_file()
        if spec.finetune != "never" and store.holds() and not retrain and not begun:
            return store.load(self.task), True
        loaded = load_model(self.task, spec.model, spec.options, spec.training.seed)
        ready = spec.finetune == "never" or (spec.finetune == "auto" and loaded.head_is_trained)
        if ready and retrain:
            raise ValueError(
                f"the teacher {spec.model} is ready as it is, and --retrain is for one that is fine-tuned; leave "
                "it out, or set teacher.finetune=always"
            )
        if not ready:
            store.check_room()
        return loaded, ready

    def student(self, seed: int | None = None) -> Loaded:
        """The student as it begins, by default that of the first seed."""
        seed = self.recipe.training.seed if seed is None else seed
        return self.teacher.student(self.recipe.student, self.task, seed)

    def preflight(self, student: nn.Module, tuned: bool) -> Plan:
        """Check models, taps, shapes, terms and optimizers before anything is trained."""
        recipe, teacher = self.recipe, self.teacher
        about = teacher.about(self.task, recipe.student.path)
        check_lengths({"teacher": about.most_tokens, "student": most_tokens(student)}, self.data)
        terms = self.terms(student)
        if isinstance(teacher, KeptTeacher):
            teacher.check_holds(self.data.asked, read_of_teacher(terms))
        distiller = Distiller(
            student, teacher.as_kept(forms_of(recipe.cache, terms)), terms, balance=recipe.balance
        )
        planned = distiller.preflight(self.data.longest())
        recipe.training.build_optimizer(student, distiller.objective)
        if recipe.baseline:
            baseline_start(recipe, self.task, student, self.processor, recipe.training.seed)
        steps = {"student": self.steps(recipe.training)}
        if not tuned:
            recipe.teacher.training.build_optimizer(student, nn.ModuleList())
            steps["teacher"] = self.steps(recipe.teacher.training, self.data.labelled)
        return Plan(
            task=self.task.name,
            examples=example_counts(self.task, self.extra),
            terms=planned,
            parameters={"teacher": about.parameters, "student": count_parameters(student)},
            steps=steps,
            teacher=teacher.state(tuned),
        )

    def steps(self, settings: Settings, data: Examples | None = None) -> int:
        """The number of updates of a training, by default one of the student."""
        return settings.total_steps(len(ExampleBatches(data or self.data.training, settings)))

    def terms(self, student: nn.Module) -> list[Term]:
        """The terms of the recipe for a student and the teacher."""
        path = self.recipe.student.path
        places = find_places(layers_of(student, path), self.teacher.about(self.task, path).layers)
        if self.recipe.found_maps:
            places = self.matched(student, places)
        terms = self.recipe.build_terms(places, self.regression)
        expose_attention(terms, student, *self.teacher.models.values())
        return terms

    def matched(self, student: nn.Module, places: Places) -> Places:
        """The places with the pairs of layers that the recipe wants found; all seeds have those of the first."""
        if not self.matches:
            teacher, data = self.teacher.models["teacher"], self.data.training
            size = self.recipe.training.batch_size
            rows = range(min(MATCHED_EXAMPLES, len(data)))
            batches = [data.batch(rows[i : i + size]) for i in range(0, len(rows), size)]
            self.matches = match_places(student, teacher, places, batches, self.recipe.found_maps).matches
        return places.model_copy(update={"matches": self.matches})

    def finetune(
        self, teacher: Loaded, tuned: bool, trained: list[nn.Parameter], store: TeacherStore
    ) -> tuple[Loaded, StageResult]:
        """Fine-tune the teacher if that is needed, and keep it; predict with it.

        A teacher that this very run fine-tuned before is taken from there, with what its training cost.
        """
        stage = self.stage("teacher")
        if tuned and not stage.is_done():
            return teacher, StageResult(None, stage.predict(teacher.model))
        for parameter in trained:
            parameter.requires_grad_(True)
        distiller = Distiller(teacher.model, None, plain_terms((), self.regression))
        model, result = self._train(stage, distiller, self.recipe.teacher.training)
        if not tuned:
            store.keep(model, teacher.processor)
        return Loaded(model, teacher.processor, head_is_trained=True), result

    def train(self, role: str, seed: int) -> tuple[nn.Module, StageResult]:
        """Train a student, its twin without extra data, or the baseline without distillation."""
        recipe, student = self.recipe, self.student(seed).model
        terms, settings = self.terms(student), recipe.training.model_copy(update={"seed": seed})
        if self.extra is not None:
            settings = alike(settings, self.data.training)
        if role in STUDENTS:
            recipe.student.set_up(student)
            teacher = self.memory.teacher(self.teacher.source())
            distiller = Distiller(student, teacher, terms, balance=recipe.balance)
        else:
            student = baseline_start(recipe, self.task, student, self.processor, seed)
            distiller = Distiller(student, None, plain_terms(terms, self.regression))
            settings = recipe.baseline_training.of(settings)
        return self._train(self.stage(f"{role}-{seed}"), distiller, settings)

    def _train(self, stage: Stage, distiller: Distiller, settings: Settings) -> tuple[nn.Module, StageResult]:
        self.observer.on_stage(stage.name)
        return stage.run(distiller, settings, self.observer.callbacks(stage.name))

    def stage_folder(self, name: str) -> Path:
        """Where a stage keeps its checkpoints and its result."""
        return self.folder / "checkpoints" / name

    def stage(self, name: str) -> Stage:
        """One stage of this run: of the teacher, the baseline or the student, whose data it has."""
        role = name.partition("-")[0]
        data = self.data.by_role(role)
        taught = {"student": self.data.training, WITHOUT_EXTRA: self.data.labelled}
        return Stage(
            name=name,
            folder=self.stage_folder(name),
            log=self.folder / LOG,
            train=taught.get(role, data[TRAIN]),
            choose=data.get(HOLDOUT, data[VALIDATION]),
            evaluate={name: data[name] for name in self.judged},
            metric=self.task.metrics[0],
            device=self.device,
        )
