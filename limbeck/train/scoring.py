"""What evaluations on the way measure: one score, or one for each task and their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from limbeck.distiller import Distiller
from limbeck.metrics import Metric, get_metric
from limbeck.registry import nearest
from limbeck.teachers import ModuleInputs
from limbeck.train.predict import predict
from limbeck.types import TASK

MEAN = "mean"

MetricLike = str | Metric


class Scoring:
    """Scores a student on the data of one task, or of several.

    Args:
        data: The data; by task where there are several.
        metric: What is measured; by task where tasks have metrics of their own.

    Attributes:
        name: The main score's.

    Raises:
        TypeError: metrics by task for data that is not.
        ValueError: an unknown metric, a task without one, or metrics of opposite directions, which have no mean.

    Example:
        >>> Scoring({"rte": [], "sts": []}, {"rte": "accuracy", "sts": "pearson"}).names()
        ['rte/accuracy', 'sts/pearson', 'mean']
    """

    def __init__(self, data: Any, metric: MetricLike | Mapping[str, MetricLike]) -> None:
        self.several = isinstance(data, Mapping)
        if isinstance(metric, Mapping) and not self.several:
            raise TypeError(f"metrics for {', '.join(metric)} need evaluation data by task; pass {{task: data}}")
        self.data: dict[str, Any] = dict(data) if self.several else {"": data}
        if not self.data:
            raise ValueError("there is no evaluation data; pass {task: data}, or leave it out")
        self.metrics = {task: get_metric(_of_task(metric, task)) for task in self.data}
        _check_metrics(metric, self.metrics)
        self.name = MEAN if self.several else self.metrics[""].name

    def names(self) -> list[str]:
        """The names of all scores."""
        each = [self._name(task) for task in self.data]
        return [*each, MEAN] if self.several else each

    def better(self, score: float, than: float | None) -> bool:
        """Whether a main score beats another; anything beats None."""
        return next(iter(self.metrics.values())).better(score, than)

    def check(self, distiller: Distiller, tasks: Iterable[str]) -> None:
        """Check, before a training, that its evaluations can work.

        Args:
            distiller: Whose student is scored.
            tasks: Those of the training data; none where it is of one.

        Raises:
            ValueError: data of a task that is not trained, or of no task, where the student has to know it.
        """
        tasks = tuple(tasks)
        for task in self.data if self.several and tasks else ():
            if task not in tasks:
                raise ValueError(f"evaluation data is for {task!r}, which is not trained; {nearest(task, tasks)}")
        if tasks and not self.several and TASK in ModuleInputs(distiller.student).named:
            raise ValueError(
                f"the student has to know the task of evaluation data; pass {{task: data}} for {', '.join(tasks)}"
            )

    def scores(
        self,
        distiller: Distiller,
        batch_size: int,
        device: torch.device,
        run: Callable[..., Any] | None = None,
    ) -> dict[str, float]:
        """Score a student; of several tasks with the mean of all.

        Args:
            distiller: Whose student is scored.
            batch_size: Examples at a time.
            device: Where it is.
            run: What is called in the student's place, if anything.

        Raises:
            FloatingPointError: its logits are NaN.
            ValueError: the data is empty or has no labels.
        """
        found = {self._name(task): self._score(task, distiller, batch_size, device, run) for task in self.data}
        return {**found, MEAN: float(np.mean(list(found.values())))} if self.several else found

    def _score(
        self,
        task: str,
        distiller: Distiller,
        batch_size: int,
        device: torch.device,
        run: Callable[..., Any] | None,
    ) -> float:
        predictions = predict(
            distiller.student,
            self.data[task],
            batch_size=batch_size,
            read=distiller.read,
            device=device,
            task=task or None,
            run=run,
        )
        if np.isnan(predictions.logits).any():
            raise FloatingPointError(f"the student's logits{f' for task {task!r}' if task else ''} are NaN")
        return self.metrics[task](predictions.logits, predictions.labels)

    def _name(self, task: str) -> str:
        return f"{task}/{self.metrics[task].name}" if self.several else self.metrics[task].name


def _of_task(metric: MetricLike | Mapping[str, MetricLike], task: str) -> MetricLike:
    if not isinstance(metric, Mapping):
        return metric
    if task not in metric:
        raise ValueError(f"there is no metric for task {task!r}; {nearest(task, metric)}")
    return metric[task]


def _check_metrics(given: MetricLike | Mapping[str, MetricLike], metrics: Mapping[str, Metric]) -> None:
    for task in given if isinstance(given, Mapping) else ():
        if task not in metrics:
            raise ValueError(f"there is a metric for {task!r} and no evaluation data; {nearest(task, metrics)}")
    up = [task for task, metric in metrics.items() if metric.higher_is_better]
    down = [task for task in metrics if task not in up]
    if up and down:
        raise ValueError(
            f"higher is better for {metrics[up[0]].name!r} of {up[0]!r} and lower for {metrics[down[0]].name!r} "
            f"of {down[0]!r}, which have no mean; choose metrics of one direction, such as 'pearson'"
        )
