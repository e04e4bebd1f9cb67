"""Every block of AutoMM's document on distillation: its loss, its configuration, its commands and its flags."""

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from limbeck import Distiller
from limbeck.compat.automm_options import Options
from limbeck.tasks.fusion import FusionNetwork
from tests import tiny

ROOT = Path(__file__).parent.parent.parent
TEXT = (Path(__file__).parent / "automm.md").read_text()
BLOCKS = [block.strip("\n") for block in re.findall(r"```(.*?)```", TEXT, flags=re.DOTALL)]
FLAGS = re.findall(r"^ +- +`(\w+)` ", TEXT, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("automm_distillation", ROOT / "examples/automm_distillation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RESAMPLES = 50
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A large and a small encoder, and a few rows of the tasks that the document names."""
    folder = tmp_path_factory.mktemp("automm")
    tiny.save_encoder(folder / "large")
    tiny.save_encoder(folder / "small", num_hidden_layers=1)
    frame = tiny.table(40)
    columns = {
        "qnli": {"question": frame.text, "sentence": frame.text[::-1].tolist(), "label": frame.label == "good"},
        "stsb": {"sentence1": frame.text, "sentence2": frame.text[::-1].tolist(), "label": frame.stars},
    }
    for task, named in columns.items():
        rows = pd.DataFrame({**named, "idx": range(40)}).astype({"label": float if task == "stsb" else int})
        (folder / "glue" / task).mkdir(parents=True)
        rows.head(24).to_parquet(folder / "glue" / task / "train.parquet")
        rows.tail(16).to_parquet(folder / "glue" / task / "validation.parquet")
    return folder


def loss_of_the_document(regression):
    """The document's methods as they stand, in the smallest class that has what they name."""
    names = {"torch": torch, "nn": nn, "F": F, "WEIGHT": "weight", "LOGITS": "logits", "FEATURES": "features"}
    methods = next(block for block in BLOCKS if "_compute_hard_label_loss" in block)
    exec("class Losses:\n" + textwrap.indent(textwrap.dedent(methods), "    "), names)
    losses = names["Losses"]()
    losses.student_model, losses.teacher_model = SimpleNamespace(prefix="s"), SimpleNamespace(prefix="t")
    losses.hard_label_loss_func = losses.soft_label_loss_func = (
        nn.MSELoss() if regression else nn.CrossEntropyLoss()
    )
    losses.output_feature_loss_func = nn.MSELoss()
    return losses


def networks(outputs):
    """A student and a teacher with features of one width, and batches for both."""
    torch.manual_seed(3)
    student, teacher = (FusionNetwork(outputs, numbers=6, hidden=8, dropout=0.0) for _ in "st")
    for parameter in teacher.parameters():
        parameter.data.mul_(3.0)  # so that it has something to say
    generator = torch.Generator().manual_seed(4)
    numbers = [torch.randn(5, 1, 6, generator=generator) for _ in range(20)]
    labels = [torch.randint(3, (5,), generator=generator) for _ in range(20)]
    return student, teacher.eval(), numbers, labels if outputs > 1 else [each.float() for each in labels]


@pytest.mark.parametrize("regression", [False, True], ids=["classes", "numbers"])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_twenty_steps_with_the_loss_of_the_document(regression, temperature):
    """The document's loss in a plain loop, and the door's terms: the same values, step by step."""
    weights = {"hard_label_weight": 0.3, "soft_label_weight": 2.0, "output_feature_loss_weight": 0.5}
    theirs = loss_of_the_document(regression)
    vars(theirs).update(weights, temperature=temperature)
    given = {**weights, "temperature": temperature, "temperature_squared": False}
    terms = Options.parse({f"distiller.{k}": v for k, v in given.items()}).terms(regression, (8, 8))
    values = []
    for door in (False, True):
        student, teacher, numbers, labels = networks(1 if regression else 3)
        distiller = Distiller(student, teacher, terms)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        found = []
        for x, y in zip(numbers, labels, strict=True):
            if door:
                loss = distiller(numbers=x, labels=y).loss
            else:
                with torch.no_grad():
                    said = vars(teacher(numbers=x))
                loss = theirs._compute_loss({"s": vars(student(numbers=x))}, {"t": said}, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        values.append(found)
    assert values[1] == pytest.approx(values[0], abs=1e-6, rel=1e-6)
    assert values[0][-1] != pytest.approx(values[0][0], rel=1e-3)


@pytest.mark.parametrize("regression", [False, True], ids=["classes", "numbers"])
def test_the_listed_correction_is_temperature_squared(regression):
    theirs, temperature = loss_of_the_document(regression), 5.0
    theirs.temperature = temperature
    student, teacher, numbers, labels = networks(1 if regression else 3)
    terms = Options.parse({"distiller.temperature": temperature}).terms(regression, (8, 8))
    ours = Distiller(student, teacher, terms)(numbers=numbers[0], labels=labels[0]).terms["soft_label"]
    said = {"s": vars(student(numbers=numbers[0]))}, {"t": vars(teacher(numbers=numbers[0]))}
    expected = temperature**2 * theirs._compute_soft_label_loss(*said)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_configuration_of_the_document_is_one_of_the_example(example):
    block = next(block for block in BLOCKS if block.startswith("glue_task"))
    named = dict(re.findall(r"^(.+?) = (.+)$", block, flags=re.MULTILINE))
    metric = named.pop("metric").strip('"')
    words = []
    for name, value in named.items():
        words += [f"--{name.lower().replace(' ', '_')}", value]
    args = example.arguments(words)
    assert (args.glue_task, args.teacher_model) == ("qnli", "google/bert_uncased_L-12_H-768_A-12")
    assert (args.max_epochs, args.temperature, args.hard_label_weight, args.soft_label_weight) == (12, 5, 0.1, 1)
    assert example.METRICS[args.glue_task] == [metric]


def test_the_example_has_every_flag_of_the_document(example):
    assert len(FLAGS) == 14
    assert set(FLAGS) <= set(vars(example.arguments([])))
    for kind in re.findall(r'"(\w+)"', next(x for x in TEXT.splitlines() if "`output_feature_loss_type`" in x)):
        Options.parse({"distiller.output_feature_loss_type": kind}).terms(False, (8, 8))


def small(place, words):
    """A command's words with models and data filled in small."""
    models = {"bert_uncased_L-12_H-768_A-12": place / "large", "bert_uncased_L-6_H-768_A-12": place / "small"}
    words = [str(models.get(word.removeprefix("google/"), word)) for word in words]
    return [*words, "--glue_path", str(place / "glue"), "--finetuned_model_cache_folder", str(place / "cache")]


def test_the_command_of_the_document_runs(example, place, capsys):
    command = next(line for line in re.findall(r"^`(python3 .+)`$", TEXT, flags=re.MULTILINE))
    words = small(place, shlex.split(command)[2:])
    first = example.main(words)
    shown = capsys.readouterr().out
    assert shown.count("without a teacher, into") == 2
    header, row = shown.splitlines()[-2:]
    names = ["Teacher Model accuracy", "Pretrained Model accuracy", "Student Model accuracy"]
    assert header.split(" | ") == [*names, "Distillation Ratio", "Speed Up"]
    assert re.fullmatch(r"\d\.\d{5} \(\d\.\d{3} to \d\.\d{3}\)", row.split(" | ")[0])
    assert re.fullmatch(r"\d+\.\d\dx \(\d+\.\d\d to \d+\.\d\d\)", row.split(" | ")[4])
    again = example.main(words)
    shown = capsys.readouterr().out
    assert shown.count("Using the model in") == 2
    assert again["accuracy"]["teacher"] == first["accuracy"]["teacher"]
    assert again["accuracy"]["student"] == first["accuracy"]["student"]


def test_the_first_command_runs_with_every_other_flag(example, place, capsys):
    """``python automm_distillation.py --glue_task stsb --<other_flag> <value>``."""
    command = next(block for block in BLOCKS if "--<other_flag>" in block)
    values = {
        "teacher_model": place / "large",
        "student_model": place / "small",
        "max_epochs": 1,
        "time_limit": 20,
        "num_gpu": -1,
        "output_feature_loss_type": "cosine_distance",
        "finetuned_model_cache_folder": place / "cache",
    }
    others = [flag for flag in FLAGS if flag not in ("glue_task", "retrain")]
    flags = [word for flag in others for word in (f"--{flag}", str(values.get(flag, 1)))]
    words = shlex.split(command.replace("--<other_flag> <value>", shlex.join(flags)))[2:]
    rows = example.main([*words, "--retrain", "--glue_path", str(place / "glue")])
    assert set(rows) == {"pearsonr", "spearmanr"}
    assert "Pretrained Model pearsonr" in capsys.readouterr().out


def test_a_model_made_otherwise_is_not_taken_from_the_cache(example, place, capsys):
    args = example.arguments(small(place, ["--student_model", str(place / "small")]))
    _, train, _ = example.read(args)
    options = {"model.hf_text.checkpoint_name": args.student_model, "optim.max_steps": 1}
    paths = []
    for rows, seed, rate in ((20, 1, 0.1), (20, 1, 0.1), (19, 1, 0.1), (20, 2, 0.1), (20, 1, 0.2)):
        args.seed = seed
        made = example.finetuned(args, "qnli", train.head(rows), args.student_model, {**options, "optim.lr": rate})
        paths.append(made.path)
    assert len(set(paths)) == 4
    assert paths[0] == paths[1]
    assert capsys.readouterr().out.count("Using the model") == 1
