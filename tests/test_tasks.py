"""Tasks: data from anywhere, checked before it is used."""

import datetime
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

from limbeck.tasks import HOLDOUT, TASKS, Rows, TaskOptions, about_tasks, make_task, task_names
from limbeck.tasks.base import shorten
from limbeck.tasks.builtin import docstrings_by_package, fresh_bert
from limbeck.tasks.glue import GLUE
from limbeck.tasks.tables import find_split, read_table, read_tables
from limbeck.tasks.text import TextTask
from tests import tiny

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "glue"


def options(**values):
    return TaskOptions(**values)


def glue_table(about, rows):
    texts = {column: [f"text {i} of {column}" for i in range(rows)] for column in about.texts}
    labels = [i % len(about.labels) for i in range(rows)] if about.labels else [5 * i / rows for i in range(rows)]
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


# ---- GLUE itself, where this machine has it ---------------------------------------------------------------------

# Examples, and how often each label occurs; the smaller sets are the hub's row for row, the others parts of them.
ROWS = {
    "cola": {"train": (8551, [2528, 6023]), "validation": (1043, [322, 721])},
    "sst2": {"train": (67349, [29780, 37569]), "validation": (872, [428, 444])},
    "mrpc": {"train": (3668, [1194, 2474]), "validation": (408, [129, 279])},
    "stsb": {"train": (5749, None), "validation": (1500, None)},
    "rte": {"train": (2490, [1249, 1241]), "validation": (277, [146, 131])},
    "qnli": {"train": (18869, [9460, 9409]), "validation": (5463, [2702, 2761])},
    "qqp": {"train": (19833, [11313, 8520]), "validation": (1000, [617, 383])},
    "mnli": {
        "train": (24739, [8332, 8198, 8209]),
        "validation": (9815, [3479, 3123, 3213]),
        "validation_mismatched": (1000, [350, 316, 334]),
    },
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="GLUE's data is not on this machine (../shared/data/glue)")
@pytest.mark.parametrize("name", sorted(ROWS))
def test_glue_as_it_is(name):
    task = make_task(options(name=f"glue/{name}", data=str(SHARED)))
    assert set(task.splits) == set(ROWS[name])
    for split, (count, by_label) in ROWS[name].items():
        rows = task.splits[split]
        assert len(rows) == len(rows.inputs) == count
        assert all(len(row) == len(GLUE[name].texts) for row in rows.inputs)
        if by_label is None:
            assert (min(rows.labels), max(rows.labels)) == (0.0, 5.0)
            assert all(type(label) is float for label in rows.labels)
        else:
            assert np.bincount(rows.labels).tolist() == by_label
            assert len(task.labels) == len(by_label)


@pytest.mark.skipif(not SHARED.is_dir(), reason="GLUE's data is not on this machine (../shared/data/glue)")
def test_glue_labels_mean_what_their_names_say():
    """One example each whose label anyone would give."""
    rte = make_task(options(name="glue/rte", data=str(SHARED)))
    row = rte.splits["train"].inputs.index(
        ("No Weapons of Mass Destruction Found in Iraq Yet.", "Weapons of Mass Destruction Found in Iraq.")
    )
    assert rte.labels[rte.splits["train"].labels[row]] == "not_entailment"
    stsb = make_task(options(name="glue/stsb", data=str(SHARED)))
    row = stsb.splits["train"].inputs.index(("A plane is taking off.", "An air plane is taking off."))
    assert stsb.splits["train"].labels[row] == 5.0
    mnli = make_task(options(name="glue/mnli", data=str(SHARED)))
    row = mnli.splits["train"].inputs.index(
        (
            " The old man sighed, his face slumping into lines of fatigue and age.",
            "The man was tired from his old age.",
        )
    )
    assert mnli.labels[mnli.splits["train"].labels[row]] == "entailment"


def test_scores_outside_of_their_range_are_no_labels(folder):
    glue_table(GLUE["stsb"], 6).assign(label=-1.0).to_parquet(folder / "stsb" / "validation.parquet")
    with pytest.raises(ValueError, match="has the label -1, outside 0 to 5; a test split has none"):
        make_task(options(name="glue/stsb", data=str(folder)))


# ---- files ------------------------------------------------------------------------------------------------------


def shards(folder, count, suffix="parquet", split="train"):
    parts = [tiny.table(20, seed=i) for i in range(count)]
    for i, part in enumerate(parts):
        path = folder / f"{split}-{i:05d}-of-{count:05d}.{suffix}"
        part.to_parquet(path) if suffix == "parquet" else part.to_csv(path, index=False)
    return pd.concat(parts)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_all_shards_of_a_split_are_read(tmp_path, suffix):
    whole = shards(tmp_path, 3, suffix)
    held = shards(tmp_path, 2, suffix, "validation")
    task = make_task(options(name="table", data=str(tmp_path), text=("text",), label="label"))
    assert [text for (text,) in task.splits["train"].inputs] == whole["text"].tolist()
    assert [text for (text,) in task.splits["validation"].inputs] == held["text"].tolist()


def test_all_shards_of_a_glue_split_are_read(folder):
    (folder / "rte" / "train-00000-of-00001.parquet").unlink()
    for i in range(2):
        glue_table(GLUE["rte"], 12).to_parquet(folder / "rte" / f"train-{i:05d}-of-00002.parquet")
    assert len(make_task(options(name="glue/rte", data=str(folder))).splits["train"]) == 24


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_shard_is_named(tmp_path, missing):
    shards(tmp_path, 3)
    name = f"train-{missing:05d}-of-00003.parquet"
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}.*fetch all 00003"):
        find_split(tmp_path, "train")


def test_a_whole_file_comes_before_shards(tmp_path):
    shards(tmp_path, 2)
    tiny.table(6).to_parquet(tmp_path / "train.parquet")
    assert len(read_tables(find_split(tmp_path, "train"))) == 6


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_text_in_json_stays_text(tmp_path, suffix):
    """Pandas makes numbers and dates of words, and of whole columns by their names."""
    words = {"text": ["007", "1.50"], "modified": ["2020-01-01", "1e3"], "2020": ["a", "b"], "label": ["1", "0"]}
    rows = [dict(zip(words, row, strict=True)) for row in zip(*words.values(), strict=True)]
    path = tmp_path / f"data.{suffix}"
    path.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    assert read_table(path).to_dict("list") == words


def test_numbers_in_json_stay_numbers(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1, "b": 0.5, "date": 3}\n{"a": 2, "b": 1, "date": 4}')
    found = read_table(path).to_dict("list")
    assert found == {"a": [1, 2], "b": [0.5, 1.0], "date": [3, 4]}
    assert not any(isinstance(v, datetime.datetime) for v in found["date"])


# ---- labels -----------------------------------------------------------------------------------------------------


def labelled(path, labels):
    """A table of one text for each label, as JSON lines, which keep every kind of value."""
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return make_task(options(name="table", data=str(path), text=("text",), label="label"))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False], ("False", "True")),
        (["yes", "no"], ("no", "yes")),
        ([10, 9], ("9", "10")),
        (["10", "9"], ("10", "9")),
        ([True, "maybe", 3], ("3", "True", "maybe")),
        ([True, 1], ("1", "True")),
        ([0.5, "n/a"], ("0.5", "n/a")),
        ([0.5, 2], ()),
    ],
)
def test_labels_of_every_kind(tmp_path, labels, names):
    task = labelled(tmp_path / "data.jsonl", labels * 10)
    assert task.labels == names
    if names:
        found = [task.labels[label] for split in task.splits.values() for label in split.labels]
        assert sorted(found) == sorted(str(label) for label in labels * 10)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_true_and_false_are_classes(tmp_path, suffix):
    table = tiny.table(40).assign(label=[True, False] * 20)
    path = tmp_path / f"data.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    task = make_task(options(name="table", data=str(path), text=("text",), label="label"))
    assert task.labels == ("False", "True")


# ---- the holdout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_equal_inputs_are_on_one_side_of_the_holdout(kind):
    if kind == "texts":
        inputs = [(f"text {i % 20}",) for i in range(60)]
        key = tuple
    else:
        inputs = [np.full((1, 2, 2), i % 20, np.float32) for i in range(60)]
        key = np.ndarray.tobytes
    rows = Rows(inputs, [i % 2 for i in range(60)])
    splits = shorten({"train": rows, "validation": rows}, options(name="any", holdout=0.25))
    assert (len(splits["train"]), len(splits[HOLDOUT])) == (45, 15)
    assert not {key(x) for x in splits["train"].inputs} & {key(x) for x in splits[HOLDOUT].inputs}


def test_a_holdout_leaves_something_on_both_sides():
    rows = Rows([("a",), ("a",), ("b",)], [0, 0, 1])
    for share in (0.1, 0.9):
        with pytest.raises(ValueError, match=r"a holdout of 0\.\d of 3 training examples leaves"):
            shorten({"train": rows}, options(name="any", holdout=share))


# ---- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("digits", {"data": "/no/such"}),
        ("digits", {"text": ("x",)}),
        ("digits", {"max_length": 64}),
        ("docstrings", {"data": "/no/such"}),
        ("docstrings", {"label": "x"}),
        ("glue/rte", {"text": ("sentence1",)}),
        ("glue/rte", {"label": "label"}),
    ],
)
def test_an_option_that_a_task_does_not_use_is_refused(name, values):
    ((option, value),) = values.items()
    with pytest.raises(ValueError, match=f"the task {name} takes no '{option}'") as caught:
        make_task(options(name=name, **values))
    shown = value[0] if isinstance(value, tuple) else value
    assert f"(it is {shown!r})" in str(caught.value)


def table_options(tmp_path, table=None, **values):
    """A table task on data of its own."""
    (tiny.table(40) if table is None else table).to_csv(tmp_path / "data.csv", index=False)
    return {"name": "table", "data": str(tmp_path / "data.csv"), "text": "text", "label": "label", **values}


@pytest.mark.parametrize("text", [("a", "b", "c"), ("a", "a")])
def test_one_text_or_a_pair(text):
    with pytest.raises(ValueError, match=f"^text: a model reads one text .* two different ones, and {len(text)} "):
        options(name="table", text=text)
    with pytest.raises(ValueError, match="one text or a pair of texts, and an example has 3"):
        TextTask("own", ("a", "b"), ("accuracy",), {}).encode(Rows([("x", "y", "z")], [0]), None)


def test_one_column_may_be_written_as_one_text(tmp_path):
    assert options(**table_options(tmp_path)).text == ("text",)
    assert options(name="image", augmentation="flip").augmentation == ("flip",)


def test_a_table_without_rows_is_said_to_be_empty(tmp_path):
    with pytest.raises(ValueError, match=r"data.csv is empty: it holds no rows"):
        make_task(options(**table_options(tmp_path, tiny.table(40).head(0))))


def test_evaluation_labels_that_training_never_has(tmp_path):
    tiny.table(40).to_csv(tmp_path / "train.csv", index=False)
    table = tiny.table(10)
    table.loc[:2, "label"] = "Good"
    table.to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(
        ValueError, match=r"label 'Good', which the train file never has \(rows .*: 3 of 10\); correct"
    ):
        make_task(options(name="table", data=str(tmp_path), text="text", label="label"))


def test_every_task_says_what_it_is():
    assert list(about_tasks()) == task_names()
    assert all(about_tasks().values())


def test_an_option_at_its_default_is_no_option():
    assert make_task(options(name="digits", max_length=128, text=(), data=None)).name == "digits"


# ---- models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reviews(tmp_path):
    tiny.table(40).to_csv(tmp_path / "data.csv", index=False)

    def make(label="label"):
        return make_task(options(name="table", data=str(tmp_path / "data.csv"), text=("text",), label=label))

    return make


def save_as(folder, model_class, **changes):
    """A model of some class in the folder of an encoder, beside its tokenizer."""
    tiny.save_encoder(folder)
    torch.manual_seed(0)
    model_class(tiny.config(vocab_size=len(AutoTokenizer.from_pretrained(folder)), **changes)).save_pretrained(
        folder
    )
    return folder


def drop(folder, fragment):
    """Take the weights whose name contains the fragment out of a folder."""
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if fragment not in name}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_only_a_head_of_the_same_kind_is_trained(reviews, tmp_path):
    task = reviews()
    assert task.load(tiny.save_classifier(tmp_path / "own", ["bad", "good"])).head_is_trained
    assert not task.load(tiny.save_encoder(tmp_path / "encoder")).head_is_trained
    assert not task.load(save_as(tmp_path / "words", BertForMaskedLM)).head_is_trained
    for labels in (2, 5):
        folder = save_as(tmp_path / f"tokens{labels}", BertForTokenClassification, num_labels=labels)
        loaded = task.load(folder)
        assert not loaded.head_is_trained
        assert loaded.model.classifier.out_features == 2


def test_a_token_classifier_without_a_pooler_is_no_trained_head(reviews, tmp_path):
    """Its weights have all the names of a text classifier's but one; DistilBERT's lack a layer of the head."""
    folder = tiny.save_encoder(tmp_path / "encoder")
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    config = DistilBertConfig(vocab_size=len(AutoTokenizer.from_pretrained(folder)), **sizes)
    DistilBertForTokenClassification(config).save_pretrained(folder)
    assert not reviews().load(folder).head_is_trained


def test_a_regressor_is_ready_for_numbers_only(reviews, tmp_path):
    folder = save_as(tmp_path / "regressor", BertForSequenceClassification, num_labels=1)
    assert reviews("stars").load(folder).head_is_trained
    with pytest.raises(ValueError, match="was trained for the labels"):
        reviews().load(folder)


@pytest.mark.parametrize("fragment", ["classifier", "pooler"])
def test_a_head_that_lacks_weights_is_not_trained(reviews, tmp_path, fragment):
    folder = drop(tiny.save_classifier(tmp_path / "teacher", ["bad", "good"]), fragment)
    assert not reviews().load(folder).head_is_trained


@pytest.mark.parametrize("fragment", ["encoder.layer.1", "embeddings.word"])
def test_a_backbone_that_lacks_weights_is_refused(reviews, tmp_path, fragment):
    for save in (tiny.save_encoder, lambda folder: tiny.save_classifier(folder, ["bad", "good"])):
        with pytest.raises(ValueError, match=rf"lack bert\.{fragment}.*would be random; use a folder"):
            reviews().load(drop(save(tmp_path / "half"), fragment))


def test_a_backbone_of_other_sizes_than_its_config_is_refused(reviews, tmp_path):
    folder = tiny.save_encoder(tmp_path / "encoder")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"lack bert\.encoder\.layer\.0\.intermediate"):
        reviews().load(folder)


def test_a_broken_folder_is_one_clear_line(reviews, tmp_path):
    folder = tiny.save_encoder(tmp_path / "encoder")
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(ValueError, match="cannot load a text model from") as caught:
        reviews().load(folder)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text('{"model_type": "telepathy"}')
    with pytest.raises(ValueError, match="cannot load a text model from") as caught:
        reviews().load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_says_so(reviews, tmp_path):
    folder = tiny.save_encoder(tmp_path / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer; save it there too"):
        reviews().load(folder)


def test_image_models_are_loaded_with_the_same_checks(tmp_path):
    task = make_task(options(name="digits"))
    sizes = {
        "num_channels": 1,
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    names = {"id2label": dict(enumerate(task.labels)), "label2id": {n: i for i, n in enumerate(task.labels)}}
    ResNetForImageClassification(ResNetConfig(**sizes, **names)).save_pretrained(tmp_path / "own")
    assert task.load(tmp_path / "own").head_is_trained
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(tmp_path / "backbone")
    assert not task.load(tmp_path / "backbone").head_is_trained
    with pytest.raises(ValueError, match=r"lack resnet\.encoder\.stages\.1"):
        task.load(drop(tmp_path / "own", "stages.1"))
    with pytest.raises(ValueError, match="cannot load an image model from"):
        task.load(tiny.save_encoder(tmp_path / "text"))
    ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
    ).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="was trained for the labels"):
        task.load(tmp_path / "three")


def test_a_fresh_bert_suits_numbers(reviews):
    config = fresh_bert(reviews("stars"), layers=1, hidden=16).model.config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    config = fresh_bert(reviews(), layers=1, hidden=16).model.config
    assert (config.num_labels, config.problem_type) == (2, "single_label_classification")
    assert config.id2label == {0: "bad", 1: "good"}


def test_installed_packages_are_no_standard_library(tmp_path):
    text = '"""A docstring that is long enough to count."""'
    for place in ("email", "dist-packages/numpy", "site-packages/torch"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.py").write_text(text.replace("A ", place + " "))
    assert set(docstrings_by_package(tmp_path)) == {"email"}
