"""Two ranks fill a contrastive memory; rank 0 prints what both remember. Started by tests/test_memory_ranks.py."""

import sys

import torch
from torch import distributed
from torch.multiprocessing import spawn

from limbeck.projectors.memory import ContrastiveMemory, everywhere

EXAMPLES, WIDTH = 10, 4


def features(offset):
    return torch.arange(EXAMPLES * WIDTH, dtype=torch.float32).view(EXAMPLES, WIDTH).sin() + offset


def remembered(ids):
    torch.manual_seed(0)
    memory = ContrastiveMemory(examples=EXAMPLES, negatives=3, width=None)
    memory.size(torch.Size([2, WIDTH]), torch.Size([2, WIDTH]))
    torch.manual_seed(len(ids))
    memory.ratios(features(0.1)[ids], features(0.7)[ids], ids)
    return memory


def work(rank, port):
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ids = torch.tensor([1, 4, 7] if rank == 0 else [2, 9])
    together = everywhere(ids)
    memory = remembered(ids)
    banks = torch.stack([memory.student_bank, memory.teacher_bank])
    other = [torch.empty_like(banks) for _ in range(2)]
    distributed.all_gather(other, banks)
    norms = [torch.empty(2) for _ in range(2)]
    distributed.all_gather(norms, memory.normalizers)
    if rank == 0:
        torch.save({"ids": together, "banks": other, "normalizers": norms}, sys.argv[2])
    distributed.destroy_process_group()


if __name__ == "__main__":
    spawn(work, (int(sys.argv[1]),), nprocs=2)
