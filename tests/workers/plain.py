"""A small training by steps of its own, to be launched on several ranks.

python plain.py OUT.safetensors --ranks N [--folder DIR] [--stop-at STEP]
"""

import argparse
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from limbeck.train import plain
from limbeck.train.checkpoint import save_weights


class StopAt(plain.Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise SystemExit(3)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stop-at", type=int, default=0)
    parser.add_argument("--ranks", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    assert world == arguments.ranks
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
    teacher = nn.Linear(4, 2)  # frozen, and outside of what trains
    student = nn.ModuleDict({"body": nn.Linear(4, 3), "head": nn.Linear(3, 2), "unused": nn.Linear(2, 2)})
    sampler = DistributedSampler(data, world, rank, shuffle=False)

    def step(batch, state):
        inputs, labels = batch
        logits = student["head"](student["body"](inputs))
        with torch.no_grad():
            wanted = teacher(inputs)
        return nn.functional.cross_entropy(logits, labels) + (logits - wanted).square().mean()

    if world > 1:
        with pytest.raises(ValueError, match=f"all {world} ranks would read the same data"):
            plain.Loop(step, student, DataLoader(data), torch.optim.SGD(student.parameters()), epochs=1).run()
    loop = plain.Loop(
        step,
        student,
        DataLoader(data, batch_size=8 // world, sampler=sampler),
        torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9),
        epochs=2,
        accumulation=3,
        clip=1.0,
        folder=arguments.folder,
        checkpoint_every=2,
        callbacks=[StopAt(arguments.stop_at)] if arguments.stop_at else [],
    )
    loop.run()
    if rank == 0:
        save_weights(student, arguments.out)


if __name__ == "__main__":
    main()
