"""Demands, the Pareto front, the choice, and sizes and times as people write them."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from limbeck.report.candidates import Candidate, Demands, beside, choose, front, kept, shortfalls, size_beside
from limbeck.report.quantities import milliseconds_of, seconds_of, size_of
from tests.searches import candidate

STATES = ("complete", "complete", "complete", "pruned", "failed", "running")


def crowd(seed: int, count: int) -> list[Candidate]:
    """Trials of every state whose scores and costs are drawn from a few values, so that there are many ties."""
    chance = random.Random(seed)
    return [
        candidate(
            number,
            chance.choice([0.5, 0.6, 0.7, 0.8, math.nan, None]),
            chance.choice([1.0, 1.01, 2.0, 3.0, 0.0]),
            size_bytes=chance.choice([10, 20, 30]),
            state=chance.choice(STATES),
        )
        for number in range(count)
    ]


def able(candidates):
    """The definition of a trial that counts, in other words than the package's."""
    return [
        c
        for c in candidates
        if c.state == "complete" and c.score is not None and c.score == c.score and c.latency_ms > 0
    ]


def beats(one, other, higher_is_better, cost):
    price = "latency_ms" if cost == "latency" else "size_bytes"
    sign = 1 if higher_is_better else -1
    scores, prices = (sign * one.score, sign * other.score), (getattr(one, price), getattr(other, price))
    no_worse = scores[0] >= scores[1] and prices[0] <= prices[1]
    return no_worse and (scores[0] > scores[1] or prices[0] < prices[1])


@pytest.mark.parametrize("cost", ["latency", "size"])
@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_the_front_is_what_nothing_beats(seed, higher, cost):
    trials = crowd(seed, 1 + seed)
    counted = able(trials)
    naive = {c.number for c in counted if not any(beats(o, c, higher, cost) for o in counted)}
    found = front(trials, higher, cost)
    assert {c.number for c in found} == naive
    prices = [c.latency_ms if cost == "latency" else c.size_bytes for c in found]
    assert prices == sorted(prices)
    assert front(trials[::-1], higher, cost) == found


def test_equals_stand_on_the_front_together():
    trials = [candidate(0, 0.8, 2.0), candidate(1, 0.8, 2.0), candidate(2, 0.8, 2.1)]
    assert [c.number for c in front(trials, True)] == [0, 1]


@pytest.mark.parametrize("state", ["pruned", "failed", "running"])
def test_unfinished_trials_are_neither_on_the_front_nor_chosen(state):
    trials = [candidate(0, 0.99, 0.1, state=state), candidate(1, 0.5, 9.0)]
    assert [c.number for c in front(trials, True)] == [1]
    assert choose(trials, Demands(), 0.9, True).chosen.number == 1


def test_nothing_finished():
    choice = choose([candidate(0, state="pruned")], Demands(keep=0.9), 0.9, True)
    assert (choice.chosen, choice.nearest, choice.lacks) == (None, None, "no trial was finished")
    assert front([], True) == []


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_the_choice_meets_the_demands_and_no_smaller_one_does(seed, higher):
    chance, trials = random.Random(seed), crowd(seed, 2 + seed % 12)
    demands = Demands(
        keep=chance.choice([None, 0.7, 0.9, 1.1]),
        speedup=chance.choice([None, 2.0, 4.0]),
        max_size=chance.choice([None, 15, 25]),
        latency_ms=chance.choice([None, 1.5]),
    )

    def meets(c):
        share = c.score / 0.7 if higher else 0.7 / c.score
        return all(
            (
                demands.keep is None or share >= demands.keep - 1e-12,
                demands.speedup is None or c.speedup >= demands.speedup,
                demands.max_size is None or c.size_bytes <= demands.max_size,
                demands.latency_ms is None or c.latency_ms <= demands.latency_ms,
            )
        )

    meeting = [c for c in able(trials) if meets(c)]
    choice = choose(trials, demands, 0.7, higher)
    assert choice.meeting == len(meeting)
    if not meeting:
        assert choice.chosen is None
        assert (choice.nearest is None) == (not able(trials))
        assert choice.lacks
        return
    assert choice.chosen in meeting
    assert choice.nearest is None
    if demands.keep is not None:
        assert choice.chosen.size_bytes == min(c.size_bytes for c in meeting)
    else:
        best = (max if higher else min)(c.score for c in meeting)
        assert choice.chosen.score == best


def test_of_one_size_the_fastest_is_chosen_but_noise_does_not_decide():
    slow, fast, faster = candidate(0, 0.89, 2.5), candidate(1, 0.88, 2.04), candidate(2, 0.86, 2.0)
    assert choose([slow, fast, faster], Demands(keep=0.9), 0.9, True).chosen.number == 1
    assert choose([slow, faster], Demands(keep=0.9), 0.9, True).chosen.number == 2


def test_the_smallest_counts_before_the_best():
    big, small = candidate(0, 0.9, 1.0, size_bytes=50), candidate(1, 0.88, 3.0, size_bytes=40)
    assert choose([big, small], Demands(keep=0.97), 0.9, True).chosen.number == 1
    assert choose([big, small], Demands(speedup=2.0), 0.9, True).chosen.number == 0
    assert choose([big, small], Demands(), 0.9, True).chosen.number == 0


def test_without_a_share_the_best_score_and_then_the_smallest():
    trials = [candidate(0, 0.8, 1.0, size_bytes=9), candidate(1, 0.8, 2.0, size_bytes=8)]
    assert choose(trials, Demands(max_size=10), 0.9, True).chosen.number == 1


def test_nearest_misses_its_worst_demand_by_the_smallest_factor():
    slow = candidate(0, 0.9, 4.05)  # twice as fast where five times are asked: a factor of 2.5
    weak = candidate(1, 0.6, 1.62)  # fast enough, and keeps two thirds of 0.97: a factor of 1.46
    choice = choose([slow, weak], Demands(keep=0.97, speedup=5.0), 0.9, True)
    assert choice.nearest.number == 1
    assert choice.lacks == "keeps 66.7% of the teacher's score where 97% is asked"
    found = {miss.demand: miss.factor for miss in shortfalls(slow, Demands(speedup=5.0), 0.9, True)}
    assert found == {"speedup": pytest.approx(2.5)}


def test_a_time_and_the_speed_that_stands_for_it_are_missed_alike():
    trial = candidate(0, 0.8, 2.7)
    by_speed = shortfalls(trial, Demands(speedup=6.0), 0.9, True)[0].factor
    by_time = shortfalls(trial, Demands(latency_ms=8.1 / 6.0), 0.9, True)[0].factor
    assert by_speed == pytest.approx(by_time)


def test_what_lacks_is_said_for_every_demand():
    asked = Demands(keep=0.97, speedup=3.5, max_size=20_000_000, latency_ms=2.0)
    trial = candidate(0, 0.8559, 3.375, speedup=2.4)
    assert choose([trial], asked, 0.9, True).lacks == (
        "keeps 95.1% of the teacher's score where 97% is asked, has 2.4x the speed where 3.5x is asked, takes "
        "40.0 MB where at most 20 MB is asked and takes 3.38 ms where at most 2 ms is asked"
    )


def test_a_metric_where_lower_is_better():
    assert kept(0.5, 0.25, False) == 0.5
    assert kept(0.0, 0.25, False) == math.inf
    good, bad = candidate(0, 0.26, 3.0, size_bytes=50), candidate(1, 0.4, 1.0, size_bytes=40)
    assert choose([good, bad], Demands(keep=0.9), 0.25, False).chosen.number == 0
    assert choose([good, bad], Demands(), 0.25, False).chosen.number == 0
    assert "62.5%" in choose([bad], Demands(keep=0.9), 0.25, False).lacks


def test_a_demand_met_to_the_last_digit_is_met():
    trial = candidate(0, 0.97 * 0.9, 2.0)
    assert choose([trial], Demands(keep=0.97), 0.9, True).chosen is trial
    assert choose([candidate(0, 0.1 * 3, 2.0)], Demands(keep=0.3), 1.0, True).chosen


@pytest.mark.parametrize("score", [0.0, -0.1, math.nan, math.inf])
def test_a_share_of_no_score_is_refused(score):
    with pytest.raises(ValueError, match="of this there is no share; leave keep out"):
        choose([candidate()], Demands(keep=0.9), score, True)
    assert choose([candidate()], Demands(speedup=2.0), score, True).chosen


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 0.0}, "keep is 0: a share of the teacher's score lies above 0"),
        ({"keep": -1.0}, "keep is -1"),
        ({"keep": 97.0}, "for 97% write 0.97"),
        ({"keep": math.nan}, "keep is nan"),
        ({"speedup": 0.0}, "the speed-up is 0; it has to be a number above 0"),
        ({"speedup": math.inf}, "the speed-up is inf"),
        ({"max_size": 0}, "the largest size in bytes is 0"),
        ({"latency_ms": -2.0}, "the latency in milliseconds is -2"),
    ],
)
def test_demands_out_of_range(changes, said):
    with pytest.raises(ValueError, match=said):
        Demands(**changes)


def test_a_share_above_one_may_be_asked():
    assert choose([candidate(0, 0.95)], Demands(keep=1.05), 0.9, True).chosen
    assert not Demands()
    assert Demands(latency_ms=2.0)


def test_demands_in_words():
    asked = Demands(keep=0.975, speedup=3.5, max_size=20_000_000, latency_ms=0.25)
    assert asked.in_words("accuracy") == (
        "at least 97.5% of the teacher's accuracy, at least 3.5x the teacher's speed, at most 20 MB and at most "
        "0.25 ms for one example"
    )


def test_a_state_that_is_none():
    with pytest.raises(ValueError, match="complete, pruned, failed, running, not 'done'"):
        dataclasses.replace(candidate(), state="done")


@pytest.mark.parametrize("seed", range(200))
def test_a_number_beside_its_limit_is_never_on_the_wrong_side(seed):
    chance = random.Random(seed)
    limit = round(10 ** chance.uniform(-2, 3), chance.randint(0, 3)) or 1.0
    value = limit * (1 + chance.choice([-1, 1]) * 10 ** chance.uniform(-7, 0.5))
    text = beside(value, limit, 1)
    assert (float(text) < limit, float(text) > limit) == (value < limit, value > limit)


@pytest.mark.parametrize(
    ("count", "limit", "text"),
    [(20_000_001, 20_000_000, "20.000001 MB"), (999, 1000, "0.999 kB"), (400, 500, "400 bytes")],
)
def test_sizes_beside_a_limit(count, limit, text):
    assert size_beside(count, limit) == text


# ---- as people write them


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20MB", 20_000_000),
        ("20 mb", 20_000_000),
        ("20 MiB", 20 * 2**20),
        (" 1.5GB ", 1_500_000_000),
        ("1GiB", 2**30),
        ("300 kB", 300_000),
        (".5KiB", 512),
        ("2e7 B", 20_000_000),
        ("0.2 B", 1),
    ],
)
def test_sizes(text, count):
    assert size_of(text) == count


@pytest.mark.parametrize(
    ("text", "milliseconds"), [("2ms", 2), ("0.002s", 2), ("500 us", 0.5), ("500µs", 0.5), ("1e-3 S", 1)]
)
def test_latencies(text, milliseconds):
    assert milliseconds_of(text) == pytest.approx(milliseconds)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("10m", 600), ("10 min", 600), ("2h", 7200), ("1h30m", 5400), ("1d 2h 3m 4.5s", 93784.5)],
)
def test_times(text, seconds):
    assert seconds_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["20", "", "MB", "20 XB", "-5MB", "1,5MB", "20MB 3kB", "nanMB", "twenty MB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"is no size; write a number and a unit .*, like 20MB"):
        size_of(text)


@pytest.mark.parametrize("text", ["2", "2 h", "2m"])
def test_what_is_no_latency(text):
    with pytest.raises(ValueError, match=r"is no latency; write a number and a unit .*, like 2ms"):
        milliseconds_of(text)


@pytest.mark.parametrize("text", ["2", "h", "2ms", "30m1h", "1h1h", "1h 2x", "1h,30m", "1h30"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="is no time; write a number and a unit"):
        seconds_of(text)


@pytest.mark.parametrize("text", ["0MB", "1e999MB", "1e-400MB"])
def test_sizes_of_nothing_and_of_everything(text):
    with pytest.raises(ValueError, match="has to be above 0 and finite"):
        size_of(text)
