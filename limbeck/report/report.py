"""The Report: what came out of a run, as data. Files and pictures are made from it, never the other way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.report.format import POINTS, Scale, scale_for

FORMAT = 1


@dataclass(frozen=True)
class Interval:
    """A number with the interval that it lies in.

    Attributes:
        value: The estimate.
        low: Lower end (95 % for scores; lower quartile for times).
        high: Upper end.

    Example:
        >>> Interval(0.5, 0.25, 0.75).format(2)
        '0.50 [0.25, 0.75]'
    """

    value: float
    low: float
    high: float

    def format(self, digits: int) -> str:
        """Write the number and its interval with so many decimals."""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def map(self, function: Callable[[float], float]) -> Interval:
        """Apply a monotone function to all three numbers, and keep the lower end below the upper."""
        value, *ends = (function(x) for x in (self.value, self.low, self.high))
        return Interval(value, min(ends), max(ends))

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class ModelResult:
    """One column of the report: a model's quality, size, speed and cost.

    Attributes:
        role: ``"teacher"``, ``"baseline"`` or ``"student"``.
        score: The main metric with its 95 % interval, pooled over seeds.
        metrics: All metrics of the task, the mean over seeds.
        parameters: Number of parameters.
        size_bytes: Bytes of the weights on disk.
        latency_ms: Milliseconds for one example: median and quartiles; None for a teacher that was not there.
        throughput: Examples per second at batch 32: median and quartiles; likewise.
        training_seconds: Wall time of its training, the mean over seeds; 0 where it was not trained here.
        teacher_seconds: The share of that time that the teacher's forward passes took.
        examples: Examples that were seen in its trainings, all seeds together.
        teacher_examples: Those for which the teacher was run; None where it was run for all of them.
        scores_by_seed: The main metric for each seed.
    """

    role: str
    score: Interval
    metrics: dict[str, float]
    parameters: int
    size_bytes: int
    latency_ms: Interval | None
    throughput: Interval | None
    training_seconds: float = 0.0
    teacher_seconds: float = 0.0
    examples: int = 0
    teacher_examples: int | None = None
    scores_by_seed: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """How the student stands to the teacher and to the baseline.

    Attributes:
        gain: Student minus baseline, in the metric's unit, paired over the examples.
        gap: Teacher minus baseline.
        ratio: The distillation ratio, gain over gap; None where the gap is within noise.
        ratio_note: Why there is no ratio, in words; empty where there is one.
        retention: Student's score over the teacher's.
        agreement: Share of examples on which student and teacher decide alike; for regression, their Pearson
            correlation.
        baseline_agreement: The same for the baseline.
    """

    gain: Interval
    gap: Interval
    ratio: Interval | None
    ratio_note: str
    retention: Interval
    agreement: Interval
    baseline_agreement: Interval


@dataclass(frozen=True)
class ExtraData:
    """What the student learned from beside the training data, labelled by the teacher alone.

    Attributes:
        origins: Number of extra examples by where they came from.
        dropped: Number of those that were left out, by the reason.
        score: The main metric of the student's twin that was trained without them, with as many updates; None
            where none was trained.
        gain: Student minus that twin, in the metric's unit, paired over the examples; likewise.
    """

    origins: dict[str, int]
    dropped: dict[str, int]
    score: Interval | None = None
    gain: Interval | None = None


@dataclass(frozen=True)
class Curve:
    """What the log of one training holds.

    Attributes:
        role: ``"teacher"``, ``"baseline"``, ``"student"``, or ``"without_extra"``, the student without these data.
        seed: The seed of this training.
        steps: Step of each logged loss.
        terms: Unweighted value of each term at these steps.
        weights: What each term was multiplied by at these steps.
        learning_rate: Learning rate at these steps.
        score_steps: Step of each evaluation.
        scores: The main metric there.
    """

    role: str
    seed: int
    steps: list[int]
    terms: dict[str, list[float]]
    weights: dict[str, list[float]]
    learning_rate: list[float]
    score_steps: list[int]
    scores: list[float]


@dataclass(frozen=True)
class Report:
    """What came out of a run: teacher, plainly trained baseline and student side by side.

    Attributes:
        task: Name of the task.
        metric: Name of the main metric.
        higher_is_better: Its direction.
        examples: Number of training and evaluation examples, by split.
        teacher: The teacher's column.
        baseline: The student's twin, same start and budget, trained without distillation; None if left out.
        student: The student's column.
        comparison: How they stand to each other; None without a baseline.
        plan: One row per term: name, loss, taps, weight at the start, schedule, projection, parameters.
        curves: The trainings of this run.
        seeds: The seeds.
        environment: Versions, machine, threads.
        recipe: The resolved recipe.
        command: What to type to repeat the run.
        created: ISO date and time.
        regression: Whether the task predicts a number; agreement is a correlation then.
        throughput_batch: Batch size at which throughput was measured.
        student_class: Class of the student, ``BertForSequenceClassification``.
        latency_ratio: The teacher's median time for one example over the student's, with its 95 % interval over
            the timed turns; None where one was not timed, or in reports of earlier versions.
        extra: What the student learned from beside the training data; None where nothing.

    Example:
        >>> report = example()
        >>> report.speedup, report.size_ratio
        ({'latency': 2.0, 'throughput': 3.0}, 0.5)
        >>> Report.from_json(report.to_json()) == report
        True
    """

    task: str
    metric: str
    higher_is_better: bool
    examples: dict[str, int]
    teacher: ModelResult
    baseline: ModelResult | None
    student: ModelResult
    comparison: Comparison | None
    plan: list[dict[str, Any]]
    curves: list[Curve]
    seeds: list[int]
    environment: dict[str, Any]
    recipe: dict[str, Any]
    command: str
    created: str
    regression: bool = False
    throughput_batch: int = 32
    student_class: str = ""
    latency_ratio: Interval | None = None
    extra: ExtraData | None = None

    @property
    def models(self) -> list[ModelResult]:
        """The columns, from left to right."""
        return [m for m in (self.teacher, self.baseline, self.student) if m is not None]

    @property
    def speedup(self) -> dict[str, float]:
        """Teacher over student: latency at batch 1 and throughput at batch 32; empty where one was not timed."""
        teacher, student = self.teacher, self.student
        if None in (teacher.latency_ms, teacher.throughput, student.latency_ms, student.throughput):
            return {}
        return {
            "latency": _value(teacher.latency_ms) / _value(student.latency_ms),
            "throughput": _value(student.throughput) / _value(teacher.throughput),
        }

    @property
    def size_ratio(self) -> float:
        """The student's bytes over the teacher's."""
        return self.student.size_bytes / self.teacher.size_bytes

    def verdict(self) -> str:
        """The result in one sentence or two."""
        speed, times = self.speedup, ""
        if speed:
            times = (
                f"{speed['latency']:.1f}x the speed (batch 1; {speed['throughput']:.1f}x at batch "
                f"{self.throughput_batch}) and "
            )
        sentence = f"{self._quality()} at {times}{self.size_ratio:.2f}x the size."
        if self.comparison is None:
            return f"{sentence} No plainly trained baseline was run, so what distillation added is not known."
        direction = "" if self.higher_is_better else " A gain counts as positive, although lower is better."
        return f"{sentence} {gain_in_words(self.comparison.gain, self.scale)}{direction}"

    @property
    def scale(self) -> Scale:
        """How values of the main metric are written: in points, or as they are."""
        ends = [end for m in self.models for end in (m.score.value, m.score.low, m.score.high)]
        return scale_for(self.metric, ends, higher_is_better=self.higher_is_better)

    def _quality(self) -> str:
        """Say what the student kept; of an error, or of nothing, it cannot keep a share."""
        student, teacher = self.student.score.value, self.teacher.score.value
        if self.higher_is_better and teacher > 0:
            return f"The student keeps {student / teacher:.1%} of the teacher's {self.metric}"
        scores = f"{self.scale.write(student)} against the teacher's {self.scale.write(teacher)}"
        return f"The student's {self.metric} is {scores},"

    def to_json(self) -> str:
        """Write the report as JSON, the source of every other form."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False, default=str)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not a report, or one of another format version.
        """
        try:
            data = json.loads(text)
            version = data.pop("format")
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"this is no limbeck report: {error}") from None
        if version != FORMAT:
            raise ValueError(f"the report has format {version}, this limbeck reads format {FORMAT}")
        data["comparison"] = data["comparison"] and _comparison(data["comparison"])
        if data.get("extra"):
            data["extra"] = ExtraData(**_with_intervals(data["extra"], ("score", "gain")))
        for role in ("teacher", "baseline", "student"):
            data[role] = data[role] and _model(data[role])
        data["curves"] = [Curve(**c) for c in data["curves"]]
        data["latency_ratio"] = interval_of(data.get("latency_ratio"))
        return cls(**data)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read ``report.json`` from a run's folder or by its own path.

        Raises:
            ValueError: there is no report, or it cannot be read; the message names the file.
        """
        file = path / "report.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no report at {file}; name the folder of a finished run")
        try:
            return cls.from_json(file.read_text())
        except ValueError as error:
            raise ValueError(f"cannot read {file}: {error}") from None


def gain_in_words(gain: Interval, scale: Scale = POINTS) -> str:
    """Say what distillation added to plain training, and whether that is more than noise."""
    ends = f"95 % interval {scale.signed(gain.low)} to {scale.signed(gain.high)}"
    points = f"{scale.signed(gain.value)}{scale.unit} ({ends})"
    if not gain.excludes_zero:
        return f"Distillation against plain training: {points}, which is within noise."
    if gain.high < 0:
        return f"Distillation did worse than plain training: {points}."
    return f"Distillation gave {points} over plain training."


def _value(interval: Interval | None) -> float:
    assert interval is not None
    return interval.value


def interval_of(data: Mapping[str, float] | None) -> Interval | None:
    """An interval as JSON has it.

    Example:
        >>> interval_of({"value": 0.5, "low": 0.25, "high": 0.75}).low
        0.25
    """
    return None if data is None else Interval(**data)


def _with_intervals(data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: interval_of(value) if key in names else value for key, value in data.items()}


def _model(data: Mapping[str, Any]) -> ModelResult:
    return ModelResult(**_with_intervals(data, ("score", "latency_ms", "throughput")))


def _comparison(data: Mapping[str, Any]) -> Comparison:
    names = ("gain", "gap", "ratio", "retention", "agreement", "baseline_agreement")
    return Comparison(**_with_intervals(data, names))


def example() -> Report:
    """A small made-up report, for examples: half the size, twice the speed, no baseline.

    Example:
        >>> example().student.parameters
        100
    """
    point = Interval(0.9, 0.8, 1.0)
    teacher = ModelResult("teacher", point, {}, 200, 800, Interval(4, 4, 4), Interval(10, 10, 10))
    student = ModelResult("student", point, {}, 100, 400, Interval(2, 2, 2), Interval(30, 30, 30))
    return Report("rte", "accuracy", True, {}, teacher, None, student, None, [], [], [0], {}, {}, "", "")
