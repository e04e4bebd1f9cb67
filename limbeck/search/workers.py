"""Several processes that work on one search, and what happens when one of them dies."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from limbeck.plan import Observer
from limbeck.recipe import Recipe
from limbeck.report.candidates import Demands
from limbeck.search.space import Space

LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
"""How long workers may take to write a checkpoint when they are told to end."""

IN_VAIN = 3
"""So many workers may die in a row before they have begun."""


@dataclass(frozen=True)
class Job:
    """What a worker has to know.

    Attributes:
        recipe: The ground's, as JSON.
        folder: The search's.
        space: As it is written in a recipe.
        study: Arguments of `limbeck.search.study.Study` beside these.
        demands: What is asked of a student.
        trials: How many there shall be in the study.
        until: When the time is over, in seconds since 1970.
        threads: Of each worker.
    """

    recipe: Mapping[str, Any]
    folder: str
    space: Mapping[str, str]
    study: Mapping[str, Any]
    demands: Demands
    trials: int
    until: float | None
    threads: int


def employ(job: Job, count: int, look: Callable[[], None], observer: Observer) -> None:
    """Let workers do trials until none is left or the time is over.

    A worker that dies is told of and replaced; its trial is taken up by whoever is free. A trial that kills every
    worker fails in the end, and workers that cannot even begin are not replaced for ever, so this ends.

    Args:
        job: What they do.
        count: How many they are.
        look: Called from time to time, to tell of trials that were finished.
        observer: What watches.

    Raises:
        KeyboardInterrupt: Ctrl-C; what workers had trained is kept.
        RuntimeError: a worker could not go on, as where the disk is full, or several died before they had begun.
    """
    crew = _Crew(job, observer)
    try:
        for _ in range(count):
            crew.hire()
        while crew.workers:
            time.sleep(LOOK_SECONDS)
            look()
            crew.replace_dead()
    finally:
        crew.dismiss()
        look()


class _Crew:
    """The workers that are alive.

    Args:
        job: What they do.
        observer: What watches.
    """

    def __init__(self, job: Job, observer: Observer) -> None:
        self.job, self.observer = job, observer
        self.context = multiprocessing.get_context("spawn")
        self.stop, self.troubles = self.context.Event(), self.context.SimpleQueue()
        self.workers: dict[BaseProcess, Event] = {}
        self.in_vain = 0

    def hire(self) -> None:
        """Start one more worker."""
        begun = self.context.Event()
        worker = self.context.Process(target=_work, args=(self.job, self.stop, begun, self.troubles))
        worker.start()
        self.workers[worker] = begun

    def replace_dead(self) -> None:
        """Start another worker for each that died; those that found nothing more to do are let go.

        Raises:
            RuntimeError: one said why it could not go on, or several died in a row before they had begun.
        """
        for worker in [each for each in self.workers if not each.is_alive()]:
            begun = self.workers.pop(worker).is_set()
            if not self.troubles.empty():
                raise RuntimeError(self.troubles.get())
            if worker.exitcode:
                self._mourn(_cause(worker.exitcode), begun)
                self.hire()

    def _mourn(self, cause: str, begun: bool) -> None:
        self.in_vain = 0 if begun else self.in_vain + 1
        if self.in_vain == IN_VAIN:
            raise RuntimeError(
                f"{IN_VAIN} workers in a row died before their first trial ({cause}); there may be too little "
                "memory for so many (take fewer), or a script calls search outside of if __name__ == '__main__':"
            )
        self.observer.on_note(f"a worker died ({cause}); {'its trial is taken up' if begun else 'another begins'}")

    def dismiss(self) -> None:
        """Let all end, with a checkpoint."""
        self.stop.set()
        for worker in self.workers:
            worker.join(PATIENCE_SECONDS)
        for worker in self.workers:
            worker.kill()


def _cause(code: int) -> str:
    """Why a process ended.

    Example:
        >>> _cause(-9), _cause(1)
        ('SIGKILL', 'exit status 1')
    """
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(job: Job, stop: Event, begun: Event, troubles: SimpleQueue[str]) -> None:
    """What one worker does."""
    import torch

    from limbeck.search.ground import Ground
    from limbeck.search.storage import told_when_lost
    from limbeck.search.study import Study
    from limbeck.search.trial import Clock, Trials

    parent = multiprocessing.parent_process()
    assert parent is not None

    def told() -> bool:
        return stop.is_set() or not parent.is_alive()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all of Ctrl-C, and the first process decides
    torch.set_num_threads(job.threads)
    try:
        ground = Ground(Recipe.parse(job.recipe), Path(job.folder), Observer())
        ground.join()
        with told_when_lost(job.study["storage"]):
            study = Study(Path(job.folder), Space.parse(job.space), **job.study)
            begun.set()
            Trials(ground, study, job.demands, Clock(job.until, told), Observer()).execute(job.trials)
    except KeyboardInterrupt:
        return
    except Exception as error:
        troubles.put(" ".join(str(error).split()) or type(error).__name__)
        raise SystemExit(1) from None
