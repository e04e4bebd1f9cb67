"""Losses between logits."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from limbeck.losses import (
    forward_kl,
    hard_label,
    js_divergence,
    logit_mse,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import CLASSES, INPUTS, TOKEN_LABELS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters
from tests.losses.test_labels import IGNORED, ce, distillation_head, naive_log_softmax

LS, LT, SS, ST = (INPUTS[name] for name in ("LS", "LT", "SS", "ST"))
ES, ET, HS, HT, AS, AT = (INPUTS[name] for name in ("ES", "ET", "HS", "HT", "AS", "AT"))


def kl(student, teacher, temperature=1.0, mask=None):
    return masked_mean(forward_kl(student, teacher, temperature=temperature), mask)


def jsd(beta):
    """As TRL and Liger average it, over the tokens with a label."""
    return lambda x: masked_mean(js_divergence(x, ST, beta=beta), TOKEN_LABELS != IGNORED)


def soft_ce(student, temperature=1.0):
    return masked_mean(soft_cross_entropy(student, LT, temperature=temperature))


def gram(features):
    rows = normalize(features, dim=-1)
    return rows @ rows.mT / 0.07


def to_queue(embeddings):
    return normalize(embeddings, dim=-1) @ normalize(generate((9, 12), 3.3, 1.0), dim=-1).T / 0.07


def pair_scores(query):
    positive, negative = generate((4, 6), 1.2, 1.0), generate((4, 6), 2.2, 1.0)
    return torch.stack([(query * positive).sum(-1), (query * negative).sum(-1)], dim=-1)


QUERY, PAIR_LABELS = generate((4, 6), 0.2, 1.0), generate((4, 2), 0.5, 2.0)

GOLDEN = {
    "forward_kl": {
        "kl_T4_batchmean_T2": (LS, lambda x: kl(x, LT, 4.0)),
        "kd_T4_alpha.1_beta.9": (LS, lambda x: 0.1 * ce(x, CLASSES) + 0.9 * kl(x, LT, 4.0)),
        "gjsd_beta0_T1_maskedmean": (SS, lambda x: kl(x, ST, mask=TOKEN_LABELS != IGNORED)),
        "deit_soft_a.5_tau3": (  # DeiT divides its divergence by the number of classes too
            LS,
            lambda x: 0.5 * ce(x, CLASSES) + 0.5 * kl(distillation_head(x), LT, 3.0) / 10,
        ),
        "token_gram_kl_tau.07": (HS, lambda x: kl(gram(x), gram(HT))),
        "lightly_v1_queue_kl": (ES, lambda x: kl(to_queue(x), to_queue(ET))),
        "st_distill_kl_T2": (QUERY, lambda x: kl(pair_scores(x), PAIR_LABELS, 2.0)),
        "minilm_attention_kl": (AS, lambda x: kl(x, AT)),
    },
    "reverse_kl": {
        "gjsd_beta1_T1_maskedmean": (SS, lambda x: masked_mean(reverse_kl(x, ST), TOKEN_LABELS != IGNORED)),
    },
    "js_divergence": {
        "gjsd_beta0_T1_maskedmean": (SS, jsd(0.0)),
        "gjsd_beta0.1_T1_maskedmean": (SS, jsd(0.1)),
        "gjsd_beta0.5_T1_maskedmean": (SS, jsd(0.5)),
        "gjsd_beta1_T1_maskedmean": (SS, jsd(1)),
    },
    "soft_cross_entropy": {
        "soft_ce_T4_T2": (LS, lambda x: soft_ce(x, 4.0)),
        "soft_ce_T4_noT2": (LS, lambda x: soft_ce(x, 4.0) / 16),  # TextBrewer leaves T² out
        "tinybert_soft_ce_mean_all": (LS, lambda x: soft_ce(x) / 10),  # TinyBERT divides by the classes
    },
    "logit_mse": {
        "logit_mse_T4": (LS, lambda x: masked_mean(logit_mse(x, LT, temperature=4.0))),
    },
    "hard_label": {
        "deit_hard_a.5_tau3": (
            LS,
            lambda x: 0.5 * ce(x, CLASSES) + 0.5 * masked_mean(hard_label(distillation_head(x), LT)),
        ),
    },
}


def softened(logits, temperature):
    """Log-probabilities by class, and T² by position."""
    warmth = torch.as_tensor(temperature, dtype=logits.dtype)
    log_probs = naive_log_softmax(logits / (warmth[..., None] if warmth.ndim else warmth))
    return [log_probs[..., c] for c in range(logits.shape[-1])], warmth**2


def naive_divergence(f):
    """The sum over the classes of a function of p and q, times T²."""

    def reference(student, teacher, temperature=1.0, **options):
        (log_q, square), (log_p, _) = softened(student, temperature), softened(teacher, temperature)
        values = [f(p.exp(), q.exp(), **options) for p, q in zip(log_p, log_q, strict=True)]
        return square * sum(values)

    return reference


def kl_term(a, b):
    return a * (a / b).log()


def jsd_term(p, q, beta=0.5):
    if beta in (0, 1):
        return kl_term(q, p) if beta else kl_term(p, q)
    m = (1 - beta) * q + beta * p
    return beta * kl_term(p, m) + (1 - beta) * kl_term(q, m)


naive_forward_kl = naive_divergence(kl_term)
naive_reverse_kl = naive_divergence(lambda p, q: kl_term(q, p))
naive_js = naive_divergence(jsd_term)
naive_skewed_forward = naive_divergence(lambda p, q, alpha=0.1: kl_term(p, alpha * p + (1 - alpha) * q))
naive_skewed_reverse = naive_divergence(lambda p, q, alpha=0.1: kl_term(q, (1 - alpha) * p + alpha * q))
naive_total_variation = naive_divergence(lambda p, q: torch.maximum(p - q, torch.zeros_like(p)))
naive_soft_cross_entropy = naive_divergence(lambda p, q: -p * q.log())


def naive_logit_mse(student, teacher, temperature=1.0):
    classes = range(student.shape[-1])
    square = torch.as_tensor(temperature, dtype=student.dtype) ** 2
    return sum((student[..., c] - teacher[..., c]) ** 2 for c in classes) / len(classes) / square


def naive_hard_label(student, teacher):
    log_q, _ = softened(student, 1.0)
    largest = teacher.max(dim=-1).values
    return -sum(torch.where(teacher[..., c] == largest, q, 0.0) for c, q in enumerate(log_q))


OWN = {  # a temperature for each position
    (6, 10): generate((6,), 0.4, 1.0) + 2,
    (2, 5, 11): generate((2, 5), 0.4, 1.0) + 2,
}


def tried(reference, *more):
    """A reference with each of some options, at several temperatures, for one prediction or one per token."""
    return [
        (reference, student, teacher, {**options, **warmth})
        for student, teacher in ((LS, LT), (SS, ST))
        for options in more or ({},)
        for warmth in (
            {},
            {"temperature": 4.0},
            {"temperature": 0.5},
            {"temperature": torch.tensor(3.0)},
            {"temperature": OWN[tuple(student.shape)]},
        )
    ]


NAIVE = {
    "forward_kl": tried(naive_forward_kl),
    "reverse_kl": tried(naive_reverse_kl),
    "js_divergence": tried(naive_js, {}, *({"beta": b} for b in (0, 0.1, 0.3, 0.7, 0.9, 1.0))),
    "skewed_forward_kl": tried(naive_skewed_forward, {}, *({"alpha": a} for a in (0, 0.3, 0.9))),
    "skewed_reverse_kl": tried(naive_skewed_reverse, {}, *({"alpha": a} for a in (0, 0.3, 0.9))),
    "total_variation": tried(naive_total_variation),
    "soft_cross_entropy": tried(naive_soft_cross_entropy),
    "logit_mse": tried(naive_logit_mse),
    "hard_label": [(naive_hard_label, *pair, {}) for pair in ((LS, LT), (SS, ST))],
}
DIVERGENCES = [
    forward_kl,
    reverse_kl,
    js_divergence,
    partial(js_divergence, beta=0.1),
    partial(js_divergence, beta=1),
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
]
SOFTENED = [*DIVERGENCES, soft_cross_entropy, logit_mse]
ALL = [*SOFTENED, hard_label]


def called(loss):
    """A readable name for a parameter of a test."""
    return f"{loss.func.__name__}-{loss.keywords}" if isinstance(loss, partial) else loss.__name__


def each(losses):
    return pytest.mark.parametrize("loss", losses, ids=called)


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


class TestForwardKL(LossContract):
    loss = "forward_kl"
    logits = shift_invariant = True


class TestForwardKLWarm(LossContract):
    loss = forward_kl
    options = {"temperature": 4.0}  # noqa: RUF012
    logits = shift_invariant = True


class TestReverseKL(LossContract):
    loss = "reverse_kl"
    logits = shift_invariant = True


class TestJSDivergence(LossContract):
    loss = "js_divergence"
    logits = shift_invariant = True


class TestJSDivergenceLeaning(LossContract):
    loss = "js_divergence"
    options = {"beta": 0.1, "temperature": 2.0}  # noqa: RUF012
    logits = shift_invariant = True


class TestSkewedForwardKL(LossContract):
    loss = "skewed_forward_kl"
    logits = shift_invariant = True


class TestSkewedReverseKL(LossContract):
    loss = "skewed_reverse_kl"
    logits = shift_invariant = True


class TestTotalVariation(LossContract):
    loss = "total_variation"
    logits = shift_invariant = True


class TestSoftCrossEntropy(LossContract):
    loss = "soft_cross_entropy"
    identity = False
    logits = shift_invariant = True


class TestLogitMSE(LossContract):
    loss = "logit_mse"
    options = {"temperature": 2.0}  # noqa: RUF012
    logits = True


class TestHardLabel(LossContract):
    loss = "hard_label"
    identity = False
    logits = shift_invariant = True


def warm_gradient(loss, temperature):
    student = LS.clone().requires_grad_()
    loss(student, LT, temperature=temperature).sum().backward()
    return student.grad


CENTRED = ((LS - LS.mean(-1, keepdim=True)) - (LT - LT.mean(-1, keepdim=True))) / 10
LIMITS = [
    (forward_kl, 1),
    (reverse_kl, 1),
    (soft_cross_entropy, 1),
    (js_divergence, 0.25),
    (partial(js_divergence, beta=0.9), 0.09),
    (partial(skewed_forward_kl, alpha=0.2), 0.64),
    (partial(skewed_reverse_kl, alpha=0.2), 0.64),
]


@pytest.mark.parametrize(("loss", "share"), LIMITS, ids=[called(loss) for loss, _ in LIMITS])
def test_high_temperature_limit_is_logit_matching(loss, share):
    """With T², the gradient tends to (z - v) / C for centred logits, whatever T (Hinton et al. 2015, eq. 4)."""
    torch.testing.assert_close(warm_gradient(loss, 1e5), share * CENTRED, rtol=0, atol=1e-4)


def test_gradient_of_total_variation_grows_with_the_temperature():
    cool, warm = (warm_gradient(total_variation, t).norm() for t in (1e4, 2e4))
    assert (warm / cool).item() == pytest.approx(2, rel=1e-3)


@each(ALL)
def test_a_class_that_cannot_occur_is_as_if_it_were_not_there(loss):
    impossible = torch.full((6, 3), -math.inf, dtype=torch.float64)
    student = LS.clone().requires_grad_()
    values = loss(torch.cat([student, impossible], -1), torch.cat([LT, impossible], -1))
    values.sum().backward()
    alone = LS.clone().requires_grad_()
    expected = loss(alone, LT)
    expected.sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, alone.grad, rtol=1e-12, atol=1e-15)


FINITE = torch.zeros(1, 3, dtype=torch.float64)
CUT = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)


def test_minus_infinity_on_one_side():
    assert forward_kl(FINITE, CUT).item() == pytest.approx(math.log(1.5))  # the teacher excludes a class
    assert forward_kl(CUT, FINITE).item() == math.inf  # the student excludes what the teacher expects
    assert reverse_kl(FINITE, CUT).item() == math.inf  # the student expects what the teacher excludes
    assert reverse_kl(CUT, FINITE).item() == pytest.approx(math.log(1.5))
    assert total_variation(CUT, FINITE).item() == pytest.approx(1 / 3)
    assert logit_mse(CUT, FINITE).item() == math.inf


@pytest.mark.parametrize("pair", [(FINITE, CUT), (CUT, FINITE)], ids=["teacher cut", "student cut"])
@each([js_divergence, partial(js_divergence, beta=0.9), skewed_forward_kl, skewed_reverse_kl, total_variation])
def test_mixtures_stay_finite_where_one_side_excludes(loss, pair):
    student = pair[0].clone().requires_grad_()
    value = loss(student, pair[1])
    value.sum().backward()
    assert 0 < value.item() < math.inf
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@each(ALL)
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": LS.clone(), "teacher": LT.clone()}
    pair[side][2, 3] = math.nan
    assert loss(pair["student"], pair["teacher"]).isnan().tolist() == [False, False, True, False, False, False]


@each(SOFTENED)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, torch.tensor([1.0, 2, 0, 1, 1, 1])], ids=str)
def test_temperature_is_positive(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        loss(LS, LT, temperature=temperature)


@each(SOFTENED)
def test_temperatures_fit_the_positions(loss):
    with pytest.raises(ValueError, match=r"temperatures of shape \(10,\) do not fit logits of shape \(6, 10\)"):
        loss(LS, LT, temperature=torch.ones(10))


@each(SOFTENED)
def test_half_precision_temperatures_cost_the_values_nothing(loss):
    own = torch.tensor([1.5, 2.0, 3.0, 0.5, 1.0, 4.0])  # exact in half precision
    half = loss(LS.half(), LT.half(), temperature=own.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(LS.half().float(), LT.half().float(), temperature=own))


@each(SOFTENED)
def test_a_learned_temperature_gets_its_gradient(loss):
    """As in curriculum temperature, where T is trained too."""
    own = OWN[6, 10].clone().requires_grad_()
    torch.autograd.gradcheck(lambda t: loss(LS, LT, temperature=t), (own,))


@each(ALL)
def test_nothing_broadcasts(loss):
    with pytest.raises(ValueError, match=r"student \(6, 10\) and teacher \(1, 10\) differ in shape"):
        loss(LS, LT[:1])


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_is_a_share(beta):
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got"):
        js_divergence(LS, LT, beta=beta)


@pytest.mark.parametrize("loss", [skewed_forward_kl, skewed_reverse_kl])
@pytest.mark.parametrize("alpha", [-0.1, 1.0, math.nan])
def test_alpha_is_a_share_below_one(loss, alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\), got"):
        loss(LS, LT, alpha=alpha)


def test_mixtures_tend_to_the_two_divergences():
    near = 1e-7
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(js_divergence(LS, LT, beta=near) / near, forward_kl(LS, LT), **close)
    torch.testing.assert_close(js_divergence(LS, LT, beta=1 - near) / near, reverse_kl(LS, LT), **close)
    torch.testing.assert_close(skewed_forward_kl(LS, LT, alpha=0.0), forward_kl(LS, LT), rtol=1e-12, atol=0)
    torch.testing.assert_close(skewed_reverse_kl(LS, LT, alpha=0.0), reverse_kl(LS, LT), rtol=1e-12, atol=0)


@each(ALL)
def test_logits_far_apart_in_single_precision(loss):
    """Where a probability is not to be told from 0, its logarithm still counts."""
    student, teacher = torch.tensor([[0.0, 1000.0]], requires_grad=True), torch.tensor([[1000.0, 0.0]])
    value = loss(student, teacher)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    if loss in (forward_kl, reverse_kl, soft_cross_entropy, hard_label):
        assert value.item() == pytest.approx(1000.0)
