"""What does each part of a preset do? The preset whole, and again with one part changed, task by task.

All variants of a task have the same fine-tuned teacher, the same seeds and, but for the two that say otherwise, as
many updates. Scores are of the validation sets of DIR: give rows of the training data that nothing else is judged
by (`benchmarks/split_glue.py`). Differences are paired over examples and seeds.

    python benchmarks/ablation.py --data DIR --teacher MODEL --pretrained MODEL --out FOLDER [--tasks cola,stsb]
        [--preset best] [--layers 1,3,5] [--set training.steps=600] [--seeds 1] [--only whole,no_copies]

MODEL is a folder or hub id, and the teacher's may hold {task}; `--pretrained` is the model from before. What is
finished in FOLDER is loaded; several processes may each take some of the variants.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import limbeck
from limbeck import take_layers
from limbeck.plan import Observer
from limbeck.recipe import Recipe, set_value
from limbeck.run import REPORT, RESAMPLES
from limbeck.tasks import is_regression, make_task, reads_texts

WHOLE = "whole"


def without(*names):
    def change(content, options):
        content["terms"] = {k: v for k, v in content["terms"].items() if k not in names}

    return change


def temperature(value):
    def change(content, options):
        if "temperature" in content["terms"]["kd"]:
            content["terms"]["kd"]["temperature"] = value

    return change


def longer(times):
    def change(content, options):
        content["training"]["steps"] = round(times * content["training"]["steps"])

    return change


def student(**parts):
    def change(content, options):
        content["student"].update(parts)

    return change


def before_fine_tuning(content, options):
    """The same layers of the pretrained model, with a new head."""
    task = make_task(Recipe.parse(content).task)
    layers = content["student"].pop("layers")
    folder = options.out / "pretrained" / task.name.replace("/", "-")
    if not (folder / "config.json").exists():
        loaded = task.load(options.pretrained)
        take_layers(loaded.model, layers).save_pretrained(folder)
        loaded.processor.save_pretrained(folder)
    content["student"]["model"] = str(folder)


def random_weights(content, options):
    """Nothing is frozen then: random token vectors would stay random."""
    layers = content["student"].pop("layers")
    content["student"].update(config={"num_hidden_layers": len(layers)}, freeze_embeddings=False)


def with_baseline(content, options):
    """The baseline is the student's twin: what comes of the same start without a teacher."""
    content["baseline"] = True
    content["baseline_training"] = {"learning_rate": options.plain_rate}


VARIANTS = {
    WHOLE: ("the preset", with_baseline),
    "no_teacher": ("labels alone, the same start: the baseline", None),
    "pretrained": ("start: the same layers before fine-tuning", before_fine_tuning),
    "random": ("start: random weights", random_weights),
    "no_layers": ("no terms between layers", without("hidden")),
    "no_labels": ("no term on labels", without("labels")),
    "cool": ("temperature 1", temperature(1.0)),
    "hot": ("temperature 8", temperature(8.0)),
    "no_copies": ("no altered copies", lambda content, options: content.update(extra=None)),
    "half": ("half the updates", longer(0.5)),
    "double": ("twice the updates", longer(2)),
    "dropout": ("the student's dropout left on", student(dropout=None)),
    "embeddings": ("token vectors trained too", student(freeze_embeddings=False)),
}


def content_of(options, task):
    """The preset's recipe for a task, with everything spelled out."""
    source = {
        "preset": options.preset,
        "task": {"name": f"glue/{task}", "data": str(options.data)},
        "teacher": options.teacher.replace("{task}", task),
        "student": {"layers": [int(each) for each in options.layers.split(",")]},
        "baseline": False,
        "seeds": options.seeds,
        "store": str(options.out / "store"),
    }
    for change in options.changes:
        set_value(source, change)
    recipe = Recipe.parse(source)
    made = make_task(recipe.task)
    return {**recipe.resolved(is_regression(made), reads_texts(made)).model_dump(mode="json"), "preset": None}


def run(options, task, name):
    """Run a variant, if it is not there, and give the resamples of its score."""
    _, change = VARIANTS[name]
    role = "student"
    if change is None:
        name, role = WHOLE, "baseline"
        _, change = VARIANTS[WHOLE]
    folder = options.out / task / name
    if not (folder / REPORT).is_file():
        content = content_of(options, task)
        change(content, options)
        limbeck.distill(content, folder, observer=Observer())
    drawn = load_file(folder / RESAMPLES)
    return 100 * drawn[role], 100 * drawn["teacher"]


def cell(drawn, whole):
    """A score and how it differs from that of the whole preset, with the 95 % interval of the difference."""
    if drawn is whole:
        low, high = np.quantile(drawn[1:], [0.025, 0.975])
        return f"{drawn[0]:.1f} [{low:.1f}, {high:.1f}]"
    difference = drawn - whole
    low, high = np.quantile(difference[1:], [0.025, 0.975])
    return f"{drawn[0]:.1f} ({difference[0]:+.1f} [{low:+.1f}, {high:+.1f}])"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="cola,stsb")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--layers", default="1,3,5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plain-rate", type=float, default=1e-4, help="the baseline's learning rate")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", default=",".join(VARIANTS), help="some of: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    tasks, names = options.tasks.split(","), options.only.split(",")
    print("| variant |", " | ".join(tasks), "|")
    print("|---" * (1 + len(tasks)) + "|")
    for name in names:
        cells = []
        for task in tasks:
            whole, teacher = run(options, task, WHOLE)
            drawn = whole if name == WHOLE else run(options, task, name)[0]
            cells.append(cell(drawn, whole) + (f", teacher {teacher[0]:.1f}" if name == WHOLE else ""))
        print(f"| {VARIANTS[name][0]} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
