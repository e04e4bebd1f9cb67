"""What searches in tests are made of: a network that can kill its process, and a search that is killed."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from limbeck.plan import Observer
from limbeck.search import search
from limbeck.tasks.image import fresh_resnet
from limbeck.train import Callback


def deadly(task, *, mark, widths=(4, 8)):
    """A small network; the first further process that makes a second one, for a trial, is killed."""
    own = Path(f"{mark}-{os.getpid()}")
    if multiprocessing.parent_process() is not None and own.exists() and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    own.touch()
    return fresh_resnet(task, widths=list(widths), depth=1)


def picky(task, *, width, depth):
    """A small network that refuses two values which are each possible alone."""
    if (width, depth) == (8, 2):
        raise ValueError("a network that is 8 wide is 1 deep")
    return fresh_resnet(task, widths=[4, width], depth=depth)


def digits(place, **changes):
    """A small search on images that come with scikit-learn."""
    network = "limbeck.tasks.image:fresh_resnet"
    return {
        "task": {"name": "digits", "train_examples": 80, "eval_examples": 32},
        "teacher": {"model": network, "options": {"widths": [8, 16], "depth": 1}, "training": {"steps": 2}},
        "student": {"model": network, "options": {"widths": [4, 8], "depth": 1}},
        "training": {"steps": 10, "batch_size": 16},
        "store": str(place / "store"),
        "search": {"training.learning_rate": "loguniform(1e-4, 1e-2)"},
        **changes,
    }


class Killer(Callback):
    """Kills the process after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KillsTrial(Observer):
    """Kills the process in its second trial, behind the second checkpoint."""

    def callbacks(self, stage):
        return [Killer(5)] if stage == "trial 1" else []


if __name__ == "__main__":
    place = Path(sys.argv[1])
    search(digits(place), place / "killed", trials=3, proof=False, observer=KillsTrial())
