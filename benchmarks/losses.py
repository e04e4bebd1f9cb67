"""What a loss costs, forward and backward, against the fastest other project that computes the same.

The pairs are those of tests/oracles, in float32 on one thread of a CPU. Ours and theirs take turns; a round's
figure is the quotient of their times (CPU time, which other processes disturb less), and the median of the rounds
is shown. Memory is the peak of what PyTorch allocates in one step.

    KERAS_BACKEND=torch PYTHONPATH=. .venv-oracles/bin/python benchmarks/losses.py [--only dist] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tests.oracles import from_language, from_others, from_torchdistill  # noqa: F401  (they register their pairs)
from tests.oracles.pairs import PAIRS, version_of

SHAPES = {
    "logits": (64, 1000),
    "tokens": (8, 128, 8192),
    "vectors": (128, 512),
    "hidden": (16, 128, 384),
    "hidden pairs": (2, 16, 128, 384),
    "maps": (16, 128, 28, 28),
    "map pairs": (2, 16, 128, 28, 28),
    "attention": (8, 12, 128, 128),
    "scores": (64, 32),
}
AIM = 1.1
LEAST = 0.03
"""Seconds that a side takes in a round, at least."""


def step(function, student, teacher):
    student.grad = None
    function(student, teacher).sum().backward()


def seconds(function, inputs, times):
    start = time.process_time()
    for _ in range(times):
        step(function, *inputs)
    return (time.process_time() - start) / times


def peak_megabytes(function, inputs):
    """The most that is allocated at once beyond the inputs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(function, *inputs)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most / 2**20


def compared(pair, rounds):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn((2, *SHAPES[pair.kind]), generator=generator)
    inputs = (student.requires_grad_(), teacher)
    functions = pair.make()
    warm = [seconds(function, inputs, 2) for function in functions]
    times = [max(1, int(LEAST / max(once, 1e-6))) for once in warm]
    found = [[], []]
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 else (1, 0):
            found[side].append(seconds(functions[side], inputs, times[side]))
    ratio = statistics.median(a / b for a, b in zip(*found, strict=True))
    memory = [peak_megabytes(function, inputs) for function in functions]
    return {
        "loss": pair.loss,
        "oracle": f"{pair.oracle} {version_of(pair.oracle)}",
        "case": pair.make.__name__,
        "shape": list(SHAPES[pair.kind]),
        "ratio": ratio,
        "milliseconds": [1000 * statistics.median(side) for side in found],
        "peak_megabytes": memory,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", help="names of losses")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print(
        f"{'loss':<24}{'case':<34}{'oracle':<30}{'ours ms':>9}{'theirs':>9}{'ratio':>7}{'ours MB':>9}{'theirs':>8}"
    )
    for pair in sorted(PAIRS, key=lambda pair: pair.loss):
        if (
            not pair.timed
            or version_of(pair.oracle) is None
            or (arguments.only and pair.loss not in arguments.only)
        ):
            continue
        found = compared(pair, arguments.rounds)
        results.append(found)
        (mine, other), (used, theirs) = found["milliseconds"], found["peak_megabytes"]
        slow = "  slower" if found["ratio"] > AIM else ""
        print(
            f"{found['loss']:<24}{found['case']:<34}{found['oracle']:<30}{mine:>9.2f}{other:>9.2f}"
            f"{found['ratio']:>7.2f}{used:>9.1f}{theirs:>8.1f}{slow}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
