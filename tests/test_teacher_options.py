"""A module teacher on another device, in another precision, compiled: options of one line."""

import copy
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from limbeck import Distiller, Term
from limbeck.teachers import ModuleTeacher, as_teacher
from limbeck.teachers.precision import Int8Linear, converted
from limbeck.testing import TeacherContract
from tests.models import bert, convolutional, hooks, images, perceptron, points, text_batch

EAGER = {"backend": "eager"}
"""Traces as any backend does, and generates no code, which takes seconds."""


class WithOptions(TeacherContract):
    wants = ("logits", "hidden_states.1", "bert.encoder.layer.0", "bert#pooler_output", "classifier#input")
    wrong_tap = "bert.encoder.layers.0"
    options: ClassVar = {}

    def teacher(self):
        return ModuleTeacher(bert(hidden_dropout_prob=0.5), **self.options)

    def batch(self):
        return text_batch()


class TestOnADevice(WithOptions):
    options: ClassVar = {"device": "cpu"}


class TestInBfloat16(WithOptions):
    options: ClassVar = {"dtype": "bf16"}
    tolerance = 0.05  # a matrix product may be summed in another order for another number of rows


class TestInFloat16(WithOptions):
    options: ClassVar = {"dtype": "fp16"}
    tolerance = 0.01


class TestInInt8(WithOptions):
    """With the tolerance of float32: what is said of an example does not depend on the others."""

    options: ClassVar = {"int8": True}
    wants = (*WithOptions.wants, "classifier")


class TestCompiled(TeacherContract):
    wants = ("logits", "1", "3#input")
    wrong_tap = "4"
    options: ClassVar = {"compile": EAGER}

    def teacher(self):
        return ModuleTeacher(perceptron(), **self.options)

    def batch(self):
        return {"input": points()[0]}


class TestCompiledInInt8(TestCompiled):
    options: ClassVar = {"int8": True, "compile": EAGER}


# ---- how near they come ----------------------------------------------------------------------------------------


def relative_error(ours, exact):
    return ((ours.float() - exact).norm() / exact.norm()).item()


BOUNDS = [({"dtype": "bf16"}, 0.02), ({"dtype": "fp16"}, 0.004), ({"int8": True}, 0.03), ({"dtype": "fp32"}, 1e-6)]


@pytest.mark.parametrize(("options", "bound"), BOUNDS)
@pytest.mark.parametrize("kind", ["bert", "perceptron", "convolutional"])
def test_signals_come_near_those_of_the_exact_teacher(options, bound, kind):
    """Within the precision's own error, for logits and for taps below them."""
    make = {"bert": bert, "perceptron": lambda: perceptron(width=64), "convolutional": convolutional}[kind]
    batch = {"bert": text_batch(8), "perceptron": {"input": points(8)[0]}, "convolutional": {}}[kind]
    batch = batch or {"pixel_values": images()[0]}
    taps = {"bert": "bert.encoder.layer.1", "perceptron": "1", "convolutional": "norm"}
    wants = ["logits", taps[kind]]
    exact = ModuleTeacher(make()).signal(batch, wants)
    ours = ModuleTeacher(make(), **options).signal(batch, wants)
    for tap in wants:
        assert relative_error(ours[tap], exact[tap]) < bound
    if options != {"dtype": "fp32"}:
        assert not torch.equal(ours["logits"].float(), exact["logits"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 3, 5), (7, 64, 33), (0, 4, 3)])
def test_int8_is_the_product_of_rounded_rows(rows, inner, outer, bias):
    """Against whole numbers in float64: rows of weights and of inputs on 127 levels of each sign."""
    linear = nn.Linear(inner, outer, bias=bias)
    values = torch.randn(rows, inner) * torch.logspace(-3, 3, rows).unsqueeze(-1)

    def levels(matrix):
        matrix = matrix.detach().numpy()
        step = np.abs(matrix).max(-1, keepdims=True, initial=1e-30) / np.float32(127)
        return np.rint(matrix / step).astype(np.float64), step.astype(np.float64)

    (left, left_step), (right, right_step) = levels(values), levels(linear.weight)
    expected = (left @ right.T) * left_step * right_step.T
    expected += linear.bias.detach().double().numpy() if bias else 0
    ours = Int8Linear(linear)
    np.testing.assert_allclose(ours(values).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.weight.numpy(), right * right_step, rtol=1e-6)


def test_int8_keeps_what_is_not_a_number_visible():
    ours = Int8Linear(nn.Linear(3, 2))
    for bad in (torch.nan, torch.inf):
        result = ours(torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 0.0]]))
        assert not result[0].isfinite().any()
        assert result[1].isfinite().all()
    assert torch.equal(ours(torch.zeros(1, 3)), ours.bias.unsqueeze(0))


def test_int8_in_torch_own_transformer():
    """Which reads the weights of its layers past their forward."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    features = torch.randn(2, 5, 16)
    ours = ModuleTeacher(layer, int8=True).signal({"src": features}, ["logits"])["logits"]
    assert relative_error(ours, layer.eval()(features)) < 0.02


def test_rotary_frequencies_keep_their_digits():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("inv_freq", torch.linspace(0.001, 1.0, 7), persistent=False)
            self.register_buffer("mean", torch.linspace(0.001, 1.0, 7))

    copied = converted(Rotary(), "bf16")
    assert torch.equal(copied.inv_freq, Rotary().inv_freq)
    assert copied.mean.dtype == torch.bfloat16


# ---- what they leave alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"int8": True}])
def test_the_users_module_is_not_changed(options):
    module = bert()
    before = copy.deepcopy(module.state_dict())
    teacher = ModuleTeacher(module, **options)
    teacher.signal(text_batch(), ["logits"])
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert hooks(module) == hooks(teacher.module) == 0
    with torch.no_grad():
        first = teacher.signal(text_batch(), ["logits"])["logits"]
        for parameter in module.parameters():
            parameter.zero_()
        assert torch.equal(teacher.signal(text_batch(), ["logits"])["logits"], first)


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"int8": True}])
def test_a_chosen_precision_holds_under_autocast(options):
    exact = ModuleTeacher(bert(), **options).signal(text_batch(), ["logits"])["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        ours = ModuleTeacher(bert(), **options).signal(text_batch(), ["logits"])["logits"]
        follows = ModuleTeacher(bert()).signal(text_batch(), ["logits"])["logits"]
    assert torch.equal(ours, exact)
    assert follows.dtype == torch.bfloat16


def test_weights_that_are_tied_stay_tied():
    torch.manual_seed(0)
    model = bert(kind="BertForMaskedLM")
    teacher = ModuleTeacher(model, dtype="bf16")
    decoder = teacher.module.get_output_embeddings().weight
    assert decoder is teacher.module.get_input_embeddings().weight
    assert decoder.dtype == torch.bfloat16


def test_a_student_learns_from_every_kind():
    features, labels = points()
    for options in ({"dtype": "bf16"}, {"int8": True}, {"compile": EAGER}, {"device": "cpu"}):
        student = perceptron(seed=4)
        terms = [
            Term("logits", loss="forward_kl", temperature=2.0, name="kd"),
            Term("1", "1", loss="mse", name="hidden"),
        ]
        out = Distiller(student, ModuleTeacher(perceptron(), **options), terms)(features, labels)
        exact = Distiller(perceptron(seed=4), perceptron(), terms)(features, labels)
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        assert relative_error(out.loss.detach(), exact.loss.detach()) < 0.05
        assert all(p.grad.isfinite().all() for p in student.parameters())


@pytest.fixture
def nothing_compiled():
    """Of one function PyTorch keeps a few compilations only."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_teacher_is_compiled_once_for_all_that_is_asked():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    teacher = ModuleTeacher(perceptron(), compile={"backend": backend})
    exact = ModuleTeacher(perceptron())
    batch = {"input": points()[0]}
    asked = [["logits"], ["1", "logits"], ["3#input", "0"]]
    for wants in asked * 2:
        ours, theirs = teacher.signal(batch, wants), exact.signal(batch, wants)
        for tap in wants:
            torch.testing.assert_close(ours[tap], theirs[tap])
    compiled = len(graphs)
    for wants in asked * 3:
        teacher.signal(batch, wants)
    assert len(graphs) == compiled > 0


def test_a_compiled_teacher_gives_what_transformers_gives_on_request():
    wants = ["logits", "hidden_states.1", "bert.encoder.layer.0"]
    ours = ModuleTeacher(bert(layers=1), compile=EAGER).signal(text_batch(), wants)
    exact = ModuleTeacher(bert(layers=1)).signal(text_batch(), wants)
    for tap in wants:
        torch.testing.assert_close(ours[tap], exact[tap])


# ---- where they are said ---------------------------------------------------------------------------------------


def test_identity_tells_precisions_apart():
    kinds = [{}, {"dtype": "fp32"}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"int8": True}]
    said = [ModuleTeacher(perceptron(), **options).identity() for options in kinds]
    assert all(one != other for i, one in enumerate(said) for other in said[:i])
    same = [
        ModuleTeacher(perceptron(), **options).identity() for options in ({"device": "cpu"}, {"compile": EAGER})
    ]
    assert same == [said[0]] * 2


def test_options_for_any_source(tmp_path):
    bert(seed=5).save_pretrained(tmp_path)
    sources = [bert(seed=5), lambda: bert(seed=5), (bert, (), {"seed": 5}), tmp_path, str(tmp_path)]
    found = [as_teacher(s, dtype="bf16").signal(text_batch(), ["logits"])["logits"] for s in sources]
    assert all(logits.dtype == torch.bfloat16 and torch.equal(logits, found[0]) for logits in found)
    named = as_teacher(perceptron(), lambda output: {"scores": output}, int8=True)
    assert named.signal({"input": points()[0]}, ["scores"])["scores"].shape == (6, 3)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dtype": "int4"}, ValueError, r"unknown dtype 'int4' for a teacher; known: fp32, bf16, fp16"),
        ({"device": "gpu"}, ValueError, r"a teacher cannot be on 'gpu': .*; choose another device"),
        ({"device": "cuda:99"}, ValueError, r"a teacher cannot be on 'cuda:99': .*; choose another device"),
        ({"int8": True, "dtype": "bf16"}, ValueError, r"computes in int8 or in bf16; leave one of them out"),
        ({"int8": True, "device": "meta"}, ValueError, r"int8 is for the CPU, and the device is 'meta'"),
        ({"compile": "fast"}, TypeError, r"compile is True, False or a dict of options .*, got 'fast'"),
        ({"dtpe": "bf16"}, TypeError, r"a teacher has no option 'dtpe'; did you mean 'dtype'\?"),
    ],
)
def test_wrong_options_are_one_clear_line(options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        as_teacher(perceptron(), **options)
    assert "\n" not in str(caught.value)


def test_options_come_where_the_teacher_is_made():
    with pytest.raises(TypeError, match="a ModuleTeacher takes no 'dtype' any more"):
        as_teacher(ModuleTeacher(perceptron()), dtype="bf16")


def test_int8_needs_something_to_quantise():
    with pytest.raises(ValueError, match=r"int8 is for nn.Linear, and Sequential has none; leave int8 out"):
        ModuleTeacher(nn.Sequential(nn.Conv2d(3, 4, 1)), int8=True)


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"int8": True}, {"device": "cpu"}])
def test_a_part_of_a_converted_teacher_is_not_lent(options):
    """A loss would pass the student's features through it, and gradients back."""
    distiller = Distiller(
        perceptron(seed=1), ModuleTeacher(perceptron(), **options), [Term("logits", loss="forward_kl")]
    )
    with pytest.raises(ValueError, match=r"through the teacher's '3', which is on a device or in a precision of"):
        distiller._borrow("3", None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"compile": EAGER}])
@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_teacher_on_another_device(there, here, options):
    batch = {key: value.to(here) for key, value in text_batch().items()}
    wants = ["logits", "bert.encoder.layer.1"]
    teacher = ModuleTeacher(bert(), device=there, **options)
    ours = teacher.signal(batch, wants)
    exact = ModuleTeacher(bert()).signal(text_batch(), wants)
    for tap in wants:
        assert ours[tap].device.type == here
        assert relative_error(ours[tap].cpu(), exact[tap]) < 0.02
    assert {parameter.device.type for parameter in teacher.module.parameters()} == {there}
    assert {value.device.type for value in batch.values()} == {here}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_int8_stays_on_the_cpu():
    batch = {key: value.to("cuda") for key, value in text_batch().items()}
    ours = ModuleTeacher(bert(), int8=True).signal(batch, ["logits"])["logits"]
    assert ours.device.type == "cuda"
    exact = ModuleTeacher(bert(), int8=True).signal(text_batch(), ["logits"])["logits"]
    assert torch.equal(ours.cpu(), exact)


def test_a_teacher_stays_on_its_device():
    """The batch goes there, and the signals go back, which from the device without contents is an error."""
    teacher = ModuleTeacher(perceptron(), device="meta")
    teacher.signal({"input": points()[0].to("meta")}, ["logits"])
    with pytest.raises(
        ValueError, match="the teacher is on 'meta', which holds no values to give; choose another"
    ):
        teacher.signal({"input": points()[0]}, ["logits"])
    assert {parameter.device.type for parameter in teacher.module.parameters()} == {"meta"}
    stays = ModuleTeacher(perceptron(), device="cpu")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        stays.signal({"input": points()[0].to("meta")}, ["logits"])
    assert {parameter.device.type for parameter in stays.module.parameters()} == {"cpu"}
