"""The picture of a search: what every trial is worth against what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from limbeck.report import format as write
from limbeck.report.candidates import PRUNED, Candidate, Cost, finished, worse
from limbeck.report.format import one_line, shorten
from limbeck.report.search.report import SearchReport
from limbeck.report.svg import INK, SERIES, STUDENT, TEACHER, panel, style, ticks, to_svg

WIDTH, HEIGHT = 350, 285
DEMAND = SERIES[4]
_WHISKER = 1.5  # lengths from the lower quartile to the best: below, a score lies outside of the picture

Point = tuple[float, float]


def quality_against(report: SearchReport, cost: Cost) -> str:
    """Draw every trial's score against its latency or its size, and the Pareto front as a line.

    Scores that lie far below the others are left out, and the picture's description says how many.

    Args:
        report: What to draw.
        cost: ``"latency"`` or ``"size"``.

    Returns:
        One ``<svg>`` element; nothing where no trial was finished.
    """
    able = finished(report.candidates)
    if not able:
        return ""
    unit = _Unit(cost, max(c.size_bytes for c in able))
    front = report.front(cost)
    with style():
        figure, axes = panel(WIDTH, HEIGHT)
        _limits(axes, report, able, unit)
        _trials(axes, report, able, front, unit)
        _front(axes, report, front, unit)
        _lines(axes, report, unit)
        _answer(axes, report, unit)
        axes.set_xlabel(unit.label)
        better = "" if report.higher_is_better else ", lower is better"
        points = " (points)" if report.scale.in_points else ""
        axes.set_ylabel(f"{shorten(report.metric, 24)}{points}{better}")
        ticks(axes.xaxis, ",.4g")
        ticks(axes.yaxis, ".4g")
        figure.legend(loc="outside upper left", ncols=3, borderpad=0, handlelength=1.2)
        said = _in_words(report, front, unit)
        return to_svg(figure, f"front-{cost}", f"Quality against {cost}", said)


def outside(report: SearchReport) -> int:
    """How many scores lie so far below the others that the picture leaves them out."""
    able = finished(report.candidates)
    if not able:
        return 0
    low, high = _range(report, able)
    shown = (c.score for c in _placed(report.candidates) if c.score is not None)
    return sum(not low <= report.scale.factor * score <= high for score in shown)


class _Unit:
    """How a cost is drawn: its number, its unit and its axis."""

    def __init__(self, cost: Cost, largest: int) -> None:
        self.cost = cost
        factor, name = next(((f, n) for f, n in ((1e6, "MB"), (1e3, "kB")) if largest >= f), (1.0, "bytes"))
        self.factor = 1.0 if cost == "latency" else factor
        self.name = "ms" if cost == "latency" else name
        self.label = "milliseconds for one example" if cost == "latency" else f"{name} of weights"

    def of(self, candidate: Candidate) -> float:
        return (candidate.latency_ms if self.cost == "latency" else candidate.size_bytes) / self.factor

    def limit(self, report: SearchReport) -> float | None:
        """The most that the demands allow."""
        demands = report.demands
        if self.cost == "size":
            return None if demands.max_size is None else demands.max_size / self.factor
        limits = [demands.latency_ms] if demands.latency_ms is not None else []
        if demands.speedup is not None and report.teacher.latency_ms > 0:
            limits.append(report.teacher.latency_ms / demands.speedup)
        return min(limits, default=None)


def _placed(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those with a score and a cost, finished or pruned."""
    return [
        c
        for c in candidates
        if c.finished
        or (c.state == PRUNED and c.score is not None and math.isfinite(c.score) and c.latency_ms > 0)
    ]


def _point(report: SearchReport, candidate: Candidate, unit: _Unit) -> Point:
    assert candidate.score is not None
    return unit.of(candidate), report.scale.factor * candidate.score


def _asked_score(report: SearchReport) -> float | None:
    """The score that the demand asks for."""
    keep, teacher = report.demands.keep, report.teacher.score
    if keep is None or teacher <= 0:
        return None
    return teacher * keep if report.higher_is_better else teacher / keep


def _range(report: SearchReport, able: Sequence[Candidate]) -> Point:
    """The range of the scores that are drawn: the best, the lines, and the others that are not far off."""
    badness = sorted(worse(c, report.higher_is_better) for c in able)
    best, quartile = badness[0], badness[math.ceil(0.75 * (len(badness) - 1))]
    worst = max(b for b in badness if b <= quartile + _WHISKER * (quartile - best))
    sign = -1 if report.higher_is_better else 1
    lines = [level for level in (report.teacher.score, _asked_score(report)) if level is not None]
    ends = [report.scale.factor * x for x in (sign * best, sign * worst, *lines)]
    room = 0.08 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    return min(ends) - room, max(ends) + room


def _limits(axes: Any, report: SearchReport, able: Sequence[Candidate], unit: _Unit) -> None:
    costs = [unit.of(c) for c in _placed(report.candidates)]
    limit = unit.limit(report)
    dearest = max(costs)
    if limit is not None and limit < 2 * dearest:  # a limit far beyond all trials would press them together
        dearest = max(dearest, limit)
    axes.set_xlim(0, 1.1 * dearest)
    axes.set_ylim(*_range(report, able))


def _trials(
    axes: Any, report: SearchReport, able: Sequence[Candidate], front: Sequence[Candidate], unit: _Unit
) -> None:
    """Draw the trials that are not on the front: pruned ones faint, finished ones as open circles."""
    on_front = {c.number for c in front}
    pruned = [_point(report, c, unit) for c in _placed(report.candidates) if c.state == PRUNED]
    beaten = [_point(report, c, unit) for c in able if c.number not in on_front]
    _scatter(axes, pruned, marker="x", markersize=4, color=INK, alpha=0.35, label="pruned")
    _scatter(
        axes, beaten, marker="o", markersize=5, color=STUDENT, markerfacecolor="none", alpha=0.8, label="finished"
    )


def _scatter(axes: Any, points: Sequence[Point], **how: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), linestyle="none", **how)


def _front(axes: Any, report: SearchReport, front: Sequence[Candidate], unit: _Unit) -> None:
    """Draw the front as steps: what is to be had up to a cost."""
    points = [_point(report, c, unit) for c in front]
    _, right = axes.get_xlim()
    line = [*points, (right, points[-1][1])]
    axes.plot(*zip(*line, strict=True), color=STUDENT, linewidth=1.4, drawstyle="steps-post")
    _scatter(axes, points, marker="o", markersize=6, color=STUDENT, label="front")


def _lines(axes: Any, report: SearchReport, unit: _Unit) -> None:
    """Draw the teacher's score, and the demands."""
    factor = report.scale.factor
    axes.axhline(factor * report.teacher.score, color=TEACHER, linestyle=":", linewidth=1.6, label="teacher")
    demand = {"color": DEMAND, "linestyle": (0, (5, 3)), "linewidth": 1.2}
    asked, limit = _asked_score(report), unit.limit(report)
    if asked is not None:
        axes.axhline(factor * asked, **demand, label="demand")
    if limit is not None and limit <= axes.get_xlim()[1]:
        axes.axvline(limit, **demand, label="demand" if asked is None else None)


def _answer(axes: Any, report: SearchReport, unit: _Unit) -> None:
    """Ring the chosen candidate, or the nearest, and name it."""
    answer = report.choice.candidate
    if answer is None:
        return
    x, y = _point(report, answer, unit)
    word = "chosen" if report.choice.chosen else "nearest"
    ring = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.6}
    axes.plot([x], [y], linestyle="none", color=INK, label=word, **ring)
    # Above and to the left of a point on the front lies nothing, for whatever lay there would beat it.
    to_left = x > 0.12 * axes.get_xlim()[1]
    axes.annotate(
        f"#{answer.number}",
        (x, y),
        xytext=(-7 if to_left else 7, 7 if report.higher_is_better else -7),
        textcoords="offset points",
        ha="right" if to_left else "left",
        va="bottom" if report.higher_is_better else "top",
        fontsize=11,
        fontweight="bold",
    )


def _in_words(report: SearchReport, front: Sequence[Candidate], unit: _Unit) -> str:
    """Describe the picture to who cannot see it."""
    scale = report.scale
    points = "; ".join(
        f"#{c.number} {scale.write(c.score or 0.0)} at {write.measure(unit.of(c))} {unit.name}" for c in front
    )
    answer = report.choice.candidate
    word = "Chosen" if report.choice.chosen else "Nearest"
    marked = f" {word}: #{answer.number}." if answer else ""
    teacher = scale.write(report.teacher.score)
    return f"{one_line(report.metric)}. The front: {points}. The teacher: {teacher}.{marked}"
