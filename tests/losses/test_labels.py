"""Losses between the student's predictions and labels."""

import math

import pytest
import torch

from limbeck.losses import binary_cross_entropy, cross_entropy, label_mse
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


def naive_binary_cross_entropy(student, labels, label_smoothing=0.0, classes="mean"):
    total, known = 0.0, 0.0
    for c in range(student.shape[-1]):
        there = (labels[..., c] != IGNORED).to(student.dtype)
        right = labels[..., c].to(student.dtype) * (1 - label_smoothing) + label_smoothing / 2
        q = 1 / (1 + (-student[..., c]).exp())
        total = total - there * (right * q.log() + (1 - right) * (1 - q).log())
        known = known + there
    return total / known.clamp(min=1) if classes == "mean" else total


def naive_label_mse(student, labels):
    return (student[..., 0] - labels) ** 2


MANY = (generate((6, 10), 0.7, 1.0) > 0.2).long()  # several classes at once
MANY[0, 3] = MANY[4, 9] = IGNORED
MANY[2] = IGNORED
SHARES = generate((2, 5, 11), 0.9, 0.5) + 0.5  # a probability for each class

NAIVE = {
    "binary_cross_entropy": [
        (naive_binary_cross_entropy, *pair, options)
        for pair in ((LS, MANY), (LS, MANY.double()), (SS, SHARES))
        for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.3, "classes": "sum"})
    ],
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


class TestCrossEntropySmooth(TestCrossEntropy):
    options = {"label_smoothing": 0.1}  # noqa: RUF012


class TestBinaryCrossEntropy(LossContract):
    loss = "binary_cross_entropy"
    identity = False
    logits = True

    def example(self, *leading):
        student = super().example(*leading)["student"]
        labels = torch.arange(student.numel()).view(student.shape) % 3 % 2
        return {"student": student, "teacher": torch.where(student < 2, labels, IGNORED)}

    def _extremes(self, example):
        """What the student excludes can be no label."""
        extremes = super()._extremes(example)
        extremes["a class at -inf"]["teacher"] = example["teacher"].index_fill(-1, torch.tensor([6]), 0)
        return extremes


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


def test_labels_that_are_not_known_do_not_count():
    values = cross_entropy(LS, torch.where(torch.arange(6) == 2, IGNORED, CLASSES), label_smoothing=0.1)
    assert (values == 0).tolist() == [False, False, True, False, False, False]
    numbers = torch.tensor([1.0, IGNORED, 3.0])
    assert label_mse(torch.zeros(3, 1), numbers, ignore_index=IGNORED).tolist() == [1.0, 0.0, 9.0]
    assert label_mse(torch.zeros(3, 1), numbers).tolist() == [1.0, IGNORED**2, 9.0]  # a number like any other
    assert (binary_cross_entropy(LS, MANY) == 0).tolist() == [False, False, True, False, False, False]


def test_an_unknown_entry_is_as_if_it_were_not_there():
    student = LS.clone().requires_grad_()
    values = binary_cross_entropy(student, torch.where(torch.arange(10) == 9, IGNORED, (LT > 0).long()))
    values.sum().backward()
    alone = binary_cross_entropy(LS[:, :9], (LT > 0).long()[:, :9])
    torch.testing.assert_close(values, alone, rtol=1e-12, atol=0)
    assert not student.grad[:, 9].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_smoothing_leaves_out_a_class_that_cannot_occur(label_smoothing):
    """PyTorch's own smoothing is infinite here."""
    student = torch.cat([LS, torch.full((6, 1), -math.inf, dtype=torch.float64)], -1).requires_grad_()
    values = cross_entropy(student, CLASSES, label_smoothing=label_smoothing)
    values.sum().backward()
    expected = cross_entropy(LS, CLASSES, label_smoothing=label_smoothing)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_like_the_frameworks_own(label_smoothing):
    expected = torch.nn.functional.cross_entropy(LS, CLASSES, label_smoothing=label_smoothing)
    assert ce_smooth(label_smoothing).item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = (LT > 0).double()
    both = torch.nn.functional.binary_cross_entropy_with_logits(LS, wanted)
    assert masked_mean(binary_cross_entropy(LS, wanted)).item() == pytest.approx(both.item(), rel=1e-12)


def ce_smooth(label_smoothing):
    return masked_mean(cross_entropy(LS, CLASSES, label_smoothing=label_smoothing))


@pytest.mark.parametrize(("loss", "labels"), [(cross_entropy, CLASSES), (binary_cross_entropy, MANY)])
@pytest.mark.parametrize("label_smoothing", [-0.1, 1.5, math.nan])
def test_smoothing_is_a_share(loss, labels, label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing is a share from 0 to 1, got"):
        loss(LS, labels, label_smoothing=label_smoothing)


def test_binary_labels_are_probabilities_of_every_class():
    with pytest.raises(ValueError, match="takes a 0 or 1 for each class"):
        binary_cross_entropy(LS, CLASSES)
    with pytest.raises(ValueError, match="takes labels from 0 to 1"):
        binary_cross_entropy(LS, MANY + 1)
    with pytest.raises(ValueError, match="classes are taken by 'mean' or 'sum', got 'none'"):
        binary_cross_entropy(LS, MANY, classes="none")


def test_certain_predictions_have_a_finite_binary_cross_entropy():
    student = torch.tensor([[-math.inf, math.inf, 1e4, -1e4]], requires_grad=True)
    value = binary_cross_entropy(student, torch.tensor([[0, 1, 0, 1]]))
    value.sum().backward()
    assert value.item() == pytest.approx(5000.0)
    assert student.grad.tolist() == [[0.0, 0.0, 0.25, -0.25]]


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_nan_is_not_swallowed(loss):
    student = LS.clone()
    student[1, 4] = math.nan
    labels = CLASSES if loss is cross_entropy else (LT > 0).long()
    assert loss(student, labels).isnan().tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("loss", [cross_entropy, binary_cross_entropy])
def test_any_label_may_be_the_one_to_ignore(loss):
    labels = CLASSES if loss is cross_entropy else (LT > 0).long()
    ours = loss(LS, labels, ignore_index=1)
    expected = loss(LS, torch.where(labels == 1, IGNORED, labels))
    torch.testing.assert_close(ours, expected)
    assert not torch.equal(ours, loss(LS, labels))


def test_labels_that_are_no_indices():
    with pytest.raises(ValueError, match="labels are class indices, whole numbers"):
        cross_entropy(LS, CLASSES.double())
