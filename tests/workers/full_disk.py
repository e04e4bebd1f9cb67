"""A training whose files may not grow any more after its second step: python full_disk.py FOLDER."""

import resource
import sys

import torch
from torch import nn

from limbeck import Callback, Distiller, Settings, Term, fit


class NoRoom(Callback):
    def on_step(self, state):
        if state.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


data = [{"input": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(32)]
student = nn.Sequential(nn.Linear(4, 9000), nn.Linear(9000, 2))
settings = Settings(batch_size=8, steps=8, checkpoint_every=2, evaluate_every=2, best=True)
try:
    fit(
        Distiller(student, None, [Term("labels", loss="cross_entropy")]),
        data,
        data,
        settings,
        callbacks=[NoRoom()],
        folder=sys.argv[1],
    )
except OSError as error:
    print(error.strerror)
