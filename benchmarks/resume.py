"""Kill a training without warning at random steps, resume it, and compare the final weights bit for bit.

python benchmarks/resume.py [--times 20] [--steps 40]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent.parent / "tests" / "workers" / "train.py"


def start(out, folder, steps):
    command = [sys.executable, str(WORKER), out, "--folder", folder, "--steps", steps, "--dropout", 0.1, "--best"]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    place = Path(tempfile.mkdtemp())
    begun = time.perf_counter()
    assert start(place / "whole.safetensors", place / "whole", arguments.steps).wait() == 0
    whole, seconds = load_file(place / "whole.safetensors"), time.perf_counter() - begun
    same = 0
    for number in range(arguments.times):
        out, folder = place / f"{number}.safetensors", place / str(number)
        kills = 0
        while True:
            process = start(out, folder, arguments.steps)
            limit = generator.uniform(0.5, 1.1) * seconds if kills < 3 else None
            try:  # anywhere between the first step and the end, while a checkpoint is written included
                status = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                continue
            assert status == 0
            break
        resumed = load_file(out)
        equal = all(torch.equal(whole[name], resumed[name]) for name in whole)
        same += equal
        print(f"run {number}: killed {kills} times, {'identical' if equal else 'DIFFERENT'}")
    print(f"{same} of {arguments.times} bit-identical")


if __name__ == "__main__":
    main()
