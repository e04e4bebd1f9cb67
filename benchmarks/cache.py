"""What remembering a teacher saves: epochs with a live teacher, from the cache, and of the student alone.

The pair is a BERT of 6 layers and one of 3, width 384, on texts of mixed lengths. All kinds take the same batches.

    python benchmarks/cache.py [--rounds 3] [--examples 512] [--hidden]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from limbeck import Callback, Distiller, Examples, Settings, Term, fit
from limbeck.cache import Store
from limbeck.tasks.text import Padding
from limbeck.teachers import Cached, ModuleTeacher

EPOCHS = (1, 3, 5, 10)


def model(layers, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 8000}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes))


def data(count):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 96, (count,), generator=generator).tolist()
    tokens = [torch.randint(5, 8000, (n,), generator=generator).numpy() for n in lengths]
    items = [
        {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": i % 2, "example_id": i}
        for i, ids in enumerate(tokens)
    ]
    return items, lengths


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


def terms(hidden):
    found = [Term("logits", loss="forward_kl", temperature=2.0), Term("labels", loss="cross_entropy", weight=0.5)]
    pairs = enumerate((1, 3, 5)) if hidden else ()
    taps = "bert.encoder.layer.{}"
    return [*found, *(Term(taps.format(s), taps.format(t), loss="mse", name=f"hidden.{s}") for s, t in pairs)]


def epochs(kind, teacher, examples, hidden, folder):
    """Seconds of each of two epochs."""
    chosen = terms(hidden)
    live = ModuleTeacher(teacher)
    source = {"live": live, "cached": Cached(live, Store({}, folder)), "student": None}[kind]
    chosen = chosen if source is not None else [t for t in chosen if t.reads_labels]
    watch = Watch(len(examples) // 32)
    settings = Settings(epochs=2, batch_size=32, log_every=1000)
    fit(Distiller(model(3, 1), source, chosen), examples, settings=settings, callbacks=[watch])
    return watch.times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--hidden", action="store_true", help="three hidden terms beside the logits")
    arguments = parser.parse_args()
    items, lengths = data(arguments.examples)
    examples = Examples(items, Padding(0), lengths)
    teacher = model(6, 0)
    seconds = {"live": [], "first": [], "later": [], "student": []}
    for number in range(arguments.rounds):
        for kind in ("live", "cached", "student") if number % 2 else ("student", "cached", "live"):
            with tempfile.TemporaryDirectory() as folder:
                first, second = epochs(
                    kind, copy.deepcopy(teacher), examples, arguments.hidden, Path(folder) / "c"
                )
            if kind == "cached":
                seconds["first"].append(first)
                seconds["later"].append(second)
            else:
                seconds[kind] += [first, second]
        print(f"round {number}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()))
    middle = {kind: statistics.median(found) for kind, found in seconds.items()}
    print(f"a step from the cache over one of the student alone: {middle['later'] / middle['student']:.3f}x")
    print("epochs | cached run / live run | limit (one epoch with the teacher)")
    for count in EPOCHS:
        run = middle["first"] + (count - 1) * middle["later"]
        limit = middle["live"] + (count - 1) * middle["student"]
        print(f"{count:6} | {run / (count * middle['live']):.3f}x | {limit / (count * middle['live']):.3f}x")


if __name__ == "__main__":
    main()
