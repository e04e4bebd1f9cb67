"""Recipes: strict, round-trip, changed from outside."""

import re

import pytest
from torch import nn

from limbeck import Settings
from limbeck.baseline import plain_terms
from limbeck.recipe import Places, Recipe, StudentSpec, default_terms

BASE = {"task": {"name": "glue/rte"}, "teacher": {"model": "teacher"}, "student": {"layers": [0, 2]}}
PLACES = Places(student_path="a", teacher_path="b", student=2, teacher=4)


def test_yaml_round_trip(tmp_path):
    recipe = Recipe.parse(BASE).resolved(regression=False)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yaml") == recipe


def test_changes_do_not_touch_the_source():
    Recipe.parse(BASE, ["student.layers=[1]", "terms.kd={loss: forward_kl}"])
    assert BASE["student"] == {"layers": [0, 2]}
    assert "terms" not in BASE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("taks.name=x", "the recipe has no key 'taks'; did you mean 'task'"),
        ("teacher.modle=x", "'teacher' has no key 'modle'; did you mean 'model'"),
        ("teacher.training.epoch=x", "'teacher.training' has no key 'epoch'; did you mean 'epochs'"),
        ("seeds=0", r"seeds: .*greater than 0"),
        ("teacher.finetune=sometimes", "teacher.finetune"),
        ("student.model=x", "either layers"),
        ("task.name.x=1", "has no keys of its own"),
        ("training.patience=2", "task.holdout=0.1"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.parse(BASE, [change])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *[("weigth", "weight"), ("teacher_tp", "teacher_tap"), ("mapp", "map"), ("insid", "inside")],
        ("temperatur", "temperature"),
    ],
)
def test_a_misspelt_key_of_a_term(key, meant):
    recipe = Recipe.parse(BASE, ["terms={kd: {loss: forward_kl}}", f"terms.kd.{key}=1"])
    message = f"terms.kd: loss 'forward_kl' has no option '{key}'; did you mean '{meant}'"
    with pytest.raises(TypeError, match=message):
        recipe.build_terms(PLACES, regression=False)


def test_a_misspelt_key_that_leaves_another_out():
    with pytest.raises(ValueError, match=r"lacks 'terms.kd.loss'; is 'los' meant for it\?"):
        Recipe.parse(BASE, ["terms={kd: {los: forward_kl}}"])


def test_settings_made_by_hand_are_explained_as_those_of_a_recipe():
    for wrong, message in (
        ({"epoch": 3}, "Settings has no key 'epoch'; did you mean 'epochs'?"),
        ({"optimizer": "adan"}, "optimizer: Input should be 'adamw', 'adam', 'sgd' or 'adafactor' (got 'adan')"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as caught:
            Settings(**wrong)
        assert type(caught.value) is ValueError


def test_parts_that_are_one_text_are_written_out():
    short = Recipe.parse({"task": "glue/rte", "teacher": "teacher", "student": "layers:0,2"}, ["task.holdout=0.1"])
    assert short == Recipe.parse(BASE, ["task.holdout=0.1"])
    changed = Recipe.parse(BASE, ["terms={kd: {loss: forward_kl, transforms: standardize}}"])
    assert changed.terms["kd"].transforms == ("standardize",)
    with pytest.raises(
        ValueError, match="'teacher' in the recipe is 3; write keys of its own, such as model: PATH"
    ):
        Recipe.parse({**BASE, "teacher": 3})


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("seeds: 1\nseeds: 2\n")
    with pytest.raises(ValueError, match="the key 'seeds' stands twice"):
        Recipe.load(tmp_path / "r.yaml")


def test_missing_parts_are_named():
    with pytest.raises(ValueError, match=r"lacks 'teacher.model'"):
        Recipe.parse({**BASE, "teacher": {}})


def test_layers_expand_to_terms():
    recipe = Recipe.parse(BASE, ["terms.hidden={tap: layers, loss: cosine, map: last, weight: 3.0, dim: -1}"])
    terms = recipe.build_terms(PLACES, regression=False)
    assert [(t.name, t.tap, t.teacher_tap, t.weight) for t in terms] == [
        ("hidden.0", "a.0", "b.2", 1.5),
        ("hidden.1", "a.1", "b.3", 1.5),
    ]
    pairs = recipe.model_copy(update={"terms": {}}).build_terms(PLACES, regression=False)
    assert [t.name for t in pairs] == ["kd", "labels", "hidden.0", "hidden.1"]


def test_layers_need_two_stacks():
    with pytest.raises(ValueError, match=r"terms.hidden: both models need a list of layers"):
        Recipe.parse(BASE).build_terms(Places(), regression=False)


def test_default_terms_suit_the_task():
    assert default_terms(regression=False, hidden=True, narrower=True)["hidden"].project == "linear"
    assert default_terms(regression=False, hidden=True)["hidden"].project is None
    losses = {t.loss for t in default_terms(regression=True, hidden=False).values()}
    assert losses == {"mse", "label_mse"}


def test_plain_training_keeps_the_label_terms_options_at_full_weight():
    recipe = Recipe.parse(BASE, ["terms.l={tap: labels, loss: cross_entropy, label_smoothing: 0.1, weight: 0.2}"])
    (term,) = plain_terms(recipe.build_terms(PLACES, regression=False), regression=False)
    assert (term.weight, term.comparison.options) == (1.0, {"label_smoothing": 0.1})
    (term,) = plain_terms([], regression=True)
    assert term.loss_name == "label_mse"


def test_student_forms():
    assert StudentSpec.parse("layers:3,1").layers == (3, 1)
    assert StudentSpec.parse("some/folder").model == "some/folder"
    assert StudentSpec.parse("shrink:0.5").shrink.share == 0.5
    for text in ("shrink:", "shrink:1.5"):
        with pytest.raises(ValueError, match=r"names no shrink; write shrink:0.5, which is half of every size"):
            StudentSpec.parse(text)
    with pytest.raises(ValueError, match="write layers:1,3,5"):
        StudentSpec.parse("layers:")
    with pytest.raises(ValueError, match="'layer:0,2' names no model; did you mean 'layers:0,2'"):
        StudentSpec.parse("layer:0,2")


def test_own_models_by_import_path(tmp_path):
    """A user's function makes teacher and student; a plain module is saved as safetensors."""
    recipe = Recipe.parse(
        {
            "task": {"name": "digits", "train_examples": 40, "eval_examples": 20},
            "teacher": {"model": "tests.test_recipe:pixels", "options": {"hidden": 32}, "training": {"steps": 2}},
            "student": {"model": "tests.test_recipe:pixels", "options": {"hidden": 8}},
            "training": {"steps": 2},
            "store": str(tmp_path / "store"),
        }
    )
    from limbeck import distill

    report = distill(recipe, tmp_path / "run")
    assert report.student_class == "Pixels"
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    again = distill(recipe, tmp_path / "again")  # the teacher comes from the store
    assert again.teacher.training_seconds == 0
    assert again.teacher.score == report.teacher.score
    assert "load_model(module" in (tmp_path / "run" / "README.md").read_text()


class Pixels(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, pixel_values):
        return self.net(pixel_values)


def pixels(task, *, hidden=16):
    return Pixels(hidden)
