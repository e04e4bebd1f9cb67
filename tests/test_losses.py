import importlib
import math

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from torch.nn.functional import normalize

from limbeck.losses import LOSSES, cosine, cross_entropy, forward_kl, label_mse, mse, soft_cross_entropy
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import (
    CASES,
    CLASSES,
    FINGERPRINTS,
    INPUTS,
    TOKEN_LABELS,
    generate,
    measure,
    tolerance,
)

LS, LT, FS, FT, ES, ET = (INPUTS[name] for name in ("LS", "LT", "FS", "FT", "ES", "ET"))
SS, ST, HS, HT, AS, AT = (INPUTS[name] for name in ("SS", "ST", "HS", "HT", "AS", "AT"))
IGNORED = -100


# ---- other people's numbers -----------------------------------------------------------------------------------


def kl(student, teacher, temperature=1.0, mask=None):
    return masked_mean(forward_kl(student, teacher, temperature=temperature), mask)


def soft_ce(student, temperature=1.0):
    return masked_mean(soft_cross_entropy(student, LT, temperature=temperature))


def ce(student, labels):
    return masked_mean(cross_entropy(student, labels))


def distillation_head(student):
    """DeiT's second head, as the golden case derives it from the first."""
    return 0.7 * student + 0.1 * LT


def gram(features):
    rows = normalize(features, dim=-1)
    return rows @ rows.mT / 0.07


def to_queue(embeddings):
    return normalize(embeddings, dim=-1) @ normalize(generate((9, 12), 3.3, 1.0), dim=-1).T / 0.07


def pair_scores(query):
    positive, negative = generate((4, 6), 1.2, 1.0), generate((4, 6), 2.2, 1.0)
    return torch.stack([(query * positive).sum(-1), (query * negative).sum(-1)], dim=-1)


QUERY, PAIR_LABELS = generate((4, 6), 0.2, 1.0), generate((4, 2), 0.5, 2.0)
HIDDEN_MASK = torch.tensor(CASES["hid_mse_masked"]["params"]["mask"])

# case -> (the student's input, the case's number from our losses in the case's own convention)
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
    "cross_entropy": {
        "kd_T4_alpha.1_beta.9": (LS, lambda x: 0.1 * ce(x, CLASSES) + 0.9 * kl(x, LT, 4.0)),
        "deit_hard_a.5_tau3": (
            LS,
            lambda x: 0.5 * ce(x, CLASSES) + 0.5 * ce(distillation_head(x), LT.argmax(-1)),
        ),
    },
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_golden_inputs_are_the_oracles_inputs(name):
    tensor, expected = INPUTS[name], FINGERPRINTS[name]
    ours = {
        "first": tensor.flatten()[0].item(),
        "sum": tensor.sum().item(),
        "abssum": tensor.abs().sum().item(),
    }
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("loss", "case"), [(loss, case) for loss, cases in GOLDEN.items() for case in cases])
def test_golden(loss, case):
    student, function = GOLDEN[loss][case]
    ours = measure(function, student)
    for result in CASES[case]["results"]:
        for number in ("value", "grad_l1", "grad_dot"):
            expected = pytest.approx(result[number], rel=tolerance(result["oracle"]), abs=0)
            assert ours[number] == expected, f"{number} of {result['oracle']}"


# ---- the papers' formulas, one position at a time, in plain Python ---------------------------------------------


def naive_log_softmax(row, temperature=1.0):
    scaled = [x / temperature for x in row]
    top = max(scaled)
    total = math.fsum(math.exp(x - top) for x in scaled)
    return [x - top - math.log(total) for x in scaled]


def naive_forward_kl(student, teacher, temperature=1.0):
    log_q, log_p = naive_log_softmax(student, temperature), naive_log_softmax(teacher, temperature)
    value = temperature**2 * math.fsum(
        math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if p > -math.inf
    )
    gradient = [temperature * (math.exp(q) - math.exp(p)) for p, q in zip(log_p, log_q, strict=True)]
    return value, gradient


def naive_soft_cross_entropy(student, teacher, temperature=1.0):
    log_q, log_p = naive_log_softmax(student, temperature), naive_log_softmax(teacher, temperature)
    value = -(temperature**2) * math.fsum(math.exp(p) * q for p, q in zip(log_p, log_q, strict=True))
    gradient = [temperature * (math.exp(q) - math.exp(p)) for p, q in zip(log_p, log_q, strict=True)]
    return value, gradient


def naive_mse(student, teacher):
    differences = [s - t for s, t in zip(student, teacher, strict=True)]
    count = len(differences)
    return math.fsum(d * d for d in differences) / count, [2 * d / count for d in differences]


def naive_cosine(student, teacher):
    dot = math.fsum(s * t for s, t in zip(student, teacher, strict=True))
    length_s, length_t = math.hypot(*student), math.hypot(*teacher)
    gradient = [
        dot * s / (length_s**3 * length_t) - t / (length_s * length_t)
        for s, t in zip(student, teacher, strict=True)
    ]
    return 1 - dot / (length_s * length_t), gradient


def naive_cross_entropy(student, label, label_smoothing=0.0):
    if label == IGNORED:
        return 0.0, [0.0] * len(student)
    log_q = naive_log_softmax(student)
    target = [label_smoothing / len(student)] * len(student)
    target[label] += 1 - label_smoothing
    value = -math.fsum(y * q for y, q in zip(target, log_q, strict=True))
    return value, [math.exp(q) - y for y, q in zip(target, log_q, strict=True)]


def naive_label_mse(student, label):
    return (student[0] - label) ** 2, [2 * (student[0] - label)]


NAIVE = {
    "forward_kl": (naive_forward_kl, [(LS, LT), (SS, ST)], [{}, {"temperature": 4.0}, {"temperature": 0.5}]),
    "soft_cross_entropy": (naive_soft_cross_entropy, [(LS, LT), (SS, ST)], [{}, {"temperature": 4.0}]),
    "mse": (naive_mse, [(LS, LT), (HS, HT), (FS, FT)], [{}]),
    "cosine": (naive_cosine, [(ES, ET), (HS, HT)], [{}]),
    "cross_entropy": (
        naive_cross_entropy,
        [(LS, CLASSES), (SS, TOKEN_LABELS)],
        [{}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}],
    ),
    "label_mse": (naive_label_mse, [(LS[:, :1], LT[:, 0]), (SS[..., :1], ST[..., 0])], [{}]),
}


def naive(function, student, teacher, options):
    """Apply a reference to every position; the gradient is that of the sum."""
    rows = student.reshape(-1, student.shape[-1]).tolist()
    targets = teacher.reshape(len(rows), -1) if teacher.ndim == student.ndim else teacher.reshape(-1)
    results = [function(r, t, **options) for r, t in zip(rows, targets.tolist(), strict=True)]
    values = torch.tensor([value for value, _ in results], dtype=torch.float64)
    gradient = torch.tensor([gradient for _, gradient in results], dtype=torch.float64)
    return values.view(student.shape[:-1]), gradient.view(student.shape)


@pytest.mark.parametrize(
    ("name", "pair", "options"),
    [(name, pair, options) for name, (_, pairs, all_) in NAIVE.items() for pair in pairs for options in all_],
    ids=lambda v: v if isinstance(v, str) else (str(v) if isinstance(v, dict) else "x".join(map(str, v[0].shape))),
)
def test_matches_the_formula(name, pair, options):
    student, teacher = pair
    values, gradient = naive(NAIVE[name][0], student, teacher, options)
    student = student.clone().requires_grad_()
    ours = LOSSES.get(name)(student, teacher, **options)
    torch.testing.assert_close(ours, values, rtol=1e-11, atol=1e-12)
    ours.sum().backward()
    torch.testing.assert_close(student.grad, gradient, rtol=1e-11, atol=1e-12)


# ---- the contract ----------------------------------------------------------------------------------------------


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


def test_every_loss_is_tested():
    """A new loss is listed above: with a golden case or a formula of its own, and with a contract."""
    contracts = {case.loss for case in LossContract.__subclasses__() if isinstance(case.loss, str)}
    for name in LOSSES:
        function = LOSSES.get(name)
        home = importlib.import_module(function.__module__)
        if not home.__name__.startswith("limbeck.") or getattr(home, function.__name__, None) is not function:
            continue  # registered by a test or a doctest
        assert name in GOLDEN or name in NAIVE, f"{name} has neither a golden case nor a formula in {__file__}"
        assert name in contracts, f"{name} has no LossContract in {__file__}"


# ---- the contract catches what goes wrong ---------------------------------------------------------------------


def raw_logit_kl(student, teacher):
    p, q = teacher.detach().clamp(1e-7), student.clamp(1e-7)
    return (p * (p / q).log()).sum(-1)


def nan_at_minus_infinity(student, teacher):
    log_p, log_q = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def overwriting(student, teacher):
    return (student - teacher.detach().mul_(2.0)).square().mean(-1)


def no_epsilon(student, teacher):
    lengths = student.norm(dim=-1) * teacher.detach().norm(dim=-1)
    return 1 - (student * teacher.detach()).sum(-1) / lengths


BROKEN = {
    "reduced": (lambda s, t: (s - t.detach()).square().mean(), "keeps_the_leading_dimensions", {}),
    "entropy": (lambda s, t: -(t.detach().softmax(-1) * s.log_softmax(-1)).sum(-1), "is_zero_at_equality", {}),
    "signed": (lambda s, t: (s - t.detach()).mean(-1), "is_never_negative", {}),
    "ranked": (
        lambda s, t: (s - t.detach()).square().mean(-1).sort(dim=0).values,
        "follows_a_permutation_of_the_examples",
        {},
    ),
    "raw logits": (raw_logit_kl, "ignores_a_constant_added_to_the_logits", {"shift_invariant": True}),
    "teacher learns": (lambda s, t: (s - t).square().mean(-1), "gives_a_gradient_to_the_student_alone", {}),
    "student detached": (
        lambda s, t: (s.detach() - t).square().mean(-1),
        "gives_a_gradient_to_the_student_alone",
        {},
    ),
    "half detached": (
        lambda s, t: ((s - t.detach()) * (s.detach() - t)).mean(-1),
        "gradient_is_the_derivative",
        {},
    ),
    "in half": (lambda s, t: (s - t.detach()).square().mean(-1), "half_precision_stays_close", {}),
    "no epsilon": (no_epsilon, "extreme_inputs_stay_finite", {}),
    "minus infinity": (nan_at_minus_infinity, "extreme_inputs_stay_finite", {"logits": True}),
    "in place": (overwriting, "leaves_its_inputs_alone", {}),
    "centred on the batch": (
        lambda s, t: (s - s.mean(1, keepdim=True) - t.detach()).square().mean(-1),
        "does_not_depend_on_padding",
        {},
    ),
    "leaking": (lambda s, t: (s - t.detach()).cumsum(1).square().mean(-1), "masked_positions_do_not_leak", {}),
    "relative": (
        lambda s, t: (s - t.detach()).square().mean(-1) / t.detach().square().mean(),
        "does_not_depend_on_the_cut",
        {},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_contract_catches(name):
    loss, caught_by, promises = BROKEN[name]
    contract = type("Broken", (LossContract,), {"loss": staticmethod(loss), **promises})()
    with pytest.raises((AssertionError, GradcheckError)):
        getattr(contract, f"test_{caught_by}")()


# ---- edges -----------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("loss", [forward_kl, soft_cross_entropy, mse, cosine])
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": LS.clone(), "teacher": LT.clone()}
    pair[side][2, 3] = math.nan
    assert loss(pair["student"], pair["teacher"]).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("loss", [forward_kl, soft_cross_entropy])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_is_positive(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        loss(LS, LT, temperature=temperature)


@pytest.mark.parametrize("loss", [forward_kl, soft_cross_entropy, mse, cosine])
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
