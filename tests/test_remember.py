"""A run whose teacher runs once for each example."""

import json

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from limbeck.recipe import Recipe
from tests import tiny


def recipe(place, **changes):
    return {
        "task": {"name": "table", "data": str(place / "data.csv"), "text": ["text"], "label": "label"},
        "teacher": {"model": str(place / "teacher"), "training": {"steps": 2}},
        "student": {"layers": [0]},
        "training": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
        "store": str(place / "store"),
        **changes,
    }


@pytest.fixture
def place(tmp_path):
    tiny.save_encoder(tmp_path / "teacher")
    tiny.table().to_csv(tmp_path / "data.csv", index=False)
    return tmp_path


def weights(folder):
    return torch.cat([t.flatten() for _, t in sorted(load_file(folder / "student" / "model.safetensors").items())])


def test_the_teacher_runs_once_for_each_example_over_epochs_and_seeds(place):
    report = limbeck.distill(recipe(place, seeds=2), place / "run")
    student = report.student
    count = report.examples["train"]
    assert student.examples == 2 * 3 * count
    assert student.teacher_examples <= count
    assert not (place / "run" / "signals").exists()
    assert "Teacher's passes" in (place / "run" / "README.md").read_text()


def test_a_remembered_teacher_teaches_the_same(place):
    ours = limbeck.distill(recipe(place), place / "on")
    live = limbeck.distill(recipe(place, cache="off"), place / "off")
    torch.testing.assert_close(weights(place / "on"), weights(place / "off"), rtol=1e-3, atol=1e-4)
    assert live.student.teacher_examples is None
    assert ours.student.score == live.student.score


def test_a_folder_serves_the_next_run(place):
    chosen = recipe(place, cache=str(place / "signals"))
    first = limbeck.distill(chosen, place / "one")
    again = limbeck.distill(chosen, place / "two")
    other = limbeck.distill({**chosen, "training": {"epochs": 1, "batch_size": 8}}, place / "three")
    assert first.student.teacher_examples > 0
    assert again.student.teacher_examples == other.student.teacher_examples == 0
    assert torch.equal(weights(place / "one"), weights(place / "two"))


def test_signals_of_another_teacher_are_refused(place):
    limbeck.distill(recipe(place, cache=str(place / "signals")), place / "one")
    other = recipe(place, cache=str(place / "signals"))
    other["teacher"] = {**other["teacher"], "training": {"steps": 3}}
    with pytest.raises(ValueError, match="holds signals of another teacher"):
        limbeck.distill(other, place / "two")


def test_what_does_not_fit_the_memory_goes_to_the_disk(place):
    report = limbeck.distill(recipe(place, cache={"gib": 1e-9}), place / "run")
    assert report.student.teacher_examples <= report.examples["train"]


def test_what_fits_neither_memory_nor_disk_is_not_remembered(place, monkeypatch):
    monkeypatch.setattr("limbeck.remember.free_bytes", lambda place: 10)
    report = limbeck.distill(recipe(place, cache={"gib": 1e-9}), place / "run")
    assert report.student.teacher_examples is None


def test_an_interrupted_run_goes_on_with_what_its_teacher_said(place):
    class Stopped(Exception):  # noqa: N818
        pass

    class Watch(limbeck.Callback):
        def on_checkpoint(self, state):
            if state.step == 6:
                raise Stopped

    class Observer(limbeck.run.Observer):
        def callbacks(self, stage):
            return [Watch()] if stage == "student-0" else []

    chosen = recipe(place)
    chosen["training"] = {**chosen["training"], "checkpoint_every": 3}
    limbeck.distill(chosen, place / "whole")
    with pytest.raises(Stopped):
        limbeck.distill(chosen, place / "run", observer=Observer())
    assert list((place / "run" / "signals").glob("*.safetensors"))
    report = limbeck.distill(chosen, place / "run")
    assert torch.equal(weights(place / "run"), weights(place / "whole"))
    assert report.student.teacher_examples <= report.examples["train"]


def test_the_recipe_says_it_all(place):
    written = Recipe.parse(recipe(place)).to_yaml()
    assert "place: memory" in written
    report = limbeck.distill(recipe(place, cache={"dtype": "fp16"}), place / "run")
    assert json.loads((place / "run" / "report.json").read_text())["recipe"]["cache"]["dtype"] == "fp16"
    assert report.student.teacher_examples is not None
