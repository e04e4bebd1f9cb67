"""Layers that belong together, found from data, and weights that change: through a whole run."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console

import limbeck
from limbeck.pairing import find_places, layers_of, match_places
from limbeck.progress import ConsoleObserver
from limbeck.recipe import Places
from tests import tiny
from tests.models import bert, perceptron, text_batch


def batches():
    return [text_batch(seed=seed) for seed in range(4)]


def test_a_model_is_matched_with_itself_layer_by_layer():
    teacher = bert(layers=3)
    student = copy.deepcopy(teacher)
    places = find_places(layers_of(student, None), layers_of(teacher, None))
    assert (places.student_path, places.student, places.teacher) == ("bert.encoder.layer", 3, 3)
    found = match_places(student, teacher, places, batches(), ["cka", "emd"]).matches
    for kind in ("cka", "emd"):
        assert found[kind].pairs == ((0, 0), (1, 1), (2, 2))
        assert found[kind].shares == pytest.approx((1 / 3,) * 3)


def test_padding_does_not_change_what_is_found():
    student, teacher = bert(layers=2, seed=1), bert(layers=4)
    places = find_places(layers_of(student, None), layers_of(teacher, None))
    longer = [
        {
            **batch,
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3), value=9),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3)),
        }
        for batch in batches()
    ]
    found = [match_places(student, teacher, places, data, ["emd"]).matches for data in (batches(), longer)]
    assert found[0] == found[1]


def test_models_without_layers_have_modules_all_the_same():
    places = find_places(layers_of(perceptron(), None), layers_of(perceptron(), None))
    assert places.student == 0
    assert places.student_modules


def test_a_map_that_is_found_needs_a_run():
    spec = limbeck.Recipe.parse(
        {
            "task": {"name": "glue/rte"},
            "teacher": {"model": "x"},
            "student": {"layers": [0]},
            "terms": {"h": {"tap": "layers", "map": "cka", "loss": "mse"}},
        }
    )
    places = Places(student_path="a", teacher_path="b", student=1, teacher=2)
    with pytest.raises(ValueError, match=r"terms\.h: map cka is found from data, in a run"):
        spec.build_terms(places, regression=False)


@pytest.mark.parametrize("kind", ["cka", "emd"])
def test_a_run_finds_its_pairs_and_reports_them(kind, tmp_path):
    tiny.save_encoder(tmp_path / "teacher", num_hidden_layers=4)
    tiny.table().to_csv(tmp_path / "data.csv", index=False)
    recipe = {
        "task": {"name": "table", "data": str(tmp_path / "data.csv"), "text": ["text"], "label": "label"},
        "teacher": {"model": str(tmp_path / "teacher"), "training": {"steps": 2}},
        "student": {"layers": [0, 3]},
        "terms": {
            "kd": {"loss": "forward_kl"},
            "hidden": {"tap": "layers", "map": kind, "loss": "mse"},
            "labels": {"tap": "labels", "loss": "cross_entropy"},
        },
        "training": {"steps": 2},
        "seeds": 2,
        "store": str(tmp_path / "store"),
    }
    report = limbeck.distill(recipe, tmp_path / "run")
    rows = [row for row in report.plan if row["name"].startswith("hidden.")]
    assert len(rows) == 2 if kind == "cka" else len(rows) >= 4
    assert sum(row["weight"] for row in rows) == pytest.approx(1.0)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for seed in (0, 1):
        terms = next(line["terms"] for line in logged if line["stage"] == f"student-{seed}" and "terms" in line)
        assert {row["name"] for row in rows} <= set(terms)


def test_a_run_with_weights_and_temperatures_that_change(tmp_path):
    tiny.save_encoder(tmp_path / "teacher")
    tiny.table().to_csv(tmp_path / "data.csv", index=False)
    recipe = {
        "task": {"name": "table", "data": str(tmp_path / "data.csv"), "text": ["text"], "label": "label"},
        "teacher": {"model": str(tmp_path / "teacher"), "training": {"steps": 1}},
        "student": {"layers": [0]},
        "terms": {
            "kd": {
                "loss": "forward_kl",
                "temperature": {"schedule": "linear", "start": 4, "end": 1},
                "weight": {"schedule": "linear_decay", "base": 0.8},
            },
            "labels": {"tap": "labels", "loss": "cross_entropy", "weight": 0.5},
        },
        "balance": "uncertainty",
        "training": {"steps": 4, "log_every": 1, "gradients_every": 2},
        "store": str(tmp_path / "store"),
    }
    with ConsoleObserver(Console(file=io.StringIO(), width=200)) as observer:
        report = limbeck.distill(recipe, tmp_path / "run", observer=observer)
    assert "0.8 x linear_decay()" in observer.console.file.getvalue()
    (curve,) = [c for c in report.curves if c.role == "student"]
    assert curve.weights["kd"][0] == pytest.approx(0.8)
    assert curve.weights["kd"][-1] == pytest.approx(0.0)
    assert "linear_decay" in (tmp_path / "run" / "report.html").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum("gradients" in line for line in lines if line["stage"] == "student-0") == 2


def test_a_run_reads_attention_and_relations_by_pairs(tmp_path):
    tiny.save_encoder(tmp_path / "teacher", num_hidden_layers=2)
    tiny.table().to_csv(tmp_path / "data.csv", index=False)
    inside = ["attention.self.query", "attention.self.key"]
    relations = {"tap": "layers", "inside": inside, "loss": "qkv_relation", "relation_heads": 2, "pairs": ["qk"]}
    recipe = {
        "task": {"name": "table", "data": str(tmp_path / "data.csv"), "text": ["text"], "label": "label"},
        "teacher": {"model": str(tmp_path / "teacher"), "training": {"steps": 1}},
        "student": {"layers": [1]},
        "terms": {
            "relations": relations,
            "attention": {
                "tap": "attentions.0",
                "teacher_tap": "attentions.1",
                "loss": "attention_kl",
                "of": "probabilities",
            },
            "labels": {"tap": "labels", "loss": "cross_entropy"},
        },
        "training": {"steps": 2},
        "store": str(tmp_path / "store"),
    }
    report = limbeck.distill(recipe, tmp_path / "run")
    assert [row["name"] for row in report.plan] == ["relations.0", "attention", "labels"]
