"""The report of a suite as data: a row for each task, and what they come to together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.report.report import Interval, Report, gain_in_words, interval_of

FORMAT = 1
FILE = "suite.json"
COMPLETE, FAILED, PENDING = "complete", "failed", "pending"

INTERVALS = ("teacher", "baseline", "student", "gain", "gap", "ratio", "retention", "speedup")


@dataclass(frozen=True)
class SuiteRow:
    """One task of a suite.

    Attributes:
        task: Its short name, ``"rte"``.
        state: ``"complete"``, ``"failed"`` or ``"pending"``.
        note: The user's remark on it.
        error: Why it failed.
        metric: Its main metric.
        examples: Number of examples by split.
        teacher: The teacher's score, with its 95 % interval, as all that follows.
        baseline: That of the student's twin, trained without distillation; None if left out.
        student: The student's.
        gain: Student minus baseline.
        gap: Teacher minus baseline.
        ratio: Gain over gap; None where the gap is within noise.
        retention: The student's score over the teacher's.
        speedup: The teacher's median time for one example over the student's.
        size_ratio: The student's bytes over the teacher's.
    """

    task: str
    state: str = PENDING
    note: str = ""
    error: str = ""
    metric: str = ""
    examples: dict[str, int] = field(default_factory=dict)
    teacher: Interval | None = None
    baseline: Interval | None = None
    student: Interval | None = None
    gain: Interval | None = None
    gap: Interval | None = None
    ratio: Interval | None = None
    retention: Interval | None = None
    speedup: Interval | None = None
    size_ratio: float | None = None

    @classmethod
    def of(cls, task: str, report: Report, note: str = "") -> SuiteRow:
        """The row of a task from its own report.

        Example:
            >>> from limbeck.report.report import example
            >>> SuiteRow.of("rte", example()).student.value
            0.9
        """
        compared = report.comparison
        return cls(
            task=task,
            state=COMPLETE,
            note=note,
            metric=report.metric,
            examples=report.examples,
            teacher=report.teacher.score,
            baseline=report.baseline.score if report.baseline else None,
            student=report.student.score,
            gain=compared.gain if compared else None,
            gap=compared.gap if compared else None,
            ratio=compared.ratio if compared else None,
            retention=compared.retention if compared else None,
            speedup=report.latency_ratio,
            size_ratio=report.size_ratio,
        )


@dataclass(frozen=True)
class Averages:
    """What the finished tasks come to together; each with a 95 % interval.

    Attributes:
        teacher: The mean of the teacher's scores: GLUE's average.
        baseline: Likewise; None if there is none.
        student: Likewise.
        gain: The mean of the gains.
        gap: The mean of the gaps.
        retention: The mean over tasks of the student's score over the teacher's.
        ratio: The mean of the distillation ratios that are defined; None if none is.
        ratio_tasks: The tasks whose ratios these are.
        pooled_ratio: The sum of all gains over the sum of all gaps; None where that is within noise.
        pooled_note: Why there is none.
        speedup: The geometric mean of the speed-ups.
    """

    teacher: Interval
    student: Interval
    retention: Interval
    baseline: Interval | None = None
    gain: Interval | None = None
    gap: Interval | None = None
    ratio: Interval | None = None
    ratio_tasks: list[str] = field(default_factory=list)
    pooled_ratio: Interval | None = None
    pooled_note: str = ""
    speedup: Interval | None = None


@dataclass(frozen=True)
class SuiteReport:
    """What came out of a suite.

    Attributes:
        name: ``"glue/all"``.
        rows: Its tasks, in order.
        averages: Over the finished tasks; None while there is none.
        remarks: What there is to say about the suite: what it leaves out, what counts how.
        seeds: The seeds.
        environment: Versions, machine, threads, of the last task that was finished.
        recipe: The recipe of all.
        command: What to type to repeat it.
        created: ISO date and time.

    Example:
        >>> report = example()
        >>> SuiteReport.from_json(report.to_json()) == report
        True
        >>> report.verdict()[:54]
        'Over 2 tasks the student keeps 98.0% of its teacher, 2'
    """

    name: str
    rows: list[SuiteRow]
    averages: Averages | None
    remarks: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    created: str = ""

    def in_state(self, state: str) -> list[SuiteRow]:
        """The rows of tasks that are complete, failed or pending."""
        return [row for row in self.rows if row.state == state]

    def verdict(self) -> str:
        """The result in a few sentences."""
        done, failed, pending = (self.in_state(state) for state in (COMPLETE, FAILED, PENDING))
        missing = [_counted(failed, "failed")] if failed else []
        missing += [_counted(pending, "not finished")] if pending else []
        absent = f" {'; '.join(missing)}." if missing else ""
        if self.averages is None:
            return f"No task is finished.{absent}"
        found = self.averages
        times = f", {found.speedup.value:.1f} times as fast (batch 1)" if found.speedup else ""
        tasks = f"{len(done)} tasks" if len(done) > 1 else f"the task {done[0].task}"
        kept = f"Over {tasks} the student keeps {found.retention.value:.1%} of its teacher{times}."
        if found.gain is None:
            return f"{kept} No plainly trained baseline was run, so what distillation added is not known.{absent}"
        return f"{kept} {gain_in_words(found.gain)} {self._worse(done)}{absent}"

    def _worse(self, done: list[SuiteRow]) -> str:
        worse = [row.task for row in done if row.gain is not None and row.gain.high < 0]
        if worse:
            return f"It is worse than plain training on {', '.join(worse)}."
        return "On no task is it worse than plain training beyond noise."

    def to_json(self) -> str:
        """Write the report as JSON, the source of every other form."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False, default=str)

    @classmethod
    def from_json(cls, text: str) -> SuiteReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not the report of a suite, or one of another format version.
        """
        try:
            data = json.loads(text)
            version = data.pop("format")
            data["rows"] = [SuiteRow(**_with_intervals(row)) for row in data["rows"]]
            averages = data["averages"]
            data["averages"] = averages and Averages(**_with_intervals({**averages}))
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"this is no report of a suite: {error}") from None
        if version != FORMAT:
            raise ValueError(f"the report has format {version}, this limbeck reads format {FORMAT}")
        return cls(**data)

    @classmethod
    def load(cls, path: Path) -> SuiteReport:
        """Read ``suite.json`` from a suite's folder or by its own path.

        Raises:
            ValueError: there is none, or it cannot be read; the message names the file.
        """
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no report of a suite at {file}; name the folder of a suite")
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cannot read {file}: {error}") from None


def is_suite_folder(path: Path) -> bool:
    """Whether a path is the folder of a suite, or its JSON file.

    Example:
        >>> is_suite_folder(Path("runs/rte"))
        False
    """
    return (path / FILE).is_file() or (path.name == FILE and path.is_file())


def _with_intervals(data: Mapping[str, Any]) -> dict[str, Any]:
    names = (*INTERVALS, "pooled_ratio")
    return {key: interval_of(value) if key in names else value for key, value in data.items()}


def _counted(rows: list[SuiteRow], what: str) -> str:
    return f"{len(rows)} {what}: {', '.join(row.task for row in rows)}"


def example() -> SuiteReport:
    """A small made-up report of two tasks, for examples.

    Example:
        >>> [row.task for row in example().rows]
        ['rte', 'qnli']
    """

    def interval(value: float) -> Interval:
        return Interval(value, value - 0.01, value + 0.01)

    scores = interval(0.9), interval(0.85), interval(0.88)
    measured = interval(0.98), interval(2.0)
    row = SuiteRow(
        "rte", COMPLETE, "", "", "accuracy", {}, *scores, interval(0.03), interval(0.05), None, *measured
    )
    other = dataclasses.replace(row, task="qnli", note="seen before", ratio=interval(0.6))
    averages = Averages(
        teacher=scores[0],
        baseline=scores[1],
        student=scores[2],
        retention=measured[0],
        gain=row.gain,
        gap=row.gap,
        ratio=interval(0.6),
        ratio_tasks=["qnli"],
        pooled_ratio=interval(0.6),
        speedup=measured[1],
    )
    return SuiteReport("glue/rte,qnli", [row, other], averages, seeds=[0])
