"""Files that are whole or not there."""

import pytest
import torch
from safetensors.torch import load_file

from limbeck import atomic


def test_all_kinds_of_files_are_written(tmp_path):
    atomic.write_text(tmp_path / "text", "θ = 1\n")
    atomic.write_bytes(tmp_path / "bytes", b"\x00\x01")
    atomic.write_tensors(tmp_path / "tensors", {"a": torch.ones(2)}, {"format": "pt"})
    assert (tmp_path / "text").read_text(encoding="utf-8") == "θ = 1\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\x01"
    assert torch.equal(load_file(tmp_path / "tensors")["a"], torch.ones(2))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic.replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise failure

    with pytest.raises(failure):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="No such file or directory"):
        atomic.write_tensors(tmp_path / "missing" / "file", {"a": torch.ones(2)})


def test_a_failed_write_names_its_file(tmp_path):
    def fails():
        with atomic.replacing(tmp_path / "file"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*file'"):
        fails()
