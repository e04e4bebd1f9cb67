"""A small training on two tasks in a process of its own, to be launched on several ranks.

python tasks.py OUT.safetensors [--accumulation N] [--kept]
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from limbeck import Distiller, Settings, Term, fit
from limbeck.cache import Store
from limbeck.students import Heads
from limbeck.teachers import ByTask, Cached, ModuleTeacher
from limbeck.train import Mixed
from limbeck.train.checkpoint import save_weights

FEATURES, CLASSES = 6, {"two": 2, "three": 3}


def examples(task, count):
    """Points and the side of planes that they lie on."""
    generator = torch.Generator().manual_seed(count)
    points = torch.randn(count, FEATURES, generator=generator)
    planes = torch.randn(FEATURES, CLASSES[task], generator=torch.Generator().manual_seed(CLASSES[task]))
    return [{"input": x, "labels": (x @ planes).argmax()} for x in points]


def data(two=37, three=21):
    return {"two": examples("two", two), "three": examples("three", three)}


def network(task, width, seed, dropout=0.0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Dropout(dropout))
    return nn.Sequential(body, nn.Linear(width, CLASSES[task]))


def student(dropout=0.0):
    return Heads({task: network(task, 5, seed, dropout) for seed, task in enumerate(CLASSES)}, body="0")


def teachers():
    return {task: network(task, 9, seed + 7) for seed, task in enumerate(CLASSES)}


def terms():
    """Of each task; the hidden one of `three` alone trains a projection; one term is for both."""
    return [
        Term("logits", loss="forward_kl", temperature=2.0, task="two", name="kd"),
        Term("logits", loss="reverse_kl", task="three", weight=0.7),
        Term("models.three.1", "0", loss="mse", project="linear", task="three", name="hidden"),
        Term("labels", loss="cross_entropy", weight=0.5),
    ]


def distiller(dropout=0.0, kept=False, **options):
    asked = teachers()
    if kept:
        asked = {task: Cached(ModuleTeacher(teacher), Store({})) for task, teacher in asked.items()}
    return Distiller(student(dropout), ByTask(asked), terms(), **options)


def train(trained, steps, accumulation=1):
    settings = Settings(
        batch_size=16,
        steps=steps,
        schedule="constant",
        accumulation=accumulation,
        learning_rate=1e-2,
        warmup=2,
        evaluate_every=4,
        log_every=3,
    )
    return fit(trained, Mixed(data(), tau=0.5), data(20, 20), settings)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--kept", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained = distiller(kept=arguments.kept)
    result = train(trained, 7, arguments.accumulation)
    assert Accelerator().num_processes == 2
    os.write(1, f"{sorted(result.scores)} {result.history}\n".encode())
    if int(os.environ.get("RANK", "0")) == 0:
        save_weights(trained, arguments.out)


if __name__ == "__main__":
    main()
