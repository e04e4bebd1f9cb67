"""Short ways that a loss takes where its numbers allow it give what the long ones give."""

import math

import pytest
import torch

from limbeck.losses import LOSSES
from limbeck.losses.base import squared_length
from limbeck.losses.distributions import weighted_sum
from limbeck.losses.labels import all_within, finite
from limbeck.losses.relations import from_products
from tests.golden_cases import INPUTS, generate

LS, LT, AS, AT = (INPUTS[name] for name in ("LS", "LT", "AS", "AT"))
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_squared_length_has_a_gradient_that_has_one(dim):
    vectors = LS.T.contiguous().T.requires_grad_()
    torch.testing.assert_close(squared_length(vectors, dim), vectors.square().sum(dim))
    torch.autograd.gradcheck(squared_length, (vectors, dim))
    torch.autograd.gradgradcheck(squared_length, (vectors, dim))
    zero = torch.zeros(2, 3, requires_grad=True)
    squared_length(zero, dim).sum().backward()
    assert not zero.grad.any()


@pytest.mark.parametrize(
    "name", ["mse", "cosine", "forward_kl", "soft_cross_entropy", "logit_mse", "binary_kl", "dist"]
)
def test_compiled_losses_give_the_same(name):
    """A compiler gets the long way, since it does not know the numbers."""
    loss, gradients = LOSSES.get(name), []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        student = LS.clone().requires_grad_()
        values = function(student, LT)
        values.sum().backward()
        gradients.append(student.grad)
        torch.testing.assert_close(values, loss(LS, LT))
    torch.testing.assert_close(*gradients)


def test_all_within_sees_what_is_not():
    assert all_within(torch.tensor([0, 3]), 0, 3)
    assert all_within(torch.tensor([0.0, 1.0]), 0, 1)
    for values in ([-100, 1], [0, 4], [0.5, math.nan], []):
        assert not all_within(torch.tensor(values), 0, 3)


@pytest.mark.parametrize(("name", "none"), [("cross_entropy", -100), ("binary_cross_entropy", -100.0)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_unknown_label_changes_no_other_position(name, none, label_smoothing):
    labels = torch.arange(6) if name == "cross_entropy" else (torch.arange(60.0).view(6, 10) % 3) / 2
    unknown = labels.clone()
    unknown[0] = none
    values, gradients = [], []
    for given in (labels, unknown):
        student = LS.clone().requires_grad_()
        found = LOSSES.get(name)(student, given, label_smoothing=label_smoothing)
        found.sum().backward()
        values.append(found.detach()[1:])
        gradients.append(student.grad[1:])
    assert found[0] == 0
    torch.testing.assert_close(*values, rtol=1e-14, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
def test_correlations_of_tiny_probabilities(scale):
    """Classes that are rare in the whole batch, below what float32 can square, count as they do in float64."""
    student, teacher = (scale * side.float() for side in (LS, LT))
    exact = LOSSES.get("dist")(student.double(), teacher.double())
    torch.testing.assert_close(LOSSES.get("dist")(student, teacher).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 3), (2, 0), (2, 3, 2)])
def test_labels_of_any_leading_dimensions(leading):
    logits = generate((*leading, 5), 0.1, 1.5)
    labels = logits.argmin(-1)
    expected = -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(LOSSES.get("cross_entropy")(logits, labels), expected)
    torch.testing.assert_close(LOSSES.get("hard_label")(logits, -logits), expected)
    assert LOSSES.get("cross_entropy")(logits, labels, label_smoothing=0.1).shape == leading


def test_masked_scores_whose_squares_overflow():
    """The lowest float32, with which models mask keys, on one side alone."""
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    student = AS[:1].float().clone()
    student[..., 4] = -1e38
    values = LOSSES.get("attention_mse")(student.requires_grad_(), AT[:1].float(), mask=mask)
    values.sum().backward()
    torch.testing.assert_close(values, LOSSES.get("attention_mse")(AS[:1].float(), AT[:1].float(), mask=mask))
    assert student.grad.isfinite().all()


def test_finite_sees_what_is_not():
    assert finite(LS)
    assert finite(torch.zeros(0))
    for bad in BAD:
        assert not finite(torch.tensor([1.0, bad, 2.0]))
    assert not finite(torch.tensor([math.inf, -math.inf]))
    assert not finite(torch.full((3,), 3e38))  # the sum overflows: the long way is taken


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "js_divergence", "soft_cross_entropy", "logit_mse"])
def test_one_excluded_class_elsewhere_changes_no_other_position(name):
    """A batch with minus infinity goes the long way; its other positions have the same values and gradients."""
    impossible = torch.zeros_like(LS)
    impossible[0, 3] = -math.inf
    for options in ({}, {"temperature": 4.0}, {"temperature": torch.linspace(1, 3, 6, dtype=torch.float64)}):
        values, gradients = [], []
        for extra in (torch.zeros_like(LS), impossible):
            student = (LS + extra).requires_grad_()
            found = LOSSES.get(name)(student, LT + extra, **options)
            found.sum().backward()
            values.append(found.detach()[1:])
            gradients.append(student.grad[1:])
        torch.testing.assert_close(*values, rtol=1e-14, atol=0)
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


def test_a_temperature_that_is_learned_keeps_its_gradient_beside_excluded_classes():
    impossible = torch.zeros_like(LS)
    impossible[:, 3] = -math.inf
    for name in ("forward_kl", "logit_mse"):
        own = torch.full((6,), 2.0, dtype=torch.float64, requires_grad=True)
        LOSSES.get(name)(LS + impossible, LT + impossible, temperature=own).sum().backward()
        assert own.grad.isfinite().all()
        assert own.grad.all()


def test_a_weighted_sum_keeps_what_is_infinite_and_what_is_no_number():
    weights = torch.tensor([[0.5, 0.5, 0.0]])
    assert weighted_sum(weights, torch.tensor([[1.0, 3.0, math.inf]])).item() == 2.0
    assert weighted_sum(weights, torch.tensor([[1.0, math.inf, 0.0]])).item() == math.inf
    assert weighted_sum(torch.tensor([[0.5, math.nan]]), torch.ones(1, 2)).isnan().all()
    assert weighted_sum(weights, torch.tensor([[1.0, math.nan, 0.0]])).isnan().all()


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_labels_beside_one_excluded_class(name):
    impossible = torch.zeros_like(LS)
    impossible[0, 3] = -math.inf
    labels = torch.arange(6) if name == "cross_entropy" else (torch.arange(60).view(6, 10) % 3 == 0).long()
    values, gradients = [], []
    for extra in (torch.zeros_like(LS), impossible):
        student = (LS + extra).requires_grad_()
        found = LOSSES.get(name)(student, labels, label_smoothing=0.1)
        found[1:].sum().backward()
        values.append(found.detach()[1:])
        gradients.append(student.grad[1:])
    torch.testing.assert_close(*values, rtol=1e-14, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


def test_attention_beside_a_masked_infinity():
    """A mask that hides an infinity goes the long way, and the tokens that count have the same values."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    for name, options in (
        ("attention_mse", {}),
        ("attention_kl", {}),
        ("attention_kl", {"renormalize": False}),
        ("attention_kl", {"kind": "cross_entropy"}),
    ):
        values, gradients = [], []
        for poison in (0.0, math.inf, math.nan):
            student = AS.clone()
            student[..., 4, :] += poison  # a query that counts in no example
            student.requires_grad_()
            found = LOSSES.get(name)(student, AT, mask=mask, **options)
            found.sum().backward()
            values.append(found.detach())
            gradients.append(student.grad)
        for i in (1, 2):
            torch.testing.assert_close(values[i], values[0], rtol=1e-14, atol=0)
            torch.testing.assert_close(gradients[i], gradients[0], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("heads", ["each", "sum"])
def test_attention_with_equal_infinities(heads):
    """Causal scores: minus infinity above the diagonal on both sides is no difference."""
    causal = torch.zeros(5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf)
    student = (AS + causal).requires_grad_()
    values = LOSSES.get("attention_mse")(student, AT + causal, heads=heads)
    values.sum().backward()
    below = torch.ones(5, 5, dtype=torch.float64).tril()
    expected = LOSSES.get("attention_mse")(AS * below, AT * below, heads=heads)
    torch.testing.assert_close(values, expected)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("bad", BAD)
def test_a_teacher_without_a_largest_class_teaches_no_label(bad):
    teacher = LT.clone()
    teacher[2] = bad
    assert LOSSES.get("hard_label")(LS, teacher).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_distances_from_products_have_the_digits_of_float32(offset):
    rows = (generate((12, 33), 0.3, 1.0) + offset).float()
    found = from_products(rows)
    exact = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=0)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5])
def test_close_rows_are_not_taken_from_products(gap):
    rows = generate((12, 33), 0.3, 1.0).float()
    rows[5] = rows[7]
    rows[5, 0] += gap
    assert from_products(rows) is None
    exact = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    between = LOSSES.get("rkd_distance")(rows, rows.flip(0))
    assert between.isfinite().all()
    assert exact[5, 7] <= 2e-5


@pytest.mark.parametrize("bad", BAD)
def test_rows_that_are_no_numbers_are_not_taken_from_products(bad):
    rows = generate((6, 4), 0.3, 1.0).float()
    rows[2, 1] = bad
    assert from_products(rows) is None


def test_doubles_and_single_rows():
    assert from_products(generate((6, 4), 0.3, 1.0)) is None  # float64 has no larger type to multiply in
    assert from_products(torch.ones(1, 4)).tolist() == [[0.0]]
