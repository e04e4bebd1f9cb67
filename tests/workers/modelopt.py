"""One step of a converted model in DistributedDataParallel; started by torch.distributed.run, or alone."""

import os
import sys

import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import limbeck.compat.modelopt as mtd


def network(channels, seed):
    """Images to 5 logits, without batch norm, which would see a part of the batch only."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def trained(rank, world):
    """All that trains, after three steps on a rank's part of the same 8 images."""
    torch.manual_seed(7)
    pairs = {("0", "0"): mtd.MGDLoss(4, 6, lambda_mgd=0.0), ("", ""): mtd.LogitsDistillationLoss(2.0)}
    config = {
        "teacher_model": network(6, 1),
        "criterion": pairs,
        "loss_balancer": mtd.StaticLossBalancer([0.5, 0.5]),
    }
    model = mtd.convert(network(4, 0), mode=[("kd_loss", config)])
    wrapped = DistributedDataParallel(model) if world > 1 else model
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(2)).chunk(world)[rank]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(images)
        model.compute_kd_loss().backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    save_file(trained(rank, distributed.get_world_size()), f"{sys.argv[1]}/{rank}.safetensors")
    distributed.destroy_process_group()
