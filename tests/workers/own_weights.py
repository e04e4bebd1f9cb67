"""Trainings on two ranks with a teacher on the student's weights, whole and interrupted.

python -m tests.workers.own_weights PORT FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

from limbeck import Distiller, Settings, fit
from limbeck.teachers import Average, WithoutAdapter
from tests.models import points
from tests.test_own_weights import KD, LABELS, SETTINGS, Adapted, InterruptAt, normed


def trained(kind, folder, stop_at=None):
    """The weights after a training; None if it was interrupted."""
    student = normed() if kind is Average else Adapted()
    teacher = kind(student)
    distiller = Distiller(student, teacher, [KD, LABELS])
    inputs, labels = points(24)
    data = [{"input": x, "features": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    settings = Settings(**{**SETTINGS.model_dump(), "batch_size": 6})
    try:
        fit(distiller, data, settings=settings, callbacks=[InterruptAt(stop_at)], folder=folder)
    except KeyboardInterrupt:
        return None
    mean = teacher.state()["weights"] if kind is Average else {}
    return {**student.state_dict(), **{f"mean {name}": weights for name, weights in mean.items()}}


def work(rank, port, folder):
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    )
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    for kind in (Average, WithoutAdapter):
        place = folder / kind.__name__
        whole = trained(kind, place / "whole")
        assert trained(kind, place / "cut", stop_at=3) is None
        resumed = trained(kind, place / "cut")
        torch.save([whole, resumed], place / f"rank-{rank}.pt")


if __name__ == "__main__":
    multiprocessing.spawn(work, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=2)
