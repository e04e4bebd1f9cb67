"""Killing the builder of a cache: what comes in the end is what an undisturbed build makes, bit for bit.

The recipe is the demo on docstrings with hidden terms. Each time the builder is killed at a random moment of its
work (SIGKILL), and started again; at the end everything is compared, and verified.

    python benchmarks/building.py [--kills 20]
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

import torch

from limbeck.cache import Store, read_manifest, verify

TERMS = ["terms.hidden.tap=layers", "terms.hidden.loss=mse", "terms.hidden.map=last"]


def command(place, out):
    recipe = resources.files("limbeck") / "recipes" / "demo-docstrings.yaml"
    changes = [*TERMS, f"store={place / 'store'}", "teacher.training.steps=20", "cache.shard_mib=1"]
    changes += ["training.batch_size=8"]
    sets = [word for change in changes for word in ("--set", change)]
    return [sys.executable, "-m", "limbeck", "cache", "build", str(recipe), "--out", str(out), *sets]


def content(folder):
    store = Store(read_manifest(folder), folder)
    keys = {key for shard in store.shards.values() for key in shard.keys}
    found = ((key, tap, parts) for key in keys for tap, parts in store.parts([key], sorted(store.taps())).items())
    return {(key, tap, name): tensor.clone() for key, tap, parts in found for name, tensor in parts.items()}


def shards(folder):
    return len(list(folder.glob("*.safetensors")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    place = Path(tempfile.mkdtemp())
    subprocess.run(command(place, place / "first"), check=True, capture_output=True)  # fine-tunes the teacher
    start = time.perf_counter()
    subprocess.run(command(place, place / "whole"), check=True, capture_output=True)
    seconds = time.perf_counter() - start
    print(f"an undisturbed build: {seconds:.1f} s, {shards(place / 'whole')} shards")
    whole, done, identical, early = content(place / "whole"), 0, 0, 0
    while done < arguments.kills:
        killed = place / "killed"
        process = subprocess.Popen(command(place, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.3, 1.0) * seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            early += not shards(killed)
        elif process.returncode:
            raise SystemExit("the builder failed")
        print(f"kill {done}: {shards(killed) if killed.exists() else 0} shards were whole")
        if process.returncode == 0 or done == arguments.kills:
            subprocess.run(command(place, killed), check=True, capture_output=True)
            ours, wrong = content(killed), verify(killed)
            same = ours.keys() == whole.keys() and all(torch.equal(ours[k], whole[k]) for k in whole)
            identical += same and not wrong
            print(f"  built to the end: identical {same}, damaged {wrong or 'nothing'}")
            shutil.rmtree(killed)
    print(f"{done} kills, {early} of them before any shard; {identical} builds ended identical")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
