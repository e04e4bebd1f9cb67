"""What a search has tried, what is asked of a student, and which student answers it. Pure data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

COMPLETE, PRUNED, FAILED, RUNNING = STATES = ("complete", "pruned", "failed", "running")
MOST_KEPT = 2.0  # of the teacher's score: who asks for more has written per cent
AS_FAST = 1.03  # times that differ by less are one time: they are measured, and no measurement is finer
_ROUNDING = 1e-9

Cost = Literal["latency", "size"]


@dataclass(frozen=True)
class Candidate:
    """One trial of a search: a student, what it is worth and what it costs.

    Attributes:
        number: Number of the trial.
        values: What was tried, by dotted path of the recipe.
        state: ``"complete"``, ``"pruned"``, ``"failed"`` or ``"running"``.
        score: The main metric on the held-out part of the training data; the last one seen for a pruned trial.
        parameters: Number of parameters.
        size_bytes: Bytes of the weights on disk.
        latency_ms: Milliseconds for one example, measured in turns with the teacher; 0 where it was not measured.
        speedup: The teacher's latency over it, of the same turns.
        seconds: What the trial took.
        done: Share of its steps that was trained.
        note: Why it was pruned or failed.

    Example:
        >>> Candidate(3, {"training.epochs": 2}, "complete", 0.9, 100, 400, 2.0, 3.5, 60.0, 1.0).finished
        True
    """

    number: int
    values: dict[str, Any]
    state: str
    score: float | None
    parameters: int
    size_bytes: int
    latency_ms: float
    speedup: float
    seconds: float
    done: float
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a state that is none: who has it wrong would find the candidate nowhere."""
        if self.state not in STATES:
            raise ValueError(f"a trial is {', '.join(STATES)}, not {self.state!r}")

    @property
    def finished(self) -> bool:
        """Whether it may be chosen: trained to its end, with a score and a time that are numbers."""
        measured = self.score is not None and math.isfinite(self.score) and 0 < self.latency_ms < math.inf
        return self.state == COMPLETE and measured


@dataclass(frozen=True)
class Demands:
    """What is asked of a student; None where nothing is.

    Speed-up and latency may both be asked for: the stricter one rules. No two demands contradict each other.

    Attributes:
        keep: Share of the teacher's score, on a metric where lower is better of one over it. It may be above 1,
            for a student can be better than its teacher.
        speedup: How many times as fast as the teacher, for one example.
        max_size: Bytes of its weights.
        latency_ms: Milliseconds for one example.

    Raises:
        ValueError: a demand is out of range.

    Example:
        >>> Demands(keep=0.97, max_size=20_000_000).in_words()
        "at least 97% of the teacher's score and at most 20 MB"
        >>> Demands(keep=97)
        Traceback (most recent call last):
        ...
        ValueError: keep is 97: a share of the teacher's score lies above 0 and is at most 2; for 97% write 0.97
    """

    keep: float | None = None
    speedup: float | None = None
    max_size: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.keep is not None and not 0 < self.keep <= MOST_KEPT:
            cure = f"; for {self.keep:g}% write {self.keep / 100:g}" if MOST_KEPT < self.keep <= 100 else ""
            raise ValueError(
                f"keep is {self.keep:g}: a share of the teacher's score lies above 0 and is at most "
                f"{MOST_KEPT:g}{cure}"
            )
        for name, value in (
            ("the speed-up", self.speedup),
            ("the largest size in bytes", self.max_size),
            ("the latency in milliseconds", self.latency_ms),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value:g}; it has to be a number above 0")

    def __bool__(self) -> bool:
        """Whether anything is asked."""
        return (self.keep, self.speedup, self.max_size, self.latency_ms) != (None, None, None, None)

    def check(self, teacher_score: float) -> None:
        """Refuse a share of a score that has none, as soon as the teacher's score is known.

        Args:
            teacher_score: The teacher's main metric on the held-out part of the training data.

        Raises:
            ValueError: `keep` is asked, and the score is zero, less or no number.

        Example:
            >>> Demands(speedup=3.5).check(0.0)
        """
        if self.keep is not None and not 0 < teacher_score < math.inf:
            raise ValueError(
                f"keep asks for a share of the teacher's score, and that is {teacher_score:g}: of this there is "
                "no share; leave keep out, or take a metric on which the teacher is above 0"
            )

    def in_words(self, score: str = "score") -> str:
        """Say what is asked, in one line.

        Args:
            score: What the teacher's score is called, ``"accuracy"``.
        """
        said = []
        if self.keep is not None:
            said.append(f"at least {_limit(100 * self.keep)}% of the teacher's {score}")
        if self.speedup is not None:
            said.append(f"at least {_limit(self.speedup)}x the teacher's speed")
        if self.max_size is not None:
            said.append(f"at most {size_beside(self.max_size)}")
        if self.latency_ms is not None:
            said.append(f"at most {_limit(self.latency_ms)} ms for one example")
        return listed(said)


@dataclass(frozen=True)
class Choice:
    """Which candidate answers the demands, or which came nearest.

    Attributes:
        chosen: The candidate that answers; None where none does.
        nearest: Where none does: the one that misses its worst demand by the smallest factor. None where no trial
            was finished.
        lacks: What the nearest lacks, in words; empty where there is a chosen one.
        meeting: How many candidates meet all demands.

    Example:
        >>> Choice(None, None, "no trial was finished", 0).candidate is None
        True
    """

    chosen: Candidate | None
    nearest: Candidate | None
    lacks: str
    meeting: int

    @property
    def candidate(self) -> Candidate | None:
        """The chosen one, or the one that came nearest."""
        return self.chosen or self.nearest


class Costs(Protocol):
    """Whatever has the costs of a student; see `Candidate`."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its weights."""

    @property
    def latency_ms(self) -> float:
        """Milliseconds for one example."""

    @property
    def speedup(self) -> float:
        """The teacher's latency over it."""


@dataclass(frozen=True)
class Shortfall:
    """A demand that a candidate misses.

    Attributes:
        demand: Name of the demand, a field of `Demands`.
        factor: By how much: what is asked over what there is, or the other way round for what is to be small. It
            is above 1 and the same for a time and for the speed-up that stands for it.
        words: The miss as the end of a sentence on the student.
    """

    demand: str
    factor: float
    words: str


def kept(score: float, teacher_score: float, higher_is_better: bool) -> float:
    """Share of the teacher's score that a student keeps; above 1 where it is better than the teacher.

    Args:
        score: The student's main metric.
        teacher_score: The teacher's, above 0.
        higher_is_better: Direction of the metric. Where lower is better the share is the teacher's error over the
            student's: twice the error keeps a half.

    Example:
        >>> kept(0.45, 0.9, True), kept(0.5, 0.25, False)
        (0.5, 0.5)
    """
    if higher_is_better:
        return score / teacher_score
    return teacher_score / score if score > 0 else math.inf


def front(candidates: Iterable[Candidate], higher_is_better: bool, cost: Cost = "latency") -> list[Candidate]:
    """The Pareto front: the finished candidates that no other one beats in score without costing more.

    A candidate is beaten by one that is at least as good in score and in cost, and better in one of them. Equals
    do not beat each other: both stand on the front.

    Args:
        candidates: What was tried; pruned and failed trials are never on the front.
        higher_is_better: Direction of the metric.
        cost: ``"latency"`` in milliseconds, or ``"size"`` in bytes.

    Returns:
        The front, the cheapest first; of equals the lower number first.

    Example:
        >>> tried = [(0.90, 4.0), (0.88, 2.0), (0.85, 3.0), (0.80, 1.0)]
        >>> trials = [Candidate(n, {}, "complete", s, 1, 1, t, 1.0, 1.0, 1.0) for n, (s, t) in enumerate(tried)]
        >>> [c.number for c in front(trials, True)]
        [3, 1, 0]
    """
    price = _price(cost)
    ranked = sorted(finished(candidates), key=lambda c: (price(c), worse(c, higher_is_better), c.number))
    best, best_price, on_front = math.inf, math.inf, []
    for candidate in ranked:
        score = worse(candidate, higher_is_better)
        if score < best or (score == best and price(candidate) == best_price):
            best, best_price = score, price(candidate)
            on_front.append(candidate)
    return on_front


def choose(
    candidates: Iterable[Candidate], demands: Demands, teacher_score: float, higher_is_better: bool
) -> Choice:
    """Choose the student that answers the demands.

    Where `keep` is asked it is the smallest one that meets all demands: fewest bytes, then the fastest (times
    within 3 % are one), then the best score. Else it is the best score, then fewest bytes, then the fastest.

    Args:
        candidates: What was tried; only trials that ran to their end count.
        demands: What is asked.
        teacher_score: The teacher's main metric, on the same examples as the candidates'.
        higher_is_better: Direction of the metric.

    Returns:
        The choice. Where none meets the demands it says which came nearest and what that one lacks.

    Raises:
        ValueError: a share of the teacher's score is asked, which is zero or less.

    Example:
        >>> big = Candidate(0, {}, "complete", 0.89, 200, 800, 2.0, 2.0, 1.0, 1.0)
        >>> small = Candidate(1, {}, "complete", 0.85, 100, 400, 1.0, 4.0, 1.0, 1.0)
        >>> choose([big, small], Demands(keep=0.94), 0.9, True).chosen.number
        1
        >>> choice = choose([big, small], Demands(keep=0.98, speedup=3), 0.9, True)
        >>> choice.chosen, choice.nearest.number, choice.lacks
        (None, 1, "keeps 94.4% of the teacher's score where 98% is asked")
    """
    demands.check(teacher_score)
    able = finished(candidates)
    missed = {c.number: shortfalls(c, demands, teacher_score, higher_is_better) for c in able}
    meeting = [c for c in able if not missed[c.number]]
    if meeting:
        chosen = (_smallest if demands.keep is not None else _best)(meeting, higher_is_better)
        return Choice(chosen, None, "", len(meeting))
    if not able:
        return Choice(None, None, "no trial was finished", 0)
    nearest = min(
        able,
        key=lambda c: (max(miss.factor for miss in missed[c.number]), worse(c, higher_is_better), c.number),
    )
    return Choice(None, nearest, listed([miss.words for miss in missed[nearest.number]]), 0)


def shortfalls(
    candidate: Candidate, demands: Demands, teacher_score: float, higher_is_better: bool
) -> list[Shortfall]:
    """The demands that a finished candidate misses, and by how much.

    Example:
        >>> student = Candidate(1, {}, "complete", 0.81, 100, 400, 1.0, 4.0, 1.0, 1.0)
        >>> [miss.words for miss in shortfalls(student, Demands(keep=0.95, speedup=5), 0.9, True)]
        ["keeps 90.0% of the teacher's score where 95% is asked", 'has 4.0x the speed where 5x is asked']
    """
    assert candidate.score is not None
    missed = cost_shortfalls(candidate, demands)
    if demands.keep is None:
        return missed
    share = kept(candidate.score, teacher_score, higher_is_better)
    said = f"keeps {beside(100 * share, 100 * demands.keep, 1)}% of the teacher's score"
    miss = _miss("keep", share, demands.keep, f"{said} where {_limit(100 * demands.keep)}% is asked")
    return [*_real([miss]), *missed]


def cost_shortfalls(candidate: Costs, demands: Demands) -> list[Shortfall]:
    """The demands on speed and size that a student misses, trained or not.

    Example:
        >>> student = Candidate(1, {}, "running", None, 100, 400, 1.0, 4.0, 1.0, 1.0)
        >>> [miss.words for miss in cost_shortfalls(student, Demands(keep=0.95, speedup=5))]
        ['has 4.0x the speed where 5x is asked']
    """
    found = []
    if demands.speedup is not None:
        said = f"has {beside(candidate.speedup, demands.speedup, 1)}x the speed"
        words = f"{said} where {_limit(demands.speedup)}x is asked"
        found.append(_miss("speedup", candidate.speedup, demands.speedup, words))
    if demands.max_size is not None:
        said = f"takes {size_beside(candidate.size_bytes, demands.max_size)}"
        words = f"{said} where at most {size_beside(demands.max_size)} is asked"
        found.append(_miss("max_size", demands.max_size, candidate.size_bytes, words))
    if demands.latency_ms is not None:
        said = f"takes {beside(candidate.latency_ms, demands.latency_ms, 2)} ms"
        words = f"{said} where at most {_limit(demands.latency_ms)} ms is asked"
        found.append(_miss("latency_ms", demands.latency_ms, candidate.latency_ms, words))
    return _real(found)


def finished(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that may be chosen.

    Example:
        >>> finished([Candidate(0, {}, "pruned", 0.7, 1, 1, 1.0, 1.0, 1.0, 0.4)])
        []
    """
    return [c for c in candidates if c.finished]


def worse(candidate: Candidate, higher_is_better: bool) -> float:
    """The score as a number that is smaller the better it is, to sort by."""
    assert candidate.score is not None
    return -candidate.score if higher_is_better else candidate.score


def beside(value: float, limit: float, decimals: int) -> str:
    """Write a number with so many decimals as show on which side of a limit it lies.

    Example:
        >>> beside(95.12, 97, 1), beside(96.97, 97, 1), beside(97, 97, 1)
        ('95.1', '96.97', '97.0')
    """
    text = f"{value:.{decimals}f}"
    if not math.isfinite(value) or math.isclose(value, limit, rel_tol=_ROUNDING):
        return text
    while (float(text) < limit) is not (value < limit) or float(text) == limit:
        decimals += 1
        text = f"{value:.{decimals}f}"
    return text


def size_beside(count: int, limit: int | None = None) -> str:
    """Write a number of bytes so that it shows on which side of a limit it lies; a limit itself as it was asked.

    Example:
        >>> size_beside(20_000_000), size_beside(20_010_000, 20_000_000), size_beside(2600, 3000)
        ('20 MB', '20.01 MB', '2.6 kB')
    """
    of = count if limit is None else limit
    unit, name = next(((u, n) for u, n in ((1e6, "MB"), (1e3, "kB")) if of >= u), (1, "bytes"))
    number = _limit(count / unit) if limit is None else beside(count / unit, limit / unit, 1 if unit > 1 else 0)
    return f"{number} {name}"


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does.

    Example:
        >>> listed(["one", "two", "three"])
        'one, two and three'
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _limit(value: float) -> str:
    """Write a number that was asked for, with no digit more than it has."""
    return f"{value:.6f}".rstrip("0").rstrip(".") if value >= 1e-6 else f"{value:g}"


def _real(found: Iterable[Shortfall]) -> list[Shortfall]:
    return [miss for miss in found if miss.factor > 1 + _ROUNDING]


def _miss(demand: str, have: float, want: float, words: str) -> Shortfall:
    return Shortfall(demand, want / have if have > 0 else math.inf, words)


def _price(cost: Cost) -> Callable[[Candidate], float]:
    return (lambda c: c.latency_ms) if cost == "latency" else (lambda c: c.size_bytes)


def _smallest(meeting: Sequence[Candidate], higher_is_better: bool) -> Candidate:
    fewest = min(c.size_bytes for c in meeting)
    small = [c for c in meeting if c.size_bytes == fewest]
    fastest = min(c.latency_ms for c in small)
    fast = [c for c in small if c.latency_ms <= AS_FAST * fastest]
    return min(fast, key=lambda c: (worse(c, higher_is_better), c.latency_ms, c.number))


def _best(meeting: Sequence[Candidate], higher_is_better: bool) -> Candidate:
    return min(meeting, key=lambda c: (worse(c, higher_is_better), c.size_bytes, c.latency_ms, c.number))
