"""What ModelOpt keeps on modules, which scripts read: given by `_layers_to_loss`, and nowhere else."""

import gc
import weakref

import pytest
import torch
from torch import nn

import limbeck.compat.modelopt as mtd
from limbeck.compat.modelopt.registry import DistillationDMRegistry, LayerwiseDistillationDMRegistry
from tests.models import hooks, perceptron, points


def converted(mode="kd_loss", paths=("0", "3")):
    pairs = {(path, path): nn.MSELoss() for path in paths}
    config = {
        "teacher_model": perceptron(seed=1),
        "criterion": pairs,
        "loss_balancer": mtd.StaticLossBalancer(1.0),
    }
    return mtd.convert(perceptron(seed=0), mode=[(mode, config)])


def kept(model, name="_intermediate_output"):
    """By pair, what is kept of the student's and of the teacher's module."""
    return [tuple(getattr(layer, name) for layer in pair) for pair in model._layers_to_loss]


def test_outputs_are_kept_until_a_loss_or_another_mode():
    model, (x, _) = converted(), points()
    assert kept(model) == [(None, None)] * 2
    model(x)
    (ours, theirs), _ = kept(model)
    assert torch.equal(ours, model[0](x))
    assert torch.equal(theirs, model.teacher_model[0](x))
    assert ours.requires_grad
    assert not theirs.requires_grad
    model.compute_kd_loss()
    assert kept(model) == [(None, None)] * 2
    model(x)
    model.eval()
    assert kept(model) == [(None, None)] * 2


def test_layers_are_their_modules_in_all_else():
    model = converted()
    (ours, theirs), _ = model._layers_to_loss
    assert (ours.weight is model[0].weight, theirs.weight is model.teacher_model[0].weight) == (True, True)
    assert [len(layer._forward_hooks) for layer in (ours, theirs)] == [1, 1]
    assert [loss.reduction for loss in model._layers_to_loss.values()] == ["mean", "mean"]


def test_hooks_are_one_for_a_module_and_two_where_inputs_matter():
    model = converted()
    assert len(model._hook_handles) == hooks(model) + hooks(model.teacher_model) == 4
    assert len(converted("layerwise_kd")._hook_handles) == 8
    mtd.export(model)
    assert model._hook_handles == []


def test_one_side_alone_keeps_one_side():
    model, (x, _) = converted(paths=("",)), points()
    with model.only_teacher_forward():
        assert (model._only_teacher_fwd, model._only_student_fwd) == (True, False)
        model(x)
    assert model._intermediate_output is None
    with model.only_student_forward():
        output = model(x)
    assert model._intermediate_output is output
    assert (model._only_teacher_fwd, model._only_student_fwd) == (False, False)


def test_inputs_are_kept_until_the_students_module_was_given_them():
    model, (x, _) = converted("layerwise_kd"), points()
    with model.only_teacher_forward():
        model(x)
    (ours, theirs), _ = model._layers_to_loss
    assert ours._teacher_layer[0] is theirs
    assert theirs._intermediate_input[0] is x
    with model.only_student_forward():
        model(x)
    assert kept(model, "_intermediate_input") == [(None, None)] * 2
    assert theirs._intermediate_output is not None


def test_export_lets_go_of_inputs():
    model, (x, _) = converted("layerwise_kd"), points()
    with model.only_teacher_forward():
        model(x)
    layers = [theirs for _, theirs in model._layers_to_loss]
    of_last = weakref.ref(layers[-1]._intermediate_input[0])
    student = mtd.export(model)
    gc.collect()
    assert of_last() is None
    assert not any(hasattr(layer, "_intermediate_input") for layer in layers)
    assert not any(hasattr(module, "_teacher_layer") for module in student.modules())


def test_inputs_are_kept_layer_by_layer_alone():
    ((_, theirs),) = converted(paths=("3",))._layers_to_loss
    with pytest.raises(AttributeError, match="'Linear' object has no attribute '_intermediate_input'"):
        _ = theirs._intermediate_input


def test_no_classes_are_made():
    model = converted()
    assert type(model) is mtd.DistillationModel
    registries = DistillationDMRegistry, LayerwiseDistillationDMRegistry
    assert [registry.prefix for registry in registries] == ["Distill", "LayerwiseDistill"]
    assert DistillationDMRegistry.get(model.original_cls) is None
