"""Fine-tuned teachers: kept by all that made them, found again, checked, safe under several processes."""

import copy
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

import limbeck
from limbeck.models import TeacherStore, fingerprint
from limbeck.recipe import Recipe
from limbeck.tasks import make_task
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.place_of(tmp_path_factory.mktemp("place"))


def store_of(source, *changes):
    recipe = Recipe.parse(source, changes)
    return TeacherStore(recipe, make_task(recipe.task))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def kept(place, tmp_path):
    """A store that holds one teacher: the store, its task, and the model that was kept."""
    recipe = Recipe.parse(tiny.recipe(place, store=str(tmp_path / "store")))
    task = make_task(recipe.task)
    store, loaded = TeacherStore(recipe, task), task.load(recipe.teacher.model)
    store.keep(loaded.model, loaded.processor)
    return store, task, loaded


@pytest.mark.parametrize(
    "change",
    [
        *("teacher.training.seed=1", "teacher.training.learning_rate=1e-4", "teacher.training.steps=3"),
        *("task.label=stars", "task.train_examples=40", "task.eval_examples=8", "task.holdout=0.2"),
        *("task.max_length=7", "task.metric=macro_f1"),
    ],
)
def test_what_makes_a_teacher_is_its_key(place, change):
    source = tiny.recipe(place)
    assert store_of(source).folder == store_of(copy.deepcopy(source)).folder
    assert store_of(source, change).folder != store_of(source).folder


@pytest.mark.parametrize("change", ["training.epochs=9", "student.layers=[1]", "seeds=2", "preset=best"])
def test_what_does_not_make_a_teacher_is_no_part_of_its_key(place, change):
    assert store_of(tiny.recipe(place), change).folder == store_of(tiny.recipe(place)).folder


def test_other_weights_labels_and_texts_make_other_teachers(place, tmp_path):
    source = tiny.recipe(place)
    own = tmp_path / "teacher"
    shutil.copytree(place / "teacher", own)
    source["teacher"]["model"] = str(own)
    before = store_of(source).folder
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.3}))
    changed = store_of(source).folder
    table = tiny.table()
    table["label"] = table["label"].replace({"good": "fair"})
    table.to_csv(tmp_path / "data.csv", index=False)
    source["task"] = {**source["task"], "data": str(tmp_path / "data.csv")}
    assert len({before, changed, store_of(source).folder}) == 3


def test_a_teacher_is_found_again_and_retrain_replaces_it(place, tmp_path):
    recipe = tiny.recipe(place, store=str(tmp_path / "store"), training={"steps": 1})
    limbeck.distill(recipe, tmp_path / "a")
    store = store_of(recipe)
    first = weights(store.load(make_task(Recipe.parse(recipe).task)).model)
    limbeck.distill(recipe, tmp_path / "b")
    assert not (tmp_path / "b" / "checkpoints" / "teacher").exists()  # it was not trained there
    marker = store.folder / "made-by.json"
    before = marker.stat().st_ino
    limbeck.distill(recipe, tmp_path / "c", retrain=True)
    assert marker.stat().st_ino != before
    assert same(weights(store.load(make_task(Recipe.parse(recipe).task)).model), first)  # it is exact


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "config"])
def test_damage_is_noticed(kept, damage):
    store, task, _ = kept
    path = store.folder / ("config.json" if damage == "config" else "model.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-100])
    else:
        content[-2] ^= 1  # the file is still one that loads, with another number in it
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged \\({path.name} is .*pass --retrain to make it anew"):
        store.load(task)


def test_teachers_of_earlier_versions_are_read(kept):
    store, task, loaded = kept
    (store.folder / "digests.json").unlink()
    assert same(weights(store.load(task).model), weights(loaded.model))


def test_several_keep_and_load_at_once(kept):
    """Readers see one whole teacher or the other while writers replace it."""
    store, task, loaded = kept
    other = copy.deepcopy(loaded.model)
    torch.nn.init.constant_(other.classifier.bias, 3.0)
    whole, wrong = (weights(loaded.model), weights(other)), []

    def write(model):
        for _ in range(8):
            store.keep(model, loaded.processor)

    def read():
        for _ in range(8):
            found = weights(store.load(task).model)
            wrong.extend([] if any(same(found, one) for one in whole) else [found])

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except Exception as error:
            wrong.append(error)

    work = [(write, loaded.model), (write, other), (read,), (read,)]
    threads = [threading.Thread(target=guarded, args=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [path.name for path in store.folder.parent.iterdir()] == [store.folder.name]


def test_a_store_that_cannot_be_is_refused_before_any_training(place, tmp_path, command):
    (tmp_path / "file").write_text("")
    words = ["distill", "--task", "table", "--data", place / "data.csv", "--text", "text", "--label", "label"]
    words += ["--teacher", place / "teacher", "--student", "layers:0", "--out", tmp_path / "run"]
    status, printed = command(*words, "--finetuned-cache", tmp_path / "file" / "store")
    assert status == 2
    assert f"{tmp_path / 'file'} is a file; name another --finetuned-cache" in printed
    assert not (tmp_path / "run").exists()


def test_a_store_that_cannot_be_written_is_refused(place, tmp_path, monkeypatch):
    store = store_of(tiny.recipe(place, store=str(tmp_path / "store")))
    monkeypatch.setattr("limbeck.models.os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="cannot be written; name another --finetuned-cache"):
        store.check_room()


def test_finetuned_cache_names_the_store(place, tmp_path, command):
    words = ["distill", "--task", "table", "--data", place / "data.csv", "--text", "text", "--label", "label"]
    words += ["--teacher", place / "teacher", "--student", "layers:0", "--set", "training.steps=1"]
    words += ["--set", "teacher.training.steps=1", "--finetuned-cache", tmp_path / "models"]
    assert "to be fine-tuned" in command(*words, "--out", tmp_path / "a")[1]
    assert len(list((tmp_path / "models" / "teachers").iterdir())) == 1
    assert "ready" in command(*words, "--out", tmp_path / "b")[1]


def test_a_hub_model_has_one_key_before_and_after_it_was_fetched(tmp_path, monkeypatch):
    """Its commit is asked for; else the first run would have another key than the second."""
    cached = tmp_path / "snapshots" / "0123abc" / "config.json"
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(cached)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert fingerprint("owner/name") == "owner/name@0123abc"
    assert asked == [("owner/name", "config.json")]
    assert fingerprint(str(Path("./not/there"))) == "not/there@0123abc"  # so may a hub id look
    assert fingerprint("./not/there") == "./not/there@"


def test_a_teacher_that_cannot_be_saved_leaves_nothing_and_one_that_can_is_for_all(kept, monkeypatch):
    store, _, loaded = kept
    assert store.folder.stat().st_mode & 0o055 == 0o055

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("limbeck.models.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        store.keep(loaded.model, loaded.processor)
    assert [path.name for path in store.folder.parent.iterdir()] == [store.folder.name]
    assert store.holds()
