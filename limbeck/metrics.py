"""Metrics by name: functions of predictions and labels, each with its direction.

They are scikit-learn's and SciPy's, the ones that GLUE's own scorer uses, so numbers compare.

Shape legend: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.registry import nearest

Array = NDArray[np.float64]
Score = Callable[[Any, Any, Any], float]


@dataclass(frozen=True)
class Metric:
    """A named score of predictions against labels.

    Attributes:
        name: Its name in reports and recipes.
        score: ``(predictions (N,), labels (N,), weights (N,) or None) -> float``; predictions are classes, or
            numbers where `numbers` says so. Numbers take no weights.
        higher_is_better: The direction in which a model improves.
        numbers: Whether it judges numbers and not classes.
        classes: The number of classes it needs; 0 for any.
        margin: Whether it judges, of two classes, by how much the second logit exceeds the first. It takes no
            weights.

    Example:
        >>> METRICS["accuracy"](np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
        0.5
    """

    name: str
    score: Score
    higher_is_better: bool = True
    numbers: bool = False
    classes: int = 0
    margin: bool = False

    def __call__(self, logits: Array, labels: Array) -> float:
        """Score predictions (N, C) against labels (N,)."""
        return float(self.score(self.decide(logits), labels, None))

    def decide(self, logits: Array) -> Array:
        """What a model decides: the class with the largest logit, the margin or the number; (N, C) to (N,)."""
        if self.margin:
            return np.asarray(logits[:, 1] - logits[:, 0])
        return logits.reshape(len(logits)) if self.numbers else np.asarray(np.argmax(logits, axis=-1))

    def better(self, score: float, than: float | None) -> bool:
        """Whether a score beats another; anything beats None."""
        if than is None:
            return True
        return score > than if self.higher_is_better else score < than


def _accuracy(predicted: Array, labels: Array, weights: Array | None) -> float:
    return float(np.average(predicted == labels, weights=weights))


def _f1(predicted: Array, labels: Array, weights: Array | None) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, sample_weight=weights, zero_division=0.0))


def _macro_f1(predicted: Array, labels: Array, weights: Array | None) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro", sample_weight=weights, zero_division=0.0))


def _matthews(predicted: Array, labels: Array, weights: Array | None) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted, sample_weight=weights))


def _pearson(predicted: Array, labels: Array, weights: None) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, labels)


def _spearman(predicted: Array, labels: Array, weights: None) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, labels)


def _correlation(function: Callable[..., tuple[float, float]], x: Array, y: Array) -> float:
    """A correlation, 0 where one side is constant and none is defined."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(function(x, y)[0])


def _mean_squared_error(predicted: Array, labels: Array, weights: None) -> float:
    return float(np.mean((predicted - labels) ** 2))


def _root_mean_squared_error(predicted: Array, labels: Array, weights: None) -> float:
    return float(np.sqrt(_mean_squared_error(predicted, labels, weights)))


def _determination(predicted: Array, labels: Array, weights: None) -> float:
    """The share of the labels' variance that is explained; 0 where they have none."""
    variance = float(np.var(labels))
    return 1.0 - _mean_squared_error(predicted, labels, weights) / variance if variance else 0.0


def _balanced_accuracy(predicted: Array, labels: Array, weights: Array | None) -> float:
    """The mean over the classes that labels have of the share that was found."""
    right = (predicted == labels).astype(float)
    return float(np.mean([np.average(right[own], weights=_part(weights, own)) for own in _of_each(labels)]))


def _of_each(labels: Array) -> list[Any]:
    return [labels == one for one in np.unique(labels)]


def _part(weights: Array | None, chosen: Any) -> Array | None:
    return None if weights is None else weights[chosen]


def _quadratic_kappa(predicted: Array, labels: Array, weights: Array | None) -> float:
    from sklearn.metrics import cohen_kappa_score

    if len({*np.unique(predicted), *np.unique(labels)}) < 2:
        return 0.0  # none is defined
    return float(cohen_kappa_score(labels, predicted, weights="quadratic", sample_weight=weights))


def _roc_auc(margins: Array, labels: Array, weights: None) -> float:
    """The area under the curve; a half, as by chance, where labels are all of one class and none is defined."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, margins)) if len(np.unique(labels)) == 2 else 0.5


def _mean(*scores: Score) -> Score:
    return lambda predicted, labels, weights: float(np.mean([s(predicted, labels, weights) for s in scores]))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy),
        Metric("f1", _f1, classes=2),
        Metric("macro_f1", _macro_f1),
        Metric("matthews", _matthews),
        Metric("pearson", _pearson, numbers=True),
        Metric("spearman", _spearman, numbers=True),
        Metric("mse", _mean_squared_error, higher_is_better=False, numbers=True),
        Metric("rmse", _root_mean_squared_error, higher_is_better=False, numbers=True),
        Metric("r2", _determination, numbers=True),
        Metric("balanced_accuracy", _balanced_accuracy),
        Metric("quadratic_kappa", _quadratic_kappa),
        Metric("roc_auc", _roc_auc, classes=2, margin=True),
        Metric("accuracy_and_f1", _mean(_accuracy, _f1), classes=2),
        Metric("pearson_and_spearman", _mean(_pearson, _spearman), numbers=True),
    )
}
"""All metrics by name. The two with ``and`` are means, as GLUE scores MRPC, QQP and STS-B."""


def get_metric(name: str | Metric) -> Metric:
    """Find a metric by name.

    Raises:
        ValueError: there is none; the message lists the nearest.

    Example:
        >>> get_metric("mse").higher_is_better
        False
    """
    if isinstance(name, Metric):
        return name
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
    return METRICS[name]


def check_metrics(names: Sequence[str], classes: int) -> None:
    """Check that metrics exist and can judge a task with so many classes (0: numbers to predict).

    Raises:
        ValueError: a metric that does not exist or does not suit the task.

    Example:
        >>> check_metrics(["accuracy"], classes=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the metric 'accuracy' judges classes, the task has numbers; choose one of mse, pearson, ...
    """
    for name in names:
        metric = get_metric(name)
        if not _suits(metric, classes):
            judges = "numbers" if metric.numbers else f"{metric.classes or ''} classes".strip()
            has = f"{classes} classes" if classes else "numbers"
            fitting = ", ".join(sorted(m.name for m in METRICS.values() if _suits(m, classes)))
            raise ValueError(f"the metric {name!r} judges {judges}, the task has {has}; choose one of {fitting}")


def _suits(metric: Metric, classes: int) -> bool:
    return metric.numbers == (classes == 0) and metric.classes in (0, classes)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a sentence that is tagged ``B-PER I-PER O``: kind, first word and the one after the last.

    An ``I-`` that continues nothing begins an entity, as in the CoNLL scorer.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        if kind and (prefix != "I" or own != kind):
            found.add((kind, start, place))
            kind = ""
        if prefix in ("B", "I") and not kind:
            kind, start = own, place
    return found


def entity_scores(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """How many entities are found exactly, over all sentences.

    Args:
        predicted: The tags of each sentence.
        labels: The right ones.

    Returns:
        ``precision``, ``recall`` and ``f1``; 0 where there is no entity to divide by.

    Example:
        >>> entity_scores([["B-PER", "O"], ["O", "B-LOC"]], [["B-PER", "O"], ["B-LOC", "I-LOC"]])
        {'precision': 0.5, 'recall': 0.5, 'f1': 0.5}
    """
    ours, right = (
        {(number, *one) for number, tags in enumerate(side) for one in entities(tags)}
        for side in (predicted, labels)
    )
    both = len(ours & right)
    return {
        "precision": both / max(1, len(ours)),
        "recall": both / max(1, len(right)),
        "f1": 2 * both / max(1, len(ours) + len(right)),
    }
