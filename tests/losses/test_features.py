"""Losses between feature tensors."""

import math

import pytest
import torch

from limbeck.losses import (
    LOSSES,
    cka,
    cosine,
    l1,
    mse,
    normalized_mse,
    pad,
    smooth_l1,
    softmax_regression,
    srd,
    traits_of,
    vid,
)
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import CASES, INPUTS, TOKEN_LABELS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters
from tests.losses.test_labels import IGNORED

LS, LT, FS, FT, ES, ET = (INPUTS[name] for name in ("LS", "LT", "FS", "FT", "ES", "ET"))
SS, ST, HS, HT, AS, AT = (INPUTS[name] for name in ("SS", "ST", "HS", "HT", "AS", "AT"))
HIDDEN_MASK = torch.tensor(CASES["hid_mse_masked"]["params"]["mask"])
VARIANCE = torch.nn.functional.softplus(torch.linspace(-1, 2, 8, dtype=torch.float64)) + 1e-5
LOG_VARIANCE = generate((6, 12), 0.9, 0.8)
WEIGHT = generate((3, 12), 2.4, 0.7)


def head(features):
    """A classifier with three classes."""
    return features @ WEIGHT.to(features.dtype).T


GOLDEN = {
    "mse": {
        "logit_mse_T4": (LS, lambda x: masked_mean(mse(x, LT)) / 16),  # both sides divided by T
        "hid_mse": (HS, lambda x: masked_mean(mse(x, HT))),
        "hid_mse_masked": (HS, lambda x: masked_mean(mse(x, HT), HIDDEN_MASK)),
        "att_mse_fullmask": (AS, lambda x: masked_mean(mse(x, AT))),
    },
    "cosine": {
        "cosine_tokens_mean": (SS, lambda x: masked_mean(cosine(x, ST), TOKEN_LABELS != IGNORED)),
        "cos_hidden": (HS, lambda x: masked_mean(cosine(x, HT))),
        "distilbert_cosine": (HS, lambda x: masked_mean(cosine(x, HT))),
        "pkd_bert_cls": (HS, lambda x: 2 * masked_mean(cosine(x[:, 0], HT[:, 0]))),  # |a-b|² of unit vectors
    },
    "normalized_mse": {"pkd_bert_cls": (HS, lambda x: masked_mean(normalized_mse(x[:, 0], HT[:, 0])))},
    "vid": {"vid_given_mean_var": (FS, lambda x: masked_mean(vid(x, FT, variance=VARIANCE)))},
}


def naive_mse(student, teacher):
    size = student.shape[-1]
    return sum((student[..., d] - teacher[..., d]) ** 2 for d in range(size)) / size


def naive_cosine(student, teacher):
    size = range(student.shape[-1])
    dot = sum(student[..., d] * teacher[..., d] for d in size)
    lengths = [sum(x[..., d] ** 2 for d in size) ** 0.5 for x in (student, teacher)]
    return 1 - dot / (lengths[0] * lengths[1])


def naive_l1(student, teacher):
    size = student.shape[-1]
    return sum((student[..., d] - teacher[..., d]).abs() for d in range(size)) / size


def naive_smooth_l1(student, teacher, beta=1.0):
    total = 0
    for d in range(student.shape[-1]):
        off = student[..., d] - teacher[..., d]
        small = off.detach().abs() < beta
        total = total + small * off * off / (2 * (beta or 1)) + ~small * (off * off.sign() - beta / 2)
    return total / student.shape[-1]


def naive_normalized_mse(student, teacher, average=False):
    size = student.shape[-1]
    dot = sum(student[..., d] * teacher[..., d] for d in range(size))
    squares = [sum(x[..., d] ** 2 for d in range(size)) for x in (student, teacher)]
    return (2 - 2 * dot / (squares[0] * squares[1]) ** 0.5) / (size if average else 1)


def naive_vid(student, teacher, variance):
    if student.ndim == 4:
        return sum(
            naive_vid(student[:, :, h, w], teacher[:, :, h, w], variance) / student[0, 0].numel()
            for h in range(student.shape[2])
            for w in range(student.shape[3])
        )
    total = 0
    for c in range(len(variance)):  # the negative logarithm of a normal density, without log(2π)/2
        total = total + (student[..., c] - teacher[..., c]) ** 2 / variance[c] / 2 + math.log(variance[c] ** 0.5)
    return total / len(variance)


def naive_pad(student, teacher, log_variance, eps=1e-6):
    size = student.shape[-1]
    spread = [math.e ** log_variance[..., d] + eps for d in range(size)]
    squares = [(teacher[..., d] - student[..., d]) ** 2 for d in range(size)]
    return sum(squares[d] / spread[d] + log_variance[..., d] for d in range(size)) / size


def rows_of(features, mask):
    """A list of vectors: valid positions of hidden states, or examples."""
    leading = (slice(None),) if mask is None and features.ndim != 3 else (slice(None), slice(None))
    count = len(leading) if mask is None else mask.ndim
    rows = features.reshape(-1, *features.shape[count:])
    valid = torch.ones(len(rows)) if mask is None else mask.reshape(-1)
    return [row.reshape(-1) for row, kept in zip(rows, valid, strict=True) if kept]


def naive_srd(student, teacher, exponent=4.0, standardize=True, mask=None):
    left, right = rows_of(student, mask), rows_of(teacher, mask)
    total = 0
    for d in range(len(left[0])):
        columns = [torch.stack([row[d] for row in side]) for side in (left, right)]
        if standardize:
            columns = [(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in columns]
        for s, t in zip(*columns, strict=True):
            total = total + abs(s - t) ** exponent
    return total.log()


def naive_cka(student, teacher, mask=None):
    """By the Hilbert-Schmidt independence criterion of the centred Gram matrices."""
    centred = []
    for side in (student, teacher):
        rows = rows_of(side, mask)
        gram = torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
        centre = torch.eye(len(rows), dtype=gram.dtype) - 1 / len(rows)
        centred.append(centre @ gram @ centre)
    products = [torch.trace(a @ b) for a in centred for b in centred]
    return 1 - products[1] / (products[0] * products[3]) ** 0.5


def naive_softmax_regression(student, teacher, head, kind="mse"):
    ours, theirs = (
        [sum(x[..., d] * WEIGHT[c, d] for d in range(x.shape[-1])) for c in range(3)] for x in (student, teacher)
    )
    if kind == "mse":
        return sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / 3
    parts, target_parts = sum(a.exp() for a in ours), sum(b.exp() for b in theirs)
    return -sum(b.exp() / target_parts * (a.exp() / parts).log() for a, b in zip(ours, theirs, strict=True))


WIDE = generate((2, 5, 12), 0.8, 1.1)
NAIVE = {
    "mse": [(naive_mse, *pair, {}) for pair in ((LS, LT), (HS, HT), (FS, FT))],
    "cosine": [(naive_cosine, *pair, {}) for pair in ((ES, ET), (HS, HT))],
    "l1": [(naive_l1, *pair, {}) for pair in ((LS, LT), (HS, HT), (FS, FT))],
    "smooth_l1": [(naive_smooth_l1, HS, HT, o) for o in ({}, {"beta": 0.3}, {"beta": 0.0})],
    "normalized_mse": [
        (naive_normalized_mse, *pair, o) for pair in ((ES, ET), (HS, HT)) for o in ({}, {"average": True})
    ],
    "vid": [(naive_vid, *pair, {"variance": VARIANCE}) for pair in ((FS, FT), (HS, HT), (HS[:, 0], HT[:, 0]))],
    "pad": [(naive_pad, ES, ET, {"log_variance": LOG_VARIANCE, **o}) for o in ({}, {"eps": 0.1})],
    "srd": [
        (naive_srd, *pair, o)
        for pair in ((ES, ET), (HS, HT))
        for o in ({}, {"exponent": 2.0}, {"standardize": False})
    ]
    + [(naive_srd, HS, HT, {"mask": HIDDEN_MASK})],
    "cka": [(naive_cka, *pair, {}) for pair in ((ES, ET), (LS, ET), (HS, WIDE), (FS, FT), (FS[:, :2], FT))]
    + [(naive_cka, HS, WIDE, {"mask": HIDDEN_MASK}), (naive_cka, FS, FT, {"mask": torch.arange(6) % 3})],
    "softmax_regression": [
        (naive_softmax_regression, *pair, {"head": head, **o})
        for pair in ((ES, ET), (WIDE, generate((2, 5, 12), 1.8, 1.4)))
        for o in ({}, {"kind": "cross_entropy"})
    ],
}


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


class TestMSE(LossContract):
    loss = "mse"


class TestCosine(LossContract):
    loss = "cosine"


class TestCosineOfChannels(LossContract):
    loss = "cosine"
    options = {"dim": 1}  # noqa: RUF012
    leading = ((4,),)

    def example(self, *leading):
        return {
            "student": generate((*leading, 3, 2, 2), 0.3, 1.0),
            "teacher": generate((*leading, 3, 2, 2), 1.1, 2.0),
        }


class TestL1(LossContract):
    loss = "l1"
    identity = False  # zero, but with a corner: no gradient to speak of

    def test_is_zero_with_a_zero_subgradient_at_equality(self):
        student = HS.clone().requires_grad_()
        value = l1(student, HS).sum()
        assert value.item() == 0.0
        value.backward()
        assert not student.grad.any()


class TestSmoothL1(LossContract):
    loss = "smooth_l1"


class TestNormalizedMSE(LossContract):
    loss = "normalized_mse"


class TestNormalizedMSEAveraged(LossContract):
    loss = "normalized_mse"
    options = {"average": True}  # noqa: RUF012


class TestVID(LossContract):
    loss = "vid"
    options = {"variance": VARIANCE[:7]}  # noqa: RUF012
    identity = non_negative = False


class TestVIDOfMaps(LossContract):
    loss = "vid"
    options = {"variance": VARIANCE[:3]}  # noqa: RUF012
    identity = non_negative = False
    leading = ((4,),)

    example = TestCosineOfChannels.example


class TestPAD(LossContract):
    loss = "pad"
    options = {"log_variance": torch.sin}  # noqa: RUF012
    identity = non_negative = False


class TestSRD(LossContract):
    loss = "srd"
    identity = non_negative = per_example = False
    leading = ((4,),)


class TestCKA(LossContract):
    loss = "cka"
    per_example = False
    leading = ((4,),)


class TestSoftmaxRegression(LossContract):
    loss = "softmax_regression"
    options = {"head": lambda x: x @ generate((7, 3), 0.6, 0.5).to(x.dtype)}  # noqa: RUF012


class TestSoftmaxRegressionByCrossEntropy(TestSoftmaxRegression):
    options = {**TestSoftmaxRegression.options, "kind": "cross_entropy"}  # noqa: RUF012
    identity = False


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", [mse, cosine, l1, smooth_l1, normalized_mse])
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": LS.clone(), "teacher": LT.clone()}
    pair[side][2, 3] = math.nan
    assert loss(pair["student"], pair["teacher"]).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("loss", [mse, cosine, l1, smooth_l1, normalized_mse])
def test_nothing_broadcasts(loss):
    with pytest.raises(ValueError, match=r"student \(6, 10\) and teacher \(1, 10\) differ in shape"):
        loss(LS, LT[:1])


def test_cosine_takes_the_dimension_of_the_channels():
    moved = cosine(FS.movedim(1, -1), FT.movedim(1, -1))
    torch.testing.assert_close(cosine(FS, FT, dim=1), moved, rtol=1e-12, atol=0)


def test_cosine_of_a_zero_vector_is_one():
    assert cosine(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [1.0, 1.0]
    assert cosine(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [1.0, 1.0]


def test_cosine_has_no_runaway_gradient_at_a_zero_vector():
    student = torch.zeros(1, 4, requires_grad=True)
    cosine(student, torch.ones(1, 4)).sum().backward()
    assert student.grad.abs().max() < 1e3


def test_a_zero_vector_has_no_runaway_gradient_after_normalisation():
    student = torch.zeros(2, 4, requires_grad=True)
    values = normalized_mse(student, torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    values.sum().backward()
    assert values.tolist() == [1.0, 0.0]
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize("name", ["vid", "pad", "srd", "cka", "softmax_regression"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_is_not_swallowed_by(name, side):
    options = {"vid": {"variance": LOG_VARIANCE[0].exp()}, "pad": {"log_variance": LOG_VARIANCE}}
    options["softmax_regression"] = {"head": head}
    pair = {"student": ES.clone(), "teacher": ET.clone()}
    pair[side][2, 3] = math.nan
    values = LOSSES.get(name)(pair["student"], pair["teacher"], **options.get(name, {}))
    expected = [False, False, True, False, False, False] if values.ndim else True
    assert values.isnan().tolist() == expected


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "normalized_mse", "vid", "pad", "srd", "softmax_regression"])
def test_other_shapes_are_refused_with_a_cure(name):
    options = {
        "vid": {"variance": VARIANCE},
        "pad": {"log_variance": LOG_VARIANCE},
        "softmax_regression": {"head": head},
    }
    with pytest.raises(ValueError, match=r"student \(2, 5, 8\) and teacher \(2, 5, 12\).*project='linear'"):
        LOSSES.get(name)(HS, WIDE, **options.get(name, {}))


def test_vid_calls_what_it_is_given_and_trains_it():
    raw = VARIANCE.clone().requires_grad_()
    values = vid(FS, FT, variance=lambda: raw)
    torch.testing.assert_close(values, vid(FS, FT, variance=VARIANCE))
    values.mean().backward()
    assert raw.grad.abs().min() > 0
    assert dict(traits_of(vid).learns) == {"variance": "channel_variance"}


def test_vid_needs_one_variance_per_channel():
    with pytest.raises(ValueError, match=r"\(6,\) values do not fit features \(6, 8, 6, 6\); .* 8 channels"):
        vid(FS, FT, variance=VARIANCE[:6])


def test_pad_reads_the_variances_off_the_student_and_trains_them():
    module = torch.nn.Linear(12, 12).double()
    values = pad(ES, ET, log_variance=module)
    torch.testing.assert_close(values, pad(ES, ET, log_variance=module(ES)))
    values.mean().backward()
    assert module.weight.grad.any()
    with pytest.raises(ValueError, match=r"log_variance \(12,\) must have the features' shape \(6, 12\)"):
        pad(ES, ET, log_variance=LOG_VARIANCE[0])


@pytest.mark.parametrize("standardize", [True, False])
def test_srd_is_bounded_at_equality(standardize):
    student = ES.clone().requires_grad_()
    value = srd(student, ES, standardize=standardize)
    value.backward()
    assert value.item() == pytest.approx(math.log(1e-12))
    assert not student.grad.any()


def test_srd_of_one_example_has_nothing_to_standardise():
    student = ES[:1].clone().requires_grad_()
    value = srd(student, ET[:1])
    value.backward()
    assert value.item() == pytest.approx(math.log(1e-12))
    assert not student.grad.any()


def test_cka_ignores_rotation_and_scale():
    rotation = torch.linalg.qr(generate((12, 12), 0.3, 1.0)).Q
    assert cka(3 * ES @ rotation + 5, ES).item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(cka(ES @ rotation, 7 * ET), cka(ES, ET))


@pytest.mark.parametrize("student", [ES[:1], torch.ones_like(ES), torch.zeros_like(ES)])
def test_cka_is_one_where_nothing_varies(student):
    student = student.clone().requires_grad_()
    value = cka(student, ET[: len(student)])
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cka, srd])
def test_masked_positions_reach_no_batch_statistic(loss):
    def value_and_gradient(student, teacher):
        student = student.clone().requires_grad_()
        value = loss(student, teacher, mask=HIDDEN_MASK)
        value.backward()
        return value, student.grad

    poison = (HIDDEN_MASK == 0).unsqueeze(-1) * torch.ones(8)
    student, teacher = (x.masked_fill(poison == 1, math.nan) for x in (HS, HT))
    (value, gradient), (expected, its_gradient) = value_and_gradient(student, teacher), value_and_gradient(HS, HT)
    assert value == expected
    assert torch.equal(gradient, its_gradient)
    assert not gradient[HIDDEN_MASK == 0].any()


@pytest.mark.parametrize("loss", [cka, srd])
def test_a_mask_that_does_not_fit_is_refused(loss):
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 4\) does not fit features \(2, 5, 8\)"):
        loss(HS, HT, mask=HIDDEN_MASK[:, :4])
    assert loss(HS, HT, mask=torch.zeros(2, 5)).isfinite()  # nothing is valid


def test_cka_needs_the_same_rows():
    with pytest.raises(ValueError, match="tap other places"):
        cka(HS, HT[:, :4])


def test_softmax_regression_gives_the_head_no_other_gradient_than_the_students():
    weight = WEIGHT.clone().requires_grad_()
    softmax_regression(ES, ET, head=lambda x: x @ weight.T).sum().backward()
    own = WEIGHT.clone().requires_grad_()
    (ES @ own.T - ET @ WEIGHT.T).square().mean(-1).sum().backward()
    torch.testing.assert_close(weight.grad, own.grad)
    assert traits_of(softmax_regression).borrows == ("head",)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smooth_l1(LS, LT, beta=-1.0), "beta must not be negative, got -1.0"),
        (lambda: smooth_l1(LS, LT, beta=math.nan), "beta must not be negative, got nan"),
        (lambda: srd(LS, LT, exponent=0.5), "the exponent must be at least 1, got 0.5"),
        (lambda: softmax_regression(ES, ET, head=head, kind="kl"), "unknown kind 'kl'.*known: mse, cross_entropy"),
    ],
)
def test_options_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
