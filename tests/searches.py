"""Made-up searches: a teacher of six layers, students of one to five, scores that follow depth and rate."""

from __future__ import annotations

import dataclasses
import math
import random

from limbeck.report import Comparison, Interval, ModelResult, Report
from limbeck.report.candidates import Candidate, Demands, choose
from limbeck.report.report import example as run_example
from limbeck.report.search import SearchReport, TeacherResult

SPACE = {
    "student.layers": "choice([5], [2, 5], [1, 3, 5], [0, 2, 4], [0, 1, 3, 4, 5])",
    "training.learning_rate": "loguniform(1e-5, 5e-4)",
    "terms.kd.temperature": "loguniform(1, 20)",
    "terms.kd.weight": "uniform(0, 1)",
    "terms.ce.weight": "uniform(0, 1)",
    "training.epochs": "int(2, 6)",
}
LAYERS = ([5], [2, 5], [1, 3, 5], [0, 2, 4], [0, 1, 3, 4, 5])
TEACHER = TeacherResult(0.8512, 22_713_986, 90_870_000, 8.1)


def candidate(number: int = 0, score: float | None = 0.8, latency: float = 2.0, **changes: object) -> Candidate:
    """One finished trial."""
    trial = Candidate(
        number=number,
        values={"training.epochs": 3},
        state="complete",
        score=score,
        parameters=10_000_000,
        size_bytes=40_000_000,
        latency_ms=latency,
        speedup=8.1 / latency if latency else 0.0,
        seconds=61.0,
        done=1.0,
    )
    return dataclasses.replace(trial, **changes)


def trial(number: int, chance: random.Random) -> Candidate:
    """A trial as a search would have it: one in three is pruned, one in twelve fails."""
    layers = chance.choice(LAYERS)
    rate, epochs = 10 ** chance.uniform(-5, -3.3), chance.randint(2, 6)
    worth = 0.62 + 0.2 * (1 - math.exp(-0.9 * len(layers))) - 0.04 * (math.log10(rate) + 4) ** 2
    score = worth + 0.004 * epochs + chance.gauss(0, 0.006)
    size, latency = 47_400_000 + 7_100_000 * len(layers), 0.4 + 1.28 * len(layers)
    values = {
        "student.layers": layers,
        "training.learning_rate": rate,
        "terms.kd.temperature": 20 ** chance.random(),
        "terms.kd.weight": chance.random(),
        "terms.ce.weight": chance.random(),
        "training.epochs": epochs,
    }
    made = candidate(
        number, score, latency, values=values, size_bytes=size, parameters=size // 4, seconds=20.0 * epochs
    )
    if number % 12 == 5:
        note = "the loss of 'kd' is not a number at step 40: lower training.learning_rate"
        return dataclasses.replace(made, state="failed", score=None, done=0.1, note=note)
    if number % 3 == 2:
        note = "below the median of 5 trials that cost no more, at 40% of the training"
        return dataclasses.replace(made, state="pruned", score=score - 0.08, done=0.4, note=note)
    return made


def proof(share: float, low: float, high: float) -> Report:
    """The run of a chosen student on the validation data."""

    def column(role: str, score: float, latency: float, size: int) -> ModelResult:
        near = Interval(score, score - 0.02, score + 0.02)
        pace = Interval(4000 / latency, 3900 / latency, 4100 / latency)
        time = Interval(latency, 0.97 * latency, 1.04 * latency)
        return ModelResult(role, near, {"accuracy": score}, size // 4, size, time, pace, 192.0)

    student = column("student", 0.86 * share, 2.3, 68_700_000)
    parts = {
        "teacher": column("teacher", 0.86, 8.1, 90_870_000),
        "baseline": dataclasses.replace(student, role="baseline", score=Interval(0.8, 0.78, 0.82)),
        "student": student,
        "comparison": Comparison(
            gain=Interval(0.0187, 0.0076, 0.0298),
            gap=Interval(0.06, 0.04, 0.08),
            ratio=Interval(0.371, 0.158, 0.571),
            ratio_note="",
            retention=Interval(share, low, high),
            agreement=Interval(0.93, 0.91, 0.94),
            baseline_agreement=Interval(0.9, 0.88, 0.91),
        ),
    }
    return dataclasses.replace(run_example(), task="glue/sst2", seeds=[0, 1, 2], **parts)


def search(
    count: int, demands: Demands | None = None, proven: Report | None = None, seed: int = 0
) -> SearchReport:
    """A search of so many trials."""
    chance = random.Random(seed)
    demands = demands or Demands()
    trials = [trial(number, chance) for number in range(count)]
    return SearchReport(
        task="glue/sst2",
        metric="accuracy",
        higher_is_better=True,
        examples={"train": 6000, "held out": 667, "validation": 872},
        teacher=TEACHER,
        demands=demands,
        candidates=trials,
        choice=choose(trials, demands, TEACHER.score, True),
        space=SPACE,
        seconds=60.0 * count,
        environment={"torch": "2.13.0", "threads": 2},
        recipe={"task": {"name": "glue/sst2"}, "search": SPACE},
        command=f"limbeck search recipe.yaml --trials {count}",
        created="2026-03-14T09:26:53+00:00",
        trials=count,
        proof=proven,
    )
