import errno
import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from limbeck.atomic import create_text, write_text
from limbeck.cache import MANIFEST, tensors_digest
from limbeck.cli import _one_line, app
from limbeck.cli_distill import _check_place, read_recipe
from tests.test_cache import filled


def limbeck(*words):
    return CliRunner().invoke(app, ["cache", *map(str, words)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_cache_is_described(tmp_path):
    filled(tmp_path / "a").flush()
    said = limbeck("info", tmp_path / "a")
    assert said.exit_code == 0
    assert "6 examples in 1 shard," in said.output
    assert "hidden, kept by tokens" in said.output
    assert "teacher: a" in said.output


def test_damage_is_found_and_removed(tmp_path):
    filled(tmp_path / "a").flush()
    assert limbeck("verify", tmp_path / "a").exit_code == 0
    (shard,) = (tmp_path / "a").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    found = limbeck("verify", tmp_path / "a")
    assert found.exit_code == 1
    assert f"{shard.name} is damaged" in found.output
    assert f"deleted {shard.name}" in limbeck("prune", tmp_path / "a").output
    assert "nothing to delete" in limbeck("prune", tmp_path / "a").output


def test_caches_come_together(tmp_path):
    filled(tmp_path / "a").flush()
    filled(tmp_path / "b", start=6).flush()
    assert "2 shards came" in limbeck("merge", tmp_path / "both", tmp_path / "a", tmp_path / "b").output
    assert "12 examples" in limbeck("info", tmp_path / "both").output


def test_what_came_is_counted_and_nothing_is_merged_into_itself(tmp_path):
    filled(tmp_path / "a").flush()
    assert "1 shard came into" in limbeck("merge", tmp_path / "b", tmp_path / "a").output
    again = limbeck("merge", tmp_path / "b", tmp_path / "a").output
    assert "0 shards came" in again
    assert "it has them all already" in again
    refused = limbeck("merge", tmp_path / "a", tmp_path / "x" / ".." / "a", tmp_path / "a")
    assert "cannot be merged into itself; name another cache" in str(refused.exception)


@pytest.mark.parametrize(
    ("lay", "fact", "cure"),
    [
        (lambda path: None, "there is no such folder", "RECIPE --out {0} makes one"),
        (lambda path: path.write_text(""), "it is a file", "RECIPE --out FOLDER makes one"),
        (lambda path: path.mkdir(), "it has no manifest.json", "RECIPE --out {0} makes one"),
        (lambda path: save(path / "x.txt"), "it has no manifest.json", "RECIPE --out FOLDER makes one"),
        (lambda path: save(path / "x.safetensors"), "it has no manifest.json", "copy it anew"),
        (
            lambda path: save(path / MANIFEST, b'{"a": 1}'),
            "its manifest.json is of something else",
            "another folder",
        ),
        (lambda path: save(path / MANIFEST, b"[1]"), "its manifest.json is of something else", "another folder"),
    ],
)
def test_no_cache_is_one_clear_line(tmp_path, lay, fact, cure):
    place = tmp_path / "a"
    lay(place)
    said = limbeck("info", place)
    assert said.exit_code != 0
    assert f"{place} is no cache of limbeck: {fact}" in str(said.exception)
    assert str(said.exception).endswith(cure.format(place))


def save(path, data=b"..."):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_a_manifest_without_what_it_is_for_is_damaged(tmp_path):
    for text in ('{"format": 2, "belongs": 3}', '{"belongs": {}, "checksum": ""}', "{"):
        (tmp_path / MANIFEST).write_text(text)
        assert "manifest.json is damaged; build the cache anew" in str(limbeck("info", tmp_path).exception)


@pytest.fixture
def standing(tmp_path):
    """A cache that stands for its teacher, as a build leaves it."""
    place = tmp_path / "a"
    filled(place).flush()
    save(place / "teacher" / "vocab.txt", b"a b c")
    save(place / "student" / "model.safetensors", b"weights")
    answers = {"validation": torch.tensor([[1.0, 2.0]])}
    save_file(answers, place / "teacher" / "answers.safetensors")
    beside = ("teacher/vocab.txt", "teacher/answers.safetensors", "student/model.safetensors")
    files = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in beside}
    about = {"answers": tensors_digest(answers), "files": files}
    save(place / "teacher" / "about.json", json.dumps(about).encode())
    return place


def without_digests(place):
    about = place / "teacher" / "about.json"
    about.write_text(json.dumps({"answers": json.loads(about.read_text())["answers"]}))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("student/model.safetensors", None, "student/model.safetensors is missing"),
        ("student/model.safetensors", b"weighty", "student/model.safetensors is damaged"),
        ("teacher/vocab.txt", b"a b d", "teacher/vocab.txt is damaged"),
        ("teacher/answers.safetensors", None, "teacher/answers.safetensors is missing"),
        ("teacher/answers.safetensors", b"...", "teacher/answers.safetensors is damaged"),
        ("teacher/about.json", None, "teacher/about.json is missing"),
        ("teacher/about.json", b"{", "teacher/about.json is damaged"),
        ("teacher/about.json", b"[1]", "teacher/about.json is damaged"),
        ("teacher/about.json", b'{"files": 3}', "teacher/about.json is damaged"),
    ],
)
def test_damage_of_what_stands_for_the_teacher_is_found(standing, name, data, said, older):
    assert limbeck("verify", standing).exit_code == 0
    if older:
        without_digests(standing)
        assert limbeck("verify", standing).exit_code == 0
    (standing / name).unlink() if data is None else (standing / name).write_bytes(data)
    found = limbeck("verify", standing)
    unseen = older and not name.startswith(("teacher/answers", "teacher/about"))
    assert found.exit_code == (0 if unseen else 1)
    if not unseen:
        lines = found.output.splitlines()
        assert lines == [
            said,
            f"limbeck cache build RECIPE --out {standing} writes what stands for the teacher anew",
        ]


def test_a_flipped_answer_is_found_without_a_digest_of_its_file(standing):
    without_digests(standing)
    answers = standing / "teacher" / "answers.safetensors"
    answers.write_bytes(answers.read_bytes()[:-1] + b"?")
    assert "teacher/answers.safetensors is damaged" in limbeck("verify", standing).output


def test_a_teacher_without_signals_is_not_whole(standing):
    (shard,) = standing.glob("*.safetensors")
    shard.write_bytes(b"")
    found = limbeck("verify", standing).output
    assert f"limbeck cache prune {standing} removes it; limbeck cache build RECIPE --out {standing}, or" in found
    assert "stands for the teacher" not in found
    assert f"deleted {shard.name}" in limbeck("prune", standing).output
    found = limbeck("verify", standing)
    assert found.exit_code == 1
    assert "no signals are left; build it again" in found.output
    assert "prune" not in found.output


def test_what_was_not_finished_beside_the_signals_is_found_and_pruned(standing):
    save(standing / "teacher" / "answers.safetensors.partial")
    assert "teacher/answers.safetensors.partial was not finished" in limbeck("verify", standing).output
    assert "deleted teacher/answers.safetensors.partial" in limbeck("prune", standing).output
    assert limbeck("verify", standing).exit_code == 0


def test_a_folder_stands_for_its_recipe_where_a_cache_is_built(tmp_path):
    build = ("--out", tmp_path / "out")
    refused = str(limbeck("build", tmp_path, *build).exception)
    assert refused == f"{tmp_path} is a folder without a recipe.yaml; name a recipe's file"
    (tmp_path / "recipe.yaml").write_text("[]")
    assert f"{tmp_path / 'recipe.yaml'} holds no recipe" in str(limbeck("build", tmp_path, *build).exception)
    with pytest.raises(ValueError, match=r"is a folder; name the recipe in it, .*recipe\.yaml"):
        read_recipe(tmp_path, None, None)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EEXIST, "name another folder"),
        (errno.ENOTDIR, "name another folder"),
        (errno.EACCES, "choose a folder that can be written"),
        (errno.ENOENT, "check the path"),
        (errno.ENOSPC, "make room, and start again; nothing finished is lost"),
        (errno.EIO, "nothing finished is lost"),
    ],
)
def test_an_error_of_the_file_system_names_the_path_and_the_cure(number, cure):
    assert _one_line(OSError(number, "a fact", "a/path")) == f"a fact: a/path; {cure}"


def test_an_error_of_a_library_is_one_line():
    assert _one_line(OSError("no model x;\n\n name another")) == "no model x; name another"


@pytest.mark.parametrize("write", [write_text, create_text])
def test_a_failed_sync_names_the_file(tmp_path, monkeypatch, write):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("limbeck.atomic.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*name\.txt'$"):
        write(tmp_path / "name.txt", "...")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "meant"),
    [("of", "off"), ("of ", "off"), ("OFF", "off"), ("memroy", "memory"), ("off", ""), ("./of", ""), ("sig", "")],
)
def test_a_cache_written_almost_like_off_is_refused(tmp_path, monkeypatch, place, meant):
    monkeypatch.chdir(tmp_path)
    if meant:
        with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
            _check_place(place)
        (tmp_path / place).mkdir()
    _check_place(place)
