import copy
import math
import pickle

import pytest

from limbeck import Term, spread
from limbeck.schedules import SCHEDULES, Scheduled, build_schedule, is_schedule, value_at


def at(spec, *progress):
    schedule = build_schedule(spec)
    return [round(schedule.at(p), 9) for p in progress]


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ({"schedule": "constant", "value": 3.0}, [3.0, 3.0, 3.0]),
        ({"schedule": "linear", "start": 2.0, "end": 4.0}, [2.0, 3.0, 4.0]),
        ({"schedule": "linear_growth"}, [0.0, 0.5, 1.0]),
        ({"schedule": "linear_decay", "base": 0.8}, [0.8, 0.4, 0.0]),
        ({"schedule": "cosine", "start": 1.0, "end": 0.2}, [1.0, 0.6, 0.2]),
        ({"schedule": "exponential", "start": 1.0, "end": 0.01}, [1.0, 0.1, 0.01]),
        ({"schedule": "warmup", "until": 1.0}, [0.0, 0.5, 1.0]),
        ({"schedule": "warmup", "until": 0.25, "start": 1.0, "end": 5.0}, [1.0, 5.0, 5.0]),
        ({"schedule": "piecewise", "points": [[0.0, 8.0], [0.5, 2.0], [1.0, 1.0]]}, [8.0, 2.0, 1.0]),
        (lambda progress: 1 - progress**2, [1.0, 0.75, 0.0]),
        ({"schedule": "math:exp", "base": 2.0}, [2.0, round(2 * math.exp(0.5), 9), round(2 * math.e, 9)]),
    ],
)
def test_values_at_the_start_half_way_and_at_the_end(spec, values):
    assert at(spec, 0.0, 0.5, 1.0) == values


def test_piecewise_goes_in_lines_or_jumps():
    points = [[0.2, 4.0], [0.6, 2.0]]
    assert at({"schedule": "piecewise", "points": points}, 0.0, 0.2, 0.4, 0.6, 0.9) == [4.0, 4.0, 3.0, 2.0, 2.0]
    jumping = {"schedule": "piecewise", "points": points, "steps": True}
    assert at(jumping, 0.0, 0.2, 0.59, 0.6, 1.0) == [4.0, 4.0, 4.0, 2.0, 2.0]


def test_every_schedule_has_a_docstring():
    assert all(SCHEDULES.get(name).__doc__ for name in SCHEDULES)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"schedule": "liner"}, ValueError, "unknown schedule 'liner'; did you mean 'linear'"),
        ({"schedule": "linear", "begin": 1}, TypeError, "schedule 'linear' has no option 'begin'"),
        ({"schedule": "piecewise"}, TypeError, "needs the option 'points'"),
        ({"schedule": "piecewise", "points": [[1.0, 1], [0.0, 2]]}, ValueError, "in order of progress"),
        ({"schedule": "exponential", "start": 1.0, "end": 0.0}, ValueError, "of one sign"),
        ({"schedule": "warmup", "until": 0}, ValueError, "until=0"),
        ({"base": 0.5}, ValueError, "schedule: name"),
        (lambda progress: math.inf, ValueError, "is inf at progress 0"),
    ],
)
def test_a_wrong_schedule_is_refused_when_it_is_built(spec, error, message):
    with pytest.raises(error, match=message):
        build_schedule(spec)


def test_a_scheduled_value_needs_progress():
    with pytest.raises(
        ValueError, match=r"the weight follows 1 x linear_decay.*pass progress=step / \(steps - 1\)"
    ):
        value_at(build_schedule({"schedule": "linear_decay"}), None, "weight")


def test_only_a_mapping_with_the_key_is_a_schedule():
    assert is_schedule({"schedule": "linear"})
    assert not is_schedule({"kind": "flsw"})
    assert not is_schedule(0.5)


# ---- in terms --------------------------------------------------------------------------------------------------


def test_a_term_follows_its_schedules():
    term = Term("logits", loss="forward_kl", weight={"schedule": "linear_decay", "base": 0.9}, temperature=4.0)
    assert term.is_scheduled
    assert [term.weight_at(p) for p in (0.0, 1.0)] == [0.9, 0.0]
    assert repr(term) == "Term(forward_kl: logits -> logits, weight 0.9 x linear_decay(), temperature=4.0)"
    warm = Term("logits", loss="forward_kl", temperature={"schedule": "linear", "start": 8.0, "end": 1.0})
    assert warm.is_scheduled
    assert isinstance(warm.comparison.options["temperature"], Scheduled)


def test_a_scheduled_term_can_be_copied_sent_and_compared():
    def make():
        return Term("logits", loss="forward_kl", weight={"schedule": "cosine", "base": 0.5})

    assert copy.deepcopy(make()) == pickle.loads(pickle.dumps(make())) == make()


@pytest.mark.parametrize("weight", [{"schedule": "linear_decay", "base": 0.8}, lambda p: 0.8 * (1 - p)])
def test_a_group_shares_out_a_scheduled_weight(weight):
    terms = spread("s.{}", "t.{}", [(0, 1), (1, 3)], name="hidden", loss="mse", weight=weight)
    assert [t.weight_at(0.5) for t in terms] == pytest.approx([0.2, 0.2])


def test_a_group_may_share_out_its_weight_unevenly():
    terms = spread("s.{}", "t.{}", [(0, 1), (1, 3)], name="hidden", loss="mse", shares=[0.25, 0.75])
    assert [t.weight for t in terms] == [0.25, 0.75]
