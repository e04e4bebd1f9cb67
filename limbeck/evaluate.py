"""Evaluation: scores with intervals, agreement with the teacher, speed, size.

Shape legend: N examples, R resamples, S seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from limbeck.batch import to_device
from limbeck.metrics import Array, Metric, get_metric
from limbeck.report.report import Comparison, Interval
from limbeck.teachers import ModuleInputs
from limbeck.train import Examples
from limbeck.types import Batch

Judge = Callable[[NDArray[np.int64]], float]

RESAMPLES = 1000
LEVEL = 0.95


class Bootstrap:
    """Resamples of evaluation examples and seeds, the same for every model, so that differences are paired.

    Each resample draws the examples with replacement, and the seeds too where there are several.

    Args:
        labels: What is true of each example, (N,).
        metric: The score.
        seeds: Number of seeds S.
        resamples: Number of resamples R.

    Example:
        >>> labels = np.array([0, 1] * 50)
        >>> from limbeck.metrics import METRICS
        >>> bootstrap = Bootstrap(labels, METRICS["accuracy"], resamples=100)
        >>> right = np.eye(2)[labels]
        >>> bootstrap.interval(bootstrap.scores([right])).value
        1.0

    Reference:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap (percentile intervals).
    """

    def __init__(self, labels: Array, metric: Metric, seeds: int = 1, resamples: int = RESAMPLES) -> None:
        self.labels = labels
        self.metric = metric
        self.resamples = resamples
        self.seeds = np.random.default_rng(0).integers(0, seeds, (resamples, seeds))

    def examples(self, resample: int) -> NDArray[np.int64]:
        """The examples of one resample, (N,); drawn anew each time, since all of them would fill the memory."""
        return np.random.default_rng((1, resample)).integers(0, len(self.labels), len(self.labels))

    def scores(self, logits: Sequence[Array]) -> Array:
        """The score of a model in each resample, (R + 1,), the first on the data as it is.

        Args:
            logits: Predictions (N, C), one array for each seed; a single array stands for all seeds.
        """
        judges = [self._judge(self.metric.decide(each)) for each in logits]
        whole = np.mean([judge(np.arange(len(self.labels))) for judge in judges])
        return np.array([whole, *(self._mean(judges, r) for r in range(self.resamples))])

    def _mean(self, judges: Sequence[Judge], resample: int) -> float:
        """The mean over the seeds of one resample."""
        chosen = self.examples(resample)
        seeds = self.seeds[resample] if len(judges) > 1 else [0]
        values = {seed: judges[seed](chosen) for seed in set(seeds)}
        return float(np.mean([values[seed] for seed in seeds]))

    def _judge(self, predicted: Array) -> Judge:
        """The score as a function of the chosen examples.

        A score of classes depends on how often each pair of label and prediction occurs and on nothing else, so it
        is computed on these few pairs with their counts as weights.
        """
        score, labels = self.metric.score, self.labels
        if self.metric.numbers or self.metric.margin:
            return lambda chosen: score(predicted[chosen], labels[chosen], None)
        pairs, number = np.unique(np.stack([labels, predicted]), axis=1, return_inverse=True)
        number = number.reshape(-1)

        def judge(chosen: NDArray[np.int64]) -> float:
            counts = np.bincount(number[chosen], minlength=pairs.shape[1])
            there = counts > 0
            return score(pairs[1][there], pairs[0][there], counts[there])

        return judge

    def against(self, labels: Array, metric: Metric) -> Bootstrap:
        """The same resamples, judged by another metric against other labels."""
        other = Bootstrap(labels, metric, resamples=self.resamples)
        other.seeds = self.seeds
        return other

    @staticmethod
    def interval(values: Array) -> Interval:
        """The first value with the percentile interval of the others."""
        tail = 100 * (1 - LEVEL) / 2
        low, high = np.percentile(values[1:], [tail, 100 - tail])
        return Interval(float(values[0]), float(low), float(high))


def compare(
    bootstrap: Bootstrap,
    logits: Mapping[str, Sequence[Array]],
    scores: Mapping[str, Array],
) -> Comparison:
    """Say how a student stands to its teacher and to its plainly trained twin.

    Args:
        bootstrap: The resamples.
        logits: Predictions of ``"teacher"``, ``"baseline"`` and ``"student"``, one array for each seed.
        scores: What `Bootstrap.scores` made of them.

    Returns:
        Differences and ratios with paired 95 % intervals. In metrics where lower is better, gain and gap count
        improvements as positive.
    """
    sign = 1.0 if bootstrap.metric.higher_is_better else -1.0
    gain = sign * (scores["student"] - scores["baseline"])
    gap = sign * (scores["teacher"] - scores["baseline"])
    ratio, note = distillation_ratio(gain, gap)
    teacher = logits["teacher"][0]
    return Comparison(
        gain=bootstrap.interval(gain),
        gap=bootstrap.interval(gap),
        ratio=ratio,
        ratio_note=note,
        retention=bootstrap.interval(kept_share(scores["student"], scores["teacher"])),
        agreement=agreement(bootstrap, teacher, logits["student"]),
        baseline_agreement=agreement(bootstrap, teacher, logits["baseline"]),
    )


def kept_share(student: Array, teacher: Array) -> Array:
    """The student's scores over the teacher's; 0 where the teacher has none.

    Example:
        >>> kept_share(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
        array([0.5, 0. ])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(student / teacher, nan=0.0, posinf=0.0, neginf=0.0)


def distillation_ratio(gain: Array, gap: Array) -> tuple[Interval | None, str]:
    """Gain over gap, where there is a gap.

    Args:
        gain: What distillation added to the baseline, on the data as it is and in each resample, (R + 1,).
        gap: What the teacher has over the baseline, likewise.

    Returns:
        The ratio, and where there is none, why.

    Example:
        >>> distillation_ratio(np.array([1.0, 1.0, 2.0]), np.array([4.0, 2.0, 4.0]))[0].value
        0.25
        >>> distillation_ratio(np.array([1.0, 1.0, 2.0]), np.array([1.0, -1.0, 2.0]))[1]
        'not defined: the gap between teacher and baseline is within noise'

    Reference:
        He et al. 2022, Towards Automated Distillation, AutoML-Conf late-breaking workshop.
    """
    whole = Bootstrap.interval(gap)
    if not whole.excludes_zero:
        return None, "not defined: the gap between teacher and baseline is within noise"
    if whole.value < 0:
        return None, "not defined: the baseline is better than the teacher"
    usable = gap != 0
    return Bootstrap.interval(gain[usable] / gap[usable]), ""


def agreement(bootstrap: Bootstrap, teacher: Array, student: Sequence[Array]) -> Interval:
    """How often student and teacher decide alike; for numbers, how they correlate (Pearson).

    Args:
        bootstrap: The resamples, whose examples and seeds are used; its labels are not.
        teacher: Predictions (N, C), or (N, 1) for numbers.
        student: The student's, one array for each seed.
    """
    metric = get_metric("pearson" if teacher.shape[1] == 1 else "accuracy")
    decided = metric.decide(teacher)
    return bootstrap.interval(bootstrap.against(decided, metric).scores(student))


def measure_speed(
    models: Mapping[str, nn.Module],
    data: Examples | Mapping[str, Examples],
    *,
    batch_size: int,
    repeats: int = 30,
    warmup: int = 3,
) -> dict[str, Interval]:
    """Time one forward pass of several models on the same batches, in turn.

    The models take turns on every batch, so that a machine that slows down slows all of them.

    Args:
        models: The models by name.
        data: Where the batches come from; by name, where the models do not take the same inputs.
        batch_size: Examples in a batch.
        repeats: Timed rounds.
        warmup: Rounds before that.

    Returns:
        Seconds per batch by name: the median with the quartiles.

    Example:
        >>> data = Examples([{"input": torch.zeros(4)}] * 8)
        >>> measured = measure_speed({"a": nn.Linear(4, 4)}, data, batch_size=4, repeats=3)
        >>> measured["a"].low <= measured["a"].value <= measured["a"].high
        True
    """
    times = time_in_turns(models, data, batch_size=batch_size, repeats=repeats, warmup=warmup)
    return {name: quartiles(values) for name, values in times.items()}


def time_in_turns(
    models: Mapping[str, nn.Module],
    data: Examples | Mapping[str, Examples],
    *,
    batch_size: int,
    repeats: int = 30,
    warmup: int = 3,
) -> dict[str, Array]:
    """The times that `measure_speed` sums up: seconds per batch by name, one for each turn, (repeats,).

    Example:
        >>> data = Examples([{"input": torch.zeros(4)}] * 8)
        >>> time_in_turns({"a": nn.Linear(4, 4)}, data, batch_size=4, repeats=3)["a"].shape
        (3,)
    """
    own = data if isinstance(data, Mapping) else dict.fromkeys(models, data)
    count = min(len(examples) for examples in own.values())
    size = min(batch_size, count)
    calls = {name: ModuleInputs(model.eval()) for name, model in models.items()}
    devices = {name: next((p.device for p in m.parameters()), torch.device("cpu")) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(warmup + repeats):
        start = (turn * size) % max(1, count - size + 1)
        for name, call in calls.items():
            batch = own[name].batch(range(start, start + size))
            seconds = _time(call, to_device(batch, devices[name]))
            if turn >= warmup:
                times[name].append(seconds)
    return {name: np.array(values) for name, values in times.items()}


def speedups(slow: Array, fast: Array, resamples: int = RESAMPLES) -> Array:
    """How many times faster one model is than another, as it was timed and in resamples of the turns, (R + 1,).

    Args:
        slow: Seconds of one, by turn, (T,).
        fast: Seconds of the other in the same turns, (T,).
        resamples: Number of resamples R, of whole turns: what slowed the machine down slowed both.

    Example:
        >>> speedups(np.array([2.0, 4.0]), np.array([1.0, 2.0]), resamples=3)
        array([2., 2., 2., 2.])
    """
    turns = np.random.default_rng(3).integers(0, len(slow), (resamples, len(slow)))
    again = np.median(slow[turns], axis=1) / np.median(fast[turns], axis=1)
    return np.array([np.median(slow) / np.median(fast), *again])


def _time(call: Callable[[Batch], Any], batch: Batch) -> float:
    with torch.no_grad():
        _wait()
        start = time.perf_counter()
        call(batch)
        _wait()
        return time.perf_counter() - start


def _wait() -> None:
    """Wait for an accelerator: its work is only queued when a call returns."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def quartiles(values: Array) -> Interval:
    """The median with the quartiles.

    Example:
        >>> quartiles(np.array([1.0, 2.0, 3.0])).format(1)
        '2.0 [1.5, 2.5]'
    """
    low, middle, high = np.percentile(values, [25, 50, 75])
    return Interval(float(middle), float(low), float(high))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of the weights as they are saved, shared ones once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
