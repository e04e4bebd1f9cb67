"""What a report says, as rows of text: the page, the model card and the terminal show the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.report import format as write
from limbeck.report.format import NOTHING, Scale, one_line
from limbeck.report.report import Comparison, ExtraData, Interval, ModelResult, Report

PLAN_COLUMNS = ("term", "loss", "student tap", "teacher tap", "weight", "projection", "parameters")

TRUE_LABELS = "true labels"

INTERVAL_NOTES = (
    "Intervals are the 95% percentile intervals of a paired bootstrap over the evaluation examples, and over the "
    "seeds where there are several. They cover chance in these; they say nothing of other data or other settings.",
    "Latency and throughput are medians with quartiles, the models taking turns on one machine, the one described "
    "here. Elsewhere the ratios are a guide, the milliseconds are not.",
)


@dataclass(frozen=True)
class Cell:
    """One number of the side-by-side table.

    Attributes:
        value: The number.
        detail: Its interval, or a remark on it; may be empty.
    """

    value: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the side-by-side table: a label and one cell per model, in the report's order."""

    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Fact:
    """One thing that the comparison found.

    Attributes:
        name: What it is called.
        value: The number, or why there is none.
        detail: Its interval; may be empty.
        meaning: What it means and how it was measured, in a sentence.
    """

    name: str
    value: str
    detail: str
    meaning: str


def in_one(value: str, detail: str) -> str:
    """Write a number and its interval, or its remark, on one line.

    Example:
        >>> in_one("83.4", "[82.0, 84.8]"), in_one("5.2×", "7.0× at batch 32"), in_one("5.2×", "")
        ('83.4 [82.0, 84.8]', '5.2×, 7.0× at batch 32', '5.2×')
    """
    return f"{value}{' ' if detail.startswith('[') else ', '}{detail}" if detail else value


def scale_note(report: Report) -> str:
    """Say in words how scores are written and which direction is good."""
    direction = "Higher is better." if report.higher_is_better else "Lower is better."
    if report.scale.in_points:
        return f"{direction} Scores are in points, 100 times {one_line(report.metric)}."
    return direction


def side_by_side(report: Report) -> list[Row]:
    """Build the rows of the table teacher, baseline, student."""
    return [
        *_score_rows(report),
        _row(report, "Parameters", lambda m: Cell(write.parameters(m.parameters))),
        _row(report, "Size on disk", lambda m: Cell(write.size(m.size_bytes))),
        _row(report, "Latency, batch 1 (ms)", lambda m: _measured(m.latency_ms)),
        _row(
            report, f"Throughput, batch {report.throughput_batch} (examples/s)", lambda m: _measured(m.throughput)
        ),
        _row(report, "Training time", _training_time),
        _row(report, "Teacher's share of it", _teacher_time),
        *_passes_row(report),
    ]


def comparison_facts(report: Report) -> list[Fact]:
    """Build what the comparison says: quality first (where there is a baseline), then speed and size."""
    quality = [] if report.comparison is None else _quality_facts(report, report.comparison)
    extra = [] if report.extra is None else _extra_facts(report, report.extra)
    return [*quality, *extra, *_speed_facts(report)]


def ratio_note(comparison: Comparison) -> str:
    """Say as a sentence why there is no distillation ratio."""
    note = one_line(comparison.ratio_note) or "not defined"
    return f"{note[0].upper()}{note[1:].rstrip('.')}."


def plan_rows(report: Report) -> list[tuple[str, ...]]:
    """Build the rows of the table of terms, in the order of `PLAN_COLUMNS`."""
    return [_plan_row(row) for row in report.plan]


def facts_of_run(report: Report) -> list[tuple[str, str]]:
    """List what the run was made of: metric, examples, seeds, date."""
    examples = ", ".join(f"{count:,} {one_line(split)}" for split, count in report.examples.items())
    return [
        ("Metric", f"{one_line(report.metric)}, {'higher' if report.higher_is_better else 'lower'} is better"),
        ("Examples", examples or NOTHING),
        ("Seeds", ", ".join(map(str, report.seeds)) or NOTHING),
        ("Created", one_line(report.created) or NOTHING),
    ]


def environment_rows(environment: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Flatten the environment into names and values.

    Example:
        >>> environment_rows({"threads": 2, "versions": {"torch": "2.13"}})
        [('threads', '2'), ('versions, torch', '2.13')]
    """
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        name = f"{above}, {key}" if above else str(key)
        if isinstance(value, Mapping):
            rows += environment_rows(value, name)
        else:
            rows.append((one_line(name), one_line(str(value))))
    return rows


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Write a resolved recipe as YAML."""
    import yaml

    plain = json.loads(json.dumps(recipe, default=str))  # paths and the like become text
    return write.clean(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)) if plain else ""


def _score_rows(report: Report) -> list[Row]:
    scale = report.scale
    name = one_line(report.metric)
    rows = [_row(report, name, lambda m: Cell(scale.write(m.score.value), scale.ends(m.score)))]
    if any(len(m.scores_by_seed) > 1 for m in report.models):
        rows.append(_row(report, f"{name}, by seed", lambda m: Cell(_by_seed(m, scale))))
    others = dict.fromkeys(key for m in report.models for key in m.metrics if key != report.metric)
    return rows + [_metric_row(report, key) for key in others]


def _metric_row(report: Report, key: str) -> Row:
    scale = write.scale_for(key, [m.metrics[key] for m in report.models if key in m.metrics])
    return _row(
        report, one_line(key), lambda m: Cell(scale.write(m.metrics[key]) if key in m.metrics else NOTHING)
    )


def _row(report: Report, label: str, cell: Callable[[ModelResult], Cell]) -> Row:
    return Row(label, [cell(model) for model in report.models])


def _measured(interval: Interval | None) -> Cell:
    if interval is None:
        return Cell("not measured")
    return Cell(write.measure(interval.value), write.measure_ends(interval))


def _by_seed(model: ModelResult, scale: Scale) -> str:
    return "  ".join(scale.write(score) for score in model.scores_by_seed) or NOTHING


def _training_time(model: ModelResult) -> Cell:
    return Cell(write.duration(model.training_seconds)) if model.training_seconds else Cell("not trained here")


def _teacher_time(model: ModelResult) -> Cell:
    if not model.training_seconds or not model.teacher_seconds:
        return Cell(NOTHING)
    part = model.teacher_seconds / model.training_seconds
    return Cell(write.duration(model.teacher_seconds), write.share(part))


def _passes_row(report: Report) -> list[Row]:
    """For how many examples the teacher was run; nothing where it does not remember."""
    if report.student.teacher_examples is None:
        return []
    return [_row(report, "Teacher's passes", _teacher_passes)]


def _teacher_passes(model: ModelResult) -> Cell:
    if model.teacher_examples is None or not model.examples:
        return Cell(NOTHING)
    saved = 1 - model.teacher_examples / model.examples
    return Cell(f"{model.teacher_examples:,} of {model.examples:,}", f"{write.share(saved)} saved")


def baseline_words(recipe: Mapping[str, Any]) -> str:
    """What the baseline of a recipe is.

    Example:
        >>> baseline_words({"baseline_training": {"start": "pretrained"}})[:53]
        'its twin made of the teacher from before fine-tuning,'
    """
    start = recipe.get("baseline_training", {}).get("start", "student")
    if start == "student":
        return "its twin with the same start and the same budget, trained on the labels alone"
    source = "the teacher from before fine-tuning" if start == "pretrained" else one_line(start)
    return (
        f"its twin made of {source}, with the same budget, trained on the labels alone, so that what the student "
        "has from the fine-tuned teacher's weights counts as added too"
    )


def _quality_facts(report: Report, comparison: Comparison) -> list[Fact]:
    scale = report.scale
    direction = (
        "" if report.higher_is_better else " Lower is better here; the gain counts an improvement as positive."
    )
    gain, gap = comparison.gain, comparison.gap
    return [
        Fact(
            "Gain",
            scale.signed(gain.value) + scale.unit,
            scale.signed_ends(gain),
            f"What distillation added: student minus baseline, {baseline_words(report.recipe)}; paired over the "
            f"evaluation examples.{direction}{_noise(gain)}",
        ),
        Fact(
            "Gap",
            scale.signed(gap.value) + scale.unit,
            scale.signed_ends(gap),
            f"What there was to win: teacher minus baseline, likewise.{_noise(gap)}",
        ),
        _ratio_fact(comparison),
        *_retention_facts(report, comparison),
        _agreement_fact(report.regression, comparison),
    ]


def _agreement_fact(regression: bool, comparison: Comparison) -> Fact:
    ours, theirs = comparison.agreement, comparison.baseline_agreement
    if regression:
        ratio = write.RATIO
        meaning = "How the student's numbers correlate with the teacher's (Pearson); the baseline's do at"
        theirs_text = f"{ratio.write(theirs.value)} {ratio.ends(theirs)}"
        return Fact("Agreement", ratio.write(ours.value), ratio.ends(ours), f"{meaning} {theirs_text}.")
    meaning = (
        "How often student and teacher decide alike on an evaluation example, right or wrong. The baseline agrees "
        f"with the teacher on {write.share(theirs.value)} {write.share_ends(theirs)}."
    )
    return Fact("Agreement", write.share(ours.value), write.share_ends(ours), meaning)


def _ratio_fact(comparison: Comparison) -> Fact:
    meaning = (
        "The part of the gap that distillation closed: gain over gap. At 0 it added nothing to plain training, at "
        "1 the student is as good as its teacher."
    )
    if comparison.ratio is None:
        return Fact("Distillation ratio", "none", "", f"{meaning} {ratio_note(comparison)}")
    ratio = comparison.ratio
    return Fact("Distillation ratio", write.RATIO.write(ratio.value), write.RATIO.ends(ratio), meaning)


def _retention_facts(report: Report, comparison: Comparison) -> list[Fact]:
    """What was kept; of nothing, or of a negative score, there is no share."""
    if report.teacher.score.value <= 0:
        return []
    lower = "" if report.higher_is_better else " Lower is better here, so that below 100% the student is ahead."
    return [
        Fact(
            "Retention",
            write.share(comparison.retention.value),
            write.share_ends(comparison.retention),
            f"The student's {one_line(report.metric)} over the teacher's, on the same evaluation examples.{lower}",
        )
    ]


def _extra_facts(report: Report, extra: ExtraData) -> list[Fact]:
    """What the student learned from beside the training data, and what that gave."""
    count = sum(extra.origins.values())
    parts = ", ".join(f"{number:,} {one_line(name)}" for name, number in extra.origins.items())
    left = ", ".join(f"{number:,} {one_line(why)}" for why, number in extra.dropped.items())
    meaning = f"Examples without a label, for the student alone; the teacher says what to learn of them: {parts}."
    facts = [Fact("Extra data", f"{count:,} examples", "", f"{meaning} Left out: {left}." if left else meaning)]
    if extra.gain is None or extra.score is None:
        return facts
    scale, gain = report.scale, extra.gain
    twin = f"{scale.write(extra.score.value)} {scale.ends(extra.score)}"
    said = (
        f"Student minus the student without the extra data, which reaches {twin} with the same start and as many "
        f"updates; paired over the evaluation examples.{_noise(gain)}"
    )
    shown = scale.signed(gain.value) + scale.unit, scale.signed_ends(gain)
    return [*facts, Fact("Gain of extra data", *shown, said)]


def _speed_facts(report: Report) -> list[Fact]:
    teacher, student = report.teacher, report.student
    size = Fact(
        "Size",
        write.times(report.size_ratio),
        "",
        f"The student's weights on disk over the teacher's, {write.size(student.size_bytes)} against "
        f"{write.size(teacher.size_bytes)}.",
    )
    if teacher.latency_ms is None or student.latency_ms is None:
        return [Fact("Speed-up", NOTHING, "", "Not measured, for the teacher itself was not there."), size]
    speed = report.speedup
    times = Fact(
        "Speed-up",
        write.times(speed["latency"]),
        f"{write.times(speed['throughput'])} at batch {report.throughput_batch}",
        "The teacher's median time for one example over the student's, "
        f"{write.measure(teacher.latency_ms.value)} ms against {write.measure(student.latency_ms.value)} ms, "
        "on the same machine.",
    )
    return [times, size]


def _noise(interval: Interval) -> str:
    return "" if interval.excludes_zero else " The interval holds zero, so this is within noise."


def _plan_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        one_line(str(row.get("name", NOTHING))),
        _with_options(row.get("loss", NOTHING), row.get("options")),
        one_line(str(row.get("tap", NOTHING))),
        TRUE_LABELS if row.get("teacher_tap") == "labels" else one_line(str(row.get("teacher_tap"))),
        one_line(str(row.get("schedule") or weight_text(row.get("weight", 1.0)))),
        _projection(row.get("projection")),
        write.parameters(row.get("parameters") or 0),
    )


def _projection(projection: str | Mapping[str, Any] | None) -> str:
    if isinstance(projection, Mapping):
        return _with_options(projection.get("kind"), {k: v for k, v in projection.items() if k != "kind"})
    return one_line(projection or NOTHING)


def _with_options(name: Any, options: Mapping[str, Any] | None) -> str:
    return one_line(", ".join([str(name), *(f"{key}={value}" for key, value in (options or {}).items())]))


def weight_text(weight: float) -> str:
    """Write the weight of a term.

    Example:
        >>> weight_text(1.0), weight_text(1 / 3)
        ('1', '0.333')
    """
    return f"{weight:.3g}"
