"""The report's pictures, each an SVG that stands inline in the page and takes its colours from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from limbeck.report.format import Scale, measure, one_line, shorten
from limbeck.report.report import Curve, Interval, ModelResult, Report
from limbeck.report.svg import BASELINE, STUDENT, TEACHER, panel, style, ticks, to_svg, write_plainly
from limbeck.report.tables import weight_text
from limbeck.report.tapmap import tap_map as tap_map

COLOUR = {"teacher": TEACHER, "baseline": BASELINE, "student": STUDENT}
DRAWN = ("baseline", "student")
"""The roles whose training is drawn."""
MARKER = {"teacher": "s", "baseline": "D", "student": "o"}
LINE = {"teacher": ":", "baseline": (0, (4, 2)), "student": "-"}
WIDTH, HEIGHT = 350, 235
MOST_NAMED_LINES = 6
LOG_FROM = 20.0  # a curve that falls by this factor is drawn on a logarithmic axis

Series = tuple[list[int], list[float]]


def quality_against_latency(report: Report) -> str:
    """Draw each model's score against its latency, with the interval of either."""
    scale = report.scale
    with style():
        figure, axes = panel(WIDTH, HEIGHT)
        timed = [(model, model.latency_ms) for model in report.models if model.latency_ms is not None]
        for (model, latency), shift in zip(timed, _shifts([latency for _, latency in timed]), strict=True):
            apart = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
            _draw_point(axes, model, latency, scale, apart)
        slowest = max(latency.high for _, latency in timed)
        axes.set_xlim(0, 1.12 * slowest if slowest > 0 else 1)
        axes.margins(y=0.12)
        axes.autoscale(axis="y")
        axes.set_xlabel("milliseconds for one example")
        axes.set_ylabel(_score_label(report, scale))
        ticks(axes.xaxis, ",.4g")
        ticks(axes.yaxis, ".4g")
        _legend(figure)
        said = "; ".join(_point_in_words(model, latency, scale) for model, latency in timed)
        return to_svg(figure, "quality", "Quality against latency", f"{one_line(report.metric)}: {said}.")


def training_curves(report: Report) -> list[str]:
    """Draw the weighted terms of the student's and the baseline's training, one picture per group of terms.

    Layers of one group (``hidden.0``, ``hidden.1``) share a picture. The last picture is the learning rate.
    """
    curves = [c for c in report.curves if c.role in DRAWN and c.steps]
    groups = _groups(list(dict.fromkeys(name for c in curves for name in c.terms)))
    with style():
        pictures = [
            _term_panel(curves, group, names, number) for number, (group, names) in enumerate(groups.items())
        ]
        return [picture for picture in (*pictures, _learning_rate_panel(curves)) if picture]


def scores_over_steps(report: Report) -> str:
    """Draw the evaluation score over the steps, for every seed; nothing where none is logged."""
    scale = report.scale
    curves = [c for c in report.curves if c.role in DRAWN and c.score_steps]
    if not curves:
        return ""
    with style():
        figure, axes = panel(WIDTH, HEIGHT)
        level = scale.factor * report.teacher.score.value
        axes.axhline(level, color=TEACHER, linestyle=LINE["teacher"], linewidth=1.4, label="teacher, final")
        for role in DRAWN:
            _draw_seeds(axes, [c for c in curves if c.role == role], scale)
        axes.set_ylabel(_score_label(report, scale))
        ticks(axes.yaxis, ".4g")
        _steps_axis(axes)
        _legend(figure)
        said = f"{len(curves)} trainings, up to step {max(c.score_steps[-1] for c in curves):,}."
        return to_svg(figure, "scores", "Evaluation score over the training steps", said)


def _shifts(latencies: Sequence[Interval]) -> list[float]:
    """Pixels by which to draw models of the same latency apart, so that no interval hides another."""
    places = [latency.value for latency in latencies]
    slowest = max(places)
    near = [[abs(x - y) <= 0.03 * slowest for y in places] for x in places]
    return [9 * (sum(row[:i]) - (sum(row) - 1) / 2) for i, row in enumerate(near)]


def _draw_point(axes: Any, model: ModelResult, latency: Interval, scale: Scale, transform: Any) -> None:
    colour, score = COLOUR[model.role], model.score
    bars = {"color": colour, "linewidth": 1.4, "transform": transform, "solid_capstyle": "round"}
    x, y = latency.value, scale.factor * score.value
    ends = [scale.factor * score.low, scale.factor * score.high]
    axes.plot([x, x], ends, **bars)
    axes.plot([latency.low, latency.high], [y, y], **bars)
    dot = {"marker": MARKER[model.role], "markersize": 7, "linestyle": "none"}
    axes.plot([x], [y], color=colour, transform=transform, label=model.role, **dot)
    axes.update_datalim([(x, end) for end in ends])  # shifted marks do not count for the axis' range


def _point_in_words(model: ModelResult, latency: Interval, scale: Scale) -> str:
    score, time = scale.write(model.score.value), measure(latency.value)
    return f"{model.role} {score} {scale.ends(model.score)} at {time} ms"


def _score_label(report: Report, scale: Scale) -> str:
    better = "" if report.higher_is_better else ", lower is better"
    return f"{shorten(report.metric, 24)}{' (points)' if scale.in_points else ''}{better}"


def _groups(names: list[str]) -> dict[str, list[str]]:
    """Gather the layers of one loss: what stands before the first dot or bracket of a term's name."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.split(r"[.\[]", name, maxsplit=1)[0], []).append(name)
    return {members[0] if len(members) == 1 else group: members for group, members in groups.items()}


def _term_panel(curves: list[Curve], group: str, names: list[str], number: int) -> str:
    """Draw one group of terms: one line per term and role, the mean over the seeds."""
    figure, axes = panel(WIDTH, HEIGHT)
    drawn: list[float] = []
    for role in DRAWN:
        of_role = [c for c in curves if c.role == role]
        present = [name for name in names if any(name in c.terms for c in of_role)]
        for place, name in enumerate(present):
            drawn += _draw_term(axes, of_role, role, name, (place, len(present)))
    finite = [value for value in drawn if math.isfinite(value)]
    if not finite:
        return ""
    _loss_axis(axes, finite)
    _steps_axis(axes)
    axes.set_title(shorten(group, 44))
    figure.legend(loc="outside lower left", ncols=2)
    said = f"Weighted terms {one_line(', '.join(names))}: from {finite[0]:.3g} to {finite[-1]:.3g}."
    return to_svg(figure, f"term-{number}", f"Training curve of {one_line(group)}", said)


def _draw_term(axes: Any, curves: list[Curve], role: str, name: str, place: tuple[int, int]) -> list[float]:
    index, count = place
    steps, values = _mean(curves, name)
    weights = next(c.weights[name] for c in curves if name in c.terms)
    named = count <= MOST_NAMED_LINES or index in (0, count - 1)
    who = role if count == 1 else shorten(name, 18)
    axes.plot(
        steps,
        values,
        color=COLOUR[role],
        linestyle=LINE[role],
        linewidth=1.5,
        alpha=1.0 if count == 1 else 0.45 + 0.55 * index / (count - 1),  # deeper layers are stronger
        marker=MARKER[role] if len(steps) == 1 else None,
        label=f"{who} × {_weight_label(weights)}" if named else None,
    )
    return values


def _weight_label(weights: Sequence[float]) -> str:
    """A weight, or where it went from and to."""
    texts = dict.fromkeys(weight_text(w) for w in (weights[0], weights[-1])) if weights else ["1"]
    return " to ".join(texts)


def _mean(curves: Sequence[Curve], name: str) -> Series:
    """Average a weighted term over the seeds, at the steps that all of them logged."""
    logs = [
        {step: w * v for step, w, v in zip(c.steps, c.weights[name], c.terms[name], strict=False)}
        for c in curves
        if name in c.terms
    ]
    shared = [step for step in logs[0] if all(step in log for log in logs)]
    logs = logs if shared else logs[:1]
    steps = shared or list(logs[0])
    return steps, [sum(log[step] for log in logs) / len(logs) for step in steps]


def _learning_rate_panel(curves: Sequence[Curve]) -> str:
    """Draw the learning rates of the first seed, once where student and baseline have the same."""
    first = {c.role: c for c in reversed(curves) if c.learning_rate}
    student, baseline = first.get("student"), first.get("baseline")
    if student is None:
        return ""
    figure, axes = panel(WIDTH, HEIGHT)
    same = baseline is not None and _rates(baseline) == _rates(student)
    _draw_rate(axes, student, "student and baseline" if same else "student")
    if baseline is not None and not same:
        _draw_rate(axes, baseline, "baseline")
    axes.set_title("learning rate")
    axes.set_ylim(bottom=0)
    ticks(axes.yaxis, ".3g", 4)
    _steps_axis(axes)
    figure.legend(loc="outside lower left", ncols=2)
    return to_svg(figure, "learning-rate", "Learning rate", "The learning rate over the training steps.")


def _rates(curve: Curve) -> Series:
    length = min(len(curve.steps), len(curve.learning_rate))
    return curve.steps[:length], curve.learning_rate[:length]


def _draw_rate(axes: Any, curve: Curve, label: str) -> None:
    axes.plot(*_rates(curve), color=COLOUR[curve.role], linestyle=LINE[curve.role], linewidth=1.5, label=label)


def _draw_seeds(axes: Any, curves: list[Curve], scale: Scale) -> None:
    """Draw one line per seed, all of one role alike."""
    for place, curve in enumerate(curves):
        seeds = f", {len(curves)} seeds" if len(curves) > 1 else ""
        axes.plot(
            curve.score_steps,
            [scale.factor * score for score in curve.scores],
            color=COLOUR[curve.role],
            linestyle=LINE[curve.role],
            linewidth=1.5,
            alpha=1.0 if len(curves) == 1 else 0.7,
            marker=MARKER[curve.role],
            markersize=3,
            label=f"{curve.role}{seeds}" if place == 0 else None,
        )


def _loss_axis(axes: Any, values: list[float]) -> None:
    """Scale the axis of a loss: logarithmic where it falls far, and written in plain figures either way."""
    if min(values) > 0 and max(values) / min(values) >= LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        write_plainly(axes.yaxis, ".3g")
    else:
        ticks(axes.yaxis, ".3g")


def _steps_axis(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    ticks(axes.xaxis, ",.0f", whole=True)


def _legend(figure: Any) -> None:
    """Name the models above the axes, in one line."""
    figure.legend(loc="outside upper left", ncols=3, borderpad=0, markerscale=0.8)
