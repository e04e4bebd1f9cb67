"""A run whose teacher runs once for each example."""

import json

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from limbeck.recipe import Recipe
from tests import tiny


@pytest.fixture
def place(tmp_path):
    return tiny.place_of(tmp_path)


def weights(folder):
    return torch.cat([t.flatten() for _, t in sorted(load_file(folder / "student" / "model.safetensors").items())])


def test_the_teacher_runs_once_for_each_example_over_epochs_and_seeds(place):
    report = limbeck.distill(tiny.recipe(place, seeds=2), place / "run")
    student = report.student
    count = report.examples["train"]
    assert student.examples == 2 * 3 * count
    assert student.teacher_examples <= count
    assert not (place / "run" / "signals").exists()
    assert "Teacher's passes" in (place / "run" / "README.md").read_text()


def test_a_remembered_teacher_teaches_the_same(place):
    ours = limbeck.distill(tiny.recipe(place), place / "on")
    live = limbeck.distill(tiny.recipe(place, cache="off"), place / "off")
    torch.testing.assert_close(weights(place / "on"), weights(place / "off"), rtol=1e-3, atol=1e-4)
    assert live.student.teacher_examples is None
    assert ours.student.score == live.student.score


def test_a_folder_serves_the_next_run(place):
    chosen = tiny.recipe(place, cache=str(place / "signals"))
    first = limbeck.distill(chosen, place / "one")
    again = limbeck.distill(chosen, place / "two")
    other = limbeck.distill({**chosen, "training": {"epochs": 1, "batch_size": 8}}, place / "three")
    assert first.student.teacher_examples > 0
    assert again.student.teacher_examples == other.student.teacher_examples == 0
    assert torch.equal(weights(place / "one"), weights(place / "two"))


def test_signals_of_another_teacher_are_refused(place):
    limbeck.distill(tiny.recipe(place, cache=str(place / "signals")), place / "one")
    other = tiny.recipe(place, cache=str(place / "signals"))
    other["teacher"] = {**other["teacher"], "training": {"steps": 3}}
    with pytest.raises(ValueError, match="holds signals of another teacher"):
        limbeck.distill(other, place / "two")


def test_what_does_not_fit_the_memory_goes_to_the_disk(place):
    report = limbeck.distill(tiny.recipe(place, cache={"gib": 1e-9}), place / "run")
    assert report.student.teacher_examples <= report.examples["train"]


def test_what_fits_neither_memory_nor_disk_is_not_remembered(place, monkeypatch):
    monkeypatch.setattr("limbeck.remember.free_bytes", lambda place: 10)
    report = limbeck.distill(tiny.recipe(place, cache={"gib": 1e-9}), place / "run")
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

    chosen = tiny.recipe(place)
    chosen["training"] = {**chosen["training"], "checkpoint_every": 3}
    limbeck.distill(chosen, place / "whole")
    with pytest.raises(Stopped):
        limbeck.distill(chosen, place / "run", observer=Observer())
    assert list((place / "run" / "signals").glob("*.safetensors"))
    report = limbeck.distill(chosen, place / "run")
    assert torch.equal(weights(place / "run"), weights(place / "whole"))
    assert report.student.teacher_examples <= report.examples["train"]


def test_the_recipe_says_it_all(place):
    written = Recipe.parse(tiny.recipe(place)).to_yaml()
    assert "place: memory" in written
    report = limbeck.distill(tiny.recipe(place, cache={"dtype": "fp16"}), place / "run")
    assert json.loads((place / "run" / "report.json").read_text())["recipe"]["cache"]["dtype"] == "fp16"
    assert report.student.teacher_examples is not None


SPARSE = {"topk": "TopK", "sampled": "Sampled", "hybrid": "Sampled"}


@pytest.mark.parametrize("form", SPARSE)
def test_logits_may_be_kept_in_part(place, form):
    loss = "forward_kl" if form == "topk" else "soft_cross_entropy"
    terms = {"kd": {"loss": loss, "temperature": 2.0}, "labels": {"tap": "labels", "loss": "cross_entropy"}}
    kept = tiny.recipe(
        place, terms=terms, cache={"logits": form, "k": 1, "draws": 8, "place": str(place / "kept")}
    )
    report = limbeck.distill(kept, place / "run")
    assert 0 < report.student.teacher_examples <= report.examples["train"]
    again = limbeck.distill({**kept, "training": {**kept["training"], "epochs": 1}}, place / "again")
    assert again.student.teacher_examples == 0
    hotter = {"kd": {"loss": loss, "temperature": 3.0}}
    with pytest.raises(ValueError, match=r"temperatures: \[2\.0\] there, \[3\.0\] here"):
        limbeck.distill({**kept, "terms": hotter}, place / "hotter")


def test_losses_that_need_all_logits_say_so_before_anything_is_trained(place):
    chosen = tiny.recipe(place, terms={"kd": {"loss": "logit_mse"}}, cache={"logits": "topk"})
    with pytest.raises(ValueError, match="'logit_mse' cannot be computed from targets that hold only some"):
        limbeck.distill(chosen, place / "run")
    scheduled = {"schedule": "linear", "start": 4, "end": 1}
    chosen["terms"] = {"kd": {"loss": "forward_kl", "temperature": scheduled}}
    with pytest.raises(ValueError, match="a few logits are kept at fixed ones"):
        limbeck.distill(chosen, place / "run")
    assert not (place / "run").exists()


@pytest.mark.parametrize("way", [{"dtype": "bf16"}, {"int8": True}, {"device": "cpu"}])
def test_a_teacher_may_teach_in_another_way(place, way):
    chosen = tiny.recipe(place, cache=str(place / "kept"))
    chosen["teacher"] = {**chosen["teacher"], **way}
    report = limbeck.distill(chosen, place / "run")
    plain = limbeck.distill(tiny.recipe(place), place / "plain")
    assert report.teacher.score == plain.teacher.score
    if way.get("device") is None:
        assert not torch.equal(weights(place / "run"), weights(place / "plain"))
        with pytest.raises(ValueError, match="holds signals of another teacher"):
            limbeck.distill(tiny.recipe(place, cache=str(place / "kept")), place / "other")


def test_a_teacher_that_a_function_makes_is_known_again(tmp_path):
    """Fine-tuned by the first run, and loaded from the store by the second."""
    network = "limbeck.tasks.image:fresh_resnet"
    chosen = {
        "task": {"name": "digits", "train_examples": 64, "eval_examples": 32},
        "teacher": {"model": network, "training": {"steps": 2}},
        "student": {"model": network, "options": {"widths": [8, 16], "depth": 1}},
        "training": {"steps": 4},
        "store": str(tmp_path / "store"),
        "cache": str(tmp_path / "kept"),
    }
    first = limbeck.distill(chosen, tmp_path / "one")
    again = limbeck.distill(chosen, tmp_path / "two")
    assert (first.student.teacher_examples, again.student.teacher_examples) == (64, 0)
