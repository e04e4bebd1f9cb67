"""The ground that all trials of a search share: data, the fine-tuned teacher, what it said, how fast it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from limbeck.belonging import holds_this
from limbeck.building import ask_about_all
from limbeck.evaluate import measure_speed
from limbeck.metrics import get_metric
from limbeck.plan import Observer, Plan
from limbeck.recipe import Recipe
from limbeck.remember import MEMORY, SIGNALS, recall
from limbeck.report.search import TeacherResult
from limbeck.run import Run
from limbeck.search.records import Speed
from limbeck.search.space import Space, default_space, with_values
from limbeck.stage import StageResult
from limbeck.tasks import HOLDOUT, Task, is_regression, make_task, reads_texts
from limbeck.teachers import Cached
from limbeck.teaching import LiveTeacher, is_kept, wanted

HELD_OUT = 0.1
"""Share of the training data that trials are judged by, where the recipe holds out none."""

TIMED = 40
"""Timed passes of student and teacher, in turns."""

OWN = {"journal.log", "journal.log.lock", "turn.lock", "ground.lock"}
"""What may lie in a search's folder before its ground is prepared."""

UNTOLD = ("seeds", "baseline", "baseline_training", "store")
"""Parts of a recipe that change no trial; a search may go on with others."""

KEPT_WHERE = ("place", "gib", "shard_mib")
"""Where what the teacher says is kept changes no trial either; how it is kept does."""


def for_search(recipe: Recipe, folder: Path) -> Recipe:
    """A recipe as a search needs it: some training data held out, and one place for what the teacher says.

    Raises:
        ValueError: its teacher is a cache.
    """
    if is_kept(recipe.teacher.model):
        raise ValueError(
            "a search measures students in turns with their teacher and takes layers of it, and "
            f"{recipe.teacher.model} is what one said; name the teacher itself"
        )
    if not recipe.task.holdout:
        recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"holdout": HELD_OUT})})
    if recipe.cache.place != MEMORY:
        return recipe
    place = str(folder / SIGNALS)
    return recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"place": place})})


class Ground:
    """What all trials in one process share.

    Args:
        recipe: From `for_search`.
        folder: The search's.
        observer: What watches.

    Raises:
        ValueError: no such task or data.
    """

    def __init__(self, recipe: Recipe, folder: Path, observer: Observer) -> None:
        self.task: Task = make_task(recipe.task)
        self.recipe = recipe.resolved(is_regression(self.task), reads_texts(self.task))
        self.folder, self.observer = folder, observer
        # Nothing predicts on other splits, so that what the final proof is judged by stays unseen.
        self.run = Run(self.recipe, self.task, folder, observer, judged=(HOLDOUT,))
        self.run.made_by = _identity(self.run)
        self.metric = get_metric(self.task.metrics[0])
        self.plans: list[Plan] = []
        self.teacher: TeacherResult

    @property
    def live(self) -> LiveTeacher:
        """The teacher."""
        assert isinstance(self.run.teacher, LiveTeacher)
        return self.run.teacher

    def layers(self) -> int:
        """Layers of the teacher, 0 where they cannot be found."""
        return self.live.about(self.task, self.recipe.student.path).layers.count

    def prepare(self, space: Space | None, begin: Callable[[Space], None]) -> Space:
        """Load the teacher, check the space against it, fine-tune it if needed, ask it about all training data.

        Args:
            space: What may be tried; None for the default.
            begin: Called when all is checked and before anything is trained.

        Returns:
            The space.

        Raises:
            ValueError: anything wrong with models, data or space, before anything is trained.
        """
        chosen: list[Space] = []

        def check(tuned: bool) -> None:
            chosen.append(space or default_space(self.recipe, self.layers()))
            chosen[0].check(self.recipe)
            self.plans = self._plans(chosen[0], tuned)
            begin(chosen[0])
            self.run.open_folder(overwrite=False)

        plan, result = self.run.teach(check)
        if self.recipe.found_maps:  # which were found with the teacher as it was before
            self.plans = self._plans(chosen[0], tuned=True)
        self.teacher = self._facts(result)
        self._remember(plan)
        return chosen[0]

    def join(self) -> None:
        """The same in a further process, when all is ready."""
        plan, result = self.run.teach(lambda tuned: None)
        self.teacher = self._facts(result)
        self.run.memory = recall(self.recipe, self.live, self.run.data.asked, plan.terms, self.folder)

    def check_folder(self) -> None:
        """Refuse a folder that holds anything but this search; change nothing.

        Raises:
            ValueError: it holds another search, or something else.
        """
        holds_this(self.folder, self.run.made_by, "search", "choose another --out", OWN)

    def _plans(self, space: Space, tuned: bool) -> list[Plan]:
        """The plan for every end of a range and every choice, which fails where the models refuse it."""
        plans = []
        for values in space.one_by_one():
            said = ", ".join(f"{path}={json.dumps(value)}" for path, value in values.items())
            try:
                run = self.run.lend(with_values(self.recipe, values), self.folder, Observer())
                plans.append(run.preflight(run.student().model, tuned))
            except (ValueError, TypeError) as error:
                text = str(error).removeprefix("search: ")
                raise ValueError(f"search: {said} cannot be tried: {text}") from None
        return plans

    def _facts(self, result: StageResult) -> TeacherResult:
        """What is known of the teacher before it is timed."""
        about = self.live.about(self.task)
        return TeacherResult(
            self.score(result.logits[HOLDOUT]), about.parameters, about.size_bytes, latency_ms=0.0
        )

    def _remember(self, plan: Plan) -> None:
        """Ask the teacher about all examples, for whatever trials read of it."""
        terms, known = list(plan.terms), {tap for planned in plan.terms for tap in planned.term.teacher_taps}
        for planned in (term for each in self.plans for term in each.terms):
            if not known.issuperset(planned.term.teacher_taps):
                terms.append(planned)
                known |= set(planned.term.teacher_taps)
        every = dataclasses.replace(plan, terms=terms)
        run = self.run
        run.memory = recall(self.recipe, self.live, run.data.asked, every.terms, self.folder)
        self.observer.on_note(f"what the teacher says is {run.memory.note}")
        store = run.memory.store
        if store is None:
            return
        teacher = run.memory.teacher(self.live.source())
        assert isinstance(teacher, Cached)
        ask_about_all(run, teacher, store, wanted(every.terms))
        store.flush()

    def score(self, logits: Any) -> float:
        """The main metric of predictions on what is held out."""
        return float(self.metric(logits, np.asarray(self.task.splits[HOLDOUT].labels)))

    def measure(self, student: nn.Module) -> Speed:
        """Time a student in turns with the teacher, for one example of what is held out."""
        run = self.run
        models = {"teacher": self.live.loaded.model.to(run.device), "student": student.to(run.device)}
        data = {role: run.data.by_role(role)[HOLDOUT] for role in models}
        found = measure_speed(models, data, batch_size=1, repeats=TIMED)
        return Speed(1000 * found["student"].value, found["teacher"].value / found["student"].value)


def architecture(model: nn.Module) -> str:
    """A name that models have in common which differ in nothing but their numbers.

    Example:
        >>> architecture(nn.Linear(2, 3)) == architecture(nn.Linear(2, 3)), architecture(nn.Linear(2, 4))[:0]
        (True, '')
    """
    parts = [type(model).__name__, *(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters())]
    parts += [type(module).__name__ for module in model.modules()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def free(device: torch.device) -> None:
    """Give back the memory of an accelerator that a trial that failed may have filled."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _identity(run: Run) -> dict[str, Any]:
    """What a search belongs to; where its data and models lie may differ between machines, not what they hold."""
    made_by: dict[str, Any] = run.made_by
    recipe = {key: value for key, value in made_by["recipe"].items() if key not in UNTOLD}
    recipe["task"] = _without(recipe["task"], "data")
    recipe["teacher"] = _without(recipe["teacher"], "model", "device", "compile")
    recipe["student"] = _without(recipe["student"], "model")
    recipe["cache"] = _without(recipe["cache"], *KEPT_WHERE)
    return {"kind": "search", **made_by, "recipe": recipe}


def _without(part: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in keys}
