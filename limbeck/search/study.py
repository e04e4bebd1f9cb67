"""The study: which values are tried next, what came of them, and who does what, for any number of processes."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from limbeck.cache import first_difference
from limbeck.report.candidates import COMPLETE, FAILED, PRUNED, RUNNING, Candidate
from limbeck.search.distributions import Distribution
from limbeck.search.records import Record, Speed, digest_of, weakness
from limbeck.search.space import Space
from limbeck.search.storage import JOURNAL, is_address, open_storage, quiet, shown

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

TRIALS = "trials"
"""The folder of a search in which each trial has its own."""

RANDOM_TRIALS = 8
"""Before the sampler begins to learn from what was tried."""

BEAT_SECONDS = 30.0
STALE_SECONDS = 600.0
"""After so long without a sign a trial on another machine is taken up here."""

IN_VAIN = 3
"""A trial whose process died so often at the same place is no longer tried."""

FEWEST = 5
"""Finished trials of which it can be said what mattered."""

GROUND, SPEED, TRIAL = "ground", "speed", "trial"


@dataclass
class Draw:
    """A trial that this process has to do.

    Attributes:
        number: Of the trial.
        values: What to try.
        folder: Where it goes.
        again: Whether it was begun before.
        lock: Held as long as it is this process's.
    """

    number: int
    values: dict[str, Any]
    folder: Path
    again: bool
    lock: FileLock

    def release(self) -> None:
        """Let others take it up, if it is not finished."""
        self.lock.release()


class Study:
    """A study, in a journal or a database.

    Args:
        folder: The search's.
        space: What may be tried.
        storage: A journal's path or a database's address; by default a journal in the folder.
        name: Of the study, for a storage that holds several.
        higher_is_better: Direction of the score.
        cost: ``"latency"`` or ``"size"``, the other objective; a study that is there already has its own.
        seed: The sampler's.
        first: Values to begin with.

    Raises:
        ValueError: the storage cannot be opened, or holds a study of this name that is of no search.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        storage: str | None = None,
        name: str = "limbeck",
        *,
        higher_is_better: bool = True,
        cost: str = "latency",
        seed: int = 0,
        first: Mapping[str, Any] | None = None,
    ) -> None:
        optuna = quiet()
        self.folder, self.space, self.seed, self.first = folder, space, seed, first
        self.higher_is_better = higher_is_better
        self.storage, self.name = storage or str(folder / JOURNAL), name
        inside = not is_address(self.storage) and Path(self.storage).resolve().parent == folder.resolve()
        self._is_mine = inside
        # Who has the journal has the locks beside it, whatever the machine is called: a container may be renamed.
        self.place = f"{'' if inside else platform.node()}:{folder.resolve()}"
        self._turn = FileLock(str(folder / "turn.lock"))
        self._distributions = {path: _for_optuna(d) for path, d in space.distributions.items()}
        with self._turn:
            self._study = optuna.create_study(
                storage=open_storage(self.storage),
                study_name=name,
                directions=["maximize" if higher_is_better else "minimize", "minimize"],
                load_if_exists=True,
            )
            if "cost" not in self._study.user_attrs:
                self._check_is_new()
                self._study.set_user_attr("cost", cost)
        self.cost: str = self._study.user_attrs["cost"]

    def _check_is_new(self) -> None:
        """Leave studies of other programs as they are.

        Raises:
            ValueError: there are trials in it already, or it has other objectives.
        """
        from optuna.study import StudyDirection

        score = StudyDirection.MAXIMIZE if self.higher_is_better else StudyDirection.MINIMIZE
        is_alike = self._study.directions == [score, StudyDirection.MINIMIZE]
        if not is_alike or self._study.get_trials(deepcopy=False):
            raise ValueError(
                f"the study {self.name!r} in {shown(self.storage)} is of no search of limbeck; choose another "
                "--study or --storage"
            )

    def claim(self, ground: Mapping[str, Any]) -> None:
        """Say what the study belongs to: recipe, data, models and space.

        Raises:
            ValueError: it belongs to something else; the message names the difference.
        """
        with self._turn:
            kept = self._study.user_attrs.get(GROUND)
            if kept is None:
                self._study.set_user_attr(GROUND, dict(ground))
                return
        difference = first_difference(json.loads(json.dumps(ground)), kept)
        if difference:
            raise ValueError(
                f"the study {self.name!r} in {shown(self.storage)} is of another search ({difference}); choose "
                "another --out, --storage or --study"
            )

    def next(self, trials: int) -> Draw | None:
        """A trial to do: one that was left behind, or a new one; None where there is none.

        Args:
            trials: How many there shall be in the study altogether.
        """
        with self._turn:
            draw = self._left_behind()
            while draw is None and self._has_room(trials):
                draw = self._ask()
            return draw

    def is_done(self, trials: int) -> bool:
        """Whether so many trials were begun as there shall be, and all of these are finished.

        Args:
            trials: As of `next`; others may do more of them.
        """
        return not self._has_room(trials) and all(_state(trial) != RUNNING for trial in self._trials()[:trials])

    def _has_room(self, trials: int) -> bool:
        asked = self._trials()
        tried = {digest_of(self._values(trial)) for trial in asked}
        return len(asked) < trials and (self.space.combinations is None or len(tried) < self.space.combinations)

    def _left_behind(self) -> Draw | None:
        """A trial that was begun, and whose process is no more."""
        for trial in self._trials():
            if _state(trial) != RUNNING:
                continue
            record = self.record(trial.number)
            elsewhere = record.place != self.place if record.place else not self._is_mine
            begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            if elsewhere and time.time() - max(record.beat, begun) < STALE_SECONDS:
                continue
            draw = self._taken(trial, again=True)
            if draw is None:
                continue
            if record.begun[-IN_VAIN:].count(record.done) == IN_VAIN:
                done = f"after {record.done:.0%} of its training"
                self.tell(
                    draw, FAILED, dataclasses.replace(record, note=f"its process died {IN_VAIN} times {done}")
                )
                draw.release()
                continue
            self.note(draw.number, dataclasses.replace(record, begun=(*record.begun, record.done)))
            return draw
        return None

    def _ask(self) -> Draw | None:
        """A new trial; None where its values were tried before, which is noted."""
        from optuna.samplers import TPESampler

        known = self._trials()
        if not known and self.first is not None:
            self._study.enqueue_trial(
                {path: _to_optuna(self.space.distributions[path], v) for path, v in self.first.items()}
            )
        # Made anew for each trial: what it draws follows from seed, number and history, also after a kill.
        self._study.sampler = TPESampler(
            n_startup_trials=RANDOM_TRIALS, seed=(1_000_003 * self.seed + len(known)) % 2**32
        )
        number = self._study.ask(self._distributions).number
        trial = next(t for t in self._trials() if t.number == number)
        digest = digest_of(self._values(trial))
        same = next((t for t in known if digest_of(self._values(t)) == digest), None)
        if same is None:
            draw = self._taken(trial, again=False)
            if draw is not None:
                self.note(number, Record(begun=(0.0,)))
            return draw
        self.note(number, Record(note=f"the same values as trial {same.number}"))
        self._study.tell(number, state=_optuna_state(PRUNED))
        return None

    def _taken(self, trial: FrozenTrial, again: bool) -> Draw | None:
        """A trial as this process's own, unless another one on this machine has it."""
        values = self._values(trial)
        folder = self.folder / TRIALS / digest_of(values)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return Draw(trial.number, values, folder, again, lock)

    def note(self, number: int, record: Record) -> Record:
        """Keep what is known of a trial of this process, and that it is alive."""
        record = dataclasses.replace(record, place=self.place, beat=time.time())
        self._study.set_user_attr(f"{TRIAL} {number}", record.as_json())
        return record

    def record(self, number: int) -> Record:
        """What is known of a trial."""
        return Record.read(self._study.user_attrs.get(f"{TRIAL} {number}"))

    def tell(self, draw: Draw, state: str, record: Record) -> None:
        """Finish a trial; if another process has finished it meanwhile, that one's word counts.

        Args:
            draw: The trial.
            state: ``"complete"``, ``"pruned"`` or ``"failed"``.
            record: What is known of it now; of a complete one with its score.
        """
        if _state(self._trial(draw.number)) != RUNNING:
            return
        self.note(draw.number, record)
        values = [record.score, record.cost(self.cost)] if state == COMPLETE else None
        self._study.tell(draw.number, values, state=_optuna_state(state), skip_if_finished=True)

    def weakness(self, number: int, record: Record) -> str:
        """Why a trial is not worth going on with; see `limbeck.search.records.weakness`."""
        share, score = record.history[-1]
        found, peers = self._study.user_attrs, []
        for trial in self._trials():
            other = Record.read(found.get(f"{TRIAL} {trial.number}"))
            if trial.number != number and other.history and _state(trial) != FAILED:
                peers.append((other.cost(self.cost), other.history))
        return weakness(share, score, record.cost(self.cost), peers, self.higher_is_better)

    def speed(self, architecture: str) -> Speed | None:
        """What was measured of an architecture, here or elsewhere."""
        found = self._study.user_attrs.get(f"{SPEED} {architecture}")
        return None if found is None else Speed(**found)

    def keep_speed(self, architecture: str, speed: Speed) -> Speed:
        """Keep what was measured; what was there before stays, so that all trials have the same."""
        with self._turn:
            found = self.speed(architecture)
            if found is None:
                found = speed.beside(self.speeds())
                self._study.set_user_attr(f"{SPEED} {architecture}", dataclasses.asdict(found))
            return found

    def candidates(self) -> list[Candidate]:
        """All trials so far."""
        found = self._study.user_attrs
        return [
            _candidate(trial, self._values(trial), Record.read(found.get(f"{TRIAL} {trial.number}")))
            for trial in self._trials()
        ]

    def importance(self) -> dict[str, float]:
        """The share of each path in what varied the score, by a random forest; empty of too few trials."""
        import optuna

        done = [trial for trial in self._trials() if _state(trial) == COMPLETE]
        if len(done) < FEWEST or len({trial.values[0] for trial in done}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(
            self._study, evaluator=evaluator, target=lambda trial: trial.values[0]
        )
        return {path: float(share) for path, share in found.items()}

    def speeds(self) -> list[Speed]:
        """All that was measured."""
        return [Speed(**value) for key, value in self._study.user_attrs.items() if key.startswith(f"{SPEED} ")]

    def _trials(self) -> list[FrozenTrial]:
        """Those that were begun, by number; one that a kill cut off while its values were drawn is none."""
        from optuna.trial import TrialState

        found = self._study.get_trials(deepcopy=False)
        return [
            t for t in found if t.state != TrialState.WAITING and t.params.keys() >= self._distributions.keys()
        ]

    def _trial(self, number: int) -> FrozenTrial:
        return next(trial for trial in self._trials() if trial.number == number)

    def _values(self, trial: FrozenTrial) -> dict[str, Any]:
        """What is tried in a trial, by path, in the order of the space."""
        return {
            path: json.loads(trial.params[path]) if d.kind == "choice" else trial.params[path]
            for path, d in self.space.distributions.items()
        }


def _for_optuna(distribution: Distribution) -> BaseDistribution:
    """The same, as Optuna has it; choices as JSON, since it takes no lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if distribution.kind == "choice":
        return CategoricalDistribution([_to_optuna(distribution, value) for value in distribution.choices])
    logarithmic = distribution.kind in ("loguniform", "logint")
    if distribution.kind in ("int", "logint"):
        return IntDistribution(int(distribution.low), int(distribution.high), log=logarithmic)
    return FloatDistribution(distribution.low, distribution.high, log=logarithmic)


def _to_optuna(distribution: Distribution, value: Any) -> Any:
    if distribution.kind == "choice":
        same = next(
            (c for c in distribution.choices if json.loads(json.dumps(c)) == json.loads(json.dumps(value))), value
        )
        return json.dumps(same)
    return int(value) if distribution.kind in ("int", "logint") else float(value)


def _optuna_state(state: str) -> Any:
    from optuna.trial import TrialState

    return {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}[state]


def _state(trial: FrozenTrial) -> str:
    from optuna.trial import TrialState

    known = {TrialState.COMPLETE: COMPLETE, TrialState.PRUNED: PRUNED, TrialState.FAIL: FAILED}
    return known.get(trial.state, RUNNING)


def _candidate(trial: FrozenTrial, values: dict[str, Any], record: Record) -> Candidate:
    score = record.score if record.score is not None and math.isfinite(record.score) else None
    return Candidate(
        number=trial.number,
        values=values,
        state=_state(trial),
        score=score,
        parameters=record.parameters,
        size_bytes=record.size_bytes,
        latency_ms=record.latency_ms,
        speedup=record.speedup,
        seconds=record.seconds,
        done=record.done,
        note=record.note,
    )
