"""DistillationTrainer on two ranks: the same weights, losses and evaluations as on one."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.hf_cases import tokens
from tests.workers.hf import losses, trained

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with what the trainings on two ranks left behind."""
    folder = tmp_path_factory.mktemp("two")
    port = str(random.Random().randint(20000, 50000))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "tests" / "workers" / "hf.py")
    done = subprocess.run(
        [*command, script, str(folder)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_near(found, expected, tolerance):
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - tensor).detach().abs().max()) for name, tensor in expected.items())
    assert worst <= tolerance


@pytest.mark.parametrize("name", ["whole", "cut"])
def test_ranks_and_accumulation_change_nothing(tmp_path, two, name):
    one = trained(tmp_path, 8)
    assert_near(load_file(two / f"{name}.safetensors"), one.distiller.state_dict(), 1e-6)
    found = [float(line) for line in (two / f"{name}.txt").read_text().splitlines()]
    assert found == pytest.approx(losses(one), abs=2e-6)


def test_a_resumed_training_on_two_ranks_ends_bit_for_bit(two):
    whole, resumed = (load_file(two / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_predictions_on_two_ranks_are_those_of_one(tmp_path, two):
    one = trained(tmp_path, 8)
    expected = one.predict(tokens()[2][:7]).predictions
    torch.testing.assert_close(
        torch.from_numpy(np.load(two / "predictions.npy")), torch.from_numpy(expected), atol=1e-5, rtol=0
    )
