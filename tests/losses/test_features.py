"""Losses between feature tensors."""

import math

import pytest
import torch

from limbeck.losses import cosine, mse
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import CASES, INPUTS, TOKEN_LABELS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters
from tests.losses.test_labels import IGNORED

LS, LT, FS, FT, ES, ET = (INPUTS[name] for name in ("LS", "LT", "FS", "FT", "ES", "ET"))
SS, ST, HS, HT, AS, AT = (INPUTS[name] for name in ("SS", "ST", "HS", "HT", "AS", "AT"))
HIDDEN_MASK = torch.tensor(CASES["hid_mse_masked"]["params"]["mask"])

GOLDEN = {
    "mse": {
        "logit_mse_T4": (LS, lambda x: masked_mean(mse(x, LT)) / 16),  # both sides divided by T
        "hid_mse": (HS, lambda x: masked_mean(mse(x, HT))),
        "hid_mse_masked": (HS, lambda x: masked_mean(mse(x, HT), HIDDEN_MASK)),
        "att_mse_fullmask": (AS, lambda x: masked_mean(mse(x, AT))),
        "mgd_mse_sum_over_N": (FS, lambda x: 2e-5 * 8 * 6 * 6 * masked_mean(mse(x, FT))),
    },
    "cosine": {
        "cosine_tokens_mean": (SS, lambda x: masked_mean(cosine(x, ST), TOKEN_LABELS != IGNORED)),
        "cos_hidden": (HS, lambda x: masked_mean(cosine(x, HT))),
        "distilbert_cosine": (HS, lambda x: masked_mean(cosine(x, HT))),
        "pkd_bert_cls": (HS, lambda x: 2 * masked_mean(cosine(x[:, 0], HT[:, 0]))),  # |a-b|² of unit vectors
    },
}


def naive_mse(student, teacher):
    size = student.shape[-1]
    return sum((student[..., d] - teacher[..., d]) ** 2 for d in range(size)) / size


def naive_cosine(student, teacher):
    size = range(student.shape[-1])
    dot = sum(student[..., d] * teacher[..., d] for d in size)
    lengths = [sum(x[..., d] ** 2 for d in size) ** 0.5 for x in (student, teacher)]
    return 1 - dot / (lengths[0] * lengths[1])


NAIVE = {
    "mse": [(naive_mse, *pair, {}) for pair in ((LS, LT), (HS, HT), (FS, FT))],
    "cosine": [(naive_cosine, *pair, {}) for pair in ((ES, ET), (HS, HT))],
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


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", [mse, cosine])
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": LS.clone(), "teacher": LT.clone()}
    pair[side][2, 3] = math.nan
    assert loss(pair["student"], pair["teacher"]).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("loss", [mse, cosine])
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
