from typer.testing import CliRunner

from limbeck.cli import app
from tests.test_cache import filled


def limbeck(*words):
    return CliRunner().invoke(app, ["cache", *map(str, words)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_cache_is_described(tmp_path):
    filled(tmp_path / "a").flush()
    said = limbeck("info", tmp_path / "a")
    assert said.exit_code == 0
    assert "6 examples in 1 shards" in said.output
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


def test_no_cache_is_one_clear_line(tmp_path):
    said = limbeck("info", tmp_path)
    assert said.exit_code != 0
    assert "is no cache of limbeck: it has no manifest.json" in str(said.exception)
