"""A small distillation through TextBrewer's door, to be launched on several ranks.

python brewing.py FOLDER --ranks N
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import limbeck.compat.textbrewer as textbrewer
from limbeck.train.checkpoint import save_weights
from tests.brewing import Tagger, adaptor, match, teacher, tensors


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    assert world == arguments.ranks
    local_rank = -1 if world == 1 else rank
    config = textbrewer.TrainingConfig(output_dir=arguments.folder, device="cpu", local_rank=local_rank)
    matches = [match("cos", proj=["linear", 8, 12])]
    distil = textbrewer.DistillationConfig(intermediate_matches=matches)
    model = teacher(width=12).requires_grad_(False)
    student = Tagger(dropout=0.0)
    adapt = adaptor("logits", "hidden")
    torch.manual_seed(0)
    distiller = textbrewer.GeneralDistiller(config, distil, model, student, adapt, adapt)
    data = TensorDataset(*tensors())
    loader = DataLoader(data, 8 // world, sampler=DistributedSampler(data, world, rank, shuffle=False))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    steps = []
    with distiller:
        distiller.train(optimizer, loader, 2, callback=lambda model, step: steps.append(step), max_grad_norm=1.0)
    assert steps == [3, 6]
    save_weights(distiller.projs[0], arguments.folder / f"projection-{rank}.safetensors")


if __name__ == "__main__":
    main()
