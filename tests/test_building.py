"""A cache that is built once and then stands for its teacher."""

import itertools
import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import limbeck
from limbeck import building
from limbeck.building import build_cache
from limbeck.cache import Store, merge, read_manifest
from limbeck.recipe import Recipe
from tests import tiny


@pytest.fixture
def place(tmp_path):
    return tiny.place_of(tmp_path)


def kept(place, **changes):
    return tiny.recipe(place, teacher={"model": f"cache:{place / 'signals'}"}, **changes)


def weights(folder):
    return torch.cat([t.flatten() for _, t in sorted(load_file(folder / "student" / "model.safetensors").items())])


def content(folder):
    """Every part of every tap of every example, as it is kept."""
    store = Store(read_manifest(folder), folder)
    keys = {key for shard in store.shards.values() for key in shard.keys}
    taps = sorted(store.taps())
    found = ((key, tap, parts) for key in keys for tap, parts in store.parts([key], taps).items())
    return {(key, tap, name): tensor for key, tap, parts in found for name, tensor in parts.items()}


def test_a_cache_stands_for_its_teacher(place):
    built = build_cache(tiny.recipe(place), place / "signals")
    assert 0 < built.computed <= built.examples
    assert not (place / "signals" / "work").exists()
    live = limbeck.distill(tiny.recipe(place), place / "live")
    shutil.rmtree(place / "teacher")
    shutil.rmtree(place / "store")
    ours = limbeck.distill(kept(place), place / "run")
    torch.testing.assert_close(weights(place / "run"), weights(place / "live"), rtol=1e-3, atol=1e-4)
    assert ours.student.teacher_examples == 0
    assert (ours.teacher.score, ours.teacher.parameters) == (live.teacher.score, live.teacher.parameters)
    assert ours.teacher.latency_ms is None
    assert ours.speedup == {}
    page = (place / "run" / "README.md").read_text()
    assert "not measured" in page


def test_building_again_asks_for_nothing(place):
    first = build_cache(tiny.recipe(place), place / "signals")
    before = content(place / "signals")
    again = build_cache(tiny.recipe(place), place / "signals")
    assert first.computed > 0
    assert again.computed == 0
    after = content(place / "signals")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def with_examples(count, made):
    return {**made, "task": {**made["task"], "train_examples": count}}


def test_merged_caches_stand_for_their_teacher(place):
    tiny.save_classifier(place / "teacher", ["bad", "good"])
    build_cache(with_examples(20, tiny.recipe(place)), place / "some")
    build_cache(tiny.recipe(place), place / "more")
    merge(place / "signals", [place / "some", place / "more"])
    assert limbeck.distill(kept(place), place / "run").student.teacher_examples == 0


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, pixel_values):
        return {"logits": self.head(pixel_values.mean((2, 3)))}


def pooled(task):
    return Pooled()


def test_a_cache_of_augmented_images_stands_for_its_teacher(tmp_path):
    generator = np.random.default_rng(0)
    for split, name, number in itertools.product(("train", "validation"), "ab", range(6)):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    model = {"model": f"{__name__}:pooled"}
    asked = {
        "task": {"name": "image", "data": str(tmp_path / "data"), "augmentation": ["crop"], "variants": 2},
        "teacher": {**model, "training": {"steps": 1}},
        "student": model,
        "training": {"epochs": 3, "batch_size": 4},
        "store": str(tmp_path / "store"),
        "baseline": False,
    }
    asked["task"]["size"] = 8
    build_cache(asked, tmp_path / "signals")
    ours = {**asked, "teacher": {"model": f"cache:{tmp_path / 'signals'}"}}
    assert limbeck.distill(ours, tmp_path / "run").student.teacher_examples == 0
    ours["task"] = {**asked["task"], "variants": None}
    with pytest.raises(ValueError, match=r"augmented anew in every epoch; set task\.variants"):
        limbeck.distill(ours, tmp_path / "other")


def test_another_number_of_logits_than_was_kept_is_refused(place):
    form = {"logits": "topk", "k": 2}
    terms = {"kd": {"loss": "forward_kl"}}
    build_cache(tiny.recipe(place, cache=form, terms=terms), place / "signals")
    said = r"keeps 'logits' otherwise than the recipe wants it \(k: 2 there, 1 here\)"
    with pytest.raises(ValueError, match=said):
        limbeck.distill(kept(place, cache={**form, "k": 1}, terms=terms), place / "run")
    with pytest.raises(ValueError, match=r"form: 'top-k' there, 'sampled' here"):
        limbeck.distill(kept(place, cache={"logits": "sampled"}, terms=terms), place / "run")
    assert limbeck.distill(kept(place, cache=form, terms=terms), place / "run").student.teacher_examples == 0


def test_fine_tuning_that_was_interrupted_is_not_taken_up_for_other_data(place, monkeypatch):
    def dies(*arguments):
        raise InterruptedError

    monkeypatch.setattr("limbeck.models.TeacherStore.keep", dies)
    for count in (20, 24):
        with pytest.raises(InterruptedError):
            build_cache(with_examples(count, tiny.recipe(place)), place / "signals")
    assert len(list((place / "signals" / "work").iterdir())) == 2
    monkeypatch.undo()
    build_cache(with_examples(24, tiny.recipe(place)), place / "signals")
    assert not (place / "signals" / "work").exists()


def test_an_interrupt_keeps_what_was_said_and_says_so(place, monkeypatch, command):
    tiny.save_classifier(place / "teacher", ["bad", "good"])
    (place / "recipe.yaml").write_text(Recipe.parse(tiny.recipe(place)).to_yaml())
    shares = building._shares

    def interrupted(run, data):
        yield next(shares(run, data))
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "_shares", interrupted)
    status, said = command("cache", "build", place / "recipe.yaml", "--out", place / "signals")
    assert (status, "what the teacher said is kept in" in " ".join(said.split())) == (130, True)
    assert "nothing was begun" not in said
    assert 0 < len(Store(read_manifest(place / "signals"), place / "signals")) <= 16


def test_of_grown_data_what_is_new_is_asked_for_and_filtered_data_is_there(place):
    tiny.save_classifier(place / "teacher", ["bad", "good"])  # one that needs no training on the data
    first = build_cache(with_examples(20, tiny.recipe(place)), place / "signals")
    before = content(place / "signals")
    grown = build_cache(tiny.recipe(place), place / "signals")
    assert grown.examples > 20
    assert first.computed + grown.computed == len(Store(read_manifest(place / "signals"), place / "signals"))
    after = content(place / "signals")
    assert all(torch.equal(before[k], after[k]) for k in before)
    report = limbeck.distill(with_examples(30, kept(place)), place / "filtered")
    assert report.student.teacher_examples == 0


def test_a_folder_of_another_teacher_is_refused_before_one_is_fine_tuned(place):
    build_cache(with_examples(20, tiny.recipe(place)), place / "signals")
    before = sorted((place / "store" / "teachers").iterdir())
    with pytest.raises(
        ValueError, match=r"is of another teacher \(data.train: .*, and this one would be fine-tuned"
    ):
        build_cache(tiny.recipe(place), place / "signals")
    assert sorted((place / "store" / "teachers").iterdir()) == before
    assert build_cache(with_examples(20, tiny.recipe(place)), place / "signals").computed == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cache": "off"}, "cache.place=off is for a teacher that runs, and this one is a cache"),
        ({"cache": {"dtype": "bf16"}}, "is kept in fp32, and the recipe has cache.dtype=bf16"),
        ({"task": {"max_length": 9}}, "was built with task.max_length=128, and the recipe has 9"),
        (
            {"terms": {"hidden": {"tap": "layers", "loss": "mse"}}},
            "keeps 'logits' of the teacher, and the terms read",
        ),
        ({"teacher": {"options": {"layers": 4}}}, "options .* are for a package.module:function"),
    ],
)
def test_what_a_recipe_says_of_a_cache_must_be_so(place, change, said):
    build_cache(tiny.recipe(place, terms={"kd": {"loss": "forward_kl"}}), place / "signals")
    chosen = kept(place)
    for key, value in change.items():
        chosen[key] = {**chosen.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=said):
        limbeck.distill(chosen, place / "run")


def test_files_beside_the_signals_are_checked(place):
    build_cache(tiny.recipe(place), place / "signals")
    weights_of_student = place / "signals" / "student" / "model.safetensors"
    content_of_it = weights_of_student.read_bytes()
    weights_of_student.write_bytes(content_of_it[:-1] + b"?")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        limbeck.distill(kept(place), place / "run")
    weights_of_student.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        limbeck.distill(kept(place), place / "run")


def test_a_cache_without_any_signals_lacks_all_examples(place):
    build_cache(tiny.recipe(place), place / "signals")
    for shard in (place / "signals").glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"(\d+) of \1 training examples are not in"):
        limbeck.distill(kept(place), place / "run")


def test_a_cache_has_no_way_to_run(place):
    with pytest.raises(ValueError, match="dtype say how a teacher runs, and a cache does not run"):
        limbeck.distill({**kept(place), "teacher": {"model": f"cache:{place}", "dtype": "bf16"}}, place / "run")


def test_missing_examples_are_counted_before_anything_is_trained(place):
    build_cache(with_examples(20, tiny.recipe(place)), place / "signals")
    with pytest.raises(
        ValueError, match=r"\d+ of \d+ training examples are not in .*signals, and there is no teacher"
    ):
        limbeck.distill(kept(place), place / "run")
    assert not (place / "run").exists()


def test_a_teacher_whose_cache_was_not_finished_is_refused(place):
    build_cache(tiny.recipe(place), place / "signals")
    shutil.rmtree(place / "signals" / "teacher")
    with pytest.raises(ValueError, match="finish it with limbeck cache build"):
        limbeck.distill(kept(place), place / "run")


def test_other_labels_and_other_evaluation_data_are_refused(place):
    build_cache(tiny.recipe(place), place / "signals")
    about = place / "signals" / "teacher" / "about.json"
    found = json.loads(about.read_text())
    about.write_text(json.dumps({**found, "labels": found["labels"][::-1]}))
    with pytest.raises(
        ValueError, match=r"answers with the labels \['good', 'bad'\], and the task has \['bad', 'good'\]"
    ):
        limbeck.distill(kept(place), place / "run")
    about.write_text(json.dumps({**found, "data": {"validation": "another"}}))
    with pytest.raises(ValueError, match="answered another validation split"):
        limbeck.distill(kept(place), place / "run")
    about.write_text(json.dumps(found))
    answers = place / "signals" / "teacher" / "answers.safetensors"
    answers.write_bytes(answers.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"answers\.safetensors is damaged"):
        limbeck.distill(kept(place), place / "run")
    about.write_text("{")
    with pytest.raises(ValueError, match=r"about\.json is damaged"):
        limbeck.distill(kept(place), place / "run")


def test_layers_that_were_not_kept_are_refused(place):
    build_cache(tiny.recipe(place), place / "signals")
    with pytest.raises(
        ValueError, match=r"layers \[1\] come from the teacher's weights, which are not here; .* \[0\]"
    ):
        limbeck.distill(kept(place, student={"layers": [1]}), place / "run")


@pytest.mark.parametrize("terms", [{"hidden": {"tap": "layers", "loss": "mse", "map": "cka"}}])
def test_layers_cannot_be_matched_without_a_teacher(place, terms):
    build_cache(tiny.recipe(place), place / "signals")
    with pytest.raises(ValueError, match="map cka is found from the teacher's layers, which are not here"):
        limbeck.distill(kept(place, terms=terms), place / "run")


def test_a_folder_with_other_things_is_refused_before_the_teacher_is_trained(place):
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no cache of limbeck, it holds 'notes.txt'"):
        build_cache(tiny.recipe(place), place / "mine")
    with pytest.raises(ValueError, match="is a file"):
        build_cache(tiny.recipe(place), place / "data.csv")
    with pytest.raises(ValueError, match="is a cache already"):
        build_cache(kept(place), place / "other")
    assert not (place / "store").exists()


def test_too_little_room_is_said_before_the_teacher_is_asked(place, monkeypatch):
    monkeypatch.setattr("limbeck.building.free_bytes", lambda place: 10)
    with pytest.raises(ValueError, match="bytes of signals do not fit the 10 free"):
        build_cache(tiny.recipe(place), place / "signals")


def test_two_processes_share_the_work(place):
    tiny.save_classifier(place / "teacher", ["bad", "good"])
    (place / "recipe.yaml").write_text(Recipe.parse(tiny.recipe(place)).to_yaml())
    port = str(random.Random().randint(20000, 50000))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command = [*launch, "-m", "limbeck", "cache", "build", str(place / "recipe.yaml"), "--out"]
    done = subprocess.run([*command, str(place / "both")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    built = build_cache(tiny.recipe(place), place / "alone")
    assert f"the teacher ran for {built.computed} now" in done.stdout
    assert len(list((place / "both").glob("*.safetensors"))) == 2
    ours, theirs = content(place / "both"), content(place / "alone")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k], theirs[k], rtol=1e-5, atol=1e-6) for k in ours)


def test_the_commands_of_the_readme(place, command):
    (place / "recipe.yaml").write_text(Recipe.parse(tiny.recipe(place)).to_yaml())
    status, said = command("cache", "build", place / "recipe.yaml", "--out", place / "signals")
    assert (status, "the teacher ran for" in said) == (0, True)
    teacher = ["--teacher", f"cache:{place / 'signals'}", "--out", place / "run"]
    status, said = command("distill", place / "recipe.yaml", *teacher)
    assert (status, "not here, its signals are" in said, "not measured" in said) == (0, True, True)
    for place_of_signals, note in (("off", "not remembered, by the recipe"), (place / "more", "remembered in")):
        arguments = ["--cache", place_of_signals, "--out", place / f"run-{note[:3]}", "--set", "baseline=false"]
        status, said = command("distill", place / "recipe.yaml", *arguments)
        assert (status, note in " ".join(said.split())) == (0, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cache", "build", "none.yaml", "--out", "x"], "there is no recipe none.yaml"),
        (["cache", "bild", "r.yaml"], "No such command 'bild'"),
        (["cache", "info", "nowhere"], "nowhere is no cache of limbeck"),
        (["distill", "RECIPE", "--teacher", "cache:nowhere"], "nowhere is no cache of limbeck"),
        (["distill", "RECIPE", "--set", "cache.plce=off"], "did you mean 'place'"),
        (["distill", "RECIPE", "--set", "cache.gib=0"], "cache.gib"),
    ],
)
def test_what_is_mistyped_is_one_clear_line(place, command, words, said):
    (place / "recipe.yaml").write_text(Recipe.parse(tiny.recipe(place)).to_yaml())
    status, printed = command(*[str(place / "recipe.yaml") if w == "RECIPE" else w for w in words])
    assert status == 2
    assert said in printed
    assert "Traceback" not in printed
