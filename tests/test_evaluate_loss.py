"""`limbeck.losses.evaluate`: one number from a loss, with the mask that belongs to it."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from limbeck import Distiller, Term
from limbeck.losses import evaluate
from tests.golden_cases import CLASSES, INPUTS, TOKEN_LABELS
from tests.models import bert, text_batch

LS, LT, SS, ST = (INPUTS[name] for name in ("LS", "LT", "SS", "ST"))
VALID = TOKEN_LABELS != -100


def test_labels_that_are_ignored_do_not_count():
    ours = evaluate("cross_entropy", SS, TOKEN_LABELS)
    torch.testing.assert_close(ours, F.cross_entropy(SS.transpose(1, 2), TOKEN_LABELS))


@pytest.mark.parametrize(("loss", "options"), [("dkd", {}), ("wsld", {}), ("js_divergence", {"beta": 0.9})])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_labels_of_positions_are_the_mask(loss, options, reduction):
    known = {"labels": TOKEN_LABELS, **options}
    ours = evaluate(loss, SS, ST, reduction, **known)
    torch.testing.assert_close(ours, evaluate(loss, SS, ST, reduction, mask=VALID, **known))


def test_numbers_that_are_ignored_do_not_count():
    predictions, numbers = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0.0, -100.0, 3.0])
    assert evaluate("label_mse", predictions, numbers, ignore_index=-100.0).item() == pytest.approx(2.5)
    student = torch.nn.Linear(1, 1)
    with torch.no_grad():
        student.weight.fill_(1.0)
        student.bias.zero_()
    distiller = Distiller(student, None, [Term("labels", loss="label_mse", ignore_index=-100.0)])
    out = distiller(predictions, numbers)
    assert out.loss.item() == pytest.approx(2.5)
    counts = distiller.count((predictions, numbers))
    parts = [distiller(predictions[cut], numbers[cut], counts=counts).loss for cut in (slice(0, 1), slice(1, 3))]
    assert sum(parts).item() == pytest.approx(2.5)


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(2, 5), torch.ones(5, 4)])
def test_a_mask_of_another_batch_is_refused(mask):
    with pytest.raises(ValueError, match=r"a mask of shape .* does not fit (values of shape \(6,\)|a batch of 6)"):
        evaluate("forward_kl", LS, LT, mask=mask)


def test_what_a_loss_does_not_read_is_refused():
    with pytest.raises(TypeError, match=r"reads no labels, and those of shape \(3,\) are no mask"):
        evaluate("forward_kl", LS, LT, labels=CLASSES[:3])
    with pytest.raises(TypeError, match="loss 'forward_kl' has no option 'example_id'"):
        evaluate("forward_kl", LS, LT, example_id=torch.arange(6))


def test_several_places_are_for_losses_that_take_them():
    with pytest.raises(ValueError, match="loss 'mse' compares one place with one, got 2"):
        evaluate("mse", (LS, LS), (LT, LT))
    with pytest.raises(ValueError, match="this term reads several places; drop transforms"):
        evaluate("fsp", (LS, LS), (LT, LT), transforms="standardize")
    with pytest.raises(ValueError, match="compares one place with one; make a term for each tap"):
        Term(["0", "2"], loss="mse")


def test_a_mask_that_a_term_names_must_fit():
    batch = {**text_batch(), "token_mask": torch.ones(4, 9)}
    term = Term("bert.encoder.layer.0", loss="mse", mask="token_mask")
    with pytest.raises(ValueError, match="a mask of shape"):
        Distiller(bert(), bert(seed=1), [term])(**batch)


def test_labels_of_several_classes_are_no_mask_of_hidden_states():
    """Even where there are as many classes as positions."""
    batch = text_batch(4, 7)
    terms = [Term("bert.encoder.layer.0", loss="mse", name="hidden")]
    student, teacher = bert(), bert(seed=1)
    expected = Distiller(student, teacher, terms)(**batch).terms["hidden"]
    many = {**batch, "labels": torch.randint(0, 2, (4, 7), generator=torch.Generator().manual_seed(0))}
    many["labels"][0] = -100
    (plan,) = Distiller(student, teacher, terms).preflight(many)
    assert plan.mask == "attention_mask"
    torch.testing.assert_close(Distiller(student, teacher, terms).distil(many).terms["hidden"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": {"schedule": "piecewise", "points": [[0, 4], [0.3, -2], [0.6, 4]]}}, "must be positive"),
        ({"weight": {"schedule": "piecewise", "points": [[0, 4], [0.3, -2], [0.6, 4]]}}, "must not be negative"),
        ({"temperature": {"kind": "flsw", "base": {"schedule": "linear"}}}, "cannot be scheduled"),
        ({"weight": {"schedule": "piecewise", "points": [1, 2]}}, r"takes points \[progress, value\]"),
        ({"weight": {"schedule": "linear", "base": "x"}}, "base of a schedule is a number, got 'x'"),
        ({"weight": True}, "must be a finite number or a schedule, got True"),
        ({"mask": 3}, "mask names an entry of the batch, got 3"),
    ],
)
def test_what_goes_wrong_later_is_refused_when_it_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        Term("logits", loss="forward_kl", **options)


@pytest.mark.parametrize("tap", [[], 3, ["a", 4]])
def test_a_tap_is_a_name(tap):
    with pytest.raises(ValueError, match="a tap is the name of a place"):
        Term(tap, loss="fsp")


def test_what_a_loss_learns_takes_options():
    with pytest.raises(TypeError, match="variance is what the loss learns, and takes options"):
        Term("0", loss="vid", variance=3.0)


RELATIONS = [
    "rkd_distance",
    "rkd_angle",
    "pkt",
    "similarity_preserving",
    "correlation_congruence",
    "infonce",
    "cka",
]


@pytest.mark.parametrize("loss", [*RELATIONS, "mse", "forward_kl", "dist"])
def test_an_example_that_does_not_count_is_as_if_it_were_not_there(loss):
    """Not even a NaN in it is seen, neither by `evaluate` nor in a Distiller."""
    keep = torch.tensor([1, 0, 1, 1, 0, 1])
    student = LS.clone()
    student[1], student[4] = 50.0, torch.nan
    student.requires_grad_()
    ours = evaluate(loss, student, LT, mask=keep)
    alone = LS[keep.bool()].clone().requires_grad_()
    expected = evaluate(loss, alone, LT[keep.bool()])
    torch.testing.assert_close(ours, expected)
    ours.backward()
    expected.backward()
    torch.testing.assert_close(student.grad[keep.bool()], alone.grad)
    assert not student.grad[~keep.bool()].any()

    model, teacher = torch.nn.Identity(), torch.nn.Identity()
    distiller = Distiller(model, teacher, [Term("logits", loss=loss, name="x", mask="keep")], teacher_read=None)
    inputs = student.detach().clone().requires_grad_()
    out = distiller.distil({"input": inputs, "keep": keep})
    assert out.loss.isfinite()


def test_nothing_to_count_is_zero():
    student = LS.clone().requires_grad_()
    value = evaluate("rkd_distance", student, LT, mask=torch.zeros(6))
    value.backward()
    assert value.item() == 0
    assert not student.grad.any()


def test_progress_runs_from_zero_to_one():
    for progress in (-1, 2):
        with pytest.raises(ValueError, match="progress runs from 0"):
            evaluate(
                "forward_kl", LS, LT, temperature={"schedule": "linear", "start": 4, "end": 1}, progress=progress
            )


def test_a_temperature_may_be_a_function_of_progress():
    ours = evaluate("forward_kl", LS, LT, temperature=lambda progress: 4 - 2 * progress, progress=0.5)
    torch.testing.assert_close(ours, evaluate("forward_kl", LS, LT, temperature=3.0))
