"""Presets: what ships runs for every kind of task and student, and what the user says wins."""

import re
from importlib import resources

import pytest
import yaml

import limbeck
from limbeck.plan import Observer
from limbeck.presets import PRESETS, Preset, fill, load_preset
from limbeck.recipe import Recipe
from limbeck.run import Run
from limbeck.tasks import is_regression, make_task, reads_texts
from tests import tiny

CUT = ["training.steps=2", "training.batch_size=16"]
FRESH = {"model": "tests.test_presets:fresh"}


def fresh(task, *, processor):
    """A student that has nothing of its teacher."""
    from transformers import BertForSequenceClassification

    made = tiny.config(vocab_size=len(processor), num_hidden_layers=1, num_labels=len(task.labels) or 1)
    return BertForSequenceClassification(made)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Teachers that are ready for classes and for numbers, and a table with both."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save_classifier(folder / "classes", ["bad", "good"])
    tiny.save_classifier(folder / "numbers", ["score"])
    tiny.table().to_csv(folder / "data.csv", index=False)
    return folder


def source(place, kind="classes", student=None, **changes):
    label = {"classes": "label", "numbers": "stars"}[kind]
    return {
        "task": {"name": "table", "data": str(place / "data.csv"), "text": ["text"], "label": label},
        "teacher": {"model": str(place / kind)},
        "student": student or {"layers": [0]},
        "store": str(place / "store"),
        **changes,
    }


def resolved(recipe):
    task = make_task(recipe.task)
    return recipe.resolved(is_regression(task), reads_texts(task)), task


@pytest.mark.parametrize("student", [{"layers": [0]}, {"shrink": {"hidden_size": 8, "heads": 1}}, FRESH])
@pytest.mark.parametrize("kind", ["classes", "numbers"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(place, tmp_path, name, kind, student):
    recipe, task = resolved(Recipe.parse(source(place, kind, student, preset=name), CUT))
    run = Run(recipe, task, tmp_path / "run", Observer())
    plan, _ = run.teach(lambda tuned: run.open_folder(False))
    run.memory = run.remember(plan)
    _, result = run.train("student", 0)
    losses = {row.term.loss_name for row in plan.terms}
    answers = {"classes": {"forward_kl", "cross_entropy"}, "numbers": {"mse", "label_mse"}}[kind]
    assert answers <= losses <= answers | {"mse"}
    inside = [row for row in plan.terms if row.term.tap not in ("logits", "labels")]
    assert bool(inside) == (student is not FRESH)
    assert all(row.term.project == "linear" for row in inside if "shrink" in student)
    assert result.fitted.steps == 2


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_documented_and_says_nothing_of_teacher_or_data(name):
    path = resources.files("limbeck") / "recipes" / f"preset-{name}.yaml"
    preset = load_preset(name)
    assert preset.about
    assert path.read_text().startswith("# ")
    assert {*preset.recipe, *preset.texts} <= {"training", "baseline_training", "student", "extra"}
    assert set(preset.recipe["student"]) == {"dropout", "freeze_embeddings"}


def test_what_the_user_says_wins(place):
    preset = load_preset("best").recipe["training"]
    recipe = Recipe.parse(source(place, preset="best", training={"epochs": 2}))
    assert recipe.training.epochs == 2
    assert recipe.training.learning_rate == preset["learning_rate"]
    recipe = Recipe.parse(source(place, preset="best", training={"epochs": 2}), ["training.epochs=1"])
    assert recipe.training.epochs == 1
    own = {"kd": {"loss": "mse"}}
    assert set(resolved(Recipe.parse(source(place, preset="best", terms=own)))[0].terms) == {"kd"}
    changed = Recipe.parse(source(place, preset="fast"), ["preset=best"])
    assert changed.training.epochs == preset["epochs"]
    assert Recipe.parse(source(place, preset="best"), ["preset=null"]) == Recipe.parse(source(place))


def test_values_that_are_mappings_are_taken_whole():
    given = {"training": {"optimizer_options": {"eps": 1e-6}}, "balance": "static"}
    beneath = {"training": {"optimizer_options": {"betas": [0.9, 0.98]}, "epochs": 4}, "balance": {"kind": "x"}}
    assert fill(given, beneath, Recipe) == {
        "training": {"optimizer_options": {"eps": 1e-6}, "epochs": 4},
        "balance": "static",
    }


def test_parts_for_texts_are_for_texts_alone(place, monkeypatch):
    """The task decides; what the user wrote counts, whatever the task."""
    preset = Preset(about="x", texts={"balance": "uncertainty", "cache": {"dtype": "fp16", "gib": 2}})
    monkeypatch.setattr("limbeck.recipe.load_preset", lambda name: preset)
    texts = Recipe.parse(source(place, preset="best"))
    assert texts.balance == "static"
    assert resolved(texts)[0].balance == "uncertainty"
    assert resolved(texts)[0].cache.gib == 2
    images = texts.resolved(regression=False, texts=False)
    assert (images.balance, images.cache.dtype) == ("static", "fp32")
    said = resolved(Recipe.parse(source(place, preset="best", balance="static", cache={"gib": 1})))[0]
    assert (said.balance, said.cache.gib, said.cache.dtype) == ("static", 1, "fp16")
    assert Recipe.parse(yaml.safe_load(images.to_yaml())).resolved(regression=False) == images


@pytest.mark.parametrize("name", PRESETS)
def test_the_resolved_recipe_is_whole(place, name):
    """It says where it came from, and gives the same whatever the preset says later."""
    recipe, _ = resolved(Recipe.parse(source(place, preset=name), ["training.optimizer_options={}"]))
    spelled = yaml.safe_load(recipe.to_yaml())
    assert spelled["preset"] == name
    assert spelled["terms"]["kd"]["loss"] == "forward_kl"
    again, _ = resolved(Recipe.parse(spelled))
    assert again == recipe


def test_no_preset_is_what_it_was(place):
    recipe, _ = resolved(Recipe.parse(source(place)))
    assert recipe.preset is None
    assert list(recipe.terms) == ["kd", "labels", "hidden"]
    assert recipe.training == limbeck.Settings()


def test_an_unknown_preset(place, tmp_path, command):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(source(place)))
    status, printed = command("distill", tmp_path / "recipe.yaml", "--preset", "bets", "--out", tmp_path / "run")
    assert (status, printed.strip()) == (2, "error: there is no preset 'bets'; did you mean 'best'?")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="there is no preset 3; known: balanced, best, fast"):
        Recipe.parse(source(place, preset=3))


def test_on_the_command_line(place, tmp_path, command):
    """An image task takes a preset too: what is for texts is left out."""
    network = "limbeck.tasks.image:fresh_resnet"
    words = ["--task", "digits", "--teacher", network, "--student", network, "--preset", "best"]
    words += ["--set", "task.train_examples=40", "--set", "task.eval_examples=20", "--set", "training.steps=2"]
    words += ["--set", "teacher.training.steps=1", "--finetuned-cache", tmp_path / "store"]
    status, printed = command("distill", *words, "--out", tmp_path / "run")
    assert status == 0, printed
    recipe = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert recipe.preset == "best"
    assert recipe.training.learning_rate == load_preset("best").recipe["training"]["learning_rate"]
    assert "preset: best" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_list_presets(command):
    status, printed = command("list", "presets")
    assert status == 0
    for name in PRESETS:
        assert re.search(rf"^{name} +{re.escape(load_preset(name).about[:30])}", printed, flags=re.MULTILINE)


def test_extra_data_of_a_preset(place):
    """Texts get them; an image task does not; what the user says of them wins, and none is none."""
    best = load_preset("best").texts["extra"]
    recipe, _ = resolved(Recipe.parse(source(place, preset="best")))
    assert (list(recipe.extra.augment), recipe.extra.copies) == (list(best["augment"]), best["copies"])
    assert Recipe.parse(source(place, preset="best")).resolved(regression=False, texts=False).extra is None
    own, _ = resolved(Recipe.parse(source(place, preset="best"), ["extra.copies=1"]))
    assert (list(own.extra.augment), own.extra.copies) == (list(best["augment"]), 1)
    assert resolved(Recipe.parse(source(place, preset="best", extra=None)))[0].extra is None
