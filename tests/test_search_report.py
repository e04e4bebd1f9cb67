"""The report of a search: its JSON, its sentences, and the page and the tables that are made from it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import statistics
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from rich.console import Console

from limbeck.report.candidates import Demands, choose
from limbeck.report.report import Interval
from limbeck.report.search import SearchReport, TeacherResult, is_search, print_search, write_search
from limbeck.report.search.html import render_search
from limbeck.report.search.influence import influences
from limbeck.report.search.plots import outside, quality_against
from limbeck.report.search.proof import checks, share_kept
from limbeck.report.search.tables import demand_rows, facts_of_search, ranked, trial_rows
from limbeck.report.search.values import short_names, value_text, values_in_words
from tests.pages import Page
from tests.searches import candidate, proof, search

SCRIPT = "<script>alert(1)</script>"
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk" * 3
STRANGE = "\u202eevil שלום 😀 $\\frac{a$ | `x` {{ 7*7 }} </style>\x1b[31m\x00\ud800"


def few() -> SearchReport:
    return search(5)


def met() -> SearchReport:
    return search(30, Demands(keep=0.93), proof(0.957, 0.941, 0.972))


def many() -> SearchReport:
    return search(200, Demands(keep=0.97, max_size=60_000_000, latency_ms=2.0))


def empty() -> SearchReport:
    return rechosen(search(0), [])


def all_failed() -> SearchReport:
    return rechosen(search(0), [candidate(n, None, 0.0, state="failed", note="out of memory") for n in range(4)])


def hostile() -> SearchReport:
    values = {f"{SCRIPT}.a.b": SCRIPT, f"{LONG}.{LONG}": [LONG, STRANGE], STRANGE: 0.5}
    report = search(7, Demands(keep=0.9))
    trials = [
        dataclasses.replace(c, values=values, note=STRANGE + SCRIPT, state="failed" if c.number == 3 else c.state)
        for c in report.candidates
    ]
    changed = dataclasses.replace(
        report,
        task=SCRIPT + STRANGE,
        metric=STRANGE + LONG + SCRIPT,
        examples={SCRIPT: 1},
        space=dict.fromkeys(values, SCRIPT),
        environment={SCRIPT: {LONG: STRANGE}},
        recipe={SCRIPT: [LONG, STRANGE]},
        command=SCRIPT + LONG,
        created=STRANGE,
        ended=SCRIPT,
    )
    return rechosen(changed, trials)


def an_error() -> SearchReport:
    """A metric where lower is better."""
    report = search(12, Demands(keep=0.9))
    trials = [c if c.score is None else dataclasses.replace(c, score=1.2 - c.score) for c in report.candidates]
    teacher = dataclasses.replace(report.teacher, score=0.35)
    return rechosen(dataclasses.replace(report, metric="mse", higher_is_better=False, teacher=teacher), trials)


def below_zero() -> SearchReport:
    """A teacher of whose score there is no share."""
    report = search(8)
    return rechosen(dataclasses.replace(report, teacher=TeacherResult(-0.1, 1, 1, 8.1)), report.candidates)


def odd() -> SearchReport:
    """Trials without numbers, equal ones, and one that collapsed."""
    trials = [
        *(candidate(n, 0.8, 2.0) for n in range(3)),
        candidate(3, math.nan, 2.0),
        candidate(4, 0.8, math.nan),
        candidate(5, 0.01, 2.0),
        candidate(6, None, 0.0, state="running", done=0.0),
        candidate(7, math.inf, 1.0, state="pruned"),
        candidate(8, 0.81, 2.0, values={}),
    ]
    return rechosen(search(0), trials)


def rechosen(report: SearchReport, trials) -> SearchReport:
    """The same search with other trials."""
    choice = choose(trials, report.demands, report.teacher.score, report.higher_is_better)
    return dataclasses.replace(report, candidates=trials, choice=choice)


REPORTS = (few, met, many, empty, all_failed, hostile, an_error, below_zero, odd)
any_report = pytest.mark.parametrize("make", REPORTS, ids=lambda make: make.__name__)


def printed(report: SearchReport, width: int = 80) -> str:
    stream = io.StringIO()
    print_search(report, Console(file=stream, width=width))
    return stream.getvalue()


def circles(svg: str) -> int:
    """How many marks a picture has: every point is a <use> of a marker."""
    return len(re.findall(r"<use ", svg))


# ---- data


@pytest.mark.parametrize("make", [few, met, many, empty, all_failed, an_error, below_zero])
def test_json_round_trip(make):
    report = make()
    assert SearchReport.from_json(report.to_json()) == report


def test_json_has_no_number_that_is_none():
    text = odd().to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    read = SearchReport.from_json(text)
    assert read.candidates[3].score is None
    assert read.candidates[4].latency_ms == 0.0
    assert read.front() == odd().front()
    assert read.choice == odd().choice


def test_a_proof_comes_back_whole():
    read = SearchReport.from_json(met().to_json())
    assert read.proof == proof(0.957, 0.941, 0.972)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "kind": "search"}', "null"])
def test_what_is_no_report_of_a_search(text):
    with pytest.raises(ValueError, match=r"this is no (whole )?report of a search"):
        SearchReport.from_json(text)


def test_another_format_or_kind():
    with pytest.raises(ValueError, match="format 99"):
        SearchReport.from_json('{"format": 99, "kind": "search"}')
    broken = json.loads(few().to_json()) | {"surplus": 1}
    with pytest.raises(ValueError, match="surplus"):
        SearchReport.from_json(json.dumps(broken))


def test_files(tmp_path):
    paths = write_search(met(), tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["search.html", "search.json"]
    assert SearchReport.load(tmp_path / "new") == SearchReport.load(paths["json"]) == met()
    assert is_search(tmp_path / "new")
    assert not is_search(tmp_path)
    with pytest.raises(ValueError, match="there is no report of a search at"):
        SearchReport.load(tmp_path)
    paths["json"].write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*search\.json: this is no report"):
        SearchReport.load(tmp_path / "new")


def test_command_shows_a_search(tmp_path, command):
    write_search(met(), tmp_path)
    (tmp_path / "search.html").unlink()
    status, shown = command("report", tmp_path)
    assert status == 0
    assert "The smallest of 20 finished students" in " ".join(shown.split())
    assert (tmp_path / "search.html").is_file()


# ---- sentences


def test_verdict_of_a_demand_that_is_met():
    report = met()
    chosen = report.choice.chosen
    said = report.verdict()
    assert said.startswith(
        f"The smallest of 20 finished students with at least 93% of the teacher's accuracy is #{chosen.number}."
    )
    assert f"On the held-out examples it has {100 * chosen.score / 0.8512:.1f}% of the teacher's accuracy" in said
    assert "On the validation data it has 95.7% [94.1, 97.2] of the teacher's accuracy" in said
    assert said.endswith("the demand is met.")


@pytest.mark.parametrize(
    ("share", "low", "high", "outcome", "said"),
    [
        (0.98, 0.971, 0.99, "met", "the demand is met."),
        (0.98, 0.965, 0.99, "met, within chance", "the demand is not proven."),
        (0.964, 0.951, 0.976, "missed, within chance", "the demand is not proven."),
        (0.95, 0.94, 0.96, "missed", "the demand is missed."),
    ],
)
def test_proof_of_a_share(share, low, high, outcome, said):
    demands = Demands(keep=0.97)
    assert [check.outcome for check in checks(proof(share, low, high), demands)] == [outcome]
    report = dataclasses.replace(search(30, demands), proof=proof(share, low, high))
    assert report.verdict().endswith(said)


def test_proof_without_a_baseline_has_no_interval():
    alone = dataclasses.replace(proof(0.98, 0.97, 0.99), baseline=None, comparison=None)
    assert [check.outcome for check in checks(alone, Demands(keep=0.97))] == ["met, no interval"]
    assert [check.outcome for check in checks(alone, Demands(keep=0.99))] == ["missed"]
    assert search(30, Demands(keep=0.9), alone).verdict().endswith("the demand is not proven.")


def test_proof_of_speed_and_size():
    asked = Demands(speedup=3.6, max_size=68_700_000, latency_ms=2.3)
    found = {check.demand: (check.found, check.outcome) for check in checks(proof(0.98, 0.97, 0.99), asked)}
    assert found == {
        "speedup": ("3.5x", "missed"),
        "max_size": ("68.7 MB", "met"),
        "latency_ms": ("2.30 ms", "met"),
    }
    untimed = dataclasses.replace(proof(0.98, 0.97, 0.99).teacher, latency_ms=None)
    unknown = dataclasses.replace(proof(0.98, 0.97, 0.99), teacher=untimed)
    assert [check.outcome for check in checks(unknown, Demands(speedup=2))] == ["not measured"]


def test_share_of_an_error_is_turned_round():
    """The run's report has error over error, above 1 where the student is worse."""
    run = proof(1.25, 1.1, 1.6)
    turned = dataclasses.replace(
        run,
        higher_is_better=False,
        teacher=dataclasses.replace(run.teacher, score=Interval(0.4, 0.3, 0.5)),
        student=dataclasses.replace(run.student, score=Interval(0.5, 0.4, 0.6)),
    )
    share, interval = share_kept(turned)
    assert share == pytest.approx(0.8)
    assert (interval.low, interval.high) == (pytest.approx(1 / 1.6), pytest.approx(1 / 1.1))


def test_verdict_where_nothing_answers():
    said = many().verdict()
    assert said.startswith(
        "None of 134 finished students has at least 97% of the teacher's accuracy, at most 60 MB"
    )
    assert re.search(r"Nearest is #\d+: it keeps 9\d\.\d% of the teacher's score where 97% is asked\.", said)
    assert said.endswith("It has not been proven on the validation data.")


def test_verdict_where_nothing_was_finished():
    assert all_failed().verdict() == "No student was found, for no trial was finished (4 failed)."
    assert empty().verdict() == "No student was found, for no trial was finished (none was begun)."


def test_verdict_of_a_score_without_shares():
    said = below_zero().verdict()
    assert "%" not in said
    assert "against the teacher's -0.1" in said or "against the teacher's -10.0" in said


def test_held_out_and_proof_stand_beside_each_demand():
    rows = demand_rows(met())
    assert [(row.asked, row.proven, row.outcome) for row in rows] == [
        ("at least 93% of the teacher's accuracy", "95.7% [94.1, 97.2]", "met")
    ]
    assert [row.outcome for row in demand_rows(many())] == ["not made"] * 3
    assert demand_rows(few()) == []


def test_a_search_that_went_on_tells_the_time_of_all_its_trials():
    trials = [candidate(n, seconds=60.0 * (n + 1)) for n in range(3)]
    report = dataclasses.replace(rechosen(search(0), trials), seconds=10.0)
    assert dict(facts_of_search(report))["Time"] == "10.0 s; all trials together 6 min 0 s"


def test_names_and_values():
    assert short_names(["a.b.c", "x.b.c", "c"]) == {"a.b.c": "a.b.c", "x.b.c": "x.b.c", "c": "c"}
    assert short_names(["student.layers"]) == {"student.layers": "layers"}
    assert [value_text(v) for v in (3, 1e-5, None, {"a": 1}, "x\ny")] == ["3", "1e-05", "null", '{"a": 1}', "x y"]
    assert values_in_words({f"p.v{n}": n for n in range(9)}).endswith("v5 5 and 3 more")


# ---- which values mattered


def test_rank_correlation_and_means_against_plain_code():
    report = search(60)
    found = {influence.path: influence for influence in influences(report)}
    able = [c for c in report.candidates if c.state == "complete"]
    for path in ("training.learning_rate", "training.epochs"):
        expected = statistics.correlation(ranks([c.values[path] for c in able]), ranks([c.score for c in able]))
        assert found[path].rank == pytest.approx(expected)
    layers = {group.value: group for group in found["student.layers"].groups}
    of_three = [c.score for c in able if c.values["student.layers"] == [1, 3, 5]]
    assert layers["[1, 3, 5]"].mean == pytest.approx(statistics.fmean(of_three))
    assert layers["[1, 3, 5]"].count == len(of_three)
    means = [group.mean for group in found["student.layers"].groups]
    assert means == sorted(means, reverse=True)
    assert sum(group.count for group in layers.values()) == len(able)


def ranks(values):
    """Mean ranks, by their definition."""
    return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]


def test_more_is_better_has_one_sign_in_both_directions():
    trials = [candidate(n, 0.5 + 0.01 * n, values={"training.epochs": n}) for n in range(6)]
    up = rechosen(search(0), trials)
    down = dataclasses.replace(up, higher_is_better=False)
    assert [i.rank for i in influences(up) if i.count] == [pytest.approx(1.0)]
    assert [i.rank for i in influences(down) if i.count] == [pytest.approx(-1.0)]
    assert not influences(up)[0].within_chance


def test_too_few_or_equal_values_are_not_ranked():
    few_trials = [candidate(n, 0.5 + 0.1 * n, values={"a": n, "b": 1, "c": True}) for n in range(4)]
    equal = [candidate(n, 0.5 + 0.01 * n, values={"a": 2.0}) for n in range(9)]
    assert {i.path: (i.rank, len(i.groups)) for i in influences(rechosen(search(0), few_trials))} == {
        "a": (None, 0),
        "b": (None, 0),
        "c": (None, 1),
    }
    assert [i.rank for i in influences(rechosen(search(0), equal))] == [None]


# ---- page


@any_report
def test_page_is_self_contained(make):
    text = render_search(make())
    page = Page(text)
    assert "<script" not in text.lower()
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert not [value for name, value in page.attributes if name == "src" or name.startswith("on")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", text)
    assert " nan " not in page.text.lower()


@any_report
def test_pictures_are_xml_with_ids_of_their_own(make):
    text = render_search(make())
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    ids = [element.attrib["id"] for svg in pictures for element in svg.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert len(pictures) == (0 if make in (empty, all_failed) else 2)
    page_ids = [value for name, value in Page(text).attributes if name == "id"]
    assert len(page_ids) == len(set(page_ids))


def test_page_has_the_numbers():
    report = met()
    text = Page(render_search(report)).text
    assert report.headline() in text
    assert report.explanation() in text
    for number in ("30: 20 complete, 7 pruned, 3 failed", "85.1, 90.9 MB, 8.10 ms", "choice([5], [2, 5]"):
        assert number in text
    for c in report.front():
        assert f"{100 * c.score:.1f} {100 * c.score / 0.8512:.1f}%" in text
    assert text.count("the loss of 'kd' is not a number") == 3
    assert "best of many looks better than it is" in text
    assert "All 30, the best first" in text
    assert "No final proof was made" in Page(render_search(few())).text


def test_hostile_texts_stay_texts():
    page = Page(render_search(hostile()))
    assert SCRIPT in page.text
    assert LONG in page.text
    assert "{{ 7*7 }}" in page.text


def test_rendering_is_deterministic():
    assert render_search(met()) == render_search(met())


def test_all_trials_are_listed_and_marked():
    report = met()
    rows = trial_rows(report, ranked(report))
    assert sorted(int(row.number[1:]) for row in rows) == list(range(30))
    marks = [row.mark for row in rows]
    assert marks.count("chosen") == 1
    assert marks.count("front") == len(report.front()) - (report.choice.chosen in report.front())
    assert marks.count("pruned at 40.0%") == 7
    assert marks.count("failed") == 3
    scores = [c.score for c in ranked(report) if c.finished]
    assert scores == sorted(scores, reverse=True)


# ---- picture


@pytest.mark.parametrize("cost", ["latency", "size"])
def test_every_trial_has_a_mark(cost):
    trials = [candidate(n, 0.7 + 0.01 * (n % 7), 1.0 + n, size_bytes=10**6 * (n + 1)) for n in range(20)]
    trials += [candidate(20, 0.75, 3.0, state="pruned"), candidate(21, None, 0.0, state="failed")]
    report = rechosen(search(0), trials)
    drawn = quality_against(report, cost)
    ticks = len(re.findall(r'id="front-\w+-[xy]tick_', drawn))
    legend = 4  # pruned, finished, front, chosen; the teacher is a line
    answer = 1
    assert outside(report) == 0
    assert circles(drawn) - ticks == 21 + legend + answer
    assert f"#{report.choice.chosen.number}</text>" in drawn


def test_a_score_that_collapsed_does_not_press_the_others_together():
    trials = [candidate(n, 0.8 + 0.001 * n, 2.0 + n) for n in range(12)]
    collapsed = [candidate(12, 0.02, 3.0), candidate(13, 0.01, 3.0, state="pruned")]
    assert outside(rechosen(search(0), trials)) == 0
    report = rechosen(search(0), trials + collapsed)
    assert outside(report) == 2
    assert "2 far from the others lie outside" in Page(render_search(report)).text


def test_pictures_take_their_colours_from_the_page():
    drawn = quality_against(met(), "latency")
    assert "var(--student" in drawn
    assert "currentColor" in drawn
    assert not re.findall(r"(?:fill|stroke): (#\w+)", drawn)


def test_the_demand_is_drawn():
    plain, asked = quality_against(search(30), "latency"), quality_against(met(), "latency")
    assert "demand" not in plain
    assert "demand" in asked
    assert "demand" in quality_against(search(30, Demands(speedup=2.0)), "latency")
    assert "demand" not in quality_against(search(30, Demands(speedup=2.0)), "size")
    assert "demand" in quality_against(search(30, Demands(max_size=60_000_000)), "size")


# ---- terminal


@pytest.mark.parametrize("width", [80, 100])
@any_report
def test_terminal_fits(make, width):
    text = printed(make(), width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_has_the_numbers(width):
    report = met()
    text = printed(report, width)
    assert report.verdict() in " ".join(text.split())
    assert "Trials: 30: 20 complete, 7 pruned, 3 failed." in text
    for c in report.front():
        row = next(line for line in text.splitlines() if line.startswith(f"#{c.number} "))
        assert row.split()[1:3] == [f"{100 * c.score:.1f}", f"{100 * c.score / 0.8512:.1f}%"]
    assert "#5 failed: the loss of 'kd' is not a number at step 40" in text


def test_terminal_shortens_a_long_front_and_keeps_its_ends_and_the_choice():
    trials = [candidate(n, 0.5 + 0.001 * n, 1.0 + 0.1 * n, size_bytes=10**6 * (n + 1)) for n in range(100)]
    report = rechosen(dataclasses.replace(search(0), demands=Demands(keep=0.65)), trials)
    text = printed(report)
    shown = [int(number) for number in re.findall(r"^#(\d+) ", text, re.MULTILINE)]
    assert {0, 99, report.choice.chosen.number} <= set(shown)
    assert len(shown) <= 16
    assert f"{100 - len(shown)} more of the front are in the page" in " ".join(text.split())


def test_import_is_light():
    heavy = "{'matplotlib', 'jinja2', 'torch', 'scipy', 'optuna'}"
    code = f"import sys, limbeck.report.search; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
