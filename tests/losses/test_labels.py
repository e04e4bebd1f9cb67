"""Losses between the student's predictions and labels."""

import math

import pytest
import torch

from limbeck.losses import cross_entropy, label_mse
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import CLASSES, INPUTS, TOKEN_LABELS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters

LS, LT, SS, ST = (INPUTS[name] for name in ("LS", "LT", "SS", "ST"))
IGNORED = -100


def ce(student, labels):
    return masked_mean(cross_entropy(student, labels))


def distillation_head(student):
    """DeiT's second head, as the golden case derives it from the first."""
    return 0.7 * student + 0.1 * LT


def naive_log_softmax(logits):
    """From the definition, the largest logit taken out first."""
    shifted = logits - logits.max(dim=-1, keepdim=True).values.detach()
    total = sum(shifted[..., c].exp() for c in range(logits.shape[-1]))
    return shifted - total.log().unsqueeze(-1)


GOLDEN = {
    "cross_entropy": {
        "deit_hard_a.5_tau3": (
            LS,
            lambda x: 0.5 * ce(x, CLASSES) + 0.5 * ce(distillation_head(x), LT.argmax(-1)),
        ),
    },
}


def naive_cross_entropy(student, labels, label_smoothing=0.0):
    log_q = naive_log_softmax(student)
    classes = student.shape[-1]
    values = torch.zeros(labels.shape, dtype=student.dtype)
    for c in range(classes):
        target = label_smoothing / classes + (1 - label_smoothing) * (labels == c).to(student.dtype)
        values = values - target * log_q[..., c]
    return values * (labels != IGNORED)


def naive_label_mse(student, labels):
    return (student[..., 0] - labels) ** 2


NAIVE = {
    "cross_entropy": [
        (naive_cross_entropy, *pair, options)
        for pair in ((LS, CLASSES), (SS, TOKEN_LABELS))
        for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0})
    ],
    "label_mse": [(naive_label_mse, LS[:, :1], LT[:, 0], {}), (naive_label_mse, SS[..., :1], ST[..., 0], {})],
}


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


class TestCrossEntropy(LossContract):
    loss = "cross_entropy"
    identity = False
    logits = shift_invariant = True

    def example(self, *leading):
        student = super().example(*leading)["student"]
        return {"student": student, "teacher": torch.arange(math.prod(leading)).view(leading) % 6}


class TestLabelMSE(LossContract):
    loss = "label_mse"

    def example(self, *leading):
        shape = (*leading, 1) if len(leading) == 1 else leading
        return {"student": generate(shape, 0.2, 1.0), "teacher": generate(leading, 1.2, 1.0)}

    def at_equality(self, example):
        return {**example, "student": example["teacher"].view(example["student"].shape).clone()}


def test_label_outside_of_the_classes():
    with pytest.raises(ValueError, match="10"):
        cross_entropy(LS, torch.tensor([3, 1, 10, 1, 5, 9]))


def test_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"labels of shape \(5,\) do not fit logits of shape \(6, 10\)"):
        cross_entropy(LS, CLASSES[:5])
    with pytest.raises(ValueError, match="one prediction per label"):
        label_mse(LS, LT[:, 0])


def test_predictions_in_another_layout_are_refused():
    with pytest.raises(ValueError, match="do not fit predictions"):
        label_mse(LS.T.contiguous(), LT)


@pytest.mark.parametrize("predictions", [LS[:, 0], LS[:, :1]])
def test_predictions_with_and_without_a_last_dimension(predictions):
    expected = [(s - t) ** 2 for s, t in zip(LS[:, 0].tolist(), LT[:, 0].tolist(), strict=True)]
    assert label_mse(predictions, LT[:, 0]).tolist() == pytest.approx(expected, rel=1e-12)
