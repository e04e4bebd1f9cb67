"""Layer by layer: each block of the student learns alone on what the teacher's block was given."""

import copy

import pytest
import torch
from torch import nn

from limbeck import Distiller, Self, Settings, Term, fit
from limbeck.cache import Store
from limbeck.teachers import Cached, Given, ModuleTeacher
from tests.models import bert, gradients, hooks, perceptron, points, text_batch
from tests.test_taps import replicas, together

PAIRS = [("bert.encoder.layer.0", "bert.encoder.layer.1"), ("bert.encoder.layer.1", "bert.encoder.layer.3")]


def terms(**options):
    return [Term(s, t, loss="mse", name=f"block{i}", **options) for i, (s, t) in enumerate(PAIRS)]


def models():
    return bert(layers=2), bert(layers=4, seed=5)


def inputs(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def calls_of(teacher, batch):
    """What the teacher's blocks are given and give, read by hooks of the test's own."""
    seen, handles = {}, []
    for _, path in PAIRS:

        def keep(module, args, named, output, path=path):
            seen[path] = args, named, output

        handles.append(teacher.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        teacher.eval()(**inputs(batch))
    for handle in handles:
        handle.remove()
    return seen


def alone(student, teacher, batch):
    """Gradients of each block by running this block alone on the teacher's input."""
    student, seen = copy.deepcopy(student), calls_of(teacher, batch)
    counts = batch["attention_mask"].bool()
    total = 0.0
    for path, teacher_path in PAIRS:
        args, named, target = seen[teacher_path]
        output = student.get_submodule(path)(*args, **named)
        total = total + (output - target).square().mean(-1)[counts].mean()
    total.backward()
    return total.detach(), gradients(student)


def test_each_blocks_gradient_is_that_of_the_block_alone():
    student, teacher = models()
    loss, expected = alone(student, teacher, text_batch())
    out = Distiller(student, teacher, terms(), layerwise=True).train()(**text_batch())
    out.loss.backward()
    torch.testing.assert_close(out.loss, loss)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert expected["bert.encoder.layer.0.output.dense.weight"].any()
    assert not expected["bert.embeddings.word_embeddings.weight"].any()


def test_it_is_another_training_than_without():
    student, teacher = models()
    plain, layerwise = (Distiller(copy.deepcopy(student), teacher, terms(), layerwise=on).train() for on in (0, 1))
    assert plain(**text_batch()).loss.item() != pytest.approx(layerwise(**text_batch()).loss.item(), rel=1e-2)


def test_nothing_else_trains_until_export():
    student, teacher = models()
    student.classifier.requires_grad_(False)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    distiller = Distiller(student, teacher, terms(project="linear"), layerwise=True, sample=text_batch())
    trained = {name for name, p in distiller.named_parameters() if p.requires_grad}
    blocks = {f"student.{name}" for name in before if name.startswith("bert.encoder.layer")}
    assert trained == blocks | {n for n, _ in distiller.named_parameters() if n.startswith("objective.")}
    data = [{key: value[i] for key, value in text_batch().items()} for i in range(4)]
    start = copy.deepcopy(student.state_dict())
    fit(distiller, data, None, Settings(steps=3, batch_size=2, learning_rate=1e-2))
    exported = distiller.export()
    assert exported is student
    assert {name: p.requires_grad for name, p in exported.named_parameters()} == before
    assert hooks(exported) == 0
    moved = {name for name, tensor in exported.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved
    assert all(name.startswith("bert.encoder.layer") for name in moved)


def test_training_goes_on_after_an_export():
    """As where a copy is saved on the way."""
    student, teacher = models()
    distiller = Distiller(student, teacher, terms(), layerwise=True).train()
    first = distiller(**text_batch()).loss
    distiller.export()
    again = distiller(**text_batch())
    assert torch.equal(first, again.loss)
    again.loss.backward()
    assert student.bert.embeddings.word_embeddings.weight.grad is None


def test_a_copy_learns_for_itself():
    student, teacher = models()
    distiller = Distiller(student, teacher, terms(), layerwise=True).train()
    distiller(**text_batch()).loss.backward()
    student.zero_grad()
    copied = copy.deepcopy(distiller)
    _, expected = alone(student, teacher, text_batch(seed=2))
    copied(**text_batch(seed=2)).loss.backward()
    for name, gradient in gradients(copied.student).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert not any(gradient.any() for gradient in gradients(student).values())
    assert hooks(copied.export()) == 0
    assert hooks(student) == len(PAIRS)


def test_outside_of_a_step_the_student_is_itself():
    student, teacher = models()
    expected = copy.deepcopy(student).eval()(**inputs(text_batch())).logits
    distiller = Distiller(student, teacher, terms(), layerwise=True).train()
    distiller(**text_batch()).loss.backward()
    assert torch.equal(distiller.eval()(**inputs(text_batch())).logits, expected)
    assert torch.equal(student(**inputs(text_batch())).logits, expected)


def test_under_activation_checkpointing_the_gradient_is_the_same():
    """Blocks run once more in the backward pass, and must be given the same then."""
    student, teacher = models()
    _, expected = alone(student, teacher, text_batch())
    student.activation_checkpointing_enable({"use_reentrant": False})
    Distiller(student, teacher, terms(), layerwise=True).train()(**text_batch()).loss.backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_what_the_teacher_said_may_be_kept(tmp_path):
    student, teacher = models()
    direct, kept = (
        Distiller(copy.deepcopy(student), source, terms(), layerwise=True).train()
        for source in (teacher, Cached(ModuleTeacher(teacher), Store({}, tmp_path)))
    )
    assert kept.wants == (*(t for _, t in PAIRS), *(f"{t}#input" for _, t in PAIRS))
    expected = direct(**text_batch()).loss
    for _ in range(2):
        torch.testing.assert_close(kept(**text_batch()).loss, expected)
    assert kept.teacher.computed == 4


def test_what_the_teacher_said_may_come_with_the_batch():
    student, teacher = models()
    signal = ModuleTeacher(teacher).signal(
        text_batch(), Distiller(student, teacher, terms(), layerwise=True).wants
    )
    expected = Distiller(student, teacher, terms(), layerwise=True).train()(**text_batch()).loss
    given = Distiller(student, Given(), terms(), layerwise=True).train()
    torch.testing.assert_close(given(**text_batch(), teacher_cache=signal.values).loss, expected)


class Named(nn.Module):
    """Passes its features on by name."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.second = Block(width), Block(width)

    def forward(self, features):
        return self.second(hidden_states=self.first(hidden_states=features))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states):
        return torch.tanh(self.linear(hidden_states))


def test_inputs_that_are_passed_by_name():
    torch.manual_seed(0)
    student, teacher, features = Named(), Named(), points()[0]
    out = Distiller(student, teacher, [Term("second", loss="mse")], layerwise=True).train()(features=features)
    with torch.no_grad():
        given = teacher.first(features)
        target = teacher.second(given)
    expected = (student.second(given) - target).square().mean()
    torch.testing.assert_close(out.loss, expected)


def test_a_compiled_student_learns_the_same():
    torch.manual_seed(0)
    student, teacher, features = Named(), Named(), points()[0]
    distillers = [
        Distiller(copy.deepcopy(student), teacher, [Term("second", loss="mse")], layerwise=True).train()
        for _ in range(2)
    ]
    distillers[1].compile_student(backend="eager")
    for scale in (1.0, 2.0):
        expected, ours = (distiller(features=scale * features) for distiller in distillers)
        torch.testing.assert_close(ours.loss, expected.loss)


def test_replicas_learn_layer_by_layer():
    """Each in a thread of its own, as `torch.nn.DataParallel` runs them."""
    student, teacher = models()
    loss, expected = alone(student, teacher, text_batch())
    distiller = Distiller(student, teacher, terms(), layerwise=True, sample=text_batch()).train()
    counts = distiller.count(text_batch())
    parts = [{key: value[rows] for key, value in text_batch().items()} for rows in (slice(0, 1), slice(1, 4))]
    calls = [
        lambda _, replica=replica, part=part: replica(**part, counts=counts)["loss"]
        for replica, part in zip(replicas(distiller, 2), parts, strict=True)
    ]
    total = torch.stack(together(*calls)).sum()
    torch.testing.assert_close(total, loss)
    total.backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_shapes_that_differ():
    student, teacher = bert(layers=2), bert(layers=4, width=24, seed=5)
    with pytest.raises(
        ValueError,
        match=r"'bert.encoder.layer.0' of the student takes \(4, 7, 16\) and is given the teacher's \(4, 7, 24\) "
        r"\(bert.encoder.layer.1#input\); pair modules whose inputs have one shape, or leave layerwise out",
    ):
        Distiller(student, teacher, terms(project="linear"), layerwise=True).train().distil(text_batch())


@pytest.mark.parametrize(
    ("term", "teacher", "message"),
    [
        (
            Term("labels", loss="cross_entropy"),
            None,
            "layerwise=True compares modules, and this term reads labels",
        ),
        (Term("logits", loss="mse"), perceptron(seed=1), "'logits' is no module's output"),
        (Term("2#input", loss="mse"), perceptron(seed=1), "'2#input' is no module's output"),
        (Term("3", "logits", loss="mse"), perceptron(seed=1), "the teacher, which does not offer 'logits#input'"),
        (Term("3", "2", loss="mse"), Self(), "needs a teacher beside the student"),
    ],
)
def test_what_cannot_be_taught_layer_by_layer(term, teacher, message):
    with pytest.raises(ValueError, match=message):
        Distiller(perceptron(), teacher, [term], layerwise=True)


def test_two_inputs_for_one_module():
    pair = [Term("0", "0", loss="mse", name="a"), Term("0", "1", loss="mse", name="b")]
    with pytest.raises(ValueError, match="'0' would be given both '0#input' and '1#input'"):
        Distiller(perceptron(), perceptron(seed=1), pair, layerwise=True)
