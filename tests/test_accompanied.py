"""A student that is taken for itself, and a teacher that sees what it sees, for any loss that comes later."""

import copy

import pytest
import torch
from torch import nn

from limbeck.accompanied import Accompanied
from tests.models import hooks, perceptron, points

PAIRS = [("0", "0"), ("", "")]


def accompanied(pairs=PAIRS, layerwise=False):
    return Accompanied(perceptron(seed=0), perceptron(seed=1), pairs, layerwise).train()


def teacher_of(model):
    return model._witness.teacher.module


def test_both_values_of_each_pair():
    model, (x, _) = accompanied(), points()
    output = model(x)
    teacher = teacher_of(model)
    first, last = model.take()
    assert torch.equal(first[0], model[0](x))
    assert torch.equal(first[1], teacher[0](x))
    assert last[0] is output
    assert torch.equal(last[1], teacher(x))
    with pytest.raises(ValueError, match="nothing to compare"):
        model.take()


def test_losses_teach_as_in_a_loop_by_hand():
    model, (x, _) = accompanied([("", "")]), points()
    student, teacher = copy.deepcopy(model.student), copy.deepcopy(teacher_of(model))
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    by_hand = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(5):
        model(x)
        ((value, target),) = model.take()
        nn.functional.mse_loss(value, target).backward()
        nn.functional.mse_loss(student(x), teacher(x).detach()).backward()
        for optimizer in (ours, by_hand):
            optimizer.step()
            optimizer.zero_grad()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_layer_by_layer_modules_get_the_teachers_inputs_and_train_alone():
    model, (x, _) = accompanied([("3", "3")], layerwise=True), points()
    model(x)
    ((ours, theirs),) = model.take()
    before = teacher_of(model)[:3](x)
    assert torch.equal(ours, model[3](before))
    assert torch.equal(theirs, teacher_of(model)[3](before))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]


def test_one_side_alone_and_then_the_other():
    model, (x, _) = accompanied(), points()
    with model.alone("teacher"):
        assert torch.equal(model(x), teacher_of(model)(x))
    with pytest.raises(ValueError, match="the student has not seen"):
        model.take()
    with model.alone("teacher"):
        model(x)
    with model.alone("student"), model.alone("teacher", enable=False):
        assert torch.equal(model(x), model.student(x))
    assert len(model.take()) == 2


def test_in_eval_mode_the_teacher_runs_when_values_are_taken():
    model, (x, _) = accompanied().eval(), points()
    calls = []
    teacher_of(model).register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == []
    model.take()
    assert calls == [1]


def test_the_teacher_goes_where_the_model_goes_and_is_no_part_of_it():
    model = accompanied()
    assert len(list(model.parameters())) == len(list(perceptron().parameters()))
    model.double()
    assert teacher_of(model)[0].weight.dtype is torch.float64


def test_export_gives_the_student_back_as_it_was():
    student, teacher = perceptron(seed=0), perceptron(seed=1)
    student[0].bias.requires_grad_(False)
    model = Accompanied(student, teacher, PAIRS[:1], layerwise=True)
    model(points()[0])
    assert model.export() is student
    assert hooks(student) + hooks(teacher) == 0
    assert [p.requires_grad for p in student.parameters()] == [True, False, True, True, True, True]


def test_wrong_modules_are_refused_before_anything_is_changed():
    student, teacher = perceptron(seed=0), perceptron(seed=1)
    with pytest.raises(ValueError, match="the teacher has no module '7'"):
        Accompanied(student, teacher, [("0", "7")])
    assert hooks(student) + hooks(teacher) == 0
    assert all(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="share weights"):
        Accompanied(student, student, PAIRS)
