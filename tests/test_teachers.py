import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from limbeck.teachers import ModuleTeacher, Teacher, as_teacher, load_pretrained
from limbeck.testing import TeacherContract
from limbeck.types import Signal
from tests.models import Unnamed, bert, perceptron, points, text_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformers model as `save_pretrained` leaves it."""
    path = tmp_path_factory.mktemp("teacher")
    bert(seed=5).save_pretrained(path)
    return path


# ---- the contract ----------------------------------------------------------------------------------------------


class TestPlainModule(TeacherContract):
    wants = ("logits", "1", "3#input")
    wrong_tap = "4"

    def teacher(self):
        return ModuleTeacher(perceptron())

    def batch(self):
        features, labels = points()
        return {"input": features, "labels": labels}


class TestOverwritingModule(TestPlainModule):
    """Its ReLU overwrites what tap "1" reads."""

    def teacher(self):
        return ModuleTeacher(perceptron(inplace=True))


class TestPositionalInputs(TestPlainModule):
    def batch(self):
        features, labels = points()
        return {"inputs": (features,), "labels": labels}


class TestDropout(TestPlainModule):
    """A teacher that arrives in training mode."""

    wants = ("logits",)

    def teacher(self):
        torch.manual_seed(0)
        return ModuleTeacher(
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
        )


class TestUnnamedOutputs(TestPlainModule):
    wants = ("logits", "hidden", "body")
    wrong_tap = "bodi#0"

    def teacher(self):
        torch.manual_seed(0)
        return ModuleTeacher(Unnamed(), read=lambda output: {"logits": output[0], "hidden": output[1]})

    def batch(self):
        return {"features": points()[0]}


class TestTransformer(TeacherContract):
    wants = ("logits", "hidden_states.1", "bert.encoder.layer.0", "bert#pooler_output")
    wrong_tap = "bert.encoder.layers.0"

    def teacher(self):
        return ModuleTeacher(bert(hidden_dropout_prob=0.5))

    def batch(self):
        return {**text_batch(), "example_id": torch.arange(4)}


class Broken:
    """A teacher with one fault at a time."""

    def __init__(self, fault):
        self.fault = fault
        self.module = perceptron()
        self.scale = nn.Parameter(torch.ones(()))

    def offers(self, tap):
        return tap == "logits" or self.fault == "offers everything"

    def names(self):
        return ["logits"] + ["ghost"] * (self.fault == "suggests what it has not")

    def signal(self, batch, wants):
        if unknown := [tap for tap in wants if tap != "logits"]:
            raise KeyError(unknown) if self.fault == "bad error" else ValueError(f"no tap {unknown}")
        logits = self.module(batch["input"]).detach()
        if self.fault == "gradient":
            logits = logits * self.scale
        if self.fault == "dropout":
            logits = nn.functional.dropout(logits)
        if self.fault == "looks at its neighbours":
            logits = logits - logits.mean(0)
        if self.fault == "changes the batch":
            batch["input"].mul_(0)
        if self.fault == "one row too few":
            logits = logits[1:]
        return Signal({"logits": logits, **({"2": logits} if self.fault == "gives too much" else {})})


FAULTS = {
    "offers everything": "does_not_offer_a_wrong_tap",
    "suggests what it has not": "offers_what_it_gives",
    "bad error": "does_not_offer_a_wrong_tap",
    "gradient": "gives_no_gradient",
    "dropout": "is_deterministic",
    "looks at its neighbours": "does_not_depend_on_order_or_company",
    "changes the batch": "leaves_the_batch_alone",
    "one row too few": "one_row_per_example",
    "gives too much": "gives_what_is_wanted",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_contract_catches(fault):
    teacher = Broken(fault)
    methods = {"teacher": lambda self: teacher, "batch": lambda self: {"input": points()[0]}}
    contract = type("Faulty", (TeacherContract,), methods)()
    with pytest.raises((AssertionError, KeyError)):
        getattr(contract, f"test_{FAULTS[fault]}")()


# ---- where teachers come from ----------------------------------------------------------------------------------


def test_from_a_module():
    module = perceptron().train()
    teacher = as_teacher(module)
    assert teacher.module is module
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_from_a_teacher():
    teacher = ModuleTeacher(perceptron())
    assert as_teacher(teacher) is teacher
    custom = Broken(None)
    assert isinstance(custom, Teacher)
    assert as_teacher(custom) is custom


def test_from_a_function():
    features, _ = points()
    signal = as_teacher(lambda: perceptron(seed=3)).signal({"input": features}, ["logits"])
    assert torch.equal(signal["logits"], perceptron(seed=3)(features))


@pytest.mark.parametrize(
    "source",
    [
        (nn.Linear, (4, 3), {"bias": False}),
        (nn.Linear, (), {"in_features": 4, "out_features": 3, "bias": False}),
        (nn.Linear, (4, 3, False)),
        (lambda: nn.Linear(4, 3, bias=False),),
    ],
)
def test_from_a_class_and_its_arguments(source):
    module = as_teacher(source).module
    assert isinstance(module, nn.Linear)
    assert module.weight.shape == (3, 4)
    assert module.bias is None


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_from_a_folder(folder, kind):
    teacher = as_teacher(kind(folder))
    assert type(teacher.module).__name__ == "BertForSequenceClassification"
    expected = bert(seed=5).eval()(**text_batch()).logits
    torch.testing.assert_close(teacher.signal(text_batch(), ["logits"])["logits"], expected)


@pytest.mark.parametrize("source", ["no/such-model", "/no/such/folder"])
def test_from_nowhere(source):
    with pytest.raises(ValueError, match=f"cannot load a model from '{source}': "):
        as_teacher(source)


def test_from_a_folder_that_names_no_known_class(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for architectures, name in (([], "no class"), (["BertForTelepathy"], "BertForTelepathy")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(ValueError, match=f"names {name}, which transformers lacks"):
            load_pretrained(tmp_path)


def test_from_a_folder_without_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot load a model from"):
        load_pretrained(tmp_path)


def test_no_pickle_is_loaded(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(bert(seed=5).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_pretrained(tmp_path)


def test_a_teacher_with_missing_weights_is_refused(tmp_path):
    """A head that the checkpoint lacks is drawn at random, and teaches noise."""
    model = bert()
    model.bert.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [type(model).__name__]}))
    with pytest.raises(ValueError, match=r"classifier\.(weight|bias)"):
        load_pretrained(tmp_path)


def test_an_architecture_is_a_model_class(folder, tmp_path):
    """A config is text from elsewhere: it may name whatever transformers exports."""
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["AutoTokenizer"]}))
    with pytest.raises(ValueError, match="AutoTokenizer"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("source", [3, None, [], {}, (), ("a", "b")])
def test_from_something_else(source):
    with pytest.raises(TypeError, match="is no teacher; pass a module, a function that makes one"):
        as_teacher(source)


# ---- a module as a teacher -------------------------------------------------------------------------------------


def test_takes_from_the_batch_what_its_forward_names():
    batch = {**text_batch(), "example_id": torch.arange(4), "weight": torch.ones(4)}
    expected = bert().eval()(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(ModuleTeacher(bert()).signal(batch, ["logits"])["logits"], expected)


def test_a_batch_with_nothing_for_it():
    with pytest.raises(ValueError, match=r"Sequential takes \['input'\], and the batch has \['pixels'\]"):
        ModuleTeacher(perceptron()).signal({"pixels": torch.ones(2, 4)}, ["logits"])


class NamesInputs(nn.Module):
    """Calls its argument what limbeck calls its positional inputs, as Perceiver and Keras do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.body(inputs)


@pytest.mark.parametrize("size", [1, 3])
def test_an_input_that_is_called_inputs(size):
    module, features = NamesInputs(), torch.randn(size, 4)
    assert torch.equal(ModuleTeacher(module).signal({"inputs": features}, ["logits"])["logits"], module(features))


def test_stays_in_eval_mode():
    module = perceptron()
    teacher = ModuleTeacher(module)
    module.train()
    teacher.signal({"input": points()[0]}, ["logits"])
    assert not module.training


def test_runs_without_building_a_graph():
    """Not even for an input that requires a gradient."""
    modes = []
    module = perceptron()
    module[0].register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    ModuleTeacher(module).signal({"input": points()[0].requires_grad_()}, ["logits"])
    assert modes == [False]


def test_follows_the_batch_to_its_device():
    teacher = ModuleTeacher(nn.Linear(4, 3))
    signal = teacher.signal({"input": torch.ones(2, 4, device="meta")}, ["logits"])
    assert signal["logits"].device.type == "meta"


def test_names_help_to_find_a_tap():
    names = set(ModuleTeacher(bert()).names())
    assert {"bert.encoder.layer.1", "classifier", "logits", "hidden_states"} <= names


def test_unnamed_outputs_say_how_to_name_them():
    with pytest.raises(TypeError, match="name them with read="):
        ModuleTeacher(Unnamed()).signal({"features": points()[0]}, ["logits"])


@pytest.mark.parametrize("fragment", ["encoder.layer.1", "pooler", "classifier"])
def test_every_weight_of_a_teacher_has_to_be_there(folder, tmp_path, fragment):
    """Pooler and head too: nothing trains them after this."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = {n: t for n, t in load_file(folder / "model.safetensors").items() if fragment not in n}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lack .*{fragment}.*, which would be random; use a folder"):
        load_pretrained(tmp_path)


def test_a_teacher_of_other_sizes_than_its_config_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"lack bert\.encoder\.layer\.0\.intermediate.* more, which would be random"
    ):
        load_pretrained(tmp_path)


def test_a_broken_file_is_one_clear_line(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot load a model from .* as safetensors: ") as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_cannot_run_is_no_teacher():
    with pytest.raises(TypeError, match=r"a teacher is a torch\.nn\.Module, got a NoneType; pass a module"):
        ModuleTeacher(None)


def test_an_input_that_the_batch_lacks_is_named():
    with pytest.raises(ValueError, match=r"Bilinear takes 'input2', and the batch has .*; add it, or rename"):
        ModuleTeacher(nn.Bilinear(4, 4, 3)).signal({"input1": points()[0]}, ["logits"])
