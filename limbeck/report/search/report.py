"""The SearchReport: what came out of a search, as data. Files and pictures are made from it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.report.candidates import (
    STATES,
    Candidate,
    Choice,
    Cost,
    Demands,
    finished,
    front,
    kept,
    listed,
    shortfalls,
)
from limbeck.report.format import Scale, scale_for, size
from limbeck.report.report import Report
from limbeck.report.search.proof import sentence_of_proof
from limbeck.report.search.values import values_in_words

FORMAT, KIND = 1, "search"
FILE = "search.json"
_MEASURED = ("latency_ms", "speedup", "seconds", "done")  # 0 where there is no number


@dataclass(frozen=True)
class TeacherResult:
    """What the students of a search are measured against.

    Attributes:
        score: The teacher's main metric on the held-out part of the training data, the candidates' own examples.
        parameters: Number of parameters.
        size_bytes: Bytes of the weights on disk.
        latency_ms: Milliseconds for one example.
    """

    score: float
    parameters: int
    size_bytes: int
    latency_ms: float


@dataclass(frozen=True)
class SearchReport:
    """What came out of a search: every student that was tried, the one that was chosen, and the proof of it.

    Attributes:
        task: Name of the task.
        metric: Name of the main metric.
        higher_is_better: Its direction.
        examples: Number of examples, by what they served: ``"train"``, ``"held out"``, ``"validation"``.
        teacher: The teacher on the held-out part.
        demands: What was asked.
        candidates: What was tried, in any order.
        choice: Which of them answers; made by `choose` of the fields above.
        space: What was searched: the distribution of each dotted path, as it was written.
        seconds: Wall time of the search, the proof left out.
        environment: Versions, machine, threads.
        recipe: The resolved recipe that was varied.
        command: What to type to repeat the search.
        created: ISO date and time.
        trials: How many trials were asked for; 0 where no number was.
        ended: Why it ended sooner, in words; empty where it did not.
        importance: Share of each path in what varied the score, from Optuna; empty where it was not computed.
        proof: The run of the choice on the official validation data, which nothing before has touched; None where
            none was made.

    Example:
        >>> report = example()
        >>> report.choice.chosen.number, [c.number for c in report.front()]
        (1, [1, 0])
        >>> SearchReport.from_json(report.to_json()) == report
        True
    """

    task: str
    metric: str
    higher_is_better: bool
    examples: dict[str, int]
    teacher: TeacherResult
    demands: Demands
    candidates: list[Candidate]
    choice: Choice
    space: dict[str, str]
    seconds: float
    environment: dict[str, Any]
    recipe: dict[str, Any]
    command: str
    created: str
    trials: int = 0
    ended: str = ""
    importance: dict[str, float] = field(default_factory=dict)
    proof: Report | None = None

    @property
    def scale(self) -> Scale:
        """How scores are written: in points, or as they are."""
        scores = [c.score for c in finished(self.candidates) if c.score is not None]
        return scale_for(self.metric, [self.teacher.score, *scores], higher_is_better=self.higher_is_better)

    @property
    def counts(self) -> dict[str, int]:
        """How many trials there are of each state that occurs."""
        states = [c.state for c in self.candidates]
        return {state: states.count(state) for state in STATES if state in states}

    def front(self, cost: Cost = "latency") -> list[Candidate]:
        """The Pareto front of score and latency, or of score and size; the cheapest first."""
        return front(self.candidates, self.higher_is_better, cost)

    def kept(self, candidate: Candidate) -> float | None:
        """Share of the teacher's score that a candidate keeps; None where there is no score or no share of it."""
        if candidate.score is None or not math.isfinite(candidate.score) or not 0 < self.teacher.score < math.inf:
            return None
        return kept(candidate.score, self.teacher.score, self.higher_is_better)

    def verdict(self) -> str:
        """The result in a few sentences: the choice, what it is worth, and what the proof says of it."""
        return f"{self.headline()} {self.explanation()}".rstrip()

    def headline(self) -> str:
        """The result in one sentence: which student was chosen, or that none answers and what came nearest."""
        chosen, nearest, count = self.choice.chosen, self.choice.nearest, len(finished(self.candidates))
        asked = self.demands.in_words(self.metric)
        if chosen is not None:
            rank = "smallest" if self.demands.keep is not None else "best"
            students = f"The {rank} of {count} finished student{'s' * (count != 1)}"
            return f"{students}{f' with {asked}' if asked else ''} is #{chosen.number}."
        if nearest is not None:
            none = f"None of {count} finished students has" if count > 1 else "The one finished student lacks"
            return f"{none} {asked}. Nearest is #{nearest.number}: it {self.choice.lacks}."
        states = ", ".join(f"{count} {state}" for state, count in self.counts.items()) or "none was begun"
        return f"No student was found, for no trial was finished ({states})."

    def explanation(self) -> str:
        """What stands behind the headline: the student's values, what it is worth, and the final proof."""
        candidate = self.choice.candidate
        if candidate is None:
            return ""
        missed = shortfalls(candidate, self.demands, self.teacher.score, self.higher_is_better)
        merits = listed(self._merits(candidate, {miss.demand for miss in missed}))
        values = values_in_words(candidate.values)
        tried = f"#{candidate.number} has {values}. " if values else ""
        worth = f"On the held-out examples it has {merits}. " if merits else ""
        return f"{tried}{worth}{sentence_of_proof(self.proof, self.demands)}"

    def to_json(self) -> str:
        """Write the report as JSON, the source of every other form. What is no finite number becomes null."""
        data = {"format": FORMAT, "kind": KIND, **dataclasses.asdict(dataclasses.replace(self, proof=None))}
        data["proof"] = self.proof and json.loads(self.proof.to_json())
        return json.dumps(_finite(data), indent=2, allow_nan=False, default=str)

    @classmethod
    def from_json(cls, text: str) -> SearchReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not the report of a search, or one of another format version.
        """
        try:
            data = json.loads(text)
            version, kind = data.pop("format"), data.pop("kind")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"this is no report of a search: {error}") from None
        if (version, kind) != (FORMAT, KIND):
            raise ValueError(
                f"it is of kind {kind!r} and format {version}; this limbeck reads kind {KIND!r}, format {FORMAT}"
            )
        try:
            return cls(**_rebuilt(data))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no whole report of a search: {error}") from None

    @classmethod
    def load(cls, path: Path) -> SearchReport:
        """Read ``search.json`` from a search's folder or by its own path.

        Raises:
            ValueError: there is none, or it cannot be read; the message names the file.
        """
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no report of a search at {file}; name the folder of a search")
        try:
            return cls.from_json(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"cannot read {file}: {error}") from None

    def _merits(self, candidate: Candidate, without: set[str]) -> list[str]:
        """What a candidate is worth, but for the demands that it misses, which are told already."""
        share = self.kept(candidate)
        assert candidate.score is not None
        score = f"{self.metric} {self.scale.write(candidate.score)} against the teacher's "
        worth = f"{100 * share:.1f}% of the teacher's {self.metric}" if share is not None else ""
        merits = {
            "keep": worth or f"{score}{self.scale.write(self.teacher.score)}",
            "speedup": f"{candidate.speedup:.1f}x the speed",
            "max_size": size(candidate.size_bytes),
        }
        return [text for demand, text in merits.items() if demand not in without]


def example() -> SearchReport:
    """A small made-up report of a search, for examples: two students, the smaller one chosen, no proof.

    Example:
        >>> example().verdict()
        "The smallest of 2 finished students with at least 94% of the teacher's accuracy is #1. #1 has epochs 2..."
    """
    from limbeck.report.candidates import choose

    teacher = TeacherResult(0.9, 400, 1600, 4.0)
    demands = Demands(keep=0.94)
    tried = [
        Candidate(0, {"training.epochs": 3}, "complete", 0.89, 200, 800, 2.0, 2.0, 60.0, 1.0),
        Candidate(1, {"training.epochs": 2}, "complete", 0.85, 100, 400, 1.0, 4.0, 30.0, 1.0),
    ]
    choice = choose(tried, demands, teacher.score, True)
    space = {"training.epochs": "int(2, 3)"}
    return SearchReport("rte", "accuracy", True, {}, teacher, demands, tried, choice, space, 90.0, {}, {}, "", "")


def _rebuilt(data: Mapping[str, Any]) -> dict[str, Any]:
    """Make the parts of a report out of what JSON has made of them."""
    choice = data["choice"]
    return {
        **data,
        "teacher": TeacherResult(**data["teacher"]),
        "demands": Demands(**data["demands"]),
        "candidates": [_candidate(each) for each in data["candidates"]],
        "choice": Choice(**{**choice, **{key: _candidate(choice[key]) for key in ("chosen", "nearest")}}),
        "proof": data["proof"] and Report.from_json(json.dumps(data["proof"])),
    }


def _candidate(data: Mapping[str, Any] | None) -> Candidate | None:
    if data is None:
        return None
    numbers: dict[str, Any] = {key: 0.0 for key in _MEASURED if data[key] is None}
    return Candidate(**{**data, **numbers})


def _finite(data: Any) -> Any:
    """Replace what JSON has no number for: a score that is none is no score, a time that is none no time."""
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
