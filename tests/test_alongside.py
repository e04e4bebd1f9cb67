"""Distilling alongside a loop that runs the student itself: a Distiller's numbers, and nothing left behind."""

import copy

import pytest
import torch
from torch import nn

from limbeck import Distiller, Self, Term
from limbeck.alongside import Alongside
from limbeck.taps import Picked, Recorder, resolve
from tests.models import Convolutional, bert, text_batch

TERMS = (
    Term("logits", loss="forward_kl", temperature=2.0),
    Term("bert.encoder.layer.0", "bert.encoder.layer.1", loss="mse", project="linear", name="hidden"),
)


def pair():
    return bert(1, 8, seed=1), bert(2, 16, seed=2)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_loss_is_a_distillers():
    student, teacher = pair()
    batch = text_batch()
    torch.manual_seed(0)  # the projections begin alike
    expected = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), TERMS)(**batch)
    torch.manual_seed(0)
    with Alongside(student, teacher, TERMS) as beside:
        found = beside.compare(batch, student(**batch))
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.terms.keys() == expected.terms.keys() == {"forward_kl", "hidden"}


def test_what_the_terms_learn_can_be_given_to_an_optimizer_before_it_has_a_size():
    student, teacher = pair()
    beside = Alongside(student, teacher, TERMS)
    optimizer = torch.optim.SGD([*student.parameters(), *beside.parameters()], lr=0.1)
    batch, seen = text_batch(), []
    for _ in range(2):
        beside.compare(batch, student(**batch)).loss.backward()
        optimizer.step()
        seen.append([p.detach().clone() for p in beside.parameters()])
    assert len(seen[0]) == 2
    assert not any(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_the_last_run_counts_and_eval_mode_is_not_read():
    student, teacher = pair()
    first, second = text_batch(seed=1), text_batch(seed=2)
    with Alongside(student, teacher, TERMS[:1]) as beside:
        student(**first)
        output = student(**second)
        student.eval()(**first)
        student.train()
        found = beside.compare(second, output)
    assert torch.equal(found.loss, Distiller(student, teacher, TERMS[:1])(**second).loss)


def test_a_comparison_needs_a_run():
    student, teacher = pair()
    batch = text_batch()
    with Alongside(student, teacher, TERMS[:1]) as beside:
        with pytest.raises(ValueError, match="has not run in training mode"):
            beside.compare(batch, student.eval()(**batch))
        output = student.train()(**batch)
        beside.compare(batch, output)
        with pytest.raises(ValueError, match="has not run in training mode"):
            beside.compare(batch, output)


def test_nothing_is_left_in_the_student_nor_in_copies_of_it():
    student, teacher = pair()
    beside = Alongside(student, teacher, TERMS)
    batch = text_batch()
    output = student(**batch)
    copied = copy.deepcopy(student)  # between a run and its comparison, too
    copied(**text_batch(seed=9))
    assert float(beside.compare(batch, output).loss.detach()) > 0
    beside.close()
    assert hooks(student) == 0
    del beside
    copied(**batch)  # its hook has nothing to call any more


def test_a_run_that_fails_leaves_no_hooks_armed():
    student, teacher = pair()
    with Alongside(student, teacher, TERMS):
        before = hooks(student)
        with pytest.raises(ValueError, match="specify"):
            student()
        assert hooks(student) == before


def test_two_at_a_time():
    """One student, two objectives."""
    student, teacher = pair()
    batch = text_batch()
    other = Term("logits", loss="mse")
    with Alongside(student, teacher, TERMS[:1]) as one, Alongside(student, teacher, [other]) as two:
        output = student(**batch)
        found = [one.compare(batch, output).loss, two.compare(batch, output).loss]
    expected = [Distiller(student, teacher, [term])(**batch).loss for term in (TERMS[0], other)]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_what_a_model_overwrites_in_place_is_read_as_it_was():
    student, teacher = Convolutional(inplace=True).train(), Convolutional(inplace=False)
    images = torch.randn(4, 3, 8, 8)
    terms = [Term("norm", loss="mse")]
    with Alongside(student, teacher, terms) as beside:
        found = beside.compare((images,), student(images)).loss
    own = copy.deepcopy(student)
    expected = nn.functional.mse_loss(own.norm(own.stem(images)), teacher.eval().norm(teacher.stem(images)))
    torch.testing.assert_close(found, expected)


def test_a_teacher_that_has_spoken_is_not_run():
    student, teacher = pair()
    batch = text_batch()
    said = teacher.eval()(**batch).logits.detach()
    expected = Distiller(student, teacher, TERMS[:1])(**batch).loss
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    with Alongside(student, teacher, TERMS[:1]) as beside:
        found = beside.compare({**batch, "teacher_cache": said}, student(**batch)).loss
    torch.testing.assert_close(found, expected)


def test_a_student_that_teaches_itself():
    student = bert(2, 8)
    batch = text_batch()
    terms = [Term("bert.encoder.layer.0", "bert.encoder.layer.1", loss="mse")]
    with Alongside(student, Self(), terms) as beside:
        found = beside.compare(batch, student(**batch)).loss
    torch.testing.assert_close(found, Distiller(student, Self(), terms)(**batch).loss)


def test_a_wrong_tap_fails_at_once():
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0"):
        Alongside(student, teacher, [Term("bert.encoder.layer.O", loss="mse")])
    assert hooks(student) == 0


class Several(nn.Module):
    """Two outputs without names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, inputs):
        hidden = self.layer(inputs)
        return hidden, {"twice": 2 * hidden}


def test_a_pick_takes_its_tensor_from_all_that_a_module_returns():
    model, inputs = Several(), torch.randn(2, 3)
    taps = [
        Picked("", lambda output: output[1]["twice"], "twice"),
        Picked("layer", lambda output: output[:, :2], "left"),
        Picked("layer", lambda output: output[:, 2:], "right"),
    ]
    recorder = Recorder(model, resolve(model, taps))
    with recorder.armed():
        output = model(inputs)
    seen = recorder.collect(output)
    hidden = model.layer(inputs)
    assert list(seen) == ["#twice", "layer#left", "layer#right"]
    torch.testing.assert_close(seen["#twice"], 2 * hidden)
    torch.testing.assert_close(torch.cat([seen["layer#left"], seen["layer#right"]], dim=1), hidden)


def test_picks_in_a_distiller_and_copies_of_them():
    student, teacher = bert(1, 8, seed=1), bert(2, 8, seed=2)

    def first_token(output):
        return (output if torch.is_tensor(output) else output[0])[:, 0]

    first = Picked("bert.encoder.layer.0", first_token, "first")
    term = Term(first, loss="mse")
    batch = text_batch()
    found = Distiller(student, teacher, [copy.deepcopy(term)])(**batch).loss
    asked = {**batch, "output_hidden_states": True}
    sides = [model(**asked).hidden_states[1][:, 0] for model in (student, teacher.eval())]
    torch.testing.assert_close(found, nn.functional.mse_loss(*sides))


def test_a_pick_that_gives_no_tensor():
    model = Several()
    recorder = Recorder(model, resolve(model, [Picked("layer", lambda output: "no", "wrong")]))
    with pytest.raises(ValueError, match="tap 'layer#wrong' gave no tensor but str"), recorder.armed():
        model(torch.randn(2, 3))
    with pytest.raises(TypeError, match="pick is a function"):
        Picked("layer", "no", "wrong")
