"""Losses between scores or logits over several candidates, labels or examples at once."""

import math

import pytest
import torch

from limbeck.losses import (
    batch_correlation,
    binary_kl,
    class_correlation,
    dist,
    forward_kl,
    listwise_kl,
    margin_mse,
)
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import INPUTS, TOKEN_LABELS
from tests.losses.proofs import (
    check_golden,
    check_naive,
    golden_parameters,
    naive_parameters,
    weighted_gradient,
)
from tests.losses.test_labels import IGNORED
from tests.losses.test_logits import OWN, PAIR_LABELS, QUERY, naive_forward_kl, pair_scores

LS, LT, SS, ST = (INPUTS[name] for name in ("LS", "LT", "SS", "ST"))
TOKEN_MASK = TOKEN_LABELS != IGNORED

GOLDEN = {
    "listwise_kl": {
        "st_distill_kl_T2": (
            QUERY,
            lambda x: masked_mean(listwise_kl(pair_scores(x), PAIR_LABELS, temperature=2.0)),
        ),
    },
    "dist": {
        "dist_b1_g1_tau1": (LS, lambda x: masked_mean(dist(x, LT, beta=1, gamma=1, temperature=1.0))),
    },
    "class_correlation": {
        "mlkd_cc_loss_T4": (LS, lambda x: class_correlation(x, LT, temperature=4.0)),
    },
    "batch_correlation": {
        "mlkd_bc_loss_T4": (LS, lambda x: masked_mean(batch_correlation(x, LT, temperature=4.0))),
    },
}
ORACLES_OWN_EPSILON = {"dist": 2e-6}  # the authors' code and torchdistill's differ from each other by as much


def naive_margin_mse(student, teacher):
    squares = [
        ((student[..., 0] - student[..., j]) - (teacher[..., 0] - teacher[..., j])) ** 2
        for j in range(1, student.shape[-1])
    ]
    return sum(squares) / len(squares)


def naive_binary_kl(student, teacher, temperature=1.0, classes="sum"):
    warmth = torch.as_tensor(temperature, dtype=student.dtype)
    total = 0.0
    for c in range(student.shape[-1]):
        q, p = (1 / (1 + (-side[..., c] / warmth).exp()) for side in (student, teacher))
        total = total + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return warmth**2 * total / (student.shape[-1] if classes == "mean" else 1)


def probabilities(logits, temperature, mask):
    """One list of probabilities per position, and which of them count."""
    warmth = torch.as_tensor(temperature, dtype=logits.dtype).expand(logits.shape[:-1]).flatten()
    rows = [(row / t).exp() for row, t in zip(logits.flatten(end_dim=-2), warmth, strict=True)]
    counted = [True] * len(rows) if mask is None else [bool(m) for m in mask.flatten()]
    return [[e / row.sum() for e in row] for row in rows], counted


def correlation(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    shared = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread_a, spread_b = (sum((x - m) ** 2 for x in v) ** 0.5 for v, m in ((a, mean_a), (b, mean_b)))
    return shared / (spread_a * spread_b)


def naive_dist(student, teacher, mask=None, beta=1.0, gamma=1.0, temperature=1.0):
    (q, counted), (p, _) = probabilities(student, temperature, mask), probabilities(teacher, temperature, mask)
    valid = [i for i, counts in enumerate(counted) if counts]
    columns = range(student.shape[-1])
    within = [1 - correlation([q[i][c] for i in valid], [p[i][c] for i in valid]) for c in columns]
    within = sum(within) / len(within)
    values = [
        (beta * (1 - correlation(q[i], p[i])) if i in valid else 0.0) + gamma * within for i in range(len(q))
    ]
    return torch.stack(values).view(student.shape[:-1]) * torch.as_tensor(temperature) ** 2


def naive_class_correlation(student, teacher, mask=None, temperature=1.0):
    (q, counted), (p, _) = probabilities(student, temperature, mask), probabilities(teacher, temperature, mask)
    classes = student.shape[-1]
    valid = [i for i, counts in enumerate(counted) if counts]
    total = 0.0
    for a in range(classes):
        for b in range(classes):
            total = total + (sum(p[i][a] * p[i][b] for i in valid) - sum(q[i][a] * q[i][b] for i in valid)) ** 2
    return total / classes


def naive_batch_correlation(student, teacher, mask=None, temperature=1.0):
    (q, counted), (p, _) = probabilities(student, temperature, mask), probabilities(teacher, temperature, mask)
    values = []
    for i in range(len(q)):
        total = 0.0 * student.sum()
        for j in range(len(q)):
            alike = [sum(x * y for x, y in zip(side[i], side[j], strict=True)) for side in (p, q)]
            total = total + (alike[0] - alike[1]) ** 2 * (counted[i] and counted[j])
        values.append(total)
    return torch.stack(values).view(student.shape[:-1])


def relations(reference, *more):
    """Over a batch of predictions, over tokens, and over those tokens that count."""
    places = [(LS, LT, {}), (SS, ST, {}), (SS, ST, {"mask": TOKEN_MASK})]
    warmth = [{}, {"temperature": 4.0}, {"temperature": 0.5}, *more]
    cases = [(reference, s, t, {**options, **place}) for s, t, place in places for options in warmth]
    return [*cases, (reference, SS, ST, {"temperature": OWN[2, 5, 11]})]


WARMTH = [{}, {"temperature": 2.0}, {"temperature": 0.5}, {"temperature": OWN[6, 10]}]
NAIVE = {
    "margin_mse": [(naive_margin_mse, *pair, {}) for pair in ((LS, LT), (SS, ST), (LS[:, :2], LT[:, :2]))],
    "listwise_kl": [(naive_forward_kl, LS, LT, options) for options in WARMTH],
    "binary_kl": [
        (naive_binary_kl, LS, LT, {**options, **classes})
        for options in WARMTH
        for classes in ({}, {"classes": "mean"})
    ],
    "dist": relations(naive_dist, {"beta": 0.5, "gamma": 2.0}, {"beta": 0.0}, {"gamma": 0.0}),
    "class_correlation": relations(naive_class_correlation),
    "batch_correlation": relations(naive_batch_correlation),
}
RELATIONS = [dist, class_correlation, batch_correlation]
ALL = [margin_mse, listwise_kl, binary_kl, *RELATIONS]


def each(losses):
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: loss.__name__)


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case, rtol=ORACLES_OWN_EPSILON.get(loss))


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


class TestMarginMSE(LossContract):
    loss = "margin_mse"
    logits = shift_invariant = True


class TestListwiseKL(LossContract):
    loss = "listwise_kl"
    options = {"temperature": 2.0}  # noqa: RUF012
    logits = shift_invariant = True


class TestBinaryKL(LossContract):
    loss = "binary_kl"
    logits = True


class TestBinaryKLMean(LossContract):
    loss = "binary_kl"
    options = {"temperature": 3.0, "classes": "mean"}  # noqa: RUF012
    logits = True


class Relation(LossContract):
    """Over the whole batch, of which the contract masks one token in three."""

    loss = staticmethod(lambda student, teacher, *, mask=None: forward_kl(student, teacher))
    logits = shift_invariant = True
    per_example = False

    def example(self, *leading):
        mask = torch.arange(math.prod(leading)).view(leading) % 3 > 0
        return {**super().example(*leading), **({"mask": mask} if len(leading) == 2 else {})}


class TestDIST(Relation, LossContract):
    loss = "dist"


class TestDISTWarm(Relation, LossContract):
    loss = "dist"
    options = {"temperature": 4.0, "beta": 0.5, "gamma": 2.0}  # noqa: RUF012


class TestClassCorrelation(Relation, LossContract):
    loss = "class_correlation"


class TestBatchCorrelation(Relation, LossContract):
    loss = "batch_correlation"


def with_more(logits, value):
    return torch.cat([logits, torch.full((*logits.shape[:-1], 3), value, dtype=logits.dtype)], -1)


@each(ALL)
def test_what_cannot_occur_is_as_if_it_were_not_there(loss):
    student = LS.clone().requires_grad_()
    values = loss(with_more(student, -math.inf), with_more(LT, -math.inf))
    values.sum().backward()
    alone = LS.clone().requires_grad_()
    expected = loss(alone, LT)
    expected.sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(student.grad, alone.grad, rtol=1e-12, atol=1e-15)


@each(ALL)
def test_nothing_broadcasts(loss):
    with pytest.raises(ValueError, match=r"student \(6, 10\) and teacher \(1, 10\) differ in shape"):
        loss(LS, LT[:1])


@pytest.mark.parametrize("side", ["student", "teacher"])
@each(ALL)
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": LS.clone(), "teacher": LT.clone()}
    pair[side][2, 3] = math.nan
    values = loss(pair["student"], pair["teacher"])
    assert values.isnan().all() if loss in RELATIONS else values.isnan().nonzero().tolist() == [[2]]


@each([margin_mse, listwise_kl])
def test_one_candidate_cannot_be_ranked(loss):
    with pytest.raises(ValueError, match=r"scores of shape \(6, 1\) have one candidate"):
        loss(LS[:, :1], LT[:, :1])


def test_margins_given_as_labels():
    """As sentence-transformers takes them: one number for each negative."""
    margins = LT[:, :1] - LT[:, 1:]
    teacher = torch.cat([torch.zeros(6, 1, dtype=torch.float64), -margins], -1)
    torch.testing.assert_close(margin_mse(LS, teacher), margin_mse(LS, LT), rtol=1e-12, atol=0)


def test_margins_to_a_positive_that_is_not_there():
    student, teacher = (torch.tensor([[-math.inf, *row]], requires_grad=True) for row in ((1.0, 2.0), (0.0, 5.0)))
    value = margin_mse(student, teacher)
    value.sum().backward()
    assert value.item() == 0
    assert student.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_binary_kl_of_two_outcomes_is_the_divergence_of_a_softmax():
    pair = [torch.stack([side, torch.zeros_like(side)], -1) for side in (LS[:, 0], LT[:, 0])]
    expected = forward_kl(*pair, temperature=3.0)
    torch.testing.assert_close(binary_kl(LS[:, :1], LT[:, :1], temperature=3.0), expected, rtol=1e-12, atol=0)


def test_binary_kl_is_infinite_where_the_student_excludes_what_the_teacher_expects():
    assert binary_kl(torch.tensor([[-math.inf]]), torch.zeros(1, 1)).item() == math.inf
    assert binary_kl(torch.zeros(1, 1), torch.tensor([[-math.inf]])).item() == pytest.approx(math.log(2))


def test_binary_kl_reductions():
    torch.testing.assert_close(binary_kl(LS, LT, classes="mean") * 10, binary_kl(LS, LT))
    with pytest.raises(ValueError, match="classes are taken by 'mean' or 'sum', got 'batchmean'"):
        binary_kl(LS, LT, classes="batchmean")


@each(RELATIONS)
def test_masked_positions_are_as_if_they_were_not_there(loss):
    ours = loss(SS, ST, mask=TOKEN_MASK)
    expected = loss(SS[TOKEN_MASK], ST[TOKEN_MASK])
    torch.testing.assert_close(ours[TOKEN_MASK] if ours.ndim else ours, expected, rtol=1e-12, atol=0)


@each(RELATIONS)
def test_a_mask_that_does_not_fit(loss):
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 4\) does not fit logits of shape \(2, 5, 11\)"):
        loss(SS, ST, mask=TOKEN_MASK[:, 1:])


@each(RELATIONS)
def test_a_batch_of_masked_positions_gives_zero(loss):
    student = SS.clone().requires_grad_()
    values = loss(student, ST, mask=torch.zeros(2, 5))
    values.sum().backward()
    assert not values.any()
    assert not student.grad.any()


def test_dist_of_a_batch_of_one_has_no_relations_within_a_class():
    alone = dist(LS[:1], LT[:1], gamma=5.0)
    assert alone.tolist() == dist(LS[:1], LT[:1], gamma=0.0).tolist()
    assert dist(LT[:1], LT[:1]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, 7.3])
def test_dist_makes_nothing_of_a_teacher_that_does_not_vary(dtype, constant):
    """Rounding must not be scaled up to a direction."""
    student = LS.clone().to(dtype).requires_grad_()
    value = dist(student, torch.full_like(LS, constant).to(dtype))
    value.sum().backward()
    assert not value.any()
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_has_no_runaway_gradient_at_a_student_that_does_not_vary(dtype):
    student = torch.full_like(LS, 0.1).to(dtype).requires_grad_()
    value = dist(student, LT.to(dtype))
    value.sum().backward()
    assert value.tolist() == [2.0] * 6
    assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_makes_nothing_of_rounding(dtype):
    """Probabilities that differ in their last digit have no direction to follow."""
    hardly = (torch.finfo(dtype).eps * LT).to(dtype)
    assert not dist(LS.to(dtype), hardly).any()


def test_dist_counts_classes_of_small_probability_in_single_precision():
    """The squares of such probabilities vanish in float32; their correlation does not."""
    rare = torch.tensor([0.0] * 8 + [-55.0, -60.0], dtype=torch.float64)
    student, teacher = LS + rare, LT + rare
    ours = weighted_gradient(dist, student.float(), teacher.float(), {})
    expected = weighted_gradient(naive_dist, student, teacher, {})
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1][0].double(), expected[1][0], rtol=1e-3, atol=1e-5)


def test_dist_ignores_what_a_correlation_ignores():
    """It is not the divergence: a student whose probabilities are the teacher's at another scale costs less."""
    teacher = LT.softmax(-1)
    student = (0.5 * teacher + 0.05).log()
    between = dist(student, LT, gamma=0.0)
    assert between.abs().max() < 1e-12
    assert forward_kl(student, LT).min() > 0.01
