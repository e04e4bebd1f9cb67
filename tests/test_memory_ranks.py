import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from tests.workers.memory import remembered

ROOT = Path(__file__).parent.parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_all_ranks_remember_what_any_of_them_saw(tmp_path):
    command = [sys.executable, "-m", "tests.workers.memory", str(free_port()), str(tmp_path / "seen.pt")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert seen["ids"].tolist() == [1, 4, 7, 2, 9]
    alone = remembered(torch.tensor([1, 4, 7, 2, 9]))
    for banks in seen["banks"]:
        torch.testing.assert_close(banks, torch.stack([alone.student_bank, alone.teacher_bank]))
    torch.testing.assert_close(*seen["normalizers"])
