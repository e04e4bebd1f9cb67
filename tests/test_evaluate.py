"""Evaluation against independent arithmetic."""

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.evaluate import Bootstrap, agreement, compare, count_parameters, measure_speed, size_in_bytes
from limbeck.metrics import METRICS, check_metrics, get_metric
from limbeck.train import Examples

RNG = np.random.default_rng(5)
LABELS = RNG.integers(0, 2, 400)


def compared(bootstrap, teacher, baseline, student):
    logits = {"teacher": [teacher], "baseline": [baseline], "student": [student]}
    return compare(bootstrap, logits, {role: bootstrap.scores(each) for role, each in logits.items()})


def answers(share, labels=LABELS, seed=0):
    """Logits that are right on a share of the examples."""
    generator = np.random.default_rng(seed)
    right = generator.random(len(labels)) < share
    return np.eye(2)[np.where(right, labels, 1 - labels)]


def test_accuracy_interval_is_that_of_the_binomial():
    predictions = answers(0.8)
    interval = Bootstrap(LABELS, METRICS["accuracy"], resamples=2000).interval
    scores = Bootstrap(LABELS, METRICS["accuracy"], resamples=2000).scores([predictions])
    p = (predictions.argmax(1) == LABELS).mean()
    width = 1.96 * np.sqrt(p * (1 - p) / len(LABELS))
    found = interval(scores)
    assert found.value == pytest.approx(p)
    assert found.low == pytest.approx(p - width, abs=0.01)
    assert found.high == pytest.approx(p + width, abs=0.01)


def test_differences_are_paired():
    """Two models that differ on five examples differ with certainty, though each is uncertain."""
    teacher = np.eye(2)[LABELS]
    student = answers(0.7)
    better = student.copy()
    wrong = np.flatnonzero(student.argmax(1) != LABELS)[:20]
    better[wrong] = np.eye(2)[LABELS[wrong]]
    found = compared(Bootstrap(LABELS, METRICS["accuracy"]), teacher, student, better)
    assert found.gain.value == pytest.approx(20 / 400)
    assert found.gain.low > 0.02
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(found.gain.value / found.gap.value)


def test_no_ratio_within_noise():
    near = (answers(0.8, seed=s) for s in (1, 2, 3))
    found = compared(Bootstrap(LABELS, METRICS["accuracy"]), *near)
    assert found.ratio is None
    assert "not defined" in found.ratio_note
    worse = compared(Bootstrap(LABELS, METRICS["accuracy"]), answers(0.5), answers(0.9), answers(0.9))
    assert worse.ratio is None
    assert "better than the teacher" in worse.ratio_note


def test_lower_is_better_counts_improvement_as_gain():
    targets = RNG.normal(size=200)
    teacher, baseline, student = (targets[:, None] + RNG.normal(size=(200, 1)) * s for s in (0.1, 0.5, 0.2))
    found = compared(Bootstrap(targets, METRICS["mse"]), teacher, baseline, student)
    assert found.gain.value > 0
    assert found.gap.value > found.gain.value
    assert 0.5 < found.ratio.value < 1


def test_seeds_widen_the_interval():
    scattered = [answers(s, seed=i) for i, s in enumerate((0.6, 0.75, 0.9))]
    steady = [answers(0.75, seed=i) for i in range(3)]
    widths = []
    for logits in (scattered, steady):
        bootstrap = Bootstrap(LABELS, METRICS["accuracy"], seeds=3)
        interval = bootstrap.interval(bootstrap.scores(logits))
        widths.append(interval.high - interval.low)
    assert widths[0] > 1.5 * widths[1]


def test_agreement():
    teacher = answers(0.8, seed=1)
    student = answers(0.7, seed=2)
    bootstrap = Bootstrap(LABELS, METRICS["accuracy"])
    expected = (teacher.argmax(1) == student.argmax(1)).mean()
    assert agreement(bootstrap, teacher, [student]).value == pytest.approx(expected)
    numbers = RNG.normal(size=(400, 1))
    assert agreement(bootstrap, numbers, [2 * numbers + 1]).value == pytest.approx(1.0)


def confusion(labels, predicted):
    return [[sum((labels == i) & (predicted == j)) for j in (0, 1)] for i in (0, 1)]


def test_metrics_against_their_formulas():
    logits = answers(0.7)
    (tn, fp), (fn, tp) = confusion(LABELS, logits.argmax(1))
    assert METRICS["accuracy"](logits, LABELS) == pytest.approx((tp + tn) / 400)
    assert METRICS["f1"](logits, LABELS) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert METRICS["matthews"](logits, LABELS) == pytest.approx((tp * tn - fp * fn) / root)
    zero = 2 * tn / (2 * tn + fp + fn)
    assert METRICS["macro_f1"](logits, LABELS) == pytest.approx((zero + METRICS["f1"](logits, LABELS)) / 2)
    pair = (METRICS["accuracy"](logits, LABELS) + METRICS["f1"](logits, LABELS)) / 2
    assert METRICS["accuracy_and_f1"](logits, LABELS) == pytest.approx(pair)


def test_correlations_against_their_formulas():
    x, y = RNG.normal(size=(50, 1)), RNG.normal(size=50)
    a, b = x[:, 0] - x.mean(), y - y.mean()
    assert METRICS["pearson"](x, y) == pytest.approx((a @ b) / np.sqrt((a @ a) * (b @ b)))
    ranks = x[:, 0].argsort().argsort(), y.argsort().argsort()
    squares = ((ranks[0] - ranks[1]) ** 2).sum()
    assert METRICS["spearman"](x, y) == pytest.approx(1 - 6 * squares / (50 * (50**2 - 1)))
    assert METRICS["mse"](x, y) == pytest.approx(((x[:, 0] - y) ** 2).sum() / 50)
    assert METRICS["pearson"](np.ones((50, 1)), y) == 0.0


def test_metrics_that_do_not_suit():
    check_metrics(["accuracy", "macro_f1"], classes=7)
    with pytest.raises(ValueError, match="'f1' judges 2 classes, the task has 7 classes"):
        check_metrics(["f1"], classes=7)
    with pytest.raises(ValueError, match="did you mean 'spearman'"):
        get_metric("spearmen")


def test_speed_tells_a_slow_model():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            import time

            time.sleep(0.005)
            return x * self.weight

    data = Examples([{"x": torch.zeros(1), "input": torch.zeros(1)}] * 8)
    found = measure_speed({"slow": Slow(), "fast": nn.Linear(1, 1)}, data, batch_size=2, repeats=5)
    assert found["slow"].value > 0.005 > found["fast"].value


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 9
    assert size_in_bytes(model) == 36


@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "matthews", "accuracy_and_f1"])
def test_counting_pairs_gives_the_score_of_the_resample(name):
    """The quick way by pairs against the metric itself on the very examples of the resample."""
    logits = answers(0.7)
    bootstrap = Bootstrap(LABELS, METRICS[name], resamples=5)
    scores = bootstrap.scores([logits])
    for r in range(5):
        chosen = bootstrap.examples(r)
        assert scores[r + 1] == pytest.approx(METRICS[name](logits[chosen], LABELS[chosen]))
