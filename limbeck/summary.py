"""From what came of a run's stages to its Report."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import limbeck
from limbeck.encodings import Encoded
from limbeck.evaluate import (
    Bootstrap,
    compare,
    count_parameters,
    quartiles,
    size_in_bytes,
    speedups,
    time_in_turns,
)
from limbeck.metrics import Array, get_metric
from limbeck.objective import PlannedTerm
from limbeck.recipe import Recipe
from limbeck.report import Report
from limbeck.report.report import Curve, ExtraData, Interval, ModelResult
from limbeck.schedules import Scheduled
from limbeck.stage import StageResult
from limbeck.tasks import EXTRA, VALIDATION, Task, is_regression
from limbeck.tasks.extra import Extra
from limbeck.teaching import About
from limbeck.train import FitResult

THROUGHPUT_BATCH = 32
WITHOUT_EXTRA = "without_extra"
"""The role of the student that is trained on the training split alone."""

PLAIN = (bool, int, float, str, list, dict, type(None))
"""What a report holds as it is; other options are written as text."""


@dataclass(frozen=True)
class Summary:
    """Puts the models of a run side by side.

    Attributes:
        recipe: The recipe, with every term spelled out.
        task: The task with its data.
        data: The encoded examples.
        device: Where models are timed.
        teacher: The teacher's sizes, for its model may not be here.
        extra: The extra examples of the student, if there are any.
    """

    recipe: Recipe
    task: Task
    data: Encoded
    device: torch.device
    teacher: About
    extra: Extra | None = None

    def report(
        self,
        models: Mapping[str, nn.Module],
        results: Mapping[str, list[StageResult]],
        plan: Sequence[PlannedTerm],
        log: list[dict[str, Any]],
        command: str,
    ) -> tuple[Report, dict[str, Array]]:
        """Make the report, and give the resamples that its intervals come from.

        Args:
            models: Teacher and baseline (if they are here) and student of the first seed, by role.
            results: What their stages gave, one for each seed.
            plan: The preflight's terms.
            log: The run's log.
            command: What to type to repeat the run.

        Returns:
            The report; and by role the main metric on the data as it is and in each resample, (R + 1,), beside
            them as ``"speedup"`` that of the student where it was timed.
        """
        metric = get_metric(self.task.metrics[0])
        labels = np.asarray(self.task.splits[VALIDATION].labels)
        bootstrap = Bootstrap(labels, metric, self.recipe.seeds)
        logits = {role: [r.logits[VALIDATION] for r in results[role]] for role in results}
        scores = {role: bootstrap.scores(each) for role, each in logits.items()}
        times, speed = self.speed(models)
        resamples = {**scores, **_speedup(times)}
        first = self.recipe.training.seed
        columns = {
            role: self.column(role, models.get(role), results[role], scores[role], speed.get(role))
            for role in results
            if role != WITHOUT_EXTRA
        }
        report = Report(
            task=self.task.name,
            metric=metric.name,
            higher_is_better=metric.higher_is_better,
            examples=example_counts(self.task, self.extra),
            teacher=columns["teacher"],
            baseline=columns.get("baseline"),
            student=columns["student"],
            comparison=compare(bootstrap, logits, scores) if "baseline" in logits else None,
            plan=[plan_row(p) for p in plan],
            curves=curves(log),
            seeds=list(range(first, first + self.recipe.seeds)),
            environment=environment(self.device),
            recipe=self.recipe.model_dump(mode="json"),
            command=command,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            regression=is_regression(self.task),
            throughput_batch=self.throughput_batch(),
            student_class=type(models["student"]).__name__,
            latency_ratio=Bootstrap.interval(resamples["speedup"]) if "speedup" in resamples else None,
            extra=self.extra_data(bootstrap, scores),
        )
        return report, resamples

    def extra_data(self, bootstrap: Bootstrap, scores: Mapping[str, Array]) -> ExtraData | None:
        """What the extra examples were, and what they gave where a student was trained without them."""
        if self.extra is None:
            return None
        sizes = self.extra.origins, {why: count for why, count in self.extra.dropped.items() if count}
        if WITHOUT_EXTRA not in scores:
            return ExtraData(*sizes)
        sign = 1.0 if bootstrap.metric.higher_is_better else -1.0
        gain = sign * (scores["student"] - scores[WITHOUT_EXTRA])
        return ExtraData(*sizes, bootstrap.interval(scores[WITHOUT_EXTRA]), bootstrap.interval(gain))

    def column(
        self,
        role: str,
        model: nn.Module | None,
        results: list[StageResult],
        scores: Array,
        speed: tuple[Interval, Interval] | None,
    ) -> ModelResult:
        """One model's column of the report; only a teacher may lack its model."""
        fitted = [r.fitted for r in results if r.fitted is not None]
        latency, batch = speed or (None, None)
        metric, labels = get_metric(self.task.metrics[0]), np.asarray(self.task.splits[VALIDATION].labels)
        return ModelResult(
            role=role,
            score=Bootstrap.interval(scores),
            metrics=self.metrics(results),
            parameters=count_parameters(model) if model else self.teacher.parameters,
            size_bytes=size_in_bytes(model) if model else self.teacher.size_bytes,
            latency_ms=latency and latency.map(lambda seconds: 1000 * seconds),
            throughput=batch and batch.map(lambda seconds: self.throughput_batch() / seconds),
            training_seconds=mean(f.seconds for f in fitted),
            teacher_seconds=mean(f.teacher_seconds for f in fitted),
            examples=sum(f.examples for f in fitted),
            teacher_examples=teacher_examples(fitted),
            scores_by_seed=[metric(r.logits[VALIDATION], labels) for r in results],
        )

    def metrics(self, results: list[StageResult]) -> dict[str, float]:
        """All metrics on all evaluation splits, the mean over seeds."""
        found = {}
        for split in results[0].logits:
            labels = np.asarray(self.task.splits[split].labels)
            suffix = "" if split == VALIDATION else f" ({split.removeprefix('validation_')})"
            for name in self.task.metrics:
                metric = get_metric(name)
                found[name + suffix] = mean(metric(r.logits[split], labels) for r in results)
        return found

    def speed(
        self, models: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Array], dict[str, tuple[Interval, Interval]]]:
        """Seconds for one example by role and turn; and by role for one example and for a batch, summed up."""
        data = {role: self.data.by_role(role)[VALIDATION] for role in models}
        for model in models.values():
            model.to(self.device)
        one = time_in_turns(models, data, batch_size=1, repeats=60)
        many = time_in_turns(models, data, batch_size=self.throughput_batch(), repeats=15)
        return one, {role: (quartiles(one[role]), quartiles(many[role])) for role in models}

    def throughput_batch(self) -> int:
        """The batch size that throughput is measured at."""
        return min(THROUGHPUT_BATCH, len(self.data.student[VALIDATION]))


def _speedup(times: Mapping[str, Array]) -> dict[str, Array]:
    """The student's speed-up over the teacher, where both were timed."""
    return {"speedup": speedups(times["teacher"], times["student"])} if "teacher" in times else {}


def example_counts(task: Task, extra: Extra | None) -> dict[str, int]:
    """The number of examples by split, extra ones among them."""
    counts = {name: len(rows) for name, rows in task.splits.items()}
    return counts if extra is None else {**counts, EXTRA: len(extra.rows)}


def mean(values: Iterable[float]) -> float:
    """The mean, 0 of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def teacher_examples(fitted: Sequence[FitResult]) -> int | None:
    """For how many examples the teacher was run in all trainings; None where it was run for every one."""
    counts = [f.teacher_examples for f in fitted if f.teacher_examples is not None]
    return sum(counts) if counts else None


def plan_row(planned: PlannedTerm) -> dict[str, Any]:
    """A term as a row of the report."""
    term = planned.term
    return {
        "name": term.name,
        "loss": term.loss_name,
        "tap": term.tap,
        "teacher_tap": term.teacher_tap,
        "weight": term.weight_at(0.0),
        "schedule": term.shown_weight() if isinstance(term.weight, Scheduled) else None,
        "options": {k: v if isinstance(v, PLAIN) else str(v) for k, v in term.shown_options().items()},
        "projection": term.project,
        "parameters": planned.parameters,
        "student_shape": list(planned.student_shape),
        "teacher_shape": list(planned.teacher_shape),
    }


def curves(log: list[dict[str, Any]]) -> list[Curve]:
    """The log as curves, one for each training."""
    found = []
    for stage in dict.fromkeys(line["stage"] for line in log):
        role, _, seed = stage.partition("-")
        steps = [line for line in log if line["stage"] == stage and "terms" in line]
        scores = [line for line in log if line["stage"] == stage and "scores" in line]
        names = list(dict.fromkeys(name for line in steps for name in line["terms"]))
        found.append(
            Curve(
                role=role,
                seed=int(seed or 0),
                steps=[line["step"] for line in steps],
                terms={name: [line["terms"][name] for line in steps] for name in names},
                weights={name: [line["weights"][name] for line in steps] for name in names},
                learning_rate=[line["learning_rate"] for line in steps],
                score_steps=[line["step"] for line in scores],
                scores=[next(iter(line["scores"].values())) for line in scores],
            )
        )
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Where the numbers were measured."""
    import transformers

    return {
        "limbeck": limbeck.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
