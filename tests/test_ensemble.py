"""Several teachers: how their logits are mixed, whose features are read, what runs."""

import numpy as np
import pytest
import torch
from torch import nn

from limbeck import Distiller, Settings, Term, fit
from limbeck.cache import Store
from limbeck.teachers import Cached, Ensemble, ModuleTeacher, Self
from limbeck.testing import TeacherContract
from limbeck.types import Signal, TopK
from tests.models import bert, perceptron, points, text_batch


class Says:
    """A teacher that gives what it was made with, row by row of the batch's ``row``; it counts its examples."""

    def __init__(self, **values):
        self.values, self.examples, self.calls = values, 0, 0

    def offers(self, tap):
        return tap in self.values

    def names(self):
        return list(self.values)

    def signal(self, batch, wants):
        self.examples += len(batch["row"])
        self.calls += 1
        return Signal({tap: self.values[tap][batch["row"]] for tap in wants})


def softmax(values):
    values = np.exp(values - values.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def drawn_logits(count=3, shape=(6, 4), seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) * scale for _ in range(count)]


def mixed(logits, labels=None, **options):
    batch = {"row": torch.arange(len(logits[0])), **({} if labels is None else {"labels": labels})}
    return Ensemble([Says(logits=z) for z in logits], **options).signal(batch, ["logits"])["logits"]


def doubles(logits):
    return [z.double().numpy() for z in logits]


SHAPES = [(6, 4), (3, 5, 4)]


# ---- the maths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_averaged_by_weight(shape):
    logits = drawn_logits(shape=shape)
    one, two, three = doubles(logits)
    expected = (1 * one + 2 * two + 5 * three) / 8
    ours = mixed(logits, weights=[1, 2, 5], mix="logits")
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_are_averaged_at_the_temperature(shape, temperature):
    logits = drawn_logits(shape=shape)
    one, two, three = (softmax(z / temperature) for z in doubles(logits))
    expected = (1 * one + 2 * two + 5 * three) / 8
    ours = mixed(logits, weights=[1, 2, 5], temperature=temperature).double().numpy()
    np.testing.assert_allclose(softmax(ours / temperature), expected, rtol=1e-5)
    np.testing.assert_allclose(ours, temperature * np.log(expected), rtol=1e-5, atol=1e-5)


def test_probabilities_are_averaged_without_underflow():
    """A class that no float32 probability can hold keeps its logit."""
    logits = [torch.tensor([[0.0, -300.0]]), torch.tensor([[0.0, -200.0]])]
    ours = mixed(logits)
    np.testing.assert_allclose(ours.numpy(), [[0.0, -200.0 - np.log(2)]], rtol=1e-6)


def naive_confidence(logits, labels, weights, temperature):
    """CA-MKD by its formulas, position by position."""
    result = np.empty(logits[0].shape)
    for place in np.ndindex(*logits[0].shape[:-1]):
        costs = []
        for z in logits:
            p = softmax(z[place])
            label = -100 if labels is None else labels[place]
            costs.append(-np.log(p[label]) if label != -100 else -(p * np.log(p)).sum())
        exponentials = np.exp(costs)
        trust = (1 - exponentials / exponentials.sum()) / (len(logits) - 1) * np.array(weights)
        trust /= trust.sum()
        mean = sum(w * softmax(z[place] / temperature) for w, z in zip(trust, logits, strict=True))
        result[place] = temperature * np.log(mean)
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("labelled", ["all", "some", "none"])
def test_confidence_is_that_of_the_paper(shape, labelled):
    logits = drawn_logits(shape=shape)
    labels = torch.randint(4, shape[:-1], generator=torch.Generator().manual_seed(3))
    if labelled == "some":
        labels.flatten()[::2] = -100
    labels = None if labelled == "none" else labels
    theirs = None if labels is None else labels.numpy()
    expected = naive_confidence(doubles(logits), theirs, [1, 2, 5], 2.0)
    ours = mixed(logits, labels, weights=[1, 2, 5], mix="per-sample confidence", temperature=2.0)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_confidence_of_a_teacher_that_excludes_the_label():
    """Its cross-entropy is infinite: of two, the other alone speaks; where all do so, they speak alike."""
    sure = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    other = torch.tensor([[1.0, 0.0], [0.0, -torch.inf]])
    ours = torch.softmax(mixed([sure, other], torch.tensor([1, 1]), mix="per-sample confidence"), -1)
    torch.testing.assert_close(ours, torch.softmax(other, -1))


def test_confidence_of_one_teacher_is_that_teacher():
    (only,) = drawn_logits(1)
    ours = mixed([only], torch.zeros(6, dtype=torch.long), mix="per-sample confidence")
    torch.testing.assert_close(torch.softmax(ours, -1), torch.softmax(only, -1))


def test_confident_mixture_is_the_published_weighted_loss():
    """Sum over teachers of weight times cross-entropy, in value and in the student's gradient."""
    logits = drawn_logits(2)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    batch = {"row": torch.arange(6), "input": torch.eye(6), "labels": labels}
    student = nn.Linear(6, 4)
    ensemble = Ensemble([Says(logits=z) for z in logits], mix="per-sample confidence", temperature=3.0)
    term = Term("logits", loss="soft_cross_entropy", temperature=3.0)
    Distiller(student, ensemble, [term])(**batch).loss.backward()

    weight = student.weight.detach().double().requires_grad_()
    log_q = torch.log_softmax((torch.eye(6).double() @ weight.T + student.bias.detach()) / 3, -1)
    costs = torch.stack([-torch.log_softmax(z.double(), -1)[torch.arange(6), labels] for z in logits])
    shares = 1 - torch.softmax(costs, 0)
    losses = torch.stack([-(torch.softmax(z.double() / 3, -1) * log_q).sum(-1) for z in logits])
    ((shares * losses).sum(0) * 9).mean().backward()
    torch.testing.assert_close(student.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_a_term_at_the_same_temperature_sees_the_mean_of_probabilities():
    one, two = perceptron(seed=1), perceptron(seed=2)
    features, labels = points()
    student = perceptron(seed=3)
    distiller = Distiller(
        student,
        Ensemble([one, two], temperature=2.0),
        [Term("logits", loss="forward_kl", temperature=2.0, name="kd")],
    )
    value = distiller(features, labels).terms["kd"]
    p = (torch.softmax(one(features) / 2, -1) + torch.softmax(two(features) / 2, -1)) / 2
    q = torch.log_softmax(student(features) / 2, -1)
    torch.testing.assert_close(value, 4 * (p * (p.log() - q)).sum(-1).mean())


def test_half_precision_is_averaged_in_full():
    logits = [z.bfloat16() for z in drawn_logits()]
    for mix in ("logits", "probabilities", "per-sample confidence"):
        ours = mixed(logits, mix=mix)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, mixed([z.float() for z in logits], mix=mix))


# ---- one at random ---------------------------------------------------------------------------------------------


def test_random_takes_each_example_from_one_teacher_by_the_weights():
    size = 4000
    logits = drawn_logits(3, (size, 2))
    ours = mixed(logits, weights=[1, 3, 0], mix="random")
    from_each = [(ours == z).all(-1) for z in logits]
    assert (from_each[0] ^ from_each[1]).all()
    share = from_each[0].double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / size) ** 0.5
    torch.manual_seed(7)
    first = mixed(logits, mix="random")
    assert not torch.equal(first, mixed(logits, mix="random"))
    torch.manual_seed(7)
    assert torch.equal(first, mixed(logits, mix="random"))


def test_random_runs_the_drawn_examples_alone():
    teachers = [Says(logits=z, other_logits=-z) for z in drawn_logits()]
    ensemble = Ensemble(teachers, mix="random")
    signal = ensemble.signal({"row": torch.arange(6)}, ["logits", "other_logits"])
    assert sum(t.examples for t in teachers) == 6
    assert torch.equal(signal["logits"], -signal["other_logits"])


def test_random_and_one_teacher_for_itself():
    teachers = [Says(logits=z, hidden=z + 1) for z in drawn_logits(2)]
    ensemble = Ensemble(teachers, mix="random")
    for _ in range(10):
        signal = ensemble.signal({"row": torch.arange(6)}, ["0:hidden", "logits", "0:logits"])
        assert torch.equal(signal["0:hidden"], teachers[0].values["hidden"])
        assert torch.equal(signal["0:logits"], teachers[0].values["logits"])
        rows = torch.stack([(signal["logits"] == t.values["logits"]).all(-1) for t in teachers])
        assert rows.any(0).all()
    assert all(t.calls <= 10 for t in teachers)


def top_k(logits, k=2, temperature=1.0):
    values, ids = logits.topk(k)
    rest = logits.scatter(-1, ids, -torch.inf).div(temperature).logsumexp(-1, keepdim=True)
    return TopK(ids, logits.shape[-1], (temperature,), values, rest)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_takes_sparse_targets_too(shape):
    logits = drawn_logits(2, shape)
    sparse = [top_k(z) for z in logits]
    ours = mixed(sparse, mix="random")
    assert isinstance(ours, TopK)
    assert ours.shape == shape
    for row in range(shape[0]):
        same = [
            torch.equal(ours.values[row], s.values[row])
            and torch.equal(ours.ids[row], s.ids[row])
            and torch.equal(ours.log_rest[row], s.log_rest[row])
            for s in sparse
        ]
        assert sum(same) == 1


def test_sparse_targets_cannot_be_averaged():
    logits = drawn_logits(2)
    with pytest.raises(ValueError, match=r"teacher '1' gives a TopK for 'logits'.*mix='random' can take it"):
        mixed([logits[0], top_k(logits[1])])
    for others in (logits[1], top_k(logits[1], k=3), top_k(logits[1], temperature=2.0)):
        torch.manual_seed(1)
        with pytest.raises(ValueError, match=r"differs in kind, size or temperatures"):
            mixed([top_k(logits[0]), others], mix="random")


# ---- whose is read, and what runs ------------------------------------------------------------------------------


def test_only_those_that_are_needed_run():
    teachers = [Says(logits=z, hidden=z) for z in drawn_logits()]
    ensemble = Ensemble(dict(zip("abc", teachers, strict=True)), weights={"a": 1, "c": 2, "b": 0})
    batch = {"row": torch.arange(6)}
    ensemble.signal(batch, ["b:hidden"])
    assert [t.calls for t in teachers] == [0, 1, 0]
    ensemble.signal(batch, ["logits", "c:hidden", "c:logits"])
    assert [t.calls for t in teachers] == [1, 1, 1]


def test_unqualified_features_are_refused_with_the_names_to_write():
    ensemble = Ensemble({"small": bert(), "large": bert(layers=3)})
    batch = text_batch()
    with pytest.raises(ValueError, match=r"write 'small:bert.encoder.layer.1' or 'large:bert.encoder.layer.1'$"):
        ensemble.signal(batch, ["bert.encoder.layer.1"])
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.2' is one teacher's; write 'large:bert.enc"):
        ensemble.signal(batch, ["bert.encoder.layer.2"])
    with pytest.raises(ValueError, match=r"no teacher of the ensemble for 'smal:logits'; did you mean 'small'"):
        ensemble.signal(batch, ["smal:logits"])
    with pytest.raises(
        ValueError, match=r"teacher 'small' has no 'small:bert.pooller'; did you mean 'bert.pooler"
    ):
        ensemble.signal(batch, ["small:bert.pooller"])
    student = bert(layers=1)
    with pytest.raises(ValueError, match=r"did you mean 'large:bert.pooler' or 'small:bert.pooler'"):
        Distiller(student, ensemble, [Term("bert.pooler", loss="mse")])


def test_logits_that_one_teacher_lacks():
    first, second = drawn_logits(2)
    ensemble = Ensemble({"a": Says(logits=first), "b": Says(hidden=second)})
    assert not ensemble.offers("logits")
    with pytest.raises(ValueError, match=r"'logits' cannot be mixed, teacher 'b' has none; write 'a:logits'"):
        ensemble.signal({"row": torch.arange(6)}, ["logits"])
    alone = Ensemble({"a": Says(logits=first), "b": Says(hidden=second)}, weights=[1, 0])
    torch.testing.assert_close(
        alone.signal({"row": torch.arange(6)}, ["logits"])["logits"].softmax(-1), first.softmax(-1)
    )


def test_each_member_has_inputs_of_its_own():
    first, second = bert(seed=1), bert(seed=2, layers=1)
    own, other, labels = text_batch(seed=5), text_batch(seed=6, length=9), text_batch()["labels"]
    inputs = {k: v for k, v in own.items() if k != "labels"}, {k: v for k, v in other.items() if k != "labels"}
    student = bert(seed=3, layers=1)
    terms = [
        Term("logits", loss="forward_kl", name="kd"),
        Term("bert.encoder.layer.0", "a:bert.encoder.layer.1", loss="mse", name="hidden"),
    ]
    distiller = Distiller(student, Ensemble({"a": first, "b": second}), terms)
    batch = {"student": inputs[0], "teacher": {"a": inputs[0], "b": inputs[1]}, "labels": labels}
    out = distiller(**batch)
    with torch.no_grad():
        p = (first(**inputs[0]).logits.softmax(-1) + second(**inputs[1]).logits.softmax(-1)) / 2
        q = student(**inputs[0]).logits.log_softmax(-1)
    torch.testing.assert_close(out.terms["kd"], (p * (p.log() - q)).sum(-1).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", ["probabilities", "per-sample confidence", "random"])
def test_members_with_caches_of_their_own_run_once(mix):
    features, labels = points(12)
    data = [{"input": x, "labels": y} for x, y in zip(features, labels, strict=True)]
    members = [Cached(ModuleTeacher(perceptron(seed=seed)), Store({"seed": seed})) for seed in (1, 2)]
    distiller = Distiller(perceptron(seed=3), Ensemble(members, mix=mix), [Term("logits", loss="forward_kl")])
    fit(distiller, data, settings=Settings(epochs=8, batch_size=4))
    assert [m.computed for m in members] == [12, 12]
    fit(distiller, data, settings=Settings(epochs=1, batch_size=3))
    assert [m.computed for m in members] == [12, 12]
    assert all(m.asked > 12 for m in members)


def test_caches_of_members_go_to_disk_with_a_checkpoint(tmp_path):
    members = [
        Cached(ModuleTeacher(perceptron(seed=seed)), Store({"seed": seed}, tmp_path / str(seed)))
        for seed in (1, 2)
    ]
    distiller = Distiller(perceptron(seed=3), Ensemble(members), [Term("logits", loss="forward_kl")])
    distiller(*points())
    distiller.keep()
    for seed in (1, 2):
        assert len(Store({"seed": seed}, tmp_path / str(seed))) == 6


def test_ensembles_of_ensembles():
    logits = drawn_logits()
    inner = Ensemble({"b": Says(logits=logits[1], hidden=logits[1]), "c": Says(logits=logits[2])}, mix="logits")
    outer = Ensemble({"a": Says(logits=logits[0]), "rest": inner}, weights=[1, 2], mix="logits")
    signal = outer.signal({"row": torch.arange(6)}, ["logits", "rest:b:hidden"])
    torch.testing.assert_close(signal["logits"], sum(logits) / 3)
    assert torch.equal(signal["rest:b:hidden"], logits[1])


def test_a_loss_borrows_from_one_member():
    teacher, student = perceptron(seed=1), perceptron(seed=2)
    distiller = Distiller(
        student, Ensemble({"a": teacher, "b": perceptron(seed=5)}), [Term("logits", loss="forward_kl")]
    )
    assert distiller._borrow("a:3", None) is teacher[3]
    with pytest.raises(ValueError, match=r"the loss needs the teacher's '3', and the teacher is no module"):
        distiller._borrow("3", None)


def test_weights_shared_with_a_member_are_refused():
    student = perceptron()
    with pytest.raises(ValueError, match=r"share weights"):
        Distiller(student, Ensemble([perceptron(), student]), [Term("logits", loss="forward_kl")])


# ---- the contract ----------------------------------------------------------------------------------------------


class TestProbabilities(TeacherContract):
    wants = ("logits", "0:1", "1:logits", "1:3#input")
    wrong_tap = "0:4"
    mix = "probabilities"

    def teacher(self):
        return Ensemble([perceptron(seed=1), perceptron(seed=2, width=7)], weights=[1, 2], mix=self.mix)

    def batch(self):
        features, labels = points()
        return {"input": features, "labels": labels}


class TestLogits(TestProbabilities):
    mix = "logits"
    wrong_tap = "1"


class TestConfidence(TestProbabilities):
    mix = "per-sample confidence"
    wrong_tap = "2:logits"


class TestOwnInputs(TeacherContract):
    wants = ("logits", "b:hidden_states.1")
    wrong_tap = "hidden_states.1"

    def teacher(self):
        return Ensemble({"a": bert(seed=1), "b": Cached(ModuleTeacher(bert(seed=2)), Store({"seed": 2}))})

    def batch(self):
        other = {k: v for k, v in text_batch(seed=6, length=9).items() if k != "labels"}
        return {**text_batch(), "b": other}


class TestSparseMembers(TeacherContract):
    wants = ("0:logits", "1:logits")

    def teacher(self):
        return Ensemble([Says(logits=top_k(z)) for z in drawn_logits(2)], mix="random")

    def batch(self):
        return {"row": torch.arange(6)}

    def test_says_who_it_is(self):
        """One that draws at random says why not; see below."""


# ---- what identifies it, and what is refused -------------------------------------------------------------------


def test_identity_tells_ensembles_apart():
    one, two = perceptron(seed=1), perceptron(seed=2)

    def identity(teachers, **options):
        return Ensemble(teachers, **options).identity()

    base = identity([one, two])
    assert base == identity([perceptron(seed=1), perceptron(seed=2)])
    assert base == identity([one, two], weights=[3, 3])
    others = [
        identity([two, one]),
        identity([one, two], weights=[1, 2]),
        identity([one, two], mix="logits"),
        identity([one, two], temperature=2.0),
        identity([one, ModuleTeacher(two, dtype="bf16")]),
        identity([one, Cached(ModuleTeacher(two), Store({"teacher": "x"}))]),
        identity([one, Cached(ModuleTeacher(two), Store({"teacher": "x"}), dtype="fp16")]),
    ]
    for number, other in enumerate(others):
        assert other != base
        assert other not in others[:number]
    assert all(isinstance(value, (str, float, bool)) for value in base.values())


@pytest.mark.parametrize(
    ("mix", "why"), [("random", "draws its teacher"), ("per-sample confidence", "labels too")]
)
def test_what_does_not_follow_from_inputs_is_not_kept_by_them(mix, why):
    ensemble = Ensemble([perceptron(seed=1), perceptron(seed=2)], mix=mix)
    for teacher in (ensemble, Ensemble([ensemble])):
        with pytest.raises(ValueError, match=f"{why}.*cache its members"):
            Cached(teacher)


def test_signals_that_cannot_be_kept_have_no_identity():
    with pytest.raises(ValueError, match=r"draws its teacher has nothing to keep; cache its members"):
        Ensemble([perceptron()], mix="random").identity()
    with pytest.raises(ValueError, match=r"teacher '0' of an ensemble, a Says, cannot say what"):
        Ensemble([Says(logits=torch.zeros(1, 2))]).identity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1]}, "1 weights for 2 teachers"),
        ({"weights": [0, 0]}, r"not all 0, got \[0.0, 0.0\]"),
        ({"weights": [1, -1]}, r"numbers from 0.*got \[1.0, -1.0\]"),
        ({"weights": [1, float("nan")]}, "numbers from 0"),
        ({"weights": {"0": 1}}, "teacher '1' has no weight"),
        ({"weights": {"0": 1, "1": 1, "2": 1}}, "a weight for '2', which is no teacher"),
        ({"mix": "probabilitys"}, "cannot mix by 'probabilitys'; did you mean 'probabilities'"),
        ({"temperature": 0}, "a temperature is a number above 0, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Ensemble([perceptron(), perceptron()], **options)


def test_wrong_teachers():
    with pytest.raises(ValueError, match=r"needs a teacher at least"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"'a:b' cannot name a teacher; take a text without ':'"):
        Ensemble({"a:b": perceptron()})
    with pytest.raises(TypeError, match=r"a int is no teacher"):
        Ensemble([3])
    with pytest.raises(ValueError, match=r"Self means the student's own pass.*take Average\(student\)"):
        Ensemble([Self()])


def test_teachers_that_do_not_match():
    small, large = perceptron(), perceptron(outputs=5)
    batch = {"input": points()[0]}
    for mix in ("probabilities", "logits", "per-sample confidence", "random"):
        with pytest.raises(
            ValueError, match=r"'logits' of teacher '[01]' has [35] classes, and of teacher '[01]'"
        ):
            Ensemble([small, large], mix=mix).signal(batch, ["logits"])
    with pytest.raises(ValueError, match=r"has shape \(3, 5, 4\), and of teacher '1' \(3, 6, 4\), so their pos"):
        mixed([*drawn_logits(1, (3, 5, 4)), *drawn_logits(1, (3, 6, 4))])
    with pytest.raises(ValueError, match=r"'logits' has one class.*take mix='logits' for numbers"):
        mixed(drawn_logits(2, (6, 1)))
    assert mixed(drawn_logits(2, (6, 1)), mix="logits").shape == (6, 1)
    with pytest.raises(ValueError, match=r"labels of shape .* do not fit logits"):
        mixed(drawn_logits(2, (3, 5, 4)), torch.zeros(3, dtype=torch.long), mix="per-sample confidence")


@pytest.mark.parametrize(
    ("teachers", "options", "error", "message"),
    [
        ([perceptron()], {"weights": "equal"}, TypeError, "weights are numbers, .* got 'equal'; leave them out"),
        ([perceptron()], {"weights": 3}, TypeError, "weights are numbers, .* got 3; leave them out"),
        ([perceptron()], {"weights": [None]}, TypeError, r"weights are numbers, .* got \[None\]; change them"),
        ([perceptron()], {"temperature": "a"}, ValueError, "a temperature is a number above 0, got 'a'"),
        (None, {}, TypeError, "a list of teachers, or a dict by name, got a NoneType"),
        (perceptron(), {}, TypeError, "a list of teachers, or a dict by name, got a Sequential"),
    ],
)
def test_wrong_arguments_are_refused(teachers, options, error, message):
    with pytest.raises(error, match=message):
        Ensemble(teachers, **options)


@pytest.mark.parametrize("mix", ["probabilities", "random"])
@pytest.mark.parametrize(
    ("part", "inputs", "message"),
    [
        ("b", ("input1",), "teacher 'b' of the ensemble: Bilinear takes 'input2'"),
        ("bb", ("input1", "input2"), "no part for teacher 'b' of the ensemble, and one named 'bb' for none"),
    ],
)
def test_a_member_without_its_inputs_is_named(mix, part, inputs, message):
    x, _ = points(64)  # so many that each member is drawn
    ensemble = Ensemble({"a": nn.Bilinear(4, 4, 3), "b": nn.Bilinear(4, 4, 3)}, mix=mix)
    batch = {"a": {"input1": x, "input2": x}, part: dict.fromkeys(inputs, x)}
    with pytest.raises(ValueError, match=message):
        ensemble.signal(batch, ["logits"])
