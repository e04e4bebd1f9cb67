"""Several tasks by one recipe: each an ordinary run of its own, and one report of all."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
from pydantic import ValidationError

from limbeck.atomic import write_text
from limbeck.baseline import STUDENT
from limbeck.belonging import MADE_BY
from limbeck.evaluate import Bootstrap, distillation_ratio, kept_share
from limbeck.metrics import Array
from limbeck.models import TeacherStore
from limbeck.plan import Observer
from limbeck.presets import fill
from limbeck.recipe import Recipe, spelled_out
from limbeck.registry import nearest
from limbeck.remember import MEMORY, OFF
from limbeck.report import Report
from limbeck.report.suite import Averages, SuiteReport, SuiteRow, write_suite
from limbeck.report.suite.report import COMPLETE, FAILED, FILE
from limbeck.report.tables import baseline_words
from limbeck.run import RECIPE, REPORT, RESAMPLES, Run, as_recipe, default_folder, delete_run, distill
from limbeck.strict import explain
from limbeck.tasks import is_regression, make_task, reads_texts
from limbeck.tasks.glue import ALL, LEFT_OUT, tasks_of_suite
from limbeck.tasks.text import TextTask
from limbeck.teaching import is_kept

TASK = "{task}"
"""In the recipe's models and data, this stands for the short name of each task."""

SHARED = ("preset", "baseline", "seeds", "store", "by_task")
"""What no task may have of its own."""

FEW = 32
"""Examples of each split that a task is tried on before any is begun."""

LEAVES_OUT = (
    "glue/all leaves WNLI out, as the papers do: its validation sentences come back from training with the "
    "opposite label."
)
MATCHED = "MNLI counts with its matched half; that of the mismatched stands in its own report."

Observers = Callable[[str, int, int], AbstractContextManager[Observer]]
"""What watches a task: called with its name, its number from 1 on, and how many there are."""


def is_suite(recipe: Recipe) -> bool:
    """Whether a recipe names several tasks.

    Example:
        >>> is_suite(Recipe.parse({"task": "glue/cola,rte", "teacher": "teacher", "student": "layers:0"}))
        True
    """
    return bool(tasks_of_suite(recipe.task.name))


def distill_suite(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    notes: Mapping[str, str] | None = None,
    overwrite: bool = False,
    retrain: bool = False,
    observers: Observers | None = None,
    command: str = "",
) -> SuiteReport:
    """Run a recipe on each of its tasks, and report on all of them together.

    A task is a run in a folder of its own, ``out/rte``. One that is finished there is not run again, and one that
    was interrupted goes on. Where one fails in training, the others go on, and its row says why.

    Args:
        recipe: A recipe whose task is ``glue/all`` or ``glue/cola,rte``. ``{task}`` in its models and its data
            stands for each task's short name; a folder for the cache gets one for each task in it.
        out: The folder for everything; by default ``runs/`` and the name.
        notes: Remarks to stand beside tasks, by short name.
        overwrite: Delete the runs that are there and start anew.
        retrain: Fine-tune the teachers even if they are in the store.
        observers: What watches.
        command: What was typed, for the reports.

    Returns:
        The report, which is in the folder too, as ``suite.json``, ``suite.html`` and ``README.md``.

    Raises:
        ValueError: anything wrong with the recipe, the data or the models of any task, before any training.

    Example:
        >>> distill_suite({"task": "glue/rte", "teacher": "teacher", "student": "layers:0"})
        Traceback (most recent call last):
        ValueError: glue/rte is one task; limbeck.distill runs it
    """
    recipe = as_recipe(recipe).with_preset(texts=True)
    tasks = tasks_of_suite(recipe.task.name)
    if not tasks:
        raise ValueError(f"{recipe.task.name} is one task; limbeck.distill runs it")
    suite = _Suite(recipe, tasks, Path(out) if out else default_folder(recipe), dict(notes or {}), command)
    suite.check(overwrite, retrain)
    return suite.execute(overwrite, retrain, observers or (lambda *_: nullcontext(Observer())))


@dataclasses.dataclass(frozen=True)
class _Suite:
    """What the tasks share."""

    recipe: Recipe
    tasks: tuple[str, ...]
    folder: Path
    notes: dict[str, str]
    command: str

    def check(self, overwrite: bool, retrain: bool) -> None:
        """Find what is wrong, with the suite and then with each of its tasks; change nothing."""
        self._check_suite()
        self._check_folder()
        goes_on = self._goes_on() and not overwrite
        wrong: dict[str, str] = {}
        for name in self.tasks:
            try:
                anew = retrain and not (goes_on and self._is_finished(name))
                check_task(task_recipe(self.recipe, name), self.folder / name, overwrite, anew)
            except (ValueError, TypeError, OSError) as error:
                wrong[name] = " ".join(str(error).split())
        if wrong:
            raise ValueError(_what_is_wrong(wrong, self.tasks))

    def _is_finished(self, name: str) -> bool:
        return (self.folder / name / REPORT).is_file()

    def _goes_on(self) -> bool:
        """Whether some tasks are finished and others not: those stay as they are, whatever is to be retrained."""
        return len(set(map(self._is_finished, self.tasks))) > 1

    def _check_suite(self) -> None:
        for name in self.notes:
            if name not in self.tasks:
                raise ValueError(f"a note is for {name!r}, which is no task here; {nearest(name, self.tasks)}")
        for name, own in self.recipe.by_task.items():
            if name not in self.tasks:
                raise ValueError(f"by_task speaks of {name!r}, which is no task here; {nearest(name, self.tasks)}")
            for key in set(own) & set(SHARED):
                raise ValueError(f"by_task.{name}.{key}: {key} is the same for all tasks; leave it out there")
        if self.recipe.task.metric is not None:
            raise ValueError(f"{self.recipe.task.name} counts each task by its own metric; leave task.metric out")
        if is_kept(self.recipe.teacher.model) and TASK not in self.recipe.teacher.model:
            raise ValueError(
                f"the teacher {self.recipe.teacher.model} is a cache of one task, and these are several; "
                f"write {TASK} where its folder has the task's name"
            )

    def _check_folder(self) -> None:
        """Refuse a folder with other things in it."""
        if (self.folder / MADE_BY).is_file():
            raise ValueError(f"{self.folder} holds the run of one task; choose another folder with --out")
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if self.folder.is_file() or (there and FILE not in there):
            raise ValueError(f"{self.folder} holds no suite of limbeck; choose another or empty folder with --out")

    def execute(self, overwrite: bool, retrain: bool, observers: Observers) -> SuiteReport:
        """Run the tasks, one after the other; the report of what is finished is always there."""
        for name in self.tasks if overwrite else ():  # all at once: after an interruption none is an old one
            delete_run(self.folder / name)
        rows = {name: self._as_it_was(name) for name in self.tasks}
        report = self.report(rows)
        write_suite(report, self.folder)  # first of all, for by it the folder is known as a suite's
        write_text(self.folder / RECIPE, self.recipe.to_yaml())
        for number, name in enumerate(self.tasks, start=1):
            rows[name] = self._run(name, retrain, observers, number)
            report = self.report(rows)
            write_suite(report, self.folder)
        return report

    def _as_it_was(self, name: str) -> SuiteRow:
        """The row of a task before its turn: of one that was finished before, what came out."""
        if not self._is_finished(name):
            return SuiteRow(name, note=self.notes.get(name, ""))
        return self._row(name, Report.load(self.folder / name))

    def _row(self, name: str, report: Report) -> SuiteRow:
        return SuiteRow.of(name, report, self.notes.get(name, ""))

    def _run(self, name: str, retrain: bool, observers: Observers, number: int) -> SuiteRow:
        """Run one task; its failure is its own."""
        try:
            with observers(name, number, len(self.tasks)) as observer:
                found = distill(
                    task_recipe(self.recipe, name),
                    self.folder / name,
                    retrain=retrain and not self._is_finished(name),
                    observer=observer,
                    command=self.command,
                )
        except Exception as error:  # whatever it is, the other tasks are not to be lost
            said = " ".join(str(error).split())
            kind = "" if isinstance(error, (ValueError, ArithmeticError)) else f"{type(error).__name__}: "
            return SuiteRow(name, FAILED, self.notes.get(name, ""), error=kind + said)
        return self._row(name, found)

    def report(self, rows: Mapping[str, SuiteRow]) -> SuiteReport:
        """The report of what there is so far."""
        done = [name for name, row in rows.items() if row.state == COMPLETE]
        last = Report.load(self.folder / done[-1]) if done else None
        first = self.recipe.training.seed
        content = self.recipe.model_dump(mode="json")
        remarks = [LEAVES_OUT] if self.recipe.task.name.endswith(f"/{ALL}") and LEFT_OUT else []
        if self.recipe.baseline and self.recipe.baseline_training.start != STUDENT:
            remarks.append(f"The baseline of each student is {baseline_words(content)}.")
        remarks += [MATCHED] if "mnli" in rows else []
        return SuiteReport(
            name=self.recipe.task.name,
            rows=list(rows.values()),
            averages=combine({name: _resamples(self.folder / name) for name in done}, _ratios(rows)),
            remarks=remarks,
            seeds=list(range(first, first + self.recipe.seeds)),
            environment=last.environment if last else {},
            recipe=content,
            command=self.command,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


def task_recipe(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one task of a suite.

    Example:
        >>> recipe = Recipe.parse({"task": "glue/all", "teacher": "models/{task}", "student": "layers:0"})
        >>> own = task_recipe(recipe, "rte")
        >>> own.task.name, own.teacher.model
        ('glue/rte', 'models/rte')
    """

    def filled(text: str | None) -> str | None:
        return text and text.replace(TASK, name)

    place = recipe.cache.place
    folder = place.replace(TASK, name) if TASK in place else f"{place}/{name}"
    extra = recipe.extra
    if extra is not None:
        extra = extra.model_copy(update={"data": tuple(each.replace(TASK, name) for each in extra.data)})
    parts = {
        "extra": extra,
        "task": recipe.task.model_copy(update={"name": f"glue/{name}", "data": filled(recipe.task.data)}),
        "teacher": recipe.teacher.model_copy(update={"model": filled(recipe.teacher.model)}),
        "student": recipe.student.model_copy(update={"model": filled(recipe.student.model)}),
        "cache": recipe.cache.model_copy(update={"place": place if place in (OFF, MEMORY) else folder}),
    }
    return _with_its_own(recipe.model_copy(update=parts), name)


def _with_its_own(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one task with what `by_task` says of it, part by part and key by key."""
    own = spelled_out(recipe.by_task.get(name, {}))
    if "name" in (own.get("task") or {}):
        raise ValueError(f"by_task.{name}.task.name: a task keeps its name; leave it out there")
    content = fill(own, recipe.model_dump(mode="json", exclude={"by_task"}), Recipe)
    try:
        whole = Recipe.model_validate(content)
    except ValidationError as error:
        raise ValueError(explain(error, Recipe, f"by_task.{name}")) from None
    return recipe.model_copy(update={"by_task": {}, **{key: getattr(whole, key) for key in own}})


class _Checked(Exception):  # noqa: N818  (no error: where a trial ends that went well)
    """All is checked that can be before training.

    Args:
        tuned: Whether the teacher is ready as it is.
    """

    def __init__(self, tuned: bool) -> None:
        self.tuned = tuned


def check_task(recipe: Recipe, folder: Path, overwrite: bool = False, retrain: bool = False) -> None:
    """Find what is wrong with one task's data, folder, models and terms; change nothing and train nothing.

    The models are tried on a few of its examples. A finished run needs no more than its folder.

    Raises:
        ValueError: anything that is wrong.
        TypeError: an option that a loss or a function does not have.
    """
    task = make_task(recipe.task)
    resolved = recipe.resolved(is_regression(task), reads_texts(task))
    Run(resolved, task, folder, Observer()).check_folder(overwrite, retrain)
    if (folder / REPORT).is_file() and not overwrite:
        return
    assert isinstance(task, TextTask)
    if is_kept(recipe.teacher.model):  # a cache belongs to all of the data
        few = task
    else:
        few = dataclasses.replace(task, splits={name: rows.subset(FEW) for name, rows in task.splits.items()})
    store = TeacherStore(resolved, task)
    with TemporaryDirectory() as place:  # what is made for few examples is of no use later
        try:
            Run(resolved.model_copy(update={"store": place}), few, folder, Observer()).teach(_stop)
        except _Checked as checked:
            if not (checked.tuned or store.holds()):
                store.check_room()


def _stop(tuned: bool) -> NoReturn:
    raise _Checked(tuned)


def _what_is_wrong(wrong: Mapping[str, str], tasks: Sequence[str]) -> str:
    """One line: what is wrong with all of them once, and else with each, and which ones could run."""
    said, *others = wrong.values()
    fine = [name for name in tasks if name not in wrong]
    if len(wrong) == len(tasks) and all(other == said for other in others):
        return said
    each = "; ".join(f"{name}: {text}" for name, text in wrong.items())
    cure = f"; the others alone are --task glue/{','.join(fine)}" if fine else ""
    return f"{len(wrong)} of {len(tasks)} tasks cannot run: {each}{cure}"


def _resamples(folder: Path) -> dict[str, Array]:
    """The resamples of a finished run.

    Raises:
        ValueError: they are not there.
    """
    from safetensors.numpy import load_file

    path = folder / RESAMPLES
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, from which averages are made; delete {folder / REPORT} to make both anew"
        )
    return load_file(path)


def _ratios(rows: Mapping[str, SuiteRow]) -> list[str]:
    return [name for name, row in rows.items() if row.ratio is not None]


def combine(resamples: Mapping[str, Mapping[str, Array]], with_ratio: Sequence[str]) -> Averages | None:
    """Put the tasks of a suite together; None where there is none.

    Each task's resamples are shuffled, by a seed of its own, so that those of two tasks have nothing to do with
    each other; resample r of a mean is the mean of the tasks' r-th.

    Args:
        resamples: By task: the score of ``"teacher"``, ``"student"`` and, where there is one, ``"baseline"``, on
            the data as it is and in each resample, (R + 1,); and ``"speedup"`` likewise, where it was timed.
        with_ratio: The tasks whose distillation ratio is defined.

    Example:
        >>> task = {"teacher": np.full(9, 0.9), "baseline": np.full(9, 0.8), "student": np.full(9, 0.85)}
        >>> combine({"rte": task}, ["rte"]).pooled_ratio.format(2)
        '0.50 [0.50, 0.50]'
    """
    if not resamples:
        return None
    drawn = {task: _shuffled(task, each) for task, each in resamples.items()}
    roles = {
        role: np.stack([each[role] for each in drawn.values()])  # (tasks, R + 1)
        for role in ("teacher", "baseline", "student", "speedup")
        if all(role in each for each in drawn.values())
    }
    teacher, student = roles["teacher"], roles["student"]
    found: dict[str, Any] = {}
    if "speedup" in roles:
        found["speedup"] = Bootstrap.interval(np.exp(np.log(roles["speedup"]).mean(axis=0)))
    if "baseline" in roles:
        found |= _against_baseline(list(drawn), roles, with_ratio)
    return Averages(_mean(teacher), _mean(student), _mean(kept_share(student, teacher)), **found)


def _against_baseline(
    tasks: Sequence[str], roles: Mapping[str, Array], with_ratio: Sequence[str]
) -> dict[str, Any]:
    gain, gap = roles["student"] - roles["baseline"], roles["teacher"] - roles["baseline"]
    pooled, note = distillation_ratio(gain.sum(axis=0), gap.sum(axis=0))
    defined = [i for i, task in enumerate(tasks) if task in with_ratio]
    ratios = None
    if defined:
        usable = (gap[defined] != 0).all(axis=0)
        ratios = _mean(gain[defined][:, usable] / gap[defined][:, usable])
    return {
        "baseline": _mean(roles["baseline"]),
        "gain": _mean(gain),
        "gap": _mean(gap),
        "ratio": ratios,
        "ratio_tasks": [tasks[i] for i in defined],
        "pooled_ratio": pooled,
        "pooled_note": note,
    }


def _mean(values: Array) -> Any:
    return Bootstrap.interval(values.mean(axis=0))


def _shuffled(task: str, resamples: Mapping[str, Array]) -> dict[str, Array]:
    """The same order for all that was drawn for one task; the first value is no resample and stays."""
    count = len(next(iter(resamples.values()))) - 1
    order = np.random.default_rng([4, *task.encode()]).permutation(count) + 1
    return {name: np.concatenate([each[:1], each[order]]) for name, each in resamples.items()}
