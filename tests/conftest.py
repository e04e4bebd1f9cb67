import os
import sys

# Small tensors are faster on one thread, and several processes do not wait for each other; workers inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import pytest
import torch

from limbeck import cli

torch.set_num_threads(1)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process; returns its status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["limbeck", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
