"""The report: its JSON, and the page, the card and the terminal table that are made from it."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.console import Console

from limbeck.report import Comparison, Curve, Interval, ModelResult, Report, print_report, write_report
from limbeck.report import format as write
from limbeck.report.html import render_html
from limbeck.report.markdown import render_card
from limbeck.report.plots import quality_against_latency, scores_over_steps, tap_map, training_curves
from tests.pages import Page

SCRIPT = "<script>alert(1)</script>"
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk" * 3
STRANGE = "\u202eevil שלום 😀 $\\frac{a$ | `x` ``` {{ 7*7 }} </style>\x1b[31m\x00\ud800"


def column(role: str, score: float, latency: float, **changes: object) -> ModelResult:
    result = ModelResult(
        role=role,
        score=Interval(score, score - 0.02, score + 0.02),
        metrics={"accuracy": score, "f1": score + 0.01},
        parameters=22_713_986,
        size_bytes=90_870_000,
        latency_ms=Interval(latency, 0.98 * latency, 1.03 * latency),
        throughput=Interval(4000 / latency, 3900 / latency, 4100 / latency),
    )
    return dataclasses.replace(result, **changes)


def curve(role: str, seed: int) -> Curve:
    steps = list(range(10, 610, 10))
    names = ["ce"] if role == "baseline" else ["kd", "ce", "hidden.0", "hidden.1", "hidden.2"]
    return Curve(
        role=role,
        seed=seed,
        steps=steps,
        terms={n: [(i + 1) * math.exp(-s / 100) + 0.01 for s in steps] for i, n in enumerate(names)},
        weights={n: [0.5] * len(steps) for n in names},
        learning_rate=[1e-4 * (1 - s / 600) for s in steps],
        score_steps=[200, 400, 600],
        scores=[0.8, 0.85, 0.87 + 0.01 * seed],
    )


def term(name: str, tap: str, teacher_tap: str, **changes: object) -> dict[str, object]:
    row = {"name": name, "loss": "mse", "tap": tap, "teacher_tap": teacher_tap, "weight": 0.5}
    return row | {"options": {}, "projection": None, "parameters": 0} | changes


def full() -> Report:
    seeds = [0, 1, 2]
    return Report(
        task="glue/sst2",
        metric="accuracy",
        higher_is_better=True,
        examples={"train": 67349, "validation": 872},
        teacher=column("teacher", 0.9243, 41.32, parameters=109_483_778, size_bytes=438_012_728),
        baseline=column("baseline", 0.8739, 7.9, training_seconds=192.0, scores_by_seed=[0.87, 0.88, 0.875]),
        student=column(
            "student", 0.8926, 7.9, training_seconds=7.3, teacher_seconds=3.1, scores_by_seed=[0.9, 0.89, 0.88]
        ),
        comparison=Comparison(
            gain=Interval(0.0187, 0.0076, 0.0298),
            gap=Interval(0.0504, 0.0363, 0.0645),
            ratio=Interval(0.371, 0.158, 0.571),
            ratio_note="",
            retention=Interval(0.9657, 0.9541, 0.9773),
            agreement=Interval(0.9312, 0.9155, 0.9458),
            baseline_agreement=Interval(0.9014, 0.8842, 0.9172),
        ),
        plan=[
            term("kd", "logits", "logits", loss="forward_kl", options={"temperature": 4.0}),
            term("ce", "logits", "labels", loss="cross_entropy"),
            *(term(f"hidden.{i}", f"layer.{i}", f"layer.{4 * i + 3}", projection="linear") for i in range(3)),
        ],
        curves=[curve(role, seed) for role in ("baseline", "student") for seed in seeds],
        seeds=seeds,
        environment={"torch": "2.13.0", "threads": 2},
        recipe={"task": {"name": "glue/sst2"}, "seeds": 3},
        command="limbeck distill recipe.yaml",
        created="2026-03-14T09:26:53+00:00",
        student_class="BertForSequenceClassification",
    )


def minimal() -> Report:
    return Report(
        task="t",
        metric="accuracy",
        higher_is_better=True,
        examples={},
        teacher=column("teacher", 0.9, 4.0, metrics={}),
        baseline=None,
        student=column("student", 0.8, 2.0, metrics={}),
        comparison=None,
        plan=[],
        curves=[],
        seeds=[0],
        environment={},
        recipe={},
        command="",
        created="",
        student_class="BertForSequenceClassification",
    )


def hostile() -> Report:
    report = full()
    terms = dict.fromkeys((SCRIPT, LONG, STRANGE), report.curves[-1].terms["kd"])
    rows = [term(SCRIPT, LONG, STRANGE, loss=STRANGE, projection={"kind": SCRIPT, "width": LONG}, weight=0.0)]
    return dataclasses.replace(
        report,
        task=SCRIPT + STRANGE,
        metric=STRANGE + LONG + SCRIPT,
        examples={SCRIPT: 1, LONG: 2},
        plan=rows,
        curves=[dataclasses.replace(report.curves[-1], terms=terms, weights=dict.fromkeys(terms, [0.0] * 60))],
        environment={SCRIPT: {LONG: STRANGE}},
        recipe={SCRIPT: [LONG, STRANGE, "```\n" + SCRIPT]},
        command=f"{SCRIPT} ``` {LONG}",
        comparison=dataclasses.replace(report.comparison, ratio=None, ratio_note=SCRIPT + LONG),
        created=STRANGE,
        student_class="BertForSequenceClassification",
    )


def error_metric() -> Report:
    """A metric where lower is better."""
    report = full()
    changes = {
        role: dataclasses.replace(getattr(report, role), score=Interval(s, s - 0.1, s + 0.1), metrics={"mse": s})
        for role, s in (("teacher", 0.5), ("baseline", 0.71), ("student", 0.6204))
    }
    return dataclasses.replace(report, metric="mse", higher_is_better=False, **changes)


def nothing_right() -> Report:
    """Every model scores 0."""
    report = full()
    nought = Interval(0.0, 0.0, 0.0)
    comparison = Comparison(nought, nought, None, "not defined: the gap is within noise", *[nought] * 3)
    models = {
        role: dataclasses.replace(column(role, 0.0, 1.0), score=nought, scores_by_seed=[0.0])
        for role in ("teacher", "baseline", "student")
    }
    return dataclasses.replace(report, **models, comparison=comparison, seeds=[0], curves=report.curves[:1])


def diverged() -> Report:
    """Losses that are no numbers, and one logged step."""
    report = full()
    ruined = dataclasses.replace(report.curves[-1], terms={"kd": [math.nan] * 60, "ce": [math.inf] * 60})
    short = dataclasses.replace(
        report.curves[-1], seed=1, steps=[7], terms={"kd": [1.0]}, learning_rate=[], score_steps=[7], scores=[0.5]
    )
    return dataclasses.replace(report, curves=[ruined, short])


REPORTS = (full, minimal, hostile, error_metric, nothing_right, diverged)
any_report = pytest.mark.parametrize("make", REPORTS, ids=lambda make: make.__name__)


def printed(report: Report, width: int = 80) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    return stream.getvalue()


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


# ---- data


@pytest.mark.parametrize("make", [full, minimal, error_metric, nothing_right])
def test_json_round_trip(make):
    report = make()
    assert Report.from_json(report.to_json()) == report


def test_load_from_folder_and_file(tmp_path):
    paths = write_report(full(), tmp_path)
    assert Report.load(tmp_path) == Report.load(paths["json"]) == full()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}'])
def test_what_is_no_report(text):
    with pytest.raises(ValueError, match="report"):
        Report.from_json(text)


def test_verdict_is_true_where_a_share_would_not_be():
    assert full().verdict().startswith("The student keeps 96.6% of the teacher's accuracy at 5.2x the speed")
    assert "+1.9 points" in full().verdict()
    assert error_metric().verdict().startswith("The student's mse is 0.6204 against the teacher's 0.5000, at")
    assert "points" not in error_metric().verdict()
    assert nothing_right().verdict().startswith("The student's accuracy is 0.0 against the teacher's 0.0, at")
    assert "within noise" in nothing_right().verdict()


# ---- page


@any_report
def test_page_is_self_contained(make):
    text = render_html(make())
    page = Page(text)
    assert "<script" not in text.lower()
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    assert not page.values("src")
    assert all(reference.startswith("#") for reference in page.values("href"))
    assert not re.search(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]


@any_report
def test_page_opens_with_the_verdict(make):
    report = make()
    page = Page(render_html(report))
    assert " ".join(write.clean(report.verdict()).split()) in page.text
    assert "nan" not in page.text.lower().split()


def test_page_has_the_numbers():
    text = Page(render_html(full())).text
    for number in ("92.4", "[90.4, 94.4]", "89.3", "109.5 M", "438.0 MB", "41.3", "3 min 12 s", "7.3 s", "42.5%"):
        assert number in text
    for number in ("+1.9 points", "[+0.8, +3.0]", "0.37", "96.6%", "93.1%", "90.1%", "5.2×", "0.21×"):
        assert number in text
    for number in ("87.0 88.0 87.5", "forward_kl, temperature=4.0", "true labels", "limbeck distill recipe.yaml"):
        assert number in text


def test_page_without_baseline_says_so():
    text = Page(render_html(minimal())).text
    assert "No baseline was trained" in text
    assert "baseline 8" not in text
    assert "Distillation ratio" not in text


def test_page_gives_the_note_in_place_of_a_ratio():
    assert "Not defined: the gap is within noise." in Page(render_html(nothing_right())).text


def test_hostile_texts_stay_texts():
    page = Page(render_html(hostile()))
    assert SCRIPT in page.text
    assert LONG in page.text
    assert "{{ 7*7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", page.text)


@any_report
def test_pictures_are_xml_with_ids_of_their_own(make):
    pictures = svgs(render_html(make()))
    ids = [e.attrib["id"] for svg in pictures for e in svg.iter() if "id" in e.attrib]
    assert len(pictures) >= 1
    assert len(ids) == len(set(ids))
    used = {
        r
        for svg in pictures
        for r in re.findall(r'(?:href="|url\()#([\w.-]+)', ElementTree.tostring(svg, "unicode"))
    }
    assert used <= set(ids)
    for svg in pictures:
        names = [svg.find(f"{{http://www.w3.org/2000/svg}}{tag}") for tag in ("title", "desc")]
        assert all(name is not None and name.text for name in names)
        assert svg.attrib["aria-labelledby"].split() == [name.attrib["id"] for name in names]


def test_pictures_take_their_colours_and_fonts_from_the_page():
    text = "".join([quality_against_latency(full()), tap_map(full()), *training_curves(full())])
    assert "currentColor" in text
    assert "var(--student" in text
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", text)) == set()
    assert "DejaVu" not in text
    assert "<text" in text


def test_which_pictures_there_are():
    titles = [re.search("<title[^>]*>(.*?)</title>", svg)[1] for svg in training_curves(full())]
    assert titles == [f"Training curve of {name}" for name in ("ce", "kd", "hidden")] + ["Learning rate"]
    assert scores_over_steps(minimal()) == ""
    assert tap_map(minimal()) == ""
    assert training_curves(minimal()) == []
    assert [t for t in training_curves(diverged()) if "ce" in t.split("</title>")[0]] == []


def test_rendering_is_deterministic():
    assert render_html(full()) == render_html(full())
    assert render_card(full()) == render_card(full())


def test_import_is_light():
    code = "import sys, limbeck.report; print({'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- card


@any_report
def test_card_front_matter(make):
    _, front, body = render_card(make()).split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["knowledge-distillation", "limbeck"]
    assert data["metrics"] == [write.one_line(make().metric)]
    assert body.startswith("\n# ")


@any_report
def test_card_is_markdown_without_surprises(make):
    body = render_card(make()).split("---\n", 2)[2]
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    page = Page(rendered)
    assert "script" not in page.tags
    assert write.one_line(make().verdict()) in page.text
    rows = re.findall(r"<tr>(.*?)</tr>", rendered.split("</table>")[0], re.DOTALL)
    assert {len(re.findall("<t[hd]", row)) for row in rows} == {1 + len(make().models)}
    assert "How to load it" in page.text


def test_card_has_the_numbers():
    card = render_card(full())
    assert "| accuracy | 92.4 [90.4, 94.4] | 87.4 [85.4, 89.4] | 89.3 [87.3, 91.3] |" in card
    assert "- **Distillation ratio: 0.37 [0.16, 0.57].**" in card
    assert 'from_pretrained("student")' in card


# ---- terminal


@any_report
def test_terminal_fits_in_80_columns(make):
    lines = printed(make()).splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    head = next(line for line in lines if line.split()[:1] == ["teacher"])
    assert head.split() == [model.role for model in make().models]
    assert "\x1b" not in printed(make())


def test_terminal_has_the_numbers():
    text = printed(full())
    row = next(line for line in text.splitlines() if line.startswith("accuracy "))
    assert row.split() == ["accuracy", "92.4", "87.4", "89.3"]
    assert "[87.3, 91.3]" in text
    assert "The student keeps 96.6%" in text
    assert "within noise" in printed(nothing_right())


# ---- files


def test_files_replace_older_ones_and_leave_nothing_else(tmp_path):
    (tmp_path / "report.html").write_text("old")
    paths = write_report(full(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html", "README.md"}
    assert paths == {
        "json": tmp_path / "report.json",
        "html": tmp_path / "report.html",
        "card": tmp_path / "README.md",
    }
    assert paths["html"].read_text("utf-8").startswith("<!doctype html>")
    assert (paths["html"].stat().st_mode & 0o777) == 0o644


def test_hostile_report_is_written(tmp_path):
    for path in write_report(hostile(), tmp_path / "new").values():
        assert path.read_text("utf-8")


def test_a_write_that_fails_keeps_the_older_file(tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_report(minimal(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"
