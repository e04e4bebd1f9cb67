"""How fast the store reads and writes, against `torch.cat` of the same pieces in memory and plain inference.

Reading: random batches from shards on disk (in the page cache), interleaved with `torch.cat` of the very same
pieces held in memory; the ratio of two is that of their bandwidths. Building: a MiniLM-like encoder over texts of
mixed lengths whose signals are kept in a new folder: the whole time over that of the inference in it.

    python benchmarks/store.py [read] [build] [--rounds 100] [--examples 256]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from limbeck.cache import Dense, Store, TopKForm, example_keys, kept_by
from limbeck.teachers import Cached, ModuleTeacher
from limbeck.types import TopK

VOCABULARY = 151_936


def key(number):
    return number.to_bytes(12, "little")


def fill(folder, form, count, make, length=None, at_once=64):
    """A store on disk, opened anew, of `count` examples."""
    store = Store({"teacher": "a"}, folder)
    for start in range(0, count, at_once):
        keys = [key(i) for i in range(start, start + at_once)]
        mask = None if length is None else torch.ones(at_once, length)
        store.put(keys, {"tap": kept_by(form, make(at_once), mask, keys, given=True)})
    store.flush()
    return Store({"teacher": "a"}, folder)


def given_top_k(examples, tokens=512, k=32):
    values = torch.randn(examples, tokens, k).sort(-1, descending=True).values
    ids = torch.randint(VOCABULARY, (examples, tokens, k))
    return TopK(ids, VOCABULARY, (1.0,), values, torch.randn(examples, tokens, 1))


def flat(value):
    """The tensors of what was read."""
    if isinstance(value, dict):
        return list(value.values())
    return [value.ids, value.values, value.log_rest] if isinstance(value, TopK) else [value]


def compare(name, read, count, size, rounds):
    """Interleaved medians of a read and of `torch.cat` of the same pieces."""
    pieces = [[t.clone() for t in flat(read([key(i)]))] for i in range(count)]
    nbytes = size * sum(t.nbytes for t in pieces[0])
    seconds = {"store": [], "cat": []}
    chooser = random.Random(0)
    for _ in range(rounds):
        chosen = [chooser.randrange(count) for _ in range(size)]
        keys, columns = [key(i) for i in chosen], list(zip(*(pieces[i] for i in chosen), strict=True))
        start = time.perf_counter()
        found = read(keys)
        middle = time.perf_counter()
        expected = [torch.cat(column) for column in columns]
        end = time.perf_counter()
        seconds["store"].append(middle - start)
        seconds["cat"].append(end - middle)
    assert all(torch.equal(a, b) for a, b in zip(flat(found), expected, strict=True))
    store, cat = (statistics.median(found) for found in seconds.values())
    rates = f"{nbytes / store / 2**20:8,.0f} MiB/s | torch.cat {nbytes / cat / 2**20:8,.0f} MiB/s"
    print(f"{name:42} | {nbytes / 2**20:6.2f} MiB | {rates} | {cat / store:5.0%}", flush=True)


def reading(rounds):
    """Random batches of three kinds of signals."""
    print("what, examples in a batch | a batch | read | torch.cat | ratio of bandwidths")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        store = fill(folder / "a", Dense("fp32"), 1024, lambda n: torch.randn(n, 128, 384), 128)
        full = torch.ones(32, 128)
        for name, mask in (("masked", full), ("no mask", None)):
            what = f"hidden states 128 x 384 fp32, 32, {name}"
            compare(
                what, lambda k, m=mask: store.read(k, ["tap"], None if len(k) < 32 else m)["tap"], 1024, 32, rounds
            )
        tokens = fill(folder / "b", TopKForm(32), 1024, given_top_k, 512)
        compare("top-32 of 512 tokens, 16, as kept", lambda k: tokens.parts(k, ["tap"])["tap"], 1024, 16, rounds)
        compare("top-32 of 512 tokens, 16, decoded", lambda k: tokens.read(k, ["tap"])["tap"], 512, 16, rounds)
        rows = fill(folder / "c", Dense("fp16"), 65_536, lambda n: torch.randn(n, 1000))
        compare("1000 classes fp16, 256", lambda k: rows.read(k, ["tap"])["tap"], 65_536, 256, rounds)


def texts(count):
    """Batches of 32 token ids of mixed lengths, padded."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count // 32):
        lengths = torch.randint(16, 128, (32, 1), generator=generator)
        mask = (torch.arange(int(lengths.max())) < lengths).long()
        ids = torch.randint(5, 30_000, mask.shape, generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)})
    return batches


class Timed:
    """A teacher under a stopwatch, so that what keeping costs is measured in the very same run."""

    def __init__(self, teacher):
        self.teacher, self.seconds = teacher, 0.0
        self.offers, self.names, self.identity = teacher.offers, teacher.names, teacher.identity

    def signal(self, batch, wants):
        """What the teacher says."""
        start = time.perf_counter()
        found = self.teacher.signal(batch, wants)
        self.seconds += time.perf_counter() - start
        return found


def building(rounds, examples):
    """What keeping everything on disk costs beside inference, the last flush included."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30_522}
    teacher = Timed(ModuleTeacher(BertModel(BertConfig(num_hidden_layers=6, **sizes))))
    batches = texts(examples)
    start = time.perf_counter()
    for batch in batches:
        example_keys(batch)
    each = (time.perf_counter() - start) / len(batches)
    print(f"keys of 32 texts: {each * 1e3:.2f} ms a batch")
    hidden = [f"encoder.layer.{i}" for i in (1, 3, 5)]
    for wants in (["pooler_output"], ["pooler_output", *hidden]):
        found = [_build(teacher, batches, wants) for _ in range(rounds)]
        ratio = statistics.median(seconds / plain for seconds, plain in found)
        rounds_said = ", ".join(f"{seconds:.2f} s / {plain:.2f} s" for seconds, plain in found)
        print(f"building {len(wants)} taps: {ratio:.3f}x of inference ({rounds_said})", flush=True)


def _build(teacher, batches, wants):
    """Seconds of a build, and of the inference in it."""
    with tempfile.TemporaryDirectory() as place:
        ours = Cached(teacher, Path(place))
        teacher.seconds, start = 0.0, time.perf_counter()
        for batch in batches:
            ours.signal(batch, wants)
        ours.store.flush()
        return time.perf_counter() - start, teacher.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["read", "build"], help="read, build, or both")
    parser.add_argument("--rounds", type=int, default=100, help="batches to read; a build takes a 20th of it")
    parser.add_argument("--examples", type=int, default=256)
    arguments = parser.parse_args()
    if "read" in arguments.what:
        reading(arguments.rounds)
    if "build" in arguments.what:
        building(max(1, arguments.rounds // 20), arguments.examples)


if __name__ == "__main__":
    main()
