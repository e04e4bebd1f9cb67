"""Batches in which student and teacher have inputs of their own, or bring along what the teacher said."""

import copy
import dataclasses
import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from limbeck import Distiller, Examples, Settings, Term, fit
from limbeck.batch import batch_size, collated, parts_of, rows, to_device, view
from limbeck.teachers import Given
from limbeck.train import predict
from limbeck.train.data import as_batches
from limbeck.types import TopK
from tests.models import bert, text_batch

TERMS = [Term("logits", loss="forward_kl", temperature=2.0, name="kd"), Term("labels", loss="cross_entropy")]
SETTINGS = Settings(epochs=2, batch_size=6, learning_rate=1e-2)


class Net(nn.Module):
    """Three numbers, or five, to logits of four classes; it counts its calls."""

    def __init__(self, width, seed, returns=None):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(width, 6), nn.Linear(6, 4)
        self.returns = returns
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        logits = self.head(self.body(x).tanh())
        return logits if self.returns is None else self.returns(logits)


def numbers(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    own, its = torch.randn(count, 3, generator=generator), torch.randn(count, 5, generator=generator)
    return own, its, torch.randint(4, (count,), generator=generator)


def models(**options):
    return Net(3, seed=1), Net(5, seed=2, **options)


def forms(own, its, labels):
    """The same batch in all the ways in which it may be written."""
    return {
        "labels outside": {"student": {"x": own}, "teacher": {"x": its}, "labels": labels},
        "labels inside": {"student": {"x": own, "labels": labels}, "teacher": {"x": its}},
        "labels in both": {"student": {"x": own, "labels": labels}, "teacher": {"x": its, "labels": labels}},
        "tuples": {"student": (own, labels), "teacher": (its, labels)},
        "lists": {"student": [own, labels], "teacher": [its, labels]},
        "tuples, labels outside": {"student": (own,), "teacher": (its,), "labels": labels},
        "tensors": {"student": own, "teacher": its, "labels": labels},
        "the teacher's beside": {"teacher": {"x": its}, "x": own, "labels": labels},
        "the student's beside": {"student": {"x": own}, "x": its, "labels": labels},
    }


FORMS = list(forms(*numbers()))


def by_hand(student, teacher, own, its, labels):
    """The definition in double precision: forward KL at temperature 2, times 4, and the cross-entropy."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    logits = student(own.double())
    said = (teacher(its.double()) / 2).softmax(-1).detach()
    kl = (said * (said.log() - (logits / 2).log_softmax(-1))).sum(-1) * 4
    cross = -logits.log_softmax(-1)[torch.arange(len(labels)), labels]
    loss = kl.mean() + cross.mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [False, True])
def test_each_model_reads_its_own_part(form, whole):
    data = numbers()
    student, teacher = models()
    batch = forms(*data)[form]
    distiller = Distiller(student, teacher, TERMS).train()
    out = distiller(batch) if whole else distiller(**batch)
    out.loss.backward()
    loss, gradient = by_hand(student, teacher, *data)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradients(student).double(), gradient, rtol=1e-4, atol=1e-6)
    assert distiller.count(batch) == {"examples": 8.0, "labels": 8.0}


@pytest.mark.parametrize("form", FORMS)
def test_in_eval_mode_the_student_reads_its_part_and_the_teacher_nothing(form):
    data = numbers()
    student, teacher = models()
    batch = forms(*data)[form]
    distiller = Distiller(student, teacher, TERMS).eval()
    with torch.no_grad():
        expected = student(data[0])
        assert torch.equal(distiller(**batch), expected)
        assert torch.equal(distiller(batch), expected)
    assert teacher.calls == 0


def test_a_mapping_that_is_an_input_is_no_part():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, features):
            return self.head(features["x"])

    own, _, labels = numbers()
    out = Distiller(Nested(), Nested(), TERMS).train()(features={"x": own}, labels=labels)
    assert out.terms["kd"] > 0
    assert parts_of({"features": {"x": own}, "labels": labels}) == set()


# What a batch brings along in place of the teacher's pass.

Parts = namedtuple("Parts", ["logits", "loss"])


@dataclasses.dataclass
class Described:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


RETURNS = {
    "a tensor": (None, None),
    "a dict": (lambda logits: {"logits": logits}, None),
    "a tuple": (lambda logits: (logits, logits.sum(-1)), lambda output: {"logits": output[0]}),
    "a named tuple": (lambda logits: Parts(logits, logits.sum(-1)), None),
    "a dataclass": (lambda logits: Described(logits), None),
    "a dataclass that is read": (lambda logits: Described(logits), lambda output: {"logits": output.logits}),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_with_a_cache_the_teacher_does_not_run_and_the_result_is_the_same(kind):
    returns, read = RETURNS[kind]
    own, its, labels = numbers()
    student, teacher = models(returns=returns)
    with torch.no_grad():
        said = teacher(its)
    results = []
    for batch in (
        {"student": (own, labels), "teacher": (its, labels)},
        {"student": (own, labels), "teacher": (its, labels), "teacher_cache": said},
        {"student": (own, labels), "teacher_cache": said},
        {"x": own, "labels": labels, "teacher_cache": said},
    ):
        learner = copy.deepcopy(student)
        before = teacher.calls
        distiller = Distiller(learner, teacher, TERMS, teacher_read=read).train()
        out = distiller(**rows(to_device(batch, torch.device("cpu")), 2, 7))
        out.loss.backward()
        assert (teacher.calls > before) == ("teacher_cache" not in batch)
        results.append((out.loss, gradients(learner)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_a_cache_needs_no_teacher_in_memory():
    own, its, labels = numbers()
    student, teacher = models()
    batch = {"student": (own, labels), "teacher_cache": {"logits": teacher(its)}}
    out = Distiller(student, Given(), TERMS).train()(**batch)
    assert out.loss.item() == pytest.approx(by_hand(student, teacher, own, its, labels)[0], rel=1e-5)
    with pytest.raises(ValueError, match="the batch has no 'teacher_cache', only"):
        Distiller(student, Given(), TERMS).train()(own, labels)


def hidden_terms():
    return [
        Term("logits", loss="forward_kl", name="kd"),
        Term("hidden_states.1", "hidden_states.2", loss="mse", name="hidden"),
        Term("attentions.0", "attentions.-1", loss="mse", name="attention"),
    ]


def test_the_output_of_a_transformers_model_is_a_cache():
    student, teacher = (bert(layers=n, seed=n, attn_implementation="eager") for n in (1, 2))
    batch = text_batch(size=6)
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        said = teacher.eval()(**inputs, output_hidden_states=True, output_attentions=True)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for extra in ({}, {"teacher_cache": said}, {"teacher_cache": dict(said)}):
        learner = copy.deepcopy(student)
        calls.clear()
        out = Distiller(learner, teacher, hidden_terms()).train()(**rows({**batch, **extra}, 0, 4))
        out.loss.backward()
        assert bool(calls) == (not extra)
        found.append((out.terms, learner.classifier.weight.grad))
    for terms, gradient in found[1:]:
        assert all(torch.equal(terms[name], found[0][0][name]) for name in terms)
        assert torch.equal(gradient, found[0][1])


def known(logits, k=2):
    """The largest logits, and what the others hold together."""
    order = logits.argsort(-1, descending=True)
    values = logits.gather(-1, order)
    return TopK(order[..., :k], logits.shape[-1], (1.0,), values[..., :k], values[..., k:].logsumexp(-1, True))


def test_sparse_targets_travel_with_the_examples():
    own, its, labels = numbers(12)
    student, teacher = models()
    said = known(teacher(its).detach())
    items = [
        {"student": {"x": own[i]}, "labels": labels[i], "teacher_cache": {"logits": said[i]}} for i in range(12)
    ]
    whole = collated(items)
    assert all(
        torch.equal(getattr(whole["teacher_cache"]["logits"], n), getattr(said, n)) for n in ("ids", "values")
    )
    part = rows(whole, 3, 5)["teacher_cache"]["logits"]
    assert part.shape == (2, 4)
    assert torch.equal(part.log_rest, said.log_rest[3:5])
    learner = copy.deepcopy(student)
    result = fit(Distiller(learner, Given(), [Term("logits", loss="forward_kl")]), items, settings=SETTINGS)
    assert result.steps == 4
    assert not torch.equal(weights(learner), weights(student))


# Training.


class TextBrewers(Dataset):
    """A data set as TextBrewer documents it."""

    def __init__(self, teacher_dataset, student_dataset, teacher_cache=None):
        self.teacher_dataset, self.student_dataset = teacher_dataset, student_dataset
        self.teacher_cache = teacher_cache

    def __len__(self):
        return len(self.student_dataset)

    def __getitem__(self, i):
        item = {"teacher": self.teacher_dataset[i], "student": self.student_dataset[i]}
        return item if self.teacher_cache is None else {**item, "teacher_cache": self.teacher_cache[i]}


class Exact(nn.Linear):
    """Its sums are exact in single precision, so that no batch it stands in changes a bit; it counts its calls."""

    def __init__(self):
        super().__init__(5, 4)
        self.calls = 0
        self.weight.data = torch.randint(-8, 9, (4, 5), generator=torch.Generator().manual_seed(1)) / 8.0
        self.bias.data = torch.arange(4) / 4.0

    def forward(self, input):
        self.calls += 1
        logits = super().forward((4 * input).round())
        return logits, logits.sum(-1)


def training_data(teacher, cached, count=24):
    own, its, labels = numbers(count)
    with torch.no_grad():
        logits, sums = teacher(its)
    said = list(zip(logits, sums, strict=True)) if cached else None
    return TextBrewers(TensorDataset(its, labels), TensorDataset(own, labels), said)


def trained(cached, loader=False, evaluate=True, **changes):
    student, teacher = models()[0], Exact()
    data = training_data(teacher, cached)
    train = DataLoader(data, batch_size=6, shuffle=True) if loader else data
    distiller = Distiller(student, teacher, TERMS, teacher_read=lambda out: {"logits": out[0]})
    before = teacher.calls
    result = fit(distiller, train, data if evaluate else None, SETTINGS.model_copy(update=changes))
    return result, weights(student), teacher.calls - before


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_from_given_values_equals_training_with_the_teacher(loader, accumulation):
    live, learned, calls = trained(False, loader, accumulation=accumulation)
    given, same, none = trained(True, loader, accumulation=accumulation)
    assert calls >= 8
    assert none == 0
    assert torch.equal(learned, same)
    assert live.history == given.history


def test_accumulation_changes_nothing():
    results = [trained(False, accumulation=n)[1] for n in (1, 3)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    assert not torch.allclose(results[0], trained(False, seed=1)[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("loader", [False, True])
def test_ranks_share_every_part_of_a_batch(loader):
    data = training_data(Exact(), cached=True)
    train = DataLoader(data, batch_size=6) if loader else data
    steps = [
        list(as_batches(train, SETTINGS.model_copy(update={"accumulation": n}), rank, world).epoch(0))
        for rank, world, n in ((0, 1, 1), (0, 2, 2), (1, 2, 2))
    ]
    for whole, *parts in zip(*steps, strict=True):
        (expected,) = whole.micro_batches
        found = [batch for part in parts for batch in part.micro_batches]
        assert len(found) == 4
        for key in ("student", "teacher", "teacher_cache"):
            for place in range(2):
                assert torch.equal(torch.cat([batch[key][place] for batch in found]), expected[key][place])


def test_predictions_are_made_on_the_part_of_the_model():
    own, its, labels = numbers(10)
    student, teacher = models()
    data = TextBrewers(TensorDataset(its, labels), TensorDataset(own, labels))
    for model, inputs, side in ((student, own, "student"), (teacher, its, "teacher")):
        found = predict(model, Examples(data), batch_size=4, side=side)
        torch.testing.assert_close(torch.from_numpy(found.logits), model(inputs).double().detach())
        assert found.labels.tolist() == labels.tolist()


# Bad input.


def refused(batch, message):
    """The same error up front, on the first batch, and on a later one."""
    student, teacher = models()
    for seen_before in (False, True):
        distiller = Distiller(student, teacher, TERMS).train()
        if seen_before:
            distiller(**forms(*numbers())["tuples"])
        with pytest.raises(ValueError, match=message):
            distiller(**batch)
    with pytest.raises(ValueError, match=message):
        Distiller(student, teacher, TERMS, sample=batch)
    with pytest.raises(ValueError, match=message):
        fit(Distiller(student, teacher, TERMS), DataLoader([batch], collate_fn=lambda batches: batches[0]))


def test_a_missing_part_is_named():
    own, its, labels = numbers()
    refused(
        {"teacher": (its,), "labels": labels}, "has inputs under 'teacher' and none for the student; add a part"
    )
    refused(
        {"student": (own,), "labels": labels}, "has inputs under 'student' and none for the teacher; add a part"
    )


def test_parts_with_other_numbers_of_examples_are_refused():
    own, its, labels = numbers()
    refused(
        {"student": (own, labels), "teacher": (its[:7],)}, "8 examples under 'student' and 7 under 'teacher'; give"
    )
    refused({"student": (own,), "teacher": (its,), "labels": labels[:5]}, "5 examples under 'labels' and 8 under")
    refused(
        {"student": (own, labels), "teacher_cache": {"logits": torch.zeros(9, 4)}},
        "8 examples under 'student' and 9 under 'teacher_cache'",
    )
    refused(
        {"x": own, "labels": labels, "teacher_cache": {"logits": torch.zeros(9, 4)}},
        "8 examples under 'labels' and 9 under 'teacher_cache'",
    )


def test_a_cache_without_a_tap_says_what_it_holds():
    own, _, labels = numbers()
    refused(
        {"student": (own, labels), "teacher_cache": {"hidden": torch.zeros(8, 4)}},
        "teacher_cache has no 'logits'; it holds 'hidden'",
    )
    taps = {"logits": torch.zeros(8, 4), "hidden_states": (torch.zeros(8, 6),)}
    terms = [*TERMS, Term("body", "hidden_states.1", loss="mse")]
    with pytest.raises(ValueError, match=r"tap 'hidden_states.1' asks for part 1 of 1"):
        Distiller(models()[0], Given(), terms).train()(student=(own, labels), teacher_cache=taps)
    terms = [*TERMS, Term("body", "pooled#0", loss="mse")]
    with pytest.raises(ValueError, match="teacher_cache has no 'pooled#0'; it holds 'logits', 'hidden_states'"):
        Distiller(models()[0], Given(), terms).train()(student=(own, labels), teacher_cache=taps)


def test_no_words_of_the_teacher_are_refused():
    with pytest.raises(
        ValueError, match="'teacher_cache' is None; give it what the teacher said, or leave it out"
    ):
        Given().signal({"input": torch.ones(2, 4), "teacher_cache": None}, ["logits"])


def test_one_tap_of_other_examples_is_refused():
    own, _, labels = numbers()
    taps = {"logits": torch.zeros(8, 4), "body": torch.zeros(6, 6)}
    terms = [*TERMS, Term("body", loss="mse")]
    with pytest.raises(
        ValueError, match="teacher_cache has 'body' of 6 examples, and the batch has 8; give it one"
    ):
        Distiller(models()[0], Given(), terms).train().distil({"student": (own, labels), "teacher_cache": taps})


def test_texts_are_cut_with_the_examples_of_their_part():
    batch = {"student": {"x": torch.arange(4)}, "teacher": {"text": ["a", "b", "c", "d"]}}
    assert rows(batch, 1, 3)["teacher"] == {"text": ["b", "c"]}
    assert batch_size(view(batch, "teacher")) == 4


# Orders of labels.


def classifiers(ours, theirs):
    def named(names, seed):
        return bert(labels=len(names), seed=seed, id2label=dict(enumerate(names)), label2id=None)

    return named(ours, 0), named(theirs, 1)


def test_another_order_of_labels_is_refused_and_cured_by_reading_in_order():
    student, teacher = classifiers(["no", "maybe", "yes"], ["yes", "no", "maybe"])
    kd = [Term("logits", loss="forward_kl")]
    message = r"classes are \['no', 'maybe', 'yes'\] and the teacher's \['yes', 'no', 'maybe'\].*\[1, 2, 0\]"
    with pytest.raises(ValueError, match=message):
        Distiller(student, teacher, kd)
    out = Distiller(student, teacher, kd, teacher_read=lambda o: {"logits": o.logits[..., [1, 2, 0]]}).train()
    batch = text_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        said, own = teacher(**inputs).logits, student(**inputs).logits
    chance = torch.stack([said[:, 1], said[:, 2], said[:, 0]], -1).softmax(-1)
    expected = (chance * (chance.log() - own.log_softmax(-1))).sum(-1).mean()
    assert out(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_other_names_of_as_many_labels_are_refused():
    student, teacher = classifiers(["no", "yes"], ["dog", "cat"])
    with pytest.raises(ValueError, match=r"\['no', 'yes'\] and the teacher's \['dog', 'cat'\].*name them alike"):
        Distiller(student, teacher, [Term("logits", loss="forward_kl")])


@pytest.mark.parametrize(
    ("ours", "theirs", "terms"),
    [
        (["no", "yes"], ["No", "YES"], [Term("logits", loss="forward_kl")]),
        (["LABEL_0", "LABEL_1"], ["no", "yes"], [Term("logits", loss="forward_kl")]),
        (["no", "yes"], ["yes", "no"], [Term("bert.pooler", loss="mse")]),
        (["no", "yes"], ["yes", "no"], [Term("labels", loss="cross_entropy")]),
    ],
)
def test_labels_that_agree_or_that_no_term_needs_are_no_matter(ours, theirs, terms):
    Distiller(*classifiers(ours, theirs), terms)


def test_the_document_runs():
    text = (Path(__file__).parent.parent / "docs" / "inputs.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "inputs.md", "exec"), names)
    assert names["examples"].batch([0])["student"]["input_ids"].shape == (1, 5)
