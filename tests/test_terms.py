import copy
import math
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch

from limbeck import Term, layer_pairs, spread
from limbeck.losses import forward_kl


def weighted(student, teacher, *, power=2.0, mask=None, labels=None):
    return (student - teacher).abs().pow(power).mean(-1)


def demanding(student, teacher, *, margin):
    return (student - teacher - margin).mean(-1)


# ---- what a term is --------------------------------------------------------------------------------------------


def test_defaults():
    term = Term("logits", loss="forward_kl")
    assert (term.tap, term.teacher_tap, term.weight, term.name) == ("logits", "logits", 1.0, "forward_kl")
    chosen = (term.project, term.mask, dict(term.comparison.options), term.comparison.asks)
    assert chosen == (None, None, {}, frozenset())
    assert term.comparison.loss is forward_kl
    assert not term.reads_labels


def test_the_teachers_tap_may_differ():
    term = Term("encoder.layer.1", "encoder.layer.3", loss="mse")
    assert (term.tap, term.teacher_tap) == ("encoder.layer.1", "encoder.layer.3")


def test_labels_take_the_place_of_a_teacher():
    for term in (Term("labels", loss="cross_entropy"), Term("logits", "labels", loss="cross_entropy")):
        assert (term.tap, term.teacher_tap, term.reads_labels) == ("logits", "labels", True)
        assert term.name == "cross_entropy"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"tap": "logits", "loss": "mse"}, "mse"),
        ({"tap": "encoder.layer.1", "loss": "mse"}, "mse[encoder.layer.1]"),
        ({"tap": "logits", "loss": weighted}, "weighted"),
        ({"tap": "logits", "loss": "mse", "name": "hidden.0"}, "hidden.0"),
    ],
)
def test_names(arguments, name):
    assert Term(**arguments).name == name


def test_a_loss_by_import_path():
    term = Term("logits", loss="limbeck.losses.logits:forward_kl", temperature=3.0)
    assert term.comparison.loss is forward_kl


def test_options_are_bound():
    student, teacher = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0]])
    assert Term("logits", loss=weighted, power=3.0).comparison(student, teacher).item() == pytest.approx(27 / 2)
    assert Term("logits", loss=weighted).comparison(student, teacher).item() == pytest.approx(9 / 2)


def test_inputs_that_the_distiller_fills_in():
    assert Term("logits", loss=weighted).comparison.asks == {"mask", "labels"}


def test_repr_says_it_all():
    term = Term("logits", loss="forward_kl", temperature=4.0, weight=0.9)
    assert repr(term) == "Term(forward_kl: logits -> logits, weight 0.9, temperature=4.0)"


def test_a_term_cannot_be_changed():
    term = Term("logits", loss="forward_kl", temperature=4.0)
    with pytest.raises(FrozenInstanceError):
        term.weight = 2.0


def test_terms_are_compared_by_what_they_say():
    assert Term("logits", loss="forward_kl", temperature=4.0) == Term("logits", loss="forward_kl", temperature=4.0)
    assert Term("logits", loss="forward_kl", temperature=4.0) != Term("logits", loss="forward_kl", temperature=2.0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda term: pickle.loads(pickle.dumps(term))])
def test_a_term_can_be_copied_and_sent_to_another_process(again):
    """An average of weights copies the Distiller; a launcher of processes pickles it."""
    term = Term("logits", loss="forward_kl", temperature=4.0, weight=0.5)
    assert again(term) == term
    other = Term("logits", loss="forward_kl", temperature="flsw", transforms=["standardize"])
    assert again(other) == other


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "forwrd_kl"}, ValueError, "unknown loss 'forwrd_kl'; did you mean 'forward_kl'"),
        ({"loss": "no.such.module:loss"}, ValueError, "cannot import 'no.such.module'"),
        ({"loss": "limbeck.losses.logits:forwrd_kl"}, ValueError, "did you mean 'forward_kl'"),
        (
            {"loss": "forward_kl", "temprature": 4.0},
            TypeError,
            "loss 'forward_kl' has no option 'temprature'; did you mean 'temperature'",
        ),
        ({"loss": "mse", "temperature": 4.0}, TypeError, "loss 'mse' has no option 'temperature'; known: none"),
        ({"loss": weighted, "labels": 1}, TypeError, "loss 'weighted' has no option 'labels'"),
        ({"loss": demanding}, TypeError, "loss 'demanding' needs the option 'margin'"),
        ({"loss": "mse", "weight": math.nan}, ValueError, "must be a finite number or a schedule, got nan"),
        ({"loss": "mse", "weight": math.inf}, ValueError, "must be a finite number or a schedule, got inf"),
        ({"loss": "mse", "weight": "a"}, ValueError, "weight of term 'mse' must be a finite number .* got 'a'"),
        ({"loss": "mse", "weight": -0.5, "name": "kd"}, ValueError, "weight of term 'kd' is -0.5, which pushes"),
        ({"loss": "mse", "weight": lambda at: 0.5 - at}, ValueError, "is -0.5 at its lowest"),
        ({"loss": "mse", "weight": {"schedule": "cosine", "base": -1}}, ValueError, "is -1 at its lowest"),
        ({"loss": "mse", "wieght": 2}, TypeError, "loss 'mse' has no option 'wieght'; did you mean 'weight'"),
        ({"loss": "mse", "teacher_tp": "x"}, TypeError, "did you mean 'teacher_tap'"),
        ({"loss": "forward_kl", "temperature": "hot"}, ValueError, "unknown temperature 'hot'; known: cwsm, flsw"),
        ({"loss": "mse", "project": "liner"}, ValueError, "unknown projection 'liner'; did you mean 'linear'"),
        ({"loss": "mse", "project": {"kind": "mlp", "width": 3}}, TypeError, "'mlp' has no option 'width'"),
    ],
)
def test_a_wrong_term_is_no_term(arguments, error, message):
    with pytest.raises(error, match=message):
        Term("logits", **arguments)


# ---- layer maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "learns_from"),
    [
        ("uniform", 4, 12, [2, 5, 8, 11]),  # TinyBERT: layer m learns from 3m, counted from 1
        ("uniform", 6, 12, [1, 3, 5, 7, 9, 11]),
        ("uniform", 3, 4, [0, 1, 3]),
        ("uniform", 1, 12, [11]),
        ("last", 6, 12, [6, 7, 8, 9, 10, 11]),
        ("skip", 6, 12, [0, 2, 4, 6, 8, 10]),
        ("skip", 3, 12, [0, 4, 8]),
        ("uniform", 3, 3, [0, 1, 2]),
        ("last", 3, 3, [0, 1, 2]),
        ("skip", 3, 3, [0, 1, 2]),
        ([0, 6, 11], 3, 12, [0, 6, 11]),
        ([-1, -12, 3], 3, 12, [11, 0, 3]),
    ],
)
def test_layer_pairs(layers, student, teacher, learns_from):
    assert layer_pairs(layers, student, teacher) == list(enumerate(learns_from))


@pytest.mark.parametrize("student", range(1, 13))
@pytest.mark.parametrize("layers", ["uniform", "last", "skip"])
def test_maps_stay_in_order_and_in_range(layers, student):
    learns_from = [teacher for _, teacher in layer_pairs(layers, student, 12)]
    assert learns_from == sorted(set(learns_from))
    assert 0 <= learns_from[0] <= learns_from[-1] <= 11
    if layers != "skip":
        assert learns_from[-1] == 11


def test_explicit_pairs_stay_as_they_are():
    pairs = [(0, 3), (0, 5), (1, 5)]
    assert layer_pairs(pairs, 2, 6) == pairs


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "message"),
    [
        ("unifrm", 3, 6, "'unifrm' is neither a list of pairs nor a known layer map; did you mean 'uniform'"),
        ("uniform", 7, 6, "at least as deep as the student, got 7 layers for 6; write the pairs out"),
        ([(3, 0)], 3, 6, "the student has no layer 3; it has 3, counted from 0"),
        ([(0, 6)], 3, 6, "the teacher has no layer 6; it has 6, counted from 0"),
        ([(-1, 0)], 3, 6, "the student has no layer -1"),
        ([0, 6], 2, 6, "the teacher has no layer 6; it has 6, counted from 0"),
        ([0, -7], 2, 6, "the teacher has no layer -7"),
        (
            [0, 1, 2],
            2,
            6,
            "the student has 2 layers and 3 of the teacher's are named; name one for each, or pairs",
        ),
    ],
)
def test_layers_that_are_not_there(layers, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(layers, student, teacher)


# ---- one term for each pair ------------------------------------------------------------------------------------


def test_spread():
    pairs = [(0, 1), (1, 3)]
    terms = spread("s.{}", "t.layer.{}", pairs, name="hidden", weight=0.5, loss="cosine", project="linear", dim=-1)
    assert [(t.tap, t.teacher_tap, t.name) for t in terms] == [
        ("s.0", "t.layer.1", "hidden.0"),
        ("s.1", "t.layer.3", "hidden.1"),
    ]
    assert [t.weight for t in terms] == [0.25, 0.25]  # the weight is the group's
    assert all(t.project == "linear" and dict(t.comparison.options) == {"dim": -1} for t in terms)


def test_spread_names_several_teachers_of_a_layer_apart():
    terms = spread("s.{}", "t.{}", [(0, 1), (0, 2), (1, 3)], name="hidden", loss="mse")
    assert [t.name for t in terms] == ["hidden.0-1", "hidden.0-2", "hidden.1"]
    assert sum(t.weight for t in terms) == pytest.approx(1.0)


@pytest.mark.parametrize("taps", [("s.1", "t.{}"), ("s.{}", "t.1")])
def test_spread_needs_a_place_for_the_number(taps):
    with pytest.raises(ValueError, match=r"has no \{\} for the layer's number"):
        spread(*taps, [(0, 1)], name="hidden", loss="mse")


def test_spread_passes_options_on_to_be_checked():
    with pytest.raises(TypeError, match="loss 'mse' has no option 'temperature'"):
        spread("s.{}", "t.{}", [(0, 1)], name="hidden", loss="mse", temperature=2.0)
