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
    training = ["--steps", steps, "--dropout", 0.1, "--best", "--ranks", 1]
    command = [sys.executable, str(WORKER), out, "--folder", folder, *training]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(folder):
    """The step of the newest checkpoint, 0 without any."""
    return max((int(p.name.removeprefix("step-")) for p in folder.glob("step-????????")), default=0)


def kill_somewhere(out, folder, steps, generator):
    """Let a training write a checkpoint or more, and kill it at a random moment of what follows."""
    process, before = start(out, folder, steps), newest(folder)
    while newest(folder) == before and process.poll() is None:
        time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.4))
    process.kill()
    process.wait()
    return newest(folder)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    place = Path(tempfile.mkdtemp())
    assert start(place / "whole.safetensors", place / "whole", arguments.steps).wait() == 0
    whole = load_file(place / "whole.safetensors")
    same = 0
    for number in range(arguments.times):
        out, folder = place / f"{number}.safetensors", place / str(number)
        kills = [kill_somewhere(out, folder, arguments.steps, generator) for _ in range(generator.randint(1, 3))]
        assert start(out, folder, arguments.steps).wait() == 0
        resumed = load_file(out)
        equal = all(torch.equal(whole[name], resumed[name]) for name in whole)
        same += equal
        print(f"run {number}: killed after checkpoints {kills}, {'identical' if equal else 'DIFFERENT'}")
    print(f"{same} of {arguments.times} bit-identical")


if __name__ == "__main__":
    main()
