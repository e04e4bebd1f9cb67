"""Which knowledge of a teacher helps a small image model: losses on logits, features and relations, side by side.

A teacher ResNet is trained once on a part of CIFAR-10. Students of the same family (a ResNet of a quarter of its
size) and of another one (a small vision transformer) then learn from a smaller part, from the labels alone or with
one loss beside them. All students of a family and seed start from the same weights, see the same images and take
the same number of steps. Weights of losses are those of the papers or of RepDistiller where it has them; none was
tuned here. The data is a lossy copy of CIFAR-10, so accuracies are not comparable with published ones.

Each run adds a line to OUT/runs.jsonl at its end; the same command goes on with those that are missing, and prints
the table of all that is there.

    python benchmarks/cifar.py --data ../shared/data/cifar10 [--out runs/cifar] [--seeds 2] [--on kd]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from limbeck import Distiller, Settings, Term, fit
from limbeck.losses import LOSSES
from limbeck.tasks import TaskOptions, make_task
from limbeck.terms import spread
from limbeck.train import predict

CLASSES = 10
STAGES = [f"stages.{i}" for i in range(3)]
EACH = [(i, i) for i in range(3)]


class Block(nn.Module):
    """Two convolutions with a way around them."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        around = nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        self.around = nn.Identity() if (channels_in, stride) == (channels, 1) else nn.Sequential(*around)

    def forward(self, maps):
        """Map (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        return torch.relu(self.body(maps) + self.around(maps))


class Layer(nn.Module):
    """A layer of a vision transformer on patches that lie in a grid, (B, D, H, W), as the maps of a ResNet do."""

    def __init__(self, width, heads):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, batch_first=True, norm_first=True)

    def forward(self, grid):
        """Map (B, D, H, W) to the same shape."""
        return self.inner(grid.flatten(2).mT).mT.unflatten(2, grid.shape[2:])


class Patches(nn.Module):
    """Patches of 4 x 4 pixels, each with a learned place."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(1, width, 8, 8))

    def forward(self, images):
        """Map (B, 3, 32, 32) to (B, D, 8, 8)."""
        return self.embed(images) + self.place


class Network(nn.Module):
    """Three stages, each a tap with maps (B, C, H, W); `pool` is a tap with one vector (B, C) for each image."""

    def __init__(self, stem, stages, width):
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images):
        """Logits (B, 10) of images (B, 3, 32, 32)."""
        maps = self.stem(images)
        for stage in self.stages:
            maps = stage(maps)
        return self.head(self.pool(maps))


def resnet(widths):
    """A ResNet with one block in each stage; its stem halves the image."""
    stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
    ends = zip([widths[0], *widths], widths, [1, 2, 2], strict=False)
    return Network(stem, [Block(*end) for end in ends], widths[-1])


def transformer(width=48, heads=4):
    """A vision transformer of three layers."""
    return Network(Patches(width), [Layer(width, heads) for _ in range(3)], width)


TEACHER = (32, 64, 128)
STUDENTS = {"resnet": lambda: resnet((16, 32, 64)), "transformer": transformer}


def at_stages(loss, weight, **arguments):
    """A term for each of the three stages."""
    return spread("stages.{}", "stages.{}", EACH, name=loss, loss=loss, weight=3 * weight, **arguments)


def hint(loss, weight, tap="stages.1", **options):
    """One term between maps, through a 1x1 convolution."""
    return [Term(tap, loss=loss, weight=weight, project="conv1x1", name=loss, **options)]


def between(loss, weight, tap="pool", **options):
    """One term between the vectors of a batch."""
    return [Term(tap, loss=loss, weight=weight, name=loss, **options)]


def logits(loss, weight, **options):
    """One term on the logits."""
    return [Term("logits", loss=loss, weight=weight, name=loss, **options)]


WARM = {"schedule": "warmup", "until": 0.25}

# Name: the losses that it needs, whether it reads logits, and what makes its terms for so many training examples.
METHODS = {
    "plain": ((), True, lambda examples: []),
    "KD, T 4": (("forward_kl",), True, lambda examples: logits("forward_kl", 1.0, temperature=4.0)),
    "DKD": (("dkd",), True, lambda examples: logits("dkd", WARM, alpha=1.0, beta=8.0, temperature=4.0)),
    "DIST": (("dist",), True, lambda examples: logits("dist", 2.0)),
    "FitNet hint": (("mse",), False, lambda examples: hint("mse", 100.0)),
    "AT": (("attention_transfer",), False, lambda examples: at_stages("attention_transfer", 1000.0)),
    "NST": (("nst",), False, lambda examples: at_stages("nst", 50.0)),
    "VID": (("vid",), False, lambda examples: at_stages("vid", 1.0, project="conv1x1")),
    "CWD": (("cwd",), False, lambda examples: hint("cwd", 1.0, "stages.2", temperature=4.0)),
    "ReviewKD": (
        ("hcl",),
        False,
        lambda examples: [Term(STAGES, loss="hcl", weight=1.0, project="abf", name="hcl")],
    ),
    "SP": (
        ("similarity_preserving",),
        False,
        lambda examples: between("similarity_preserving", 3000.0, "stages.2"),
    ),
    "RKD": (
        ("rkd_distance", "rkd_angle"),
        False,
        lambda examples: between("rkd_distance", 25.0) + between("rkd_angle", 50.0, normalize=False),
    ),
    "PKT": (("pkt",), False, lambda examples: between("pkt", 30000.0)),
    "CC": (("correlation_congruence",), False, lambda examples: between("correlation_congruence", 0.02)),
    "CRD": (
        ("crd",),
        False,
        lambda examples: between("crd", 0.8, memory={"examples": examples, "negatives": 1024}),
    ),
    "InfoNCE": (("infonce",), False, lambda examples: between("infonce", 1.0, project="linear")),
}


class Study:
    """The data, the teacher and the file of results."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        options = TaskOptions(
            name="image",
            data=arguments.data,
            train_examples=arguments.teacher_train,
            eval_examples=arguments.test,
        )
        task = make_task(options)
        self.teacher_data = task.encode(task.splits["train"], task.pixels)
        self.data = task.encode(task.splits["train"].subset(arguments.train), task.pixels)
        self.test = task.encode(task.splits["validation"], task.pixels)

    def settings(self, epochs, seed):
        """The same for all students."""
        chosen = {"learning_rate": 2e-3, "batch_size": 64, "schedule": "cosine", "weight_decay": 0.05}
        return Settings(epochs=epochs, seed=seed, log_every=50, **chosen)

    def score(self, model, teacher=None):
        """Accuracy on the test images, and how often the model agrees with the teacher."""
        found = predict(model, self.test, batch_size=256)
        decided = found.logits.argmax(-1)
        other = decided if teacher is None else predict(teacher, self.test, batch_size=256).logits.argmax(-1)
        return float((decided == found.labels).mean()), float((decided == other).mean())

    def teacher(self):
        """Train the teacher, or load it."""
        wanted = {key: getattr(self.arguments, key) for key in ("teacher_train", "teacher_epochs", "test")}
        torch.manual_seed(0)
        model, weights, notes = resnet(TEACHER), self.out / "teacher.safetensors", self.out / "teacher.json"
        if notes.is_file() and json.loads(notes.read_text())["settings"] == wanted:
            model.load_state_dict(load_file(weights))
            return model.eval()
        start = time.perf_counter()
        settings = self.settings(self.arguments.teacher_epochs, seed=0)
        fit(Distiller(model, None, [Term("labels", loss="cross_entropy")]), self.teacher_data, settings=settings)
        accuracy, _ = self.score(model)
        save_file(model.state_dict(), weights)
        notes.write_text(
            json.dumps({"settings": wanted, "accuracy": accuracy, "seconds": time.perf_counter() - start})
        )
        return model.eval()

    def run(self, teacher, student, method, seed):
        """Train one student and return its line."""
        torch.manual_seed(seed)
        model = STUDENTS[student]()
        _, on_logits, make = METHODS[method]
        terms = [Term("labels", loss="cross_entropy", name="labels"), *make(len(self.data))]
        if self.arguments.on == "kd" and not on_logits:
            terms.append(Term("logits", loss="forward_kl", temperature=4.0, name="kd"))
        start = time.perf_counter()
        distiller = Distiller(model, teacher if len(terms) > 1 else None, terms)
        done = fit(distiller, self.data, settings=self.settings(self.arguments.epochs, seed))
        accuracy, agreement = self.score(distiller.export(), teacher)
        seconds = time.perf_counter() - start
        return {"accuracy": accuracy, "agreement": agreement, "seconds": seconds, "steps": done.steps}

    def key(self, student, method, seed):
        """What a run is, by which it is found again."""
        own = {key: getattr(self.arguments, key) for key in ("train", "test", "epochs", "teacher_train")}
        own["teacher_epochs"] = self.arguments.teacher_epochs
        on = "" if METHODS[method][1] else self.arguments.on
        return {"student": student, "method": method, "seed": seed, "on": on, **own}

    def results(self):
        """All lines of the file, each with its key."""
        file = self.out / "runs.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def add(self, line):
        """Append one line."""
        with (self.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def planned(arguments):
    """Students, methods and seeds, seed by seed, so that what is there early is complete."""
    names = arguments.only or list(METHODS)
    missing = {n for name in names for n in METHODS[name][0] if n not in set(LOSSES)}
    for loss in sorted(missing):
        print(f"no loss {loss!r} yet; its methods are left out")
    names = [name for name in names if not missing.intersection(METHODS[name][0])]
    for seed in range(arguments.seeds):
        for student in arguments.students:
            for name in names:
                yield student, name, seed


def mean_and_error(values):
    """In percent, with the standard error over seeds where there are several."""
    values = [100 * value for value in values]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return f"{statistics.mean(values):.1f}" + (f" ± {error:.1f}" if error is not None else "")


def table(study):
    """All results that belong to these settings, in Markdown."""
    arguments = study.arguments
    found = defaultdict(dict)
    for line in study.results():
        seed = line["seed"]
        if (
            line["method"] in METHODS
            and line["student"] in STUDENTS
            and line["key"] == study.key(line["student"], line["method"], seed)
        ):
            found[line["student"], line["method"]][seed] = line
    notes = json.loads((study.out / "teacher.json").read_text())
    print(
        f"\nTeacher: {100 * notes['accuracy']:.1f} % of {arguments.test} test images, trained on "
        f"{arguments.teacher_train}; students trained on {arguments.train} for {arguments.epochs:g} epochs. "
        "Mean ± standard error over seeds; gain over `plain` paired by seed.\n"
    )
    heads = [f"{s}: accuracy | gain | as the teacher" for s in arguments.students]
    print(f"| method | {' | '.join(heads)} |\n|---|{'---|' * (3 * len(heads))}")
    for name, (_, on_logits, _) in METHODS.items():
        cells = [cell for s in arguments.students for cell in _cells(found[s, name], found[s, "plain"])]
        label = name if on_logits or arguments.on == "labels" else f"KD + {name}"
        if any(cells):
            print(f"| {label} | {' | '.join(cells)} |")


def _cells(own, plain):
    if not own:
        return "", "", ""
    gains = [own[seed]["accuracy"] - plain[seed]["accuracy"] for seed in own if seed in plain]
    accuracy, agreement = ([line[key] for line in own.values()] for key in ("accuracy", "agreement"))
    return mean_and_error(accuracy), mean_and_error(gains) if gains else "", mean_and_error(agreement)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--out", default="runs/cifar")
    parser.add_argument("--teacher-train", type=int, default=15_000, help="training images of the teacher")
    parser.add_argument("--train", type=int, default=5000, help="training images of the students, a part of them")
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--teacher-epochs", type=float, default=8)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--only", nargs="+", choices=list(METHODS))
    parser.add_argument(
        "--on", choices=["labels", "kd"], default="labels", help="what feature losses are added to"
    )
    return parser.parse_args()


def main():
    arguments = parse()
    torch.set_num_threads(1)
    study = Study(arguments)
    teacher = study.teacher()
    done = [line["key"] for line in study.results()]
    for student, method, seed in planned(arguments):
        key = study.key(student, method, seed)
        if key in done:
            continue
        line = {"student": student, "method": method, "seed": seed, **study.run(teacher, student, method, seed)}
        study.add({**line, "key": key})
        print(f"{student}, {method}, seed {seed}: {line['accuracy']:.3f} in {line['seconds']:.0f} s", flush=True)
    table(study)


if __name__ == "__main__":
    main()
