"""What remembering a teacher saves: epochs with a live teacher, from the cache, and of the student alone.

The pair of texts is a BERT of 6 layers and one of 3, width 384, on texts of mixed lengths; that of images a
ResNet-34 and a much smaller network, on images of 64 x 64. All kinds take the same batches, in turn. The student
alone learns the labels; with hidden terms, it has them too, with targets that lie in memory.

    python benchmarks/cache.py [--rounds 3] [--examples 512] [--hidden] [--images]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from limbeck import Callback, Distiller, Examples, Settings, Term, fit
from limbeck.tasks.text import Padding
from limbeck.teachers import Cached, ModuleTeacher
from limbeck.types import Signal

EPOCHS = (1, 3, 5, 10)
COPIES = 8


def bert(layers, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 8000}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes))


def residual(depths, widths, seed):
    torch.manual_seed(seed)
    sizes = {"depths": depths, "hidden_sizes": widths, "embedding_size": widths[0], "layer_type": "basic"}
    config = ResNetConfig(num_channels=3, num_labels=10, downsample_in_first_stage=False, **sizes)
    return ResNetForImageClassification(config)


def texts(count):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 96, (count,), generator=generator).tolist()
    tokens = [torch.randint(5, 8000, (n,), generator=generator).numpy() for n in lengths]
    items = [
        {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": i % 2, "example_id": i}
        for i, ids in enumerate(tokens)
    ]
    return Examples(items, Padding(0), lengths)


def images(count):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 64, 64, generator=generator)
    return Examples([{"pixel_values": x, "labels": torch.tensor(i % 10)} for i, x in enumerate(pixels)])


def text_terms(hidden):
    pairs = enumerate((1, 3, 5)) if hidden else ()
    taps = "bert.encoder.layer.{}"
    return [Term(taps.format(s), taps.format(t), loss="mse", name=f"hidden.{s}") for s, t in pairs]


def image_terms(hidden):
    taps = [f"resnet.encoder.stages.{i}" for i in range(4)] if hidden else []
    return [Term(tap, loss="mse", project="conv1x1", name=tap) for tap in taps]


class Watch(Callback):
    """Notes when each epoch ended."""

    def __init__(self, steps):
        self.steps, self.times = steps, []

    def on_start(self, state):
        """Start the clock."""
        self.last = time.perf_counter()

    def on_step(self, state):
        """Stop it at the end of an epoch."""
        if state.step % self.steps == 0:
            now = time.perf_counter()
            self.times.append(now - self.last)
            self.last = now


class AtHand:
    """A teacher whose answers lie in memory: some copies of each shape, in turn, so that they come from there."""

    def __init__(self, teacher):
        self.teacher, self.known, self.turn = teacher, {}, 0

    def offers(self, tap):
        """See `limbeck.teachers.Teacher`."""
        return self.teacher.offers(tap)

    def names(self):
        """See there."""
        return self.teacher.names()

    def signal(self, batch, wants):
        """Compute once for each shape, and copy what is the turn's."""
        shape = tuple(next(v for v in batch.values() if v.ndim > 1).shape)
        if shape not in self.known:
            said = self.teacher.signal(batch, wants).values
            self.known[shape] = [{tap: v.clone() for tap, v in said.items()} for _ in range(COPIES)]
        self.turn += 1
        chosen = self.known[shape][self.turn % COPIES]
        return Signal({tap: value.clone() for tap, value in chosen.items()})


def epochs(kind, pair, teacher, hidden, folder):
    """Seconds of each of two epochs; what is at hand is made in a first one, which does not count."""
    live = ModuleTeacher(copy.deepcopy(teacher))
    own = [Term("labels", loss="cross_entropy", weight=0.5)]
    chosen = [Term("logits", loss="forward_kl", temperature=2.0), *own, *pair.terms(hidden)]
    source = {"live": live, "cached": Cached(live, folder), "student": AtHand(live) if hidden else None}[kind]
    student = pair.student()
    watch = Watch(len(pair.data) // 32)
    for _ in range(2 if kind == "student" and hidden else 1):
        watch.times.clear()
        settings = Settings(epochs=2, batch_size=32, log_every=1000)
        distiller = Distiller(student, source, own if source is None else chosen)
        fit(distiller, pair.data, settings=settings, callbacks=[watch])
    if kind == "cached":
        distiller.keep()
        watch.bytes = source.store.nbytes()
    return watch


@dataclass
class Pair:
    """What is distilled, and on what."""

    data: Any
    teacher: Any
    student: Any
    terms: Any


def pair_of(arguments):
    if arguments.images:
        teacher, student = (
            residual([3, 4, 6, 3], [64, 128, 256, 512], 0),
            lambda: residual([1] * 4, [32, 64, 128, 256], 1),
        )
        return Pair(images(arguments.examples), teacher, student, image_terms)
    return Pair(texts(arguments.examples), bert(6, 0), lambda: bert(3, 1), text_terms)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--hidden", action="store_true", help="three hidden terms beside the logits")
    parser.add_argument("--images", action="store_true", help="images, and a much larger teacher")
    arguments = parser.parse_args()
    pair = pair_of(arguments)
    seconds = {"live": [], "first": [], "later": [], "student": []}
    for number in range(arguments.rounds):
        for kind in ("live", "cached", "student") if number % 2 else ("student", "cached", "live"):
            with tempfile.TemporaryDirectory() as folder:
                watch = epochs(kind, pair, pair.teacher, arguments.hidden, Path(folder) / "c")
            if kind == "cached":
                for epoch, found in zip(("first", "later"), watch.times, strict=True):
                    seconds[epoch].append(found)
                kept = watch.bytes
            else:
                seconds[kind] += watch.times
        print(f"round {number}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()), flush=True)
    print(f"{kept:,} bytes are kept of {arguments.examples} examples, {kept / arguments.examples:,.0f} each")
    middle = {kind: statistics.median(found) for kind, found in seconds.items()}
    print(f"a step of the student alone over one with the teacher: {middle['student'] / middle['live']:.3f}x")
    print(f"a step from the cache over one of the student alone: {middle['later'] / middle['student']:.3f}x")
    print("epochs | cached run / live run | limit (one epoch with the teacher)")
    for count in EPOCHS:
        run = middle["first"] + (count - 1) * middle["later"]
        limit = middle["live"] + (count - 1) * middle["student"]
        print(f"{count:6} | {run / (count * middle['live']):.3f}x | {limit / (count * middle['live']):.3f}x")


if __name__ == "__main__":
    main()
