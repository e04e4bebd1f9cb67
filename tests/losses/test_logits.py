"""Losses between logits."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from limbeck.losses import forward_kl, soft_cross_entropy
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import CLASSES, INPUTS, TOKEN_LABELS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters
from tests.losses.test_labels import IGNORED, ce, distillation_head, naive_log_softmax

LS, LT, SS, ST = (INPUTS[name] for name in ("LS", "LT", "SS", "ST"))
ES, ET, HS, HT, AS, AT = (INPUTS[name] for name in ("ES", "ET", "HS", "HT", "AS", "AT"))


def kl(student, teacher, temperature=1.0, mask=None):
    return masked_mean(forward_kl(student, teacher, temperature=temperature), mask)


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
    "soft_cross_entropy": {
        "soft_ce_T4_T2": (LS, lambda x: soft_ce(x, 4.0)),
        "soft_ce_T4_noT2": (LS, lambda x: soft_ce(x, 4.0) / 16),  # TextBrewer leaves T² out
        "tinybert_soft_ce_mean_all": (LS, lambda x: soft_ce(x) / 10),  # TinyBERT divides by the classes
    },
}


def naive_forward_kl(student, teacher, temperature=1.0):
    log_q, log_p = naive_log_softmax(student / temperature), naive_log_softmax(teacher / temperature)
    return temperature**2 * sum(
        log_p[..., c].exp() * (log_p[..., c] - log_q[..., c]) for c in range(log_p.shape[-1])
    )


def naive_soft_cross_entropy(student, teacher, temperature=1.0):
    log_q, log_p = naive_log_softmax(student / temperature), naive_log_softmax(teacher / temperature)
    return -(temperature**2) * sum(log_p[..., c].exp() * log_q[..., c] for c in range(log_p.shape[-1]))


TEMPERATURES = [{}, {"temperature": 4.0}, {"temperature": 0.5}]
NAIVE = {
    "forward_kl": [(naive_forward_kl, *pair, o) for pair in ((LS, LT), (SS, ST)) for o in TEMPERATURES],
    "soft_cross_entropy": [
        (naive_soft_cross_entropy, *pair, o) for pair in ((LS, LT), (SS, ST)) for o in TEMPERATURES
    ],
}


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


class TestSoftCrossEntropy(LossContract):
    loss = "soft_cross_entropy"
    identity = False
    logits = shift_invariant = True


def test_high_temperature_limit_is_logit_matching():
    """With T², the gradient tends to (z - v) / C for centred logits, whatever T (Hinton et al. 2015, eq. 4)."""
    student = LS.clone().requires_grad_()
    forward_kl(student, LT, temperature=1e5).sum().backward()
    centred = (LS - LS.mean(-1, keepdim=True)) - (LT - LT.mean(-1, keepdim=True))
    torch.testing.assert_close(student.grad, centred / 10, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss", [forward_kl, soft_cross_entropy])
def test_a_class_that_cannot_occur_is_as_if_it_were_not_there(loss):
    impossible = torch.full((6, 3), -math.inf, dtype=torch.float64)
    student = LS.clone().requires_grad_()
    values = loss(torch.cat([student, impossible], -1), torch.cat([LT, impossible], -1), temperature=2.0)
    values.sum().backward()
    alone = LS.clone().requires_grad_()
    expected = loss(alone, LT, temperature=2.0)
    expected.sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, alone.grad, rtol=1e-12, atol=1e-15)


def test_minus_infinity_on_one_side():
    finite, cut = (
        torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64),
    )
    assert forward_kl(finite, cut).item() == pytest.approx(math.log(1.5))  # the teacher excludes a class
    assert forward_kl(cut, finite).item() == math.inf  # the student excludes what the teacher expects


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", [forward_kl, soft_cross_entropy])
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": LS.clone(), "teacher": LT.clone()}
    pair[side][2, 3] = math.nan
    assert loss(pair["student"], pair["teacher"]).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("loss", [forward_kl, soft_cross_entropy])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_is_positive(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        loss(LS, LT, temperature=temperature)


@pytest.mark.parametrize("loss", [forward_kl, soft_cross_entropy])
def test_nothing_broadcasts(loss):
    with pytest.raises(ValueError, match=r"student \(6, 10\) and teacher \(1, 10\) differ in shape"):
        loss(LS, LT[:1])
