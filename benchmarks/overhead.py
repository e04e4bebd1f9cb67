"""What limbeck adds to a step, against a plain hand-written loop that does the same work.

Teacher BERT 6 x 384, student 3 x 384, batch 32, length 128; KL at T = 4, three hidden MSEs and cross-entropy,
AdamW, clipping. Both take turns in one process; a round's figure is the median of its steps.

    python benchmarks/overhead.py [--rounds 7] [--steps 6] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import BertConfig, BertForSequenceClassification

from limbeck import Callback, Distiller, Settings, Term, fit, take_layers

BATCH, LENGTH, CLASSES, TEMPERATURE = 32, 128, 3, 4.0
PAIRS = ((0, 1), (1, 3), (2, 5))
WARMUP = 2


def models():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    teacher = BertForSequenceClassification(config).eval()
    return teacher, take_layers(teacher, [1, 3, 5])


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(5, 30522, (BATCH, LENGTH), generator=generator),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
            "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
        }
        for _ in range(count)
    ]


def by_hand(teacher, student, data):
    """The loop that one writes in an afternoon; returns seconds per step and the losses."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5)
    student.train()
    times, losses = [], []
    for batch in data:
        start = time.perf_counter()
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            t = teacher(**inputs, output_hidden_states=True)
        s = student(**inputs, output_hidden_states=True)
        kl = F.kl_div(
            F.log_softmax(s.logits / TEMPERATURE, -1),
            F.log_softmax(t.logits / TEMPERATURE, -1),
            log_target=True,
            reduction="batchmean",
        )
        hidden = sum(F.mse_loss(s.hidden_states[i + 1], t.hidden_states[j + 1]) for i, j in PAIRS)
        hard = F.cross_entropy(s.logits, batch["labels"])
        loss = 0.7 * TEMPERATURE**2 * kl + 0.1 * hidden + 0.2 * hard
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return times, losses


class Stopwatch(Callback):
    """Time from one step's end to the next, everything that limbeck does in between included."""

    def __init__(self):
        self.times, self.losses = [], []
        self.last = 0.0

    def on_start(self, state):
        """Start the watch."""
        self.last = time.perf_counter()

    def on_step(self, state):
        """Take a lap."""
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.losses.append(state.loss)
        self.last = now


def by_limbeck(teacher, student, data):
    """The same work through `limbeck.fit`."""
    terms = [Term("logits", loss="forward_kl", temperature=TEMPERATURE, weight=0.7, name="kd")]
    terms += [Term(f"bert.encoder.layer.{i}", f"bert.encoder.layer.{j}", loss="mse", weight=0.1) for i, j in PAIRS]
    terms.append(Term("labels", loss="cross_entropy", weight=0.2))
    settings = Settings(batch_size=1, steps=len(data), schedule="constant", warmup=0, log_every=1, bucket=False)
    watch = Stopwatch()
    fit(Distiller(student, teacher, terms), _InOrder(data), settings=settings, callbacks=[watch])
    return watch.times, watch.losses


class _InOrder(torch.utils.data.DataLoader):
    """A loader that hands out ready batches in order, as the hand-written loop gets them."""

    def __init__(self, data):
        super().__init__(data, batch_size=None, shuffle=False)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    teacher, start = models()
    data = batches(WARMUP + arguments.steps)
    ratios, rows = [], []
    for number in range(arguments.rounds):
        runs = {"hand": by_hand, "limbeck": by_limbeck}
        order = list(runs) if number % 2 == 0 else list(reversed(runs))
        found = {name: runs[name](teacher, copy.deepcopy(start), data) for name in order}
        first = {name: losses[0] for name, (_, losses) in found.items()}
        assert abs(first["hand"] - first["limbeck"]) < 1e-5, f"not the same work: {first}"
        seconds = {name: statistics.median(times[WARMUP:]) for name, (times, _) in found.items()}
        ratios.append(seconds["limbeck"] / seconds["hand"])
        rows.append(seconds)
        shown = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
        print(f"round {number}: {shown}, {ratios[-1]:.3f}x")
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"limbeck / hand-written: median {statistics.median(ratios):.3f}x, quartiles {low:.3f} to {high:.3f}")
    print(f"{arguments.rounds} rounds of {arguments.steps} steps, {torch.get_num_threads()} threads")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ratios": ratios, "seconds": rows}, indent=1))


if __name__ == "__main__":
    main()
