"""Whether the choice of a search stands on data that the search has not touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from limbeck.report.candidates import Demands, beside, kept, size_beside
from limbeck.report.report import Interval, Report

MET, MISSED = "met", "missed"
WITHIN_CHANCE = "met, within chance"
MISSED_WITHIN_CHANCE = "missed, within chance"
NO_INTERVAL = "met, no interval"
UNKNOWN = "not measured"
NOT_PROVEN = (WITHIN_CHANCE, MISSED_WITHIN_CHANCE, NO_INTERVAL, UNKNOWN)

CAUTION = (
    "The scores of the trials are those on the part of the training data that was held out. The choice was made "
    "among many of them, so that its own is flattered: the best of many looks better than it is. What counts is "
    "the final proof, on validation data that no trial has seen."
)


@dataclass(frozen=True)
class Check:
    """One demand, held against the final proof.

    Attributes:
        demand: Name of the demand, a field of `Demands`.
        found: What the proof measured, with its interval where it has one.
        outcome: ``"met"`` or ``"missed"``, and whether chance may have done it.
    """

    demand: str
    found: str
    outcome: str


def checks(proof: Report, demands: Demands) -> list[Check]:
    """Hold every demand against the final proof.

    Args:
        proof: The run of the choice on the validation data.
        demands: What is asked.

    Returns:
        One check for each demand, in the order of the fields. A share of the teacher's score counts as met where
        the whole 95 % interval meets it, and as missed where none of it does. A time counts as it was measured.

    Example:
        >>> from limbeck.report.report import example
        >>> [(check.demand, check.found, check.outcome) for check in checks(example(), Demands(speedup=3))]
        [('speedup', '2.0x', 'missed')]
    """
    student, found = proof.student, []
    if demands.keep is not None:
        found.append(_keep(proof, demands.keep))
    if demands.speedup is not None:
        speed = proof.speedup.get("latency")
        text = UNKNOWN if speed is None else f"{beside(speed, demands.speedup, 1)}x"
        found.append(Check("speedup", text, _outcome(speed, demands.speedup)))
    if demands.max_size is not None:
        met = MET if student.size_bytes <= demands.max_size else MISSED
        found.append(Check("max_size", size_beside(student.size_bytes, demands.max_size), met))
    if demands.latency_ms is not None:
        time = None if student.latency_ms is None else student.latency_ms.value
        text = UNKNOWN if time is None else f"{beside(time, demands.latency_ms, 2)} ms"
        found.append(Check("latency_ms", text, _outcome(None if time is None else -time, -demands.latency_ms)))
    return found


def share_kept(proof: Report) -> tuple[float, Interval | None] | None:
    """Share of the teacher's score that the proof found, with its interval where a baseline stood beside it.

    Of a metric where lower is better it is the teacher's error over the student's. None where the teacher's score
    is zero or less.
    """
    student, teacher = proof.student.score.value, proof.teacher.score.value
    if not 0 < teacher < math.inf or not math.isfinite(student):
        return None
    value = kept(student, teacher, proof.higher_is_better)
    if proof.comparison is None:
        return value, None
    retention = proof.comparison.retention
    if proof.higher_is_better:
        return value, Interval(value, retention.low, retention.high)
    if min(retention.low, retention.value) <= 0:
        return value, None
    turned = retention.map(lambda x: 1 / x)  # the run's report has it as error over error
    return value, Interval(value, turned.low, turned.high)


def sentence_of_proof(proof: Report | None, demands: Demands) -> str:
    """Say in one sentence what the final proof found, and whether the demands are met there.

    Example:
        >>> from limbeck.report.report import example
        >>> sentence_of_proof(example(), Demands(speedup=3))
        "On the validation data it has 100.0% of the teacher's accuracy, 2.0x the speed, 400 bytes: the demand..."
        >>> sentence_of_proof(None, Demands())
        'It has not been proven on the validation data.'
    """
    if proof is None:
        return "It has not been proven on the validation data."
    found = f"On the validation data it has {', '.join(_findings(proof, demands))}"
    outcomes = [check.outcome for check in checks(proof, demands)]
    if not outcomes:
        return f"{found}."
    if MISSED in outcomes:
        return f"{found}: the demand is missed."
    if any(outcome in NOT_PROVEN for outcome in outcomes):
        return f"{found}: the demand is not proven."
    return f"{found}: the demand is met."


def kept_text(proof: Report, limit: float | None = None) -> str:
    """Write the share that is kept and its interval; nothing where there is none."""
    found = share_kept(proof)
    if found is None:
        return ""
    value, interval = found
    shares = (value, interval.low, interval.high) if interval else (value,)
    written, *ends = (f"{100 * x:.1f}" if limit is None else beside(100 * x, 100 * limit, 1) for x in shares)
    return f"{written}%" + (f" [{', '.join(ends)}]" if ends else "")


def _findings(proof: Report, demands: Demands) -> list[str]:
    scale, student = proof.scale, proof.student
    part = kept_text(proof, demands.keep)
    score = f"{proof.metric} {scale.write(student.score.value)} {scale.ends(student.score)}"
    against = f"against the teacher's {scale.write(proof.teacher.score.value)}"
    worth = f"{part} of the teacher's {proof.metric}" if part else f"{score} {against}"
    speed = proof.speedup.get("latency")
    asked = demands.speedup
    told = [] if speed is None else [f"{f'{speed:.1f}' if asked is None else beside(speed, asked, 1)}x the speed"]
    return [worth, *told, size_beside(student.size_bytes, demands.max_size or student.size_bytes)]


def _keep(proof: Report, keep: float) -> Check:
    found = share_kept(proof)
    if found is None:
        return Check("keep", "no share of a score of zero or less", UNKNOWN)
    value, interval = found
    met = value >= keep * (1 - 1e-9)
    if interval is None:
        return Check("keep", kept_text(proof, keep), NO_INTERVAL if met else MISSED)
    if met:
        outcome = MET if interval.low >= keep * (1 - 1e-9) else WITHIN_CHANCE
    else:
        outcome = MISSED if interval.high < keep else MISSED_WITHIN_CHANCE
    return Check("keep", kept_text(proof, keep), outcome)


def _outcome(value: float | None, least: float) -> str:
    if value is None:
        return UNKNOWN
    return MET if value >= least - abs(least) * 1e-9 else MISSED
