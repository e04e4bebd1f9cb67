"""Losses between logits that also know the right class."""

import math

import pytest
import torch

from limbeck.losses import dkd, forward_kl, mft, ofa, soft_cross_entropy, wsld
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import CLASSES, INPUTS, TOKEN_LABELS
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters
from tests.losses.test_labels import IGNORED
from tests.losses.test_logits import OWN

LS, LT, SS, ST = (INPUTS[name] for name in ("LS", "LT", "SS", "ST"))

GOLDEN = {
    "dkd": {
        "dkd_a1_b8_T4": (LS, lambda x: masked_mean(dkd(x, LT, labels=CLASSES, alpha=1, beta=8, temperature=4))),
    },
    "ofa": {
        "ofa_eps1.5_T1": (LS, lambda x: masked_mean(ofa(x, LT, labels=CLASSES, eps=1.5, temperature=1.0))),
    },
}


def exponentials(logits, temperature=1.0):
    return [(z / temperature).exp() for z in logits]


def probabilities(logits, temperature=1.0):
    parts = exponentials(logits, temperature)
    return [part / sum(parts) for part in parts]


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def by_position(reference):
    """Call a reference once for each position, with its own temperature, in plain loops."""

    def batched(student, teacher, *, labels, temperature, **options):
        rows = student.flatten(end_dim=-2), teacher.flatten(end_dim=-2), labels.flatten()
        own = torch.as_tensor(temperature, dtype=student.dtype).expand(labels.shape).flatten()
        values = [
            reference(list(s), list(t), int(y), warmth, **options) if y != IGNORED else 0.0 * s.sum()
            for s, t, y, warmth in zip(*rows, own, strict=True)
        ]
        return torch.stack(values).view(labels.shape)

    return batched


def without(values, y):
    return [value for c, value in enumerate(values) if c != y]


@by_position
def naive_dkd(student, teacher, y, temperature, alpha, beta):
    """Equation 7, with the binary and the non-target distributions of equations 1 and 2."""
    (s, t) = (exponentials(side, temperature) for side in (student, teacher))
    binary = [[e[y] / sum(e), sum(without(e, y)) / sum(e)] for e in (t, s)]
    others = [[part / sum(without(e, y)) for part in without(e, y)] for e in (t, s)]
    return temperature**2 * (alpha * kl(*binary) + beta * kl(*others))


@by_position
def naive_wsld(student, teacher, y, temperature):
    doubt_s, doubt_t = (-probabilities(side)[y].log() for side in (student, teacher))
    weight = 1 - (-(doubt_s / (doubt_t + 1e-7))).exp().detach()
    q, p = probabilities(student, temperature), probabilities(teacher, temperature)
    return weight * temperature**2 * -sum(a * b.log() for a, b in zip(p, q, strict=True))


@by_position
def naive_mft(student, teacher, y, temperature, threshold):
    q, p = probabilities(student, temperature), probabilities(teacher, temperature)
    best = max(p)
    if p[y] < best:
        mix = (best - p[y] + threshold) / (1 + best - p[y] + 1e-7)
    else:
        mix = (min(p[y] + threshold, torch.ones_like(p[y])) - p[y]) / (1 - p[y] + 1e-7)
    corrected = [(1 - mix) * value + (mix if c == y else 0.0) for c, value in enumerate(p)]
    return temperature**2 * kl(corrected, q)


@by_position
def naive_ofa(student, teacher, y, temperature, eps):
    q, p = probabilities(student, temperature), probabilities(teacher, temperature)
    value = -((1 + p[y]) ** eps - 1) * q[y].log()
    return temperature**2 * (value - sum(p[c] ** eps * q[c].log() for c in range(len(p)) if c != y))


def tried(reference, defaults, *more):
    """A reference with its defaults and other options, for one label or one per token, some of them missing."""
    cases = []
    for student, teacher, labels in ((LS, LT, CLASSES), (SS, ST, TOKEN_LABELS)):
        for options in ({}, *more, {"temperature": OWN[tuple(student.shape)]}):
            full = {**defaults, **options}
            cases.append((reference, student, teacher, {"labels": labels, **full}))
    return cases


NAIVE = {
    "dkd": tried(
        naive_dkd,
        {"alpha": 1.0, "beta": 8.0, "temperature": 4.0},
        {"beta": 0.5, "temperature": 1.0},
        {"alpha": 0.3, "beta": 2.0, "temperature": 2.0},
        {"alpha": 0.0},
        {"beta": 0.0},
    ),
    "wsld": tried(naive_wsld, {"temperature": 2.0}, {"temperature": 1.0}, {"temperature": 4.0}),
    "mft": tried(
        naive_mft,
        {"threshold": 0.2, "temperature": 1.0},
        {"threshold": 0.0},
        {"threshold": 0.9},
        {"threshold": 0.3, "temperature": 2.0},
    ),
    "ofa": tried(naive_ofa, {"eps": 1.5, "temperature": 1.0}, {"eps": 1.0}, {"eps": 1.2, "temperature": 2.0}),
}
DEFAULTS = {name: {k: v for k, v in cases[0][3].items() if k != "labels"} for name, cases in NAIVE.items()}
ALL = [dkd, wsld, mft, ofa]
each = pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.__name__)


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


@each
def test_defaults_are_those_of_the_papers(loss):
    expected = loss(LS, LT, labels=CLASSES, **DEFAULTS[loss.__name__])
    assert torch.equal(loss(LS, LT, labels=CLASSES), expected)


class Labelled(LossContract):
    """Examples with a label each, one of them missing."""

    loss = staticmethod(lambda student, teacher, *, labels: forward_kl(student, teacher))
    logits = shift_invariant = True

    def example(self, *leading):
        labels = torch.arange(math.prod(leading)).view(leading) * 5 % 6
        return {**super().example(*leading), "labels": torch.where(labels == 4, IGNORED, labels)}


class TestDKD(Labelled, LossContract):
    loss = "dkd"


class TestDKDCold(Labelled, LossContract):
    loss = "dkd"
    options = {"alpha": 1.0, "beta": 0.5, "temperature": 1.0}  # noqa: RUF012


class TestWSLD(Labelled, LossContract):
    loss = "wsld"
    identity = False

    def test_gradient_is_the_derivative(self):
        """The weight has no gradient, so autograd is compared with a weight that is held fixed."""
        for example in self.examples():
            counted = example["labels"] != IGNORED
            sides = example["student"], example["teacher"]
            share = wsld(*sides, labels=example["labels"]) / soft_cross_entropy(*sides, temperature=2.0)

            def held(student, example=example, share=share):
                return share * soft_cross_entropy(student, example["teacher"], temperature=2.0)

            student = example["student"].clone().requires_grad_()
            torch.autograd.gradcheck(held, (student,))
            expected = torch.autograd.grad(held(student).sum(), student)[0]
            ours = torch.autograd.grad(self.call({**example, "student": student}).sum(), student)[0]
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
            assert not ours[~counted].any()


class TestMFT(Labelled, LossContract):
    loss = "mft"
    identity = False


class TestOFA(Labelled, LossContract):
    loss = "ofa"
    identity = False


def test_dkd_with_the_paper_weights_is_forward_kl():
    p = (LT / 4).softmax(-1).gather(-1, CLASSES[:, None])[:, 0]
    parts = [dkd(LS, LT, labels=CLASSES, alpha=a, beta=b) for a, b in ((1.0, 0.0), (0.0, 1.0))]
    whole = forward_kl(LS, LT, temperature=4.0)
    torch.testing.assert_close(parts[0] + (1 - p) * parts[1], whole, rtol=1e-12, atol=0)


def test_wsld_turns_the_teacher_down_where_the_student_needs_it_less():
    sure = LS.scatter_add(-1, CLASSES[:, None], torch.full((6, 1), 20.0, dtype=torch.float64))
    lost = LS.scatter_add(-1, CLASSES[:, None], torch.full((6, 1), -20.0, dtype=torch.float64))
    shares = [wsld(s, LT, labels=CLASSES) / soft_cross_entropy(s, LT, temperature=2.0) for s in (sure, lost)]
    assert (shares[0] < 0.01).all()
    assert (shares[1] > 0.8).all()


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
def test_mft_corrects_by_no_more_than_needed(threshold):
    """The student that would give 0 has the label ahead by the threshold, and the rest in proportion."""
    for label in range(10):
        labels = torch.full((6,), label)
        student = LT.clone().requires_grad_()
        gradient = torch.autograd.grad(mft(student, LT, labels=labels, threshold=threshold).sum(), student)[0]
        p = LT.softmax(-1)
        corrected = p - gradient  # the gradient of a cross-entropy is q minus its target
        own, others = corrected[:, label], corrected.clone()
        others[:, label] = 0
        best = p.argmax(-1)
        wrong = best != label
        torch.testing.assert_close(
            own[wrong] - others.amax(-1)[wrong], torch.full_like(own[wrong], threshold), atol=1e-6, rtol=0
        )
        gained = (p[:, label] + threshold).clamp(max=1)
        torch.testing.assert_close(own[~wrong], gained[~wrong], atol=1e-6, rtol=0)


def test_ofa_at_one_is_soft_cross_entropy():
    expected = soft_cross_entropy(LS, LT, temperature=2.0)
    ours = ofa(LS, LT, labels=CLASSES, eps=1.0, temperature=2.0)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@each
def test_a_position_without_a_label_counts_nothing(loss):
    student = SS.clone().requires_grad_()
    values = loss(student, ST, labels=TOKEN_LABELS)
    values.sum().backward()
    missing = TOKEN_LABELS == IGNORED
    assert not values[missing].any()
    assert not student.grad[missing].any()
    assert values[~missing].all()


@each
def test_a_class_that_cannot_occur_is_as_if_it_were_not_there(loss):
    impossible = torch.full((6, 3), -math.inf, dtype=torch.float64)
    student = LS.clone().requires_grad_()
    values = loss(torch.cat([student, impossible], -1), torch.cat([LT, impossible], -1), labels=CLASSES)
    values.sum().backward()
    alone = LS.clone().requires_grad_()
    expected = loss(alone, LT, labels=CLASSES)
    expected.sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, alone.grad, rtol=1e-12, atol=1e-15)


@each
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_logits_are_finite(loss, scale):
    """Both sides sure, of the same and of different classes, right and wrong; mdistiller's DKD is NaN here."""
    for dtype in (torch.float16, torch.float32):
        student = (LS * scale).to(dtype).requires_grad_()
        value = loss(student, (LT * scale).to(dtype), labels=CLASSES)
        value.sum().backward()
        assert value.isfinite().all()
        assert student.grad.isfinite().all()


@each
def test_a_label_that_cannot_occur_is_finite_where_both_sides_say_so(loss):
    """The answer may be outside of what both models are let say, as a masked token."""
    cut = torch.full((6, 10), 0.0, dtype=torch.float64).scatter(-1, CLASSES[:, None], -math.inf)
    student = LS.clone().requires_grad_()
    value = loss(student + cut, LT + cut, labels=CLASSES)
    if loss is mft:
        assert (value == math.inf).all()  # its corrected teacher expects the label
        return
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


def test_one_class_alone_teaches_nothing():
    student = torch.zeros(2, 1, requires_grad=True)
    value = dkd(student, torch.ones(2, 1), labels=torch.tensor([0, IGNORED]))
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0]
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@each
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": LS.clone(), "teacher": LT.clone()}
    pair[side][2, 3] = math.nan
    values = loss(pair["student"], pair["teacher"], labels=CLASSES)
    assert values.isnan().tolist() == [False, False, True, False, False, False]


@each
def test_labels_that_do_not_fit(loss):
    with pytest.raises(ValueError, match="label 10 lies outside the 10 classes"):
        loss(LS, LT, labels=CLASSES + 1)
    with pytest.raises(ValueError, match=r"labels of shape \(5,\) do not fit logits of shape \(6, 10\)"):
        loss(LS, LT, labels=CLASSES[:5])
    with pytest.raises(TypeError, match="labels"):
        loss(LS, LT)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], got 1.5"):
        mft(LS, LT, labels=CLASSES, threshold=1.5)
    with pytest.raises(ValueError, match=r"eps must be at least 1, got 0\.5"):
        ofa(LS, LT, labels=CLASSES, eps=0.5)
    with pytest.raises(ValueError, match="the temperature must be positive, got 0"):
        dkd(LS, LT, labels=CLASSES, temperature=0)
