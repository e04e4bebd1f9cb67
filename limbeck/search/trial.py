"""One trial: a student with other values, trained on the shared ground and judged by what is held out."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from limbeck.evaluate import count_parameters, size_in_bytes
from limbeck.plan import Observer
from limbeck.recipe import Recipe
from limbeck.report.candidates import COMPLETE, FAILED, PRUNED, Demands, cost_shortfalls
from limbeck.run import Run
from limbeck.search.ground import Ground, architecture, free
from limbeck.search.records import EVALUATIONS, Record
from limbeck.search.space import with_values
from limbeck.search.study import BEAT_SECONDS, Draw, Study
from limbeck.tasks import HOLDOUT
from limbeck.train import Callback, State

PRUNED_BECAUSE = "pruned: "
WAIT_SECONDS = 1.0
"""Between two looks at what others work on."""

FAILURES = (ArithmeticError, ValueError, TypeError, RuntimeError, MemoryError)
"""What a trial may die of without ending the search: NaN, too little memory, values that do not go together."""


@dataclass(frozen=True)
class Clock:
    """When a search has to stop.

    Attributes:
        until: Seconds since 1970; None for no limit.
        told: Whether somebody else said so.
    """

    until: float | None = None
    told: Callable[[], bool] = lambda: False

    def is_over(self) -> bool:
        """Whether it has to stop now."""
        return self.told() or (self.until is not None and time.time() >= self.until)


class Watch(Callback):
    """Watches a trial's training: says that it is alive, stops it when the time is over, gives it up when weak.

    Args:
        study: The study.
        draw: The trial.
        record: What is known of it.
        clock: When to stop.
        metric: Name of the main score.
    """

    def __init__(self, study: Study, draw: Draw, record: Record, clock: Clock, metric: str) -> None:
        self.study, self.draw, self.record, self.clock, self.metric = study, draw, record, clock, metric
        self.paused = False
        self.last_beat = time.monotonic()

    def on_step(self, state: State) -> None:
        """Look at the clock."""
        if self.clock.is_over():
            self.paused = state.pause = True
        if self.paused or time.monotonic() - self.last_beat > BEAT_SECONDS:
            self._note(state)

    def on_evaluate(self, state: State) -> None:
        """Note the score; at all evaluations but the last, decide whether it is worth going on."""
        self._note(state)
        if state.step < state.total_steps and not state.stop:
            why = self.study.weakness(self.draw.number, self.record)
            state.stop = why and PRUNED_BECAUSE + why

    def _note(self, state: State) -> None:
        history = tuple((step / state.total_steps, score) for step, score in state.history)
        self.record = self.study.note(
            self.draw.number,
            replace(
                self.record,
                history=history,
                score=history[-1][1] if history else None,
                done=state.step / state.total_steps,
                seconds=state.seconds,
            ),
        )
        self.last_beat = time.monotonic()


class _Watched(Observer):
    """Adds one callback to what an observer has for a trial's training, and says nothing else of it."""

    def __init__(self, watch: Watch, observer: Observer) -> None:
        self.watch, self.observer = watch, observer

    def callbacks(self, stage: str) -> list[Callback]:
        """Of the trial."""
        return [self.watch, *self.observer.callbacks(f"trial {self.watch.draw.number}")]


@dataclass(frozen=True)
class Trials:
    """Does trials, one after another.

    Attributes:
        ground: What they share.
        study: Where they come from and go to.
        demands: What is asked of a student.
        clock: When to stop.
        observer: What watches.
        look: Called after each trial, to tell of it.
    """

    ground: Ground
    study: Study
    demands: Demands
    clock: Clock
    observer: Observer
    look: Callable[[], None] = lambda: None

    def execute(self, trials: int) -> None:
        """Do trials until there are enough in the study and all of them are finished, or the time is over.

        Those that others work on are waited for: the choice is made among all, and one that is left behind has to
        be taken up by somebody.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was trained of the trial at hand is kept.
            OSError: the disk is full.
        """
        waits = False
        while not self.clock.is_over():
            draw = self.study.next(trials)
            if draw is not None:
                self._do(draw)
            elif self.study.is_done(trials):
                return
            else:
                self._wait(again=waits)
            waits = draw is None

    def _wait(self, again: bool) -> None:
        if not again:
            self.observer.on_note("no trial is left to begin; waiting for those that other processes work on")
        time.sleep(WAIT_SECONDS)

    def _do(self, draw: Draw) -> None:
        try:
            self.attempt(draw)
        finally:
            draw.release()
            self.look()

    def attempt(self, draw: Draw) -> None:
        """Do one trial; what it may fail of is noted."""
        try:
            self._attempt(draw)
        except FAILURES as error:
            note = " ".join(str(error).split()) or type(error).__name__
            self.study.tell(draw, FAILED, replace(self.study.record(draw.number), note=note))
            free(self.ground.run.device)
            shutil.rmtree(draw.folder, ignore_errors=True)

    def _attempt(self, draw: Draw) -> None:
        study, began = self.study, time.perf_counter()
        recipe = with_values(self.ground.recipe, draw.values)
        run = self.ground.run.lend(recipe, draw.folder, Observer())
        student = run.student().model
        record = self._described(draw, student)
        hopeless = self._misses(record)
        if hopeless:
            study.tell(draw, PRUNED, replace(record, note=hopeless, seconds=time.perf_counter() - began))
            return
        run.preflight(student, tuned=True)
        run.recipe = evaluated(recipe, run)
        watch = Watch(study, draw, record, self.clock, self.ground.metric.name)
        run.observer = _Watched(watch, self.observer)
        draw.folder.mkdir(parents=True, exist_ok=True)
        try:
            _, result = run.train("student", recipe.training.seed)
        except KeyboardInterrupt:
            study.note(draw.number, replace(watch.record, begun=watch.record.begun[:-1]))  # no death
            if watch.paused:
                return
            raise
        assert result.fitted is not None
        stopped = result.fitted.stopped
        state = PRUNED if stopped.startswith(PRUNED_BECAUSE) else COMPLETE
        score = self.ground.score(result.logits[HOLDOUT]) if state == COMPLETE else watch.record.score
        if score is not None and not math.isfinite(score):
            raise ValueError(f"its {self.ground.metric.name} is {score}")
        record = replace(
            study.record(draw.number),
            score=score,
            done=result.fitted.steps / run.steps(run.recipe.training),
            seconds=time.perf_counter() - began if not draw.again else result.fitted.seconds,
            note=stopped.removeprefix(PRUNED_BECAUSE) if state == PRUNED else "",
        )
        study.tell(draw, state, record)
        shutil.rmtree(draw.folder / "checkpoints", ignore_errors=True)

    def _described(self, draw: Draw, student: nn.Module) -> Record:
        """What is known of a trial before it is trained: what its student costs."""
        name = architecture(student)
        speed = self.study.speed(name) or self.study.keep_speed(name, self.ground.measure(student))
        record = replace(
            self.study.record(draw.number),
            parameters=count_parameters(student),
            size_bytes=size_in_bytes(student),
            **dataclasses.asdict(speed),
        )
        return self.study.note(draw.number, record)

    def _misses(self, record: Record) -> str:
        """Why a student need not be trained: it costs more than is asked, and another one does not."""
        missed = cost_shortfalls(record, self.demands)
        if missed and any(c.finished and not cost_shortfalls(c, self.demands) for c in self.study.candidates()):
            return f"not trained: it {missed[0].words}, which another trial reaches"
        return ""


def evaluated(recipe: Recipe, run: Run) -> Recipe:
    """A trial's recipe: evaluated at fixed shares of its training, and saved there."""
    every = math.ceil(run.steps(recipe.training) / EVALUATIONS)
    settings = recipe.training.model_copy(update={"evaluate_every": every, "checkpoint_every": None})
    return recipe.model_copy(update={"training": settings})
