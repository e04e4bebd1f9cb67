"""Rows of GLUE's training data to choose by, so that its validation sets stay untouched until the end.

Writes TASK/train.parquet and TASK/validation.parquet, both drawn from the training rows, duplicates left out. What
is measured on the CPU takes 20,000 rows of SST-2. With `--official` the training rows are the same, and the
validation set is GLUE's own: for the one last run.

    python benchmarks/split_glue.py --data DIR --out FOLDER [--official]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pandas as pd

TEXTS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "rte": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
}
HELD = {"cola": 1000, "sst2": 2000, "mrpc": 500, "stsb": 900, "rte": 400, "qnli": 2000}
MOST = {"sst2": 20000}
SEED = 7


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds TASK/train.parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--official", action="store_true")
    options = parser.parse_args()
    for task, columns in TEXTS.items():
        rows = pd.read_parquet(options.data / task / "train.parquet").sample(frac=1, random_state=SEED)
        rows = rows.reset_index(drop=True).drop_duplicates(columns)
        held, train = rows[: HELD[task]], rows[HELD[task] :][: MOST.get(task)]
        folder = options.out / task
        folder.mkdir(parents=True, exist_ok=True)
        train.to_parquet(folder / "train.parquet")
        if options.official:
            shutil.copy(options.data / task / "validation.parquet", folder)
        else:
            held.to_parquet(folder / "validation.parquet")
        print(f"{task}: {len(train)} rows to train on")


if __name__ == "__main__":
    main()
