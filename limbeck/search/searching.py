"""What a search does, from top to bottom: ground, trials, choice, proof, report."""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from limbeck.atomic import write_text
from limbeck.belonging import MADE_BY
from limbeck.plan import Observer
from limbeck.recipe import SEARCH, Recipe, read_yaml
from limbeck.report import Report
from limbeck.report.candidates import COMPLETE, FAILED, RUNNING, Candidate, Choice, Demands, choose
from limbeck.report.search import SearchReport, write_search
from limbeck.run import RECIPE, default_folder, distill
from limbeck.search.ground import Ground, architecture, for_search
from limbeck.search.space import Space, with_values
from limbeck.search.storage import told_when_lost
from limbeck.search.study import Study
from limbeck.search.trial import FAILURES, Clock, Trials
from limbeck.search.workers import Job, employ
from limbeck.summary import environment
from limbeck.tasks import HOLDOUT, TRAIN, VALIDATION

BEST = "best"
"""The folder of the final proof, a run like any other."""


def search(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    trials: int = 20,
    time_limit: float | None = None,
    space: Mapping[str, Any] | None = None,
    demands: Demands | None = None,
    workers: int = 1,
    storage: str | None = None,
    study: str = "limbeck",
    seed: int | None = None,
    proof: bool = True,
    observer: Observer | None = None,
    command: str = "",
) -> SearchReport:
    """Search for the best student that a recipe's values can be changed to, and prove it on the validation data.

    Trials are judged by a part of the training data that is held out. They share the fine-tuned teacher, what it
    said of each example, and the encoded data. The same call goes on where an earlier one ended.

    Args:
        recipe: A Recipe, its content as a mapping, or the path of its YAML file; ``search:`` in it is the space.
        out: The folder for everything; by default ``runs/``, the task's name and ``-search``.
        trials: How many trials there shall be in the study altogether.
        time_limit: Seconds after which no trial goes on; the proof comes after that.
        space: Distributions by path, instead of those of the recipe; by default `default_space`.
        demands: What is asked of the student.
        workers: Processes that do trials, on this machine; of more than one, each imports the calling script, so
            that this call has to stand under ``if __name__ == "__main__":``.
        storage: A journal's path or a database's address that others share; by default ``journal.log`` in `out`.
        study: The study's name there.
        seed: Of the values that are drawn; by default the training's.
        proof: Whether to train the chosen student beside its baseline and judge both on the validation data.
        observer: What watches.
        command: What was typed, for the report.

    Returns:
        The report, which the folder holds as ``search.json`` and ``search.html``; the proof is in ``best/``.

    Raises:
        ValueError: anything wrong with recipe, space, storage or models, before any training; no trial that was
            finished in time, or none that did not fail.
        KeyboardInterrupt: Ctrl-C; what was finished is kept.
        RuntimeError: a worker could not go on.

    Example:
        >>> import tempfile
        >>> place, network = tempfile.mkdtemp(), "limbeck.tasks.image:fresh_resnet"
        >>> report = search({
        ...     "task": {"name": "digits", "train_examples": 64, "eval_examples": 32},
        ...     "teacher": {"model": network, "training": {"steps": 2}},
        ...     "student": {"model": network, "options": {"widths": [8, 16], "depth": 1}},
        ...     "training": {"steps": 5},
        ...     "store": place,
        ...     "search": {"training.learning_rate": "loguniform(1e-4, 1e-2)"},
        ... }, place + "/search", trials=2, proof=False)
        >>> [candidate.state for candidate in report.candidates]
        ['complete', 'complete']
    """
    _check_numbers(trials, time_limit, workers)
    made, written = as_recipe_with_space(recipe)
    written = written if space is None else space
    folder = folder_for(made, out)
    wishes = Wishes(trials, time_limit, demands or Demands(), workers, storage, study, seed, proof)
    chosen = None if written is None else Space.parse(written)
    with told_when_lost(storage):
        return Search(made, folder, chosen, wishes, observer or Observer(), command).execute()


def folder_for(recipe: Recipe | Mapping[str, Any], out: str | Path | None) -> Path:
    """Where a search goes: what was said, or beside where a run of the recipe would go.

    Example:
        >>> folder_for({"task": "glue/rte", "teacher": "x", "student": "layers:0"}, None).as_posix()
        'runs/glue-rte-search'
    """
    if out is not None:
        return Path(out)
    own = default_folder(recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe))
    return own.with_name(f"{own.name}-search")


def as_recipe_with_space(
    source: Recipe | Mapping[str, Any] | str | Path,
) -> tuple[Recipe, Mapping[str, Any] | None]:
    """A recipe and its part ``search:``, None where it has none.

    Raises:
        ValueError: no recipe, or a part that holds no distributions by path.
    """
    if isinstance(source, Recipe):
        return source, None
    data = source if isinstance(source, Mapping) else read_yaml(Path(source))
    return Recipe.parse(data), space_in(data)


def space_in(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part ``search:`` of a recipe as it is written; None where it has none.

    Raises:
        ValueError: it holds no distributions by path.
    """
    if SEARCH not in data:
        return None
    written = data[SEARCH] or {}
    if not isinstance(written, Mapping):
        raise ValueError(f"search is {written!r}; write distributions by path, training.epochs: int(2, 6)")
    return written


def _check_numbers(trials: int, time_limit: float | None, workers: int) -> None:
    for name, value in (("trials", trials), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} is {value}; a search needs at least 1")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"the time limit is {time_limit:g} s; give more than 0")


@dataclass(frozen=True)
class Wishes:
    """How a search is to be done; see `search`."""

    trials: int
    time_limit: float | None
    demands: Demands
    workers: int
    storage: str | None
    study: str
    seed: int | None
    proof: bool

    @property
    def cost(self) -> str:
        """The other objective beside the score: bytes where only they are asked for, else time."""
        asked = self.demands
        return "size" if asked.max_size and not (asked.speedup or asked.latency_ms) else "latency"


class Search:
    """One search: the variables that its steps share.

    Args:
        recipe: As the user wrote it.
        folder: Where everything goes.
        space: What may be tried; None for the default.
        wishes: How to do it.
        observer: What watches.
        command: What was typed.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, space: Space | None, wishes: Wishes, observer: Observer, command: str
    ) -> None:
        self.began = time.time()
        self.folder, self.wishes, self.observer, self.command = folder, wishes, observer, command
        self.ground = Ground(for_search(recipe, folder), folder, observer)
        if space is not None:
            space.check(self.ground.recipe)  # before any model is loaded
        self.space = space
        self.study: Study
        self.told: set[int] = set()

    def execute(self) -> SearchReport:
        """The search, from top to bottom."""
        ground, wishes = self.ground, self.wishes
        self._prepare()
        wishes.demands.check(ground.teacher.score)
        self._measure()
        until = None if wishes.time_limit is None else self.began + wishes.time_limit
        clock = Clock(until)
        self._news(quiet=True)
        if wishes.workers > 1:
            employ(self._job(until), wishes.workers, self._news, self.observer)
        else:
            Trials(ground, self.study, wishes.demands, clock, self.observer, self._news).execute(wishes.trials)
        candidates = self.study.candidates()
        is_short = clock.is_over() and not self.study.is_done(wishes.trials)
        ended = "the time limit was reached" if is_short else ""
        self._check_outcome(candidates, ended)
        choice = choose(candidates, wishes.demands, ground.teacher.score, ground.metric.higher_is_better)
        seconds = time.time() - self.began
        proof = self._prove(choice) if wishes.proof and choice.chosen is not None else None
        report = self._report(candidates, choice, proof, seconds, ended)
        write_search(report, self.folder)
        return report

    def _prepare(self) -> None:
        """Make the ground, one process after another, and open the study."""
        self.ground.check_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.folder / "ground.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.observer.on_note(f"another process prepares {self.folder}; waiting for it")
            lock.acquire()
        try:
            self.space = self.ground.prepare(self.space, self._open)
            part = yaml.safe_dump({SEARCH: self.space.written()}, sort_keys=False)
            write_text(self.folder / RECIPE, self.ground.recipe.to_yaml() + part)
        finally:
            lock.release()

    def _open(self, space: Space) -> None:
        """Open the study, when everything but it was checked."""
        self.study = Study(self.folder, space, **self._arguments(space))
        self.study.claim({**self.ground.run.made_by, "space": space.written()})

    def _arguments(self, space: Space) -> dict[str, Any]:
        wishes, recipe = self.wishes, self.ground.recipe
        return {
            "storage": wishes.storage,
            "name": wishes.study,
            "higher_is_better": self.ground.metric.higher_is_better,
            "cost": wishes.cost,
            "seed": recipe.training.seed if wishes.seed is None else wishes.seed,
            "first": space.own_values(recipe),
        }

    def _measure(self) -> None:
        """Time every student that can be foreseen before anything else runs on this machine."""
        assert self.space is not None
        for values in self.space.architectures() or [{}]:
            with suppress(*FAILURES):  # two values may go together with nothing; the trial that has them says so
                run = self.ground.run.lend(with_values(self.ground.recipe, values), self.folder, Observer())
                student = run.student().model
                name = architecture(student)
                if self.study.speed(name) is None:
                    self.study.keep_speed(name, self.ground.measure(student))

    def _job(self, until: float | None) -> Job:
        assert self.space is not None
        return Job(
            recipe=self.ground.recipe.model_dump(mode="json"),
            folder=str(self.folder),
            space=self.space.written(),
            study=self._arguments(self.space),
            demands=self.wishes.demands,
            trials=self.wishes.trials,
            until=until,
            threads=max(1, torch.get_num_threads() // self.wishes.workers),
        )

    def _news(self, quiet: bool = False) -> None:
        """Tell of trials that were finished since the last time."""
        for candidate in self.study.candidates():
            if candidate.state != RUNNING and candidate.number not in self.told:
                self.told.add(candidate.number)
                if not quiet:
                    self.observer.on_note(self._line(candidate))

    def _line(self, candidate: Candidate) -> str:
        score = "" if candidate.score is None else f", {self.ground.metric.name} {candidate.score:.4g}"
        cost = f", {candidate.speedup:.3g}x" if candidate.latency_ms else ""
        note = f": {candidate.note}" if candidate.note else ""
        done = f" ({len(self.told)} of {self.wishes.trials})"
        return f"trial #{candidate.number} {candidate.state}{score}{cost}{done}{note}"

    def _check_outcome(self, candidates: list[Candidate], ended: str) -> None:
        """Refuse to go on where there is nothing to choose from.

        Raises:
            ValueError: no trial was finished in time, or all failed.
        """
        if any(c.state == COMPLETE for c in candidates):
            return
        begun = next((c for c in candidates if c.state == RUNNING), None)
        if begun is not None and ended:
            raise ValueError(
                f"the time limit of {self.wishes.time_limit:g} s ended before the first trial was finished "
                f"({begun.done:.0%} of it is trained and kept in {self.folder}); a longer --time-limit goes on "
                "from there"
            )
        if ended:
            raise ValueError(
                f"the time limit of {self.wishes.time_limit:g} s ended before the first trial began; what was "
                f"done is kept in {self.folder}, and a longer --time-limit goes on from there"
            )
        failed = next((c for c in candidates if c.state == FAILED), None)
        if failed is None:
            raise ValueError(f"all {len(candidates)} trials were given up, each for others; ask for more --trials")
        raise ValueError(f"all {len(candidates)} trials failed; the first one: {failed.note}")

    def _prove(self, choice: Choice) -> Report:
        """An ordinary run of the chosen values, which judges student and baseline on the validation data."""
        assert choice.chosen is not None
        recipe = with_values(self.ground.recipe, choice.chosen.values)
        place = self.folder / BEST
        command = f"limbeck distill {place / 'recipe.yaml'}"
        with FileLock(str(self.folder / "best.lock")):
            _make_room(place, recipe)
            return distill(recipe, place, observer=self.observer, command=command)

    def _report(
        self, candidates: list[Candidate], choice: Choice, proof: Report | None, seconds: float, ended: str
    ) -> SearchReport:
        ground, wishes = self.ground, self.wishes
        assert self.space is not None
        splits = ground.task.splits
        examples = {"train": len(splits[TRAIN]), "held out": len(splits[HOLDOUT])}
        examples |= {"validation": len(splits[VALIDATION])} if proof else {}
        teacher_ms = statistics.median(s.latency_ms * s.speedup for s in self.study.speeds())
        return SearchReport(
            task=ground.task.name,
            metric=ground.metric.name,
            higher_is_better=ground.metric.higher_is_better,
            examples=examples,
            teacher=replace(ground.teacher, latency_ms=teacher_ms),
            demands=wishes.demands,
            candidates=candidates,
            choice=choice,
            space=self.space.written(),
            seconds=seconds,
            environment=environment(ground.run.device),
            recipe=ground.recipe.model_dump(mode="json"),
            command=self.command or f"limbeck search {self.folder / 'recipe.yaml'}",
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            trials=wishes.trials,
            ended=ended,
            importance=self.study.importance(),
            proof=proof,
        )


def _make_room(place: Path, recipe: Recipe) -> None:
    """Put an earlier proof aside, if it is of other values: other demands may have chosen another student."""
    if not place.exists() or _recipe_in(place) == recipe.model_dump(mode="json"):
        return
    number = next(n for n in itertools.count(1) if not place.with_name(f"{BEST}-{n}").exists())
    place.rename(place.with_name(f"{BEST}-{number}"))


def _recipe_in(place: Path) -> Any:
    """The recipe of the run in a folder; None where nothing whole says it, as after an early kill."""
    try:
        return json.loads((place / MADE_BY).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
