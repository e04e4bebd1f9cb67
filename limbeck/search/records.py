"""What is known of a trial beside its values, as JSON in the study; and when a trial is given up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EVALUATIONS = 5
"""How often a trial is evaluated, at even shares of its training."""

PEERS = 4
"""So many trials that are no more expensive have to be known before one is given up for them."""

SAME_SHARE = 0.01
"""Steps are whole, so that the same share of two trainings is not the very same."""

DIGEST = 16


@dataclass(frozen=True)
class Speed:
    """A student beside its teacher, measured in turns.

    Attributes:
        latency_ms: Milliseconds for one example, the median.
        speedup: The teacher's median over it.
    """

    latency_ms: float
    speedup: float

    def beside(self, others: Sequence[Speed]) -> Speed:
        """The same with the teacher's time of the others, so that milliseconds say what speed-ups say.

        A machine is now busier and now less: what was measured in turns compares, what came later does not.

        Example:
            >>> Speed(latency_ms=4.0, speedup=2.0).beside([Speed(latency_ms=2.0, speedup=3.0)])
            Speed(latency_ms=3.0, speedup=2.0)
        """
        if not others:
            return self
        teacher_ms = others[0].latency_ms * others[0].speedup
        return Speed(teacher_ms / self.speedup, self.speedup)


@dataclass(frozen=True)
class Record:
    """What is known of a trial.

    Attributes:
        place: Where it runs or ran: the search's folder, and the machine where the study lies elsewhere.
        beat: When that was last known, in seconds since 1970.
        parameters: Number of parameters of its student.
        size_bytes: Bytes of its weights.
        latency_ms: See `Speed`; 0 before it is measured.
        speedup: Likewise.
        history: Evaluations: the share of the training that was done, and the score.
        score: The last one seen.
        done: Share of its steps that was trained.
        seconds: What it took.
        note: Why it was pruned or failed.
        begun: The share that was done each time it was taken up.
    """

    place: str = ""
    beat: float = 0.0
    parameters: int = 0
    size_bytes: int = 0
    latency_ms: float = 0.0
    speedup: float = 0.0
    history: tuple[tuple[float, float], ...] = ()
    score: float | None = None
    done: float = 0.0
    seconds: float = 0.0
    note: str = ""
    begun: tuple[float, ...] = field(default=())

    def cost(self, kind: str) -> float:
        """What it costs: milliseconds, or bytes."""
        return self.latency_ms if kind == "latency" else float(self.size_bytes)

    def as_json(self) -> dict[str, Any]:
        """For the study."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, found: Mapping[str, Any] | None) -> Record:
        """From the study; of a trial of which nothing was noted, an empty one.

        Example:
            >>> record = Record("here:/runs", history=((0.2, 0.7),))
            >>> Record.read(json.loads(json.dumps(record.as_json()))) == record
            True
        """
        values = dict(found or {})
        history = tuple((float(share), float(score)) for share, score in values.get("history", ()))
        return cls(**{**values, "history": history, "begun": tuple(values.get("begun", ()))})


def digest_of(values: Mapping[str, Any]) -> str:
    """The name of what is tried: equal values have the same one, in whatever order they stand.

    Example:
        >>> digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:DIGEST]


def weakness(
    share: float,
    score: float,
    cost: float,
    peers: Iterable[tuple[float, Sequence[tuple[float, float]]]],
    higher_is_better: bool,
) -> str:
    """Say why a trial is not worth going on with, or nothing.

    Optuna prunes by one objective alone, and a small student that is worse than a large one is no failure. So a
    trial is compared with those that cost no more than itself: where it is worse than their median at the same
    share of their trainings (or the last evaluation before that), it is given up. Of fewer than `PEERS` such
    trials nothing follows.

    Args:
        share: How much of its training is done.
        score: Its main metric there.
        cost: What its student costs.
        peers: Of every other trial, what it costs and its evaluations, as shares with scores.
        higher_is_better: Direction of the metric.

    Example:
        >>> cheap = [(1.0, [(0.2, s)]) for s in (0.7, 0.8, 0.9, 0.6)]
        >>> weakness(0.2, 0.74, 2.0, cheap, True)
        'at 20% of its training 0.74, below 0.75, the median of 4 trials that cost no more'
        >>> weakness(0.2, 0.76, 2.0, cheap, True), weakness(0.2, 0.74, 0.5, cheap, True)
        ('', '')
    """
    seen = [_score_at(history, share) for own, history in peers if own <= cost]
    scores = [each for each in seen if each is not None]
    if len(scores) < PEERS:
        return ""
    median = statistics.median(scores)
    if score >= median if higher_is_better else score <= median:
        return ""
    side = "below" if higher_is_better else "above"
    return (
        f"at {share:.0%} of its training {score:.4g}, {side} {median:.4g}, the median of {len(scores)} trials "
        "that cost no more"
    )


def _score_at(history: Sequence[tuple[float, float]], share: float) -> float | None:
    """The score at a share of the training, or at the last evaluation before it."""
    seen = [score for at, score in history if at <= share + SAME_SHARE]
    return seen[-1] if seen else None
