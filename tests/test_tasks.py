"""Tasks: data from anywhere, checked before it is used."""

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from limbeck.tasks import TASKS, TaskOptions, make_task, task_names
from limbeck.tasks.glue import GLUE
from tests import tiny


def options(**values):
    return TaskOptions(**values)


def glue_table(about, rows):
    texts = {column: [f"text {i} of {column}" for i in range(rows)] for column in about.texts}
    labels = [i % len(about.labels) for i in range(rows)] if about.labels else [i / 2 for i in range(rows)]
    return pd.DataFrame({**texts, "label": labels, "idx": range(rows)})


@pytest.fixture
def folder(tmp_path):
    """All nine GLUE tasks as a local folder, MNLI with the hub's names of its splits."""
    for name, about in GLUE.items():
        (tmp_path / name).mkdir()
        glue_table(about, 12).to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
        for split in ("validation_matched", "validation_mismatched") if name == "mnli" else ("validation",):
            glue_table(about, 6).to_parquet(tmp_path / name / f"{split}.parquet")
    return tmp_path


OFFICIAL = {
    "cola": "matthews",
    "sst2": "accuracy",
    "mrpc": "accuracy_and_f1",
    "stsb": "pearson_and_spearman",
    "qqp": "accuracy_and_f1",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "wnli": "accuracy",
}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_every_glue_task_from_a_folder(folder, name):
    task = make_task(options(name=f"glue/{name}", data=str(folder)))
    assert task.metrics[0] == OFFICIAL[name]
    assert len(task.splits["train"]) == 12
    assert len(task.splits["train"].inputs[0]) == len(GLUE[name].texts)
    extra = {"validation_mismatched"} if name == "mnli" else set()
    assert set(task.splits) == {"train", "validation"} | extra
    assert bool(task.labels) == (name != "stsb")


def test_the_hub_out_of_reach_says_what_to_do():
    with pytest.raises(ValueError, match=r"from the hub.*--data"):
        make_task(options(name="glue/rte"))


def test_glue_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match="unknown GLUE task 'rtee'; did you mean 'rte'"):
        make_task(options(name="glue/rtee"))
    with pytest.raises(ValueError, match="there is no folder"):
        make_task(options(name="glue/rte", data=str(tmp_path / "nowhere")))
    (folder / "rte" / "validation.parquet").unlink()
    with pytest.raises(ValueError, match="no validation split of glue/rte"):
        make_task(options(name="glue/rte", data=str(folder)))
    table = glue_table(GLUE["rte"], 6).assign(label=-1)
    table.to_parquet(folder / "rte" / "validation.parquet")
    with pytest.raises(ValueError, match="has the label -1"):
        make_task(options(name="glue/rte", data=str(folder)))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_tables_of_every_format_are_the_same(tmp_path, suffix):
    table = tiny.table(40)
    path = tmp_path / f"data.{suffix}"
    writers = {
        "csv": lambda: table.to_csv(path, index=False),
        "tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "json": lambda: table.to_json(path, orient="records"),
        "parquet": lambda: table.to_parquet(path),
    }
    writers[suffix]()
    task = make_task(options(name="table", data=str(path), text=("text",), label="label"))
    assert task.labels == ("bad", "good")
    read = {text for split in task.splits.values() for (text,) in split.inputs}
    assert read == set(table["text"])


def test_a_single_file_is_split_without_overlap(tmp_path):
    table = pd.concat([tiny.table(60), tiny.table(60)])  # every text twice
    table.to_csv(tmp_path / "data.csv", index=False)
    task = make_task(options(name="table", data=str(tmp_path / "data.csv"), text=("text",), label="label"))
    assert not set(task.splits["train"].inputs) & set(task.splits["validation"].inputs)
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 120


def test_pairs_numbers_and_words_as_labels(tmp_path):
    table = pd.DataFrame(
        {"a": [f"x{i}" for i in range(20)], "b": ["NA"] * 20, "n": [10, 9] * 10, "z": [0.5, 2.0] * 10}
    )
    table.to_csv(tmp_path / "data.csv", index=False)
    path = str(tmp_path / "data.csv")
    task = make_task(options(name="table", data=path, text=("a", "b"), label="n"))
    assert task.labels == ("9", "10")
    assert task.splits["train"].inputs[0][1] == "NA"
    assert make_task(options(name="table", data=path, text=("a",), label="z")).labels == ()


def test_limits_and_holdout(tmp_path):
    tiny.table(100).to_csv(tmp_path / "data.csv", index=False)
    base = {"name": "table", "data": str(tmp_path / "data.csv"), "text": ("text",), "label": "label"}
    task = make_task(options(**base, train_examples=40, eval_examples=10, holdout=0.25))
    assert {name: len(rows) for name, rows in task.splits.items()} == {
        "train": 30,
        "validation": 10,
        "holdout": 10,
    }
    again = make_task(options(**base, train_examples=40, eval_examples=10, holdout=0.25))
    assert task.splits["train"].fingerprint() == again.splits["train"].fingerprint()
    other = make_task(options(**base, train_examples=41))
    assert task.splits["train"].fingerprint() != other.splits["train"].fingerprint()


def test_table_needs_its_columns():
    with pytest.raises(ValueError, match="needs --data FILE, --text COLUMN and --label COLUMN"):
        make_task(options(name="table", data="x.csv"))


def test_docstrings():
    task = make_task(options(name="docstrings"))
    assert len(task.labels) == 10
    sizes = np.bincount([*task.splits["train"].labels, *task.splits["validation"].labels])
    assert sizes.min() >= 100
    assert sizes.max() <= 700
    assert not set(task.splits["train"].inputs) & set(task.splits["validation"].inputs)
    assert any("asyncio" in label for label in task.labels)


def test_digits():
    task = make_task(options(name="digits"))
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 1797
    batch = task.encode(task.splits["train"], None).batch(range(3))
    assert batch["pixel_values"].shape == (3, 1, 8, 8)


def test_encoding_is_that_of_the_tokenizer(tmp_path):
    tiny.table(40).to_csv(tmp_path / "data.csv", index=False)
    task = make_task(options(name="table", data=str(tmp_path / "data.csv"), text=("text", "label"), label="label"))
    folder = tiny.save_encoder(tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = task.splits["train"]
    batch = task.encode(rows, tokenizer).batch([0, 1, 2])
    columns = zip(*rows.inputs[:3], strict=True)
    expected = tokenizer(*map(list, columns), padding=True, return_tensors="pt")
    for key, value in expected.items():
        assert (batch[key] == value).all(), key
    assert batch["labels"].tolist() == rows.labels[:3]


def test_names():
    assert {"table", "docstrings", "digits", "glue/mnli"} <= set(task_names())
    assert "glue" in set(TASKS)
    with pytest.raises(ValueError, match="unknown task 'digit'; did you mean 'digits'"):
        make_task(options(name="digit"))
    assert make_task(options(name="limbeck.tasks.image:digits")).name == "digits"
