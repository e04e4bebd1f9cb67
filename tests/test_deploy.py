"""Exported models: what they say is what PyTorch says; bad input and damaged files are refused in one line."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import limbeck
from limbeck import hub
from limbeck.deploy import ExportOptions, Manifest, Parity, Source, evaluate, export, find_source
from limbeck.deploy.evaluation import of_length, open_model, split_role, task_of
from limbeck.deploy.onnx_files import need_onnx
from limbeck.deploy.parity import check_close, check_kept, greatest_difference
from limbeck.deploy.program import read_program
from limbeck.deploy.served import Served, open_onnx, open_program
from limbeck.evaluate import quartiles
from limbeck.tasks import TaskOptions, make_task
from limbeck.train import Examples, predict
from tests import models, tiny

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve_onnx.py"
TEXTS = ["a fine film", "the room was very cold and it was quite grim"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run on tiny texts, with a trained head, and its exports."""
    folder = tiny.place_of(tmp_path_factory.mktemp("place"))
    teacher = {
        "model": str(folder / "teacher"),
        "training": {"epochs": 8, "batch_size": 8, "learning_rate": 5e-3},
    }
    limbeck.distill(tiny.recipe(folder, teacher=teacher, baseline=False), folder / "run")
    for name, options in {
        "onnx": ExportOptions(),
        "int8": ExportOptions(int8=True, optimise=True, allowance=0.1),
        "torch": ExportOptions("torch"),
    }.items():
        export(find_source(str(folder / "run"), "teacher"), folder / name, options)
    export(find_source(str(folder / "run")), folder / "student", ExportOptions(opset=18))
    (folder / "search" / "trials").mkdir(parents=True)
    for name in ("recipe.yaml", "made-by.json"):
        shutil.copy(folder / "run" / name, folder / "search")
    (folder / "suite" / "rte").mkdir(parents=True)
    (folder / "suite" / "suite.json").write_text("{}")
    (folder / "suite" / "rte" / "report.json").write_text("{}")
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "answers", lambda: False)


def logits_of(folder, texts, model=None):
    """What a transformers folder says of some texts, one by one, by transformers alone."""
    model = model or AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        each = [model(**_without_types(tokenizer(t, return_tensors="pt"))).logits[0] for t in texts]
    return torch.stack(each).numpy()


def _without_types(encoded):
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


# What comes out


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_an_export_says_what_the_model_says_at_any_batch_and_length(place, name):
    source = find_source(str(place / "run"), "teacher")
    made = Manifest.load(place / name)
    path = place / name / made.file
    exported = open_program(path, made.inputs) if name == "torch" else open_onnx(path)
    for size, length in ((1, 2), (1, 1), (3, 17), (5, 64)):
        ids = torch.randint(5, 40, (size, length))
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        with torch.no_grad():
            wanted = source.model(input_ids=ids, attention_mask=mask).logits
        said = exported(input_ids=ids, attention_mask=mask)
        assert torch.allclose(said, wanted, atol=1e-5)
    assert made.parity.greatest_difference < 1e-5
    assert made.parity.agreement == 1.0


def test_int8_is_smaller_and_its_parity_is_what_one_counts_by_hand(place):
    source = find_source(str(place / "run"), "teacher")
    small, large = Manifest.load(place / "int8"), Manifest.load(place / "onnx")
    kinds = {node.op_type for node in onnx.load(place / "int8" / small.file).graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    exported = open_onnx(place / "int8" / small.file)
    right, agree, worst = 0, 0, 0.0
    for item in source.examples.items:
        inputs = {k: torch.from_numpy(item[k])[None] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ours, theirs = source.model(**inputs).logits[0], exported(**inputs)[0]
        right += int(theirs.argmax()) == item["labels"]
        agree += int(theirs.argmax()) == int(ours.argmax())
        worst = max(worst, float((ours - theirs).abs().max()))
    count = len(source.examples)
    assert small.parity.examples == count
    assert small.parity.agreement == pytest.approx(agree / count)
    assert small.parity.score_after == pytest.approx(right / count)
    together = source.examples.batch(range(count))  # whose activations are quantised together
    with torch.no_grad():
        ours = source.model(**{k: together[k] for k in ("input_ids", "attention_mask")}).logits
    worst = max(worst, float((ours - exported(**together)).abs().max()))
    assert count <= 16  # the check takes as many alone, and as many together
    assert small.parity.greatest_difference == pytest.approx(worst, rel=1e-3)
    assert small.parity.greatest_difference > large.parity.greatest_difference
    assert small.size_bytes < large.size_bytes


def test_the_manifest_says_where_the_model_came_from(place):
    made, run = Manifest.load(place / "onnx"), json.loads((place / "run" / "made-by.json").read_text())
    assert made.lineage["data"] == run["data"]
    assert made.lineage["teacher"] == run["teacher"]
    assert made.lineage["role"] == "teacher"
    assert made.labels == ["bad", "good"]
    assert made.versions["onnxruntime"]
    assert set(made.files) == {path.name for path in (place / "onnx").iterdir()} - {"manifest.json"}
    assert made.parameters == sum(p.numel() for p in find_source(str(place / "run"), "teacher").model.parameters())


def test_serving_the_student_needs_onnxruntime_and_tokenizers_only(place):
    script = f"""
import importlib.util, json, sys
for name in ("torch", "transformers", "limbeck"):
    sys.modules[name] = None  # importing it fails
spec = importlib.util.spec_from_file_location("serve", {str(EXAMPLE)!r})
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)
model = serve.Classifier({str(place / "student")!r})
print(json.dumps([model.logits({TEXTS!r}).tolist(), model.answers({TEXTS!r})]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    logits, answers = json.loads(done.stdout)
    wanted = logits_of(place / "run" / "student", TEXTS)
    assert np.allclose(logits, wanted, atol=1e-5)
    shares = torch.softmax(torch.tensor(wanted), -1)
    assert [label for label, _ in answers] == [["bad", "good"][i] for i in wanted.argmax(1)]
    assert np.allclose([share for _, share in answers], shares.max(1).values, atol=1e-5)


KINDS = {
    "RobertaForSequenceClassification": transformers.RobertaConfig(
        **SIZES, max_position_embeddings=34, vocab_size=40, pad_token_id=1, bos_token_id=0, eos_token_id=2
    ),
    "DistilBertForSequenceClassification": transformers.DistilBertConfig(
        dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=40, max_position_embeddings=32
    ),
}


def texts_of(pad, count=20):
    """Encoded texts of many lengths for models that know 40 tokens."""
    generator = np.random.default_rng(0)
    items = [
        {"input_ids": generator.integers(3, 40, 2 + i % 9), "labels": i % 2, "example_id": i} for i in range(count)
    ]
    items = [{**item, "attention_mask": np.ones_like(item["input_ids"])} for item in items]
    from limbeck.tasks.text import Padding

    return Examples(items, Padding(pad), [len(item["input_ids"]) for item in items])


class Pads:
    """As much of a tokenizer as an export needs."""

    pad_token_id, pad_token = 1, "<pad>"

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("name", KINDS)
def test_encoders_of_transformers(name, tmp_path):
    model = getattr(transformers, name)(KINDS[name])
    with torch.no_grad():
        for parameter in model.parameters():  # as they begin, logits hardly depend on the input
            parameter.add_(0.1 * torch.randn_like(parameter))
    source = Source(model, Pads(), texts_of(pad=1), "numbers", "accuracy", (), 32, None, {})
    before = model.config._attn_implementation
    assert export(source, tmp_path / "out").parity.greatest_difference <= 1e-4
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("kind", "format"), [("ViT", "onnx"), ("ResNet", "torch")])
def test_image_models(kind, format, tmp_path):
    torch.manual_seed(0)
    if kind == "ViT":
        config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
        model = transformers.ResNetForImageClassification(config)
    pixels, labels = models.images(20)
    items = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    source = Source(model, None, Examples(items), "noise", "accuracy", (), None, None, {})
    made = export(source, tmp_path / "out", ExportOptions(format))
    assert made.parity.greatest_difference <= 1e-4
    assert made.max_tokens is None


def test_a_transformers_folder_is_checked_with_given_texts(tmp_path):
    folder = tiny.save_classifier(tmp_path / "model", ["no", "yes"])
    (tmp_path / "texts.txt").write_text("\n".join(tiny.table(12)["text"]))
    source = find_source(str(folder), texts=tmp_path / "texts.txt")
    made = export(source, tmp_path / "out", ExportOptions("torch"))
    assert (made.parity.metric, made.parity.examples, made.labels) == (None, 12, ["no", "yes"])
    said = open_program(tmp_path / "out" / made.file, made.inputs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = _without_types(tokenizer(TEXTS[0], return_tensors="pt"))
    assert np.allclose(said(**inputs).detach().numpy(), logits_of(folder, TEXTS[:1]), atol=1e-5)


def test_the_opset_is_the_one_that_was_asked_for(place):
    made = Manifest.load(place / "student")
    graph = onnx.load(place / "student" / made.file)
    assert (made.opset, [each.version for each in graph.opset_import if not each.domain]) == (18, [18])


# What is refused, with nothing left


class Forgetful(nn.Module):
    """Says in a trace something else than out of it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, input):
        return self.head(input) + (1.0 if torch.compiler.is_exporting() else 0.0)


class Deciding(nn.Module):
    """Reads the values of its inputs to decide what to compute."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, input):
        return self.head(input) if input.sum() > 0 else -self.head(input)


class Fixed(nn.Module):
    """Takes batches of two only."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 6)

    def forward(self, input):
        return self.head(input.reshape(1, 8)).reshape(2, 3)


def numbers(model, count=8):
    features, labels = models.points(count)
    items = [{"input": x, "labels": y} for x, y in zip(features, labels, strict=True)]
    return Source(model, None, Examples(items), "noise", "accuracy", (), None, None, {})


@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Forgetful(), "differs from PyTorch by 1 "),
        (Deciding(), "cannot be exported"),
        (Fixed(), "cannot be exported"),
    ],
    ids=["other values", "decisions", "one size"],
)
def test_a_model_that_cannot_be_exported_leaves_nothing(model, said, format, tmp_path):
    with pytest.raises(ValueError, match=said):
        export(numbers(model), tmp_path / "out", ExportOptions(format))
    assert not list(tmp_path.iterdir())


def test_int8_that_loses_too_much_leaves_nothing(tmp_path):
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(1e-3)  # all weights are alike but for what int8 rounds away
        model.weight.add_(1.0)
        model.bias.zero_()
    source = numbers(model, 64)
    source = dataclasses.replace(source, metric=None)
    with pytest.raises(ValueError, match=r"agrees with PyTorch on .* of the noise, which is less than 99.0%"):
        export(source, tmp_path / "out", ExportOptions(int8=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metric", "before", "after", "fine"),
    [
        ("accuracy", 0.90, 0.89, True),
        ("accuracy", 0.90, 0.88, False),
        ("accuracy", 0.80, 0.90, True),
        ("rmse", 0.50, 0.505, True),
        ("rmse", 0.50, 0.52, False),
        ("accuracy", 0.90, float("nan"), False),
    ],
)
def test_int8_may_cost_a_point(metric, before, after, fine):
    parity = Parity(100, "texts", 0.1, 1.0, metric, before, after)
    if fine:
        check_kept(parity)
    else:
        with pytest.raises(ValueError, match=r"worse by more than 0\.01"):
            check_kept(parity)


def test_values_that_are_no_numbers_are_never_close():
    model, broken = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        broken.bias.fill_(float("nan"))
    difference = greatest_difference(model, broken, numbers(model).examples)
    with pytest.raises(ValueError, match="differs from PyTorch by inf"):
        check_close(difference, "the ONNX model")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--format", "onx"], "there is no format 'onx'; did you mean 'onnx'?"),
        (["run", "--format", "torch", "--int8"], "int8 is for ONNX"),
        (["run", "--role", "techer"], "a run has no 'techer' to export; did you mean 'teacher'?"),
        (["run", "--task", "digits"], "which has its task and data; leave --task and --texts out"),
        (["run", "--opset", "99"], "opset 99"),
        (["data.csv"], "is a file; name the folder"),
        (["store"], "holds neither a run nor a transformers model"),
        (["onnx"], "holds a model that was exported already"),
        (["./nothing"], "there is no model at"),
        (["nowhere"], "cannot load a model from 'nowhere': there is no such folder here"),
        (["search"], "search is a search; name the run of its choice: search/best"),
        (["suite"], "suite is a suite; name one of its runs: suite/rte"),
        (["teacher"], "either --task or --texts FILE"),
        (["teacher", "--label", "label"], "--label belongs to a task; name it with --task"),
        (["run/student", "--texts", "nothing.txt"], "there is no file"),
        (["run/student", "--role", "teacher", "--texts", "x"], "is one model and no run; leave --role out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("no_hub")
def test_bad_input_is_one_line(place, tmp_path, command, monkeypatch, arguments, said):
    monkeypatch.chdir(place)
    status, printed = command("export", *arguments, "--out", tmp_path / "out")
    assert status == 2
    assert said in printed
    assert printed.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_head_that_nobody_trained_is_refused(place, tmp_path, command):
    data = ["--task", "table", "--data", place / "data.csv", "--text", "text", "--label", "label"]
    status, printed = command("export", place / "teacher", *data, "--out", tmp_path / "out")
    assert (status, "has no head that was trained for table" in printed) == (2, True)


def test_a_run_that_is_not_finished_is_refused(place, tmp_path, command):
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("recipe.yaml", "made-by.json"):
        (begun / name).write_bytes((place / "run" / name).read_bytes())
    status, printed = command("export", begun, "--out", tmp_path / "out")
    assert (status, "is not finished; go on with it" in printed) == (2, True)


def test_texts_that_are_longer_than_a_model_reads_are_refused(place, tmp_path, command):
    """Up front, and with what to set; a tracer would blame the model's code."""
    long = tiny.table(12)
    long["text"] = long["text"].map(lambda text: " ".join([text] * 60))
    long.to_csv(tmp_path / "long.csv", index=False)
    model = tiny.save_classifier(tmp_path / "model", ["bad", "good"])
    data = ["--task", "table", "--data", tmp_path / "long.csv", "--text", "text", "--label", "label"]
    for words in (["export", model, "--out", tmp_path / "out"], ["evaluate", model, "--repeats", 1]):
        status, printed = command(*words, *data)
        assert status == 2
        assert "reads at most 64 tokens, and the longest text has" in printed
        assert "set --max-length 64" in printed
    assert command("evaluate", model, "--repeats", 1, "--max-length", 64, *data)[0] == 0


def test_an_allowance_without_int8_is_refused(place, tmp_path, command):
    status, printed = command("export", place / "run", "--out", tmp_path / "out", "--allowance", "0.1")
    assert (status, "--allowance is what int8 may cost; add --int8" in printed) == (2, True)


def test_a_link_to_a_folder_is_followed(place, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    made = export(find_source(str(place / "run")), tmp_path / "link", ExportOptions("torch"))
    assert (tmp_path / "real" / made.file).is_file()
    assert (tmp_path / "link").is_symlink()


def test_folders_that_hold_other_things_stay_as_they_are(place, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    status, printed = command("export", place / "run", "--out", out, "--overwrite")
    assert (status, "holds other things" in printed) == (2, True)
    (out / "thesis.txt").rename(out / "manifest.json")
    status, printed = command("export", place / "run", "--out", out, "--overwrite")
    assert (status, f"{out / 'manifest.json'}: it is no manifest of limbeck" in printed) == (2, True)
    (out / "manifest.json").unlink()
    assert command("export", place / "run", "--out", out, "--format", "torch")[0] == 0
    status, printed = command("export", place / "run", "--out", out)
    assert (status, "holds an export already" in printed) == (2, True)
    (out / "thesis.txt").write_text("mine")
    status, printed = command("export", place / "run", "--out", out, "--overwrite")
    assert (status, "beside an export (thesis.txt)" in printed) == (2, True)
    (out / "thesis.txt").unlink()
    assert command("export", place / "run", "--out", out, "--overwrite", "--role", "teacher")[0] == 0
    assert Manifest.load(out).file == "model.onnx"
    assert not (out / "model.pt2").exists()


def test_the_extra_is_named_where_it_is_missing(place, tmp_path, monkeypatch, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    status, printed = command("export", place / "run", "--out", tmp_path / "out")
    assert (status, "ONNX needs onnxscript; install it: pip install 'limbeck[deploy]'" in printed) == (2, True)
    monkeypatch.undo()
    need_onnx()


def test_a_damaged_model_is_refused(place, tmp_path):
    shutil.copytree(place / "student", tmp_path / "out")
    made = Manifest.load(tmp_path / "out")
    path = tmp_path / "out" / made.file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="is not the file that"):
        Manifest.load(tmp_path / "out")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="onnxruntime cannot read"):
        open_onnx(path)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb"),))


@pytest.mark.parametrize("place_of_bomb", ["constants", "sample_inputs"])
def test_a_pt2_file_with_a_pickle_in_it_is_not_loaded(place, tmp_path, monkeypatch, place_of_bomb):
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile.pt2"
    with zipfile.ZipFile(place / "torch" / "model.pt2") as good, zipfile.ZipFile(hostile, "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            if place_of_bomb == "sample_inputs" and "sample_inputs" in name:
                data = pickle.dumps(Bomb())
            if place_of_bomb == "constants" and name.endswith("constants_config.json"):
                told = json.loads(data)
                entry = next(iter(told["config"].values()))
                told["config"]["bomb"] = {**entry, "path_name": "custom_obj_0", "use_pickle": True}
                data = json.dumps(told).encode()
                bad.writestr(name.replace("model_constants_config.json", "custom_obj_0"), pickle.dumps(Bomb()))
            bad.writestr(name, data)
    with pytest.raises(ValueError, match="holds something that is no tensor"):
        read_program(hostile)
    assert not (tmp_path / "bomb").exists()


# Side by side


def test_models_side_by_side(place, command, tmp_path):
    names = [f"{place}/run:teacher", f"{place}/run", *(f"{place}/{name}" for name in ("onnx", "int8", "torch"))]
    file = tmp_path / "numbers.json"
    status, printed = command("evaluate", *names, "--repeats", 3, "--length", 12, "--threads", 1, "--json", file)
    assert status == 0
    found = json.loads(file.read_text())
    assert [one["runtime"] for one in found["models"]] == [
        "PyTorch",
        "PyTorch",
        "ONNX",
        "ONNX int8",
        "torch.export",
    ]
    assert (found["length"], found["threads"], found["batch_size"]) == (12, 1, 1)
    teacher, _, same, _, program = found["models"]
    assert teacher["score"] == same["score"] == program["score"]
    assert same["agreement"]["value"] == 1.0
    assert same["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    task = make_task(task_of(names))
    labels = task.splits["validation"].labels
    texts = [row[0] for row in task.splits["validation"].inputs]
    model = find_source(str(place / "run"), "teacher").model
    wanted = np.mean(logits_of(place / "teacher", texts, model).argmax(1) == labels)
    assert teacher["score"]["value"] == pytest.approx(wanted)
    assert all(one["latency_ms"]["value"] > 0 for one in found["models"])
    assert "Times at batch 1, length 12, threads: 1; models take turns" in printed


def test_texts_are_cut_as_an_export_was_made_for(place, tmp_path, monkeypatch):
    shutil.copytree(place / "onnx", tmp_path / "short")
    manifest = json.loads((tmp_path / "short" / "manifest.json").read_text())
    (tmp_path / "short" / "manifest.json").write_text(json.dumps({**manifest, "max_tokens": 4}))
    seen = []

    def spy(model, data, **options):
        seen.append(max(len(item["input_ids"]) for item in data.items))
        return predict(model, data, **options)

    monkeypatch.setattr("limbeck.deploy.evaluation.predict", spy)
    both = [str(tmp_path / "short"), str(place / "onnx")]
    task = task_of(both)
    evaluate(both, repeats=1)
    evaluate(
        both, TaskOptions.model_validate({**task.model_dump(exclude={"max_length"}), "max_length": 5}), repeats=1
    )
    assert seen[0] == 4 < 5 < seen[1]
    assert seen[2:] == [5, 5]


def test_texts_are_cut_and_padded_to_a_length(place):
    task = make_task(task_of([str(place / "onnx")]))
    opened = open_model(str(place / "onnx"), task)
    rows = task.splits["validation"]
    for length in (4, 40):
        batch = of_length(task, rows, opened, length).batch(range(3))
        assert batch["input_ids"].shape == (3, length)
        whole = task.encode(rows, opened.processor)
        for row, mask, item in zip(batch["input_ids"], batch["attention_mask"], whole.items, strict=False):
            assert int(mask.sum()) == min(length, len(item["input_ids"]))
            assert int(row[int(mask.sum()) - 1]) == item["input_ids"][-1]  # the end of a text stays at its end


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "run"], "run is named twice"),
        (["./teacher"], "name the data to evaluate on"),
        (["run", "./nothing"], "there is no model at ./nothing"),
        (["nowhere", "--task", "glue/rte"], "cannot load a model from 'nowhere': there is no such folder here"),
        (["run", "search"], "search is a search; name the run of its choice: search/best"),
        (["run", "--length", "65"], "length 65 is not between 3 and 64"),
        (["run", "--length", "1"], "length 1 is not between 3 and 64"),
        (["run", "--task", "digits"], "was made for the labels ['bad', 'good'], the task has"),
        (["run", "--json", "no/folder/x.json"], "there is no folder no/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("no_hub")
def test_what_cannot_be_compared_is_one_line(place, command, monkeypatch, arguments, said):
    monkeypatch.chdir(place)
    status, printed = command("evaluate", *arguments, "--repeats", 1)
    assert status == 2
    assert said in printed
    assert printed.count("error:") == 1


def test_images_have_no_length(tmp_path):
    options = TaskOptions(name="digits", eval_examples=8)
    task = make_task(options)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], id2label=dict(enumerate(task.labels))
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    found = evaluate([str(tmp_path / "model")], options, repeats=1)
    assert found.models[0].difference is None
    with pytest.raises(ValueError, match="is for texts, and digits has none"):
        evaluate([str(tmp_path / "model")], options, length=8)


def test_small_parts(tmp_path):
    assert split_role("a:b") == (Path("a:b"), "student")
    assert quartiles([3.0, 1.0, 2.0]).value == 2.0
    with pytest.raises(ValueError, match="takes 'x', and the batch has"):
        Served(lambda x: x, ["x"], "it")(y=torch.ones(1))
    with pytest.raises(ValueError, match="no manifest of limbeck export"):
        Manifest.from_json("[]")
    with pytest.raises(ValueError, match="format 99"):
        Manifest.from_json('{"format": 99}')
