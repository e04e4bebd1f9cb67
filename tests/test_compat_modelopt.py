"""The door of NVIDIA ModelOpt: its names and argument shapes, and the corrections of docs/coming-from.md."""

import copy
import inspect
import io
import os
import random
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

import limbeck.compat.modelopt as mtd
from limbeck.standin import StandIn
from tests.models import bert, convolutional, gradients, hooks, images, perceptron, points, text_batch
from tests.workers import modelopt

ROOT = Path(__file__).parent.parent
INPUT = torch.tensor([[1.0, 1.0]])


class Net(nn.Module):
    """Two linear modules whose weights are set by hand, so that each loss is known: fc1 gives (s, s), fc2 2s."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.fc1 = nn.Linear(2, 2, bias=False)
        self.fc2 = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.fc1.weight.copy_(scale * torch.eye(2))
            self.fc2.weight.fill_(1.0)

    def forward(self, x):
        return self.fc2(self.fc1(x))


class Biased(nn.Module):
    """A loss with a weight."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, student, teacher):
        return functional.mse_loss(student + self.bias, teacher)


def converted(criterion, student=None, teacher=None, mode="kd_loss", **config):
    teacher = Net(2.0) if teacher is None else teacher
    config = {"teacher_model": teacher, "criterion": criterion, **config}
    return mtd.convert(Net() if student is None else student, mode=[(mode, config)])


def two_pairs(**config):
    pairs = {("fc1", "fc1"): nn.MSELoss(), ("fc2", "fc2"): nn.MSELoss()}
    return converted(pairs, loss_balancer=static([0.25, 0.25]), **config)


def static(*weights):
    with pytest.warns(UserWarning, match="do not sum to 1"):
        return mtd.StaticLossBalancer(*weights)


# The converted model is the student to whoever looks.


def test_it_is_taken_for_the_student():
    student = bert()
    model = converted(mtd.LogitsDistillationLoss(), student, bert(width=24, seed=1))
    assert isinstance(model, mtd.DistillationModel)
    assert isinstance(model, type(student))
    assert model.original_cls is type(student)
    assert model.config is student.config
    assert model.bert.encoder is student.bert.encoder
    assert inspect.signature(model.forward) == inspect.signature(student.forward)
    assert inspect.signature(model.__class__.forward) == inspect.signature(type(student).forward)
    assert type(student).__name__ == "BertForSequenceClassification"
    own = dict(student.named_parameters())
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in own.items()}
    batch = text_batch()
    assert torch.equal(model(**batch).logits, student(**batch).logits)


def test_what_is_set_on_it_is_set_on_the_student():
    model = converted(nn.MSELoss())
    model.fc1 = nn.Linear(2, 2)
    model.flag = 3
    assert model.student.flag == 3
    assert model.student.fc1 is model.fc1
    del model.flag
    with pytest.raises(AttributeError, match="no attribute 'flag'"):
        model.flag  # noqa: B018


def test_a_sequential_student_keeps_its_indices():
    student = perceptron()
    model = converted(mtd.LogitsDistillationLoss(), student, perceptron(seed=1))
    assert model[0] is student[0]
    assert len(model) == 4
    assert bool(model)


def test_train_and_eval_return_the_model_and_leave_the_teacher_in_eval():
    model = converted(nn.MSELoss())
    assert model.train() is model
    assert model.training
    assert model.student.training
    assert not model.teacher_model.training
    assert model.eval() is model
    assert not model.student.training


def test_it_can_be_copied_and_pickled():
    """Theirs cannot be pickled: its class is made while the program runs."""
    model = converted({("fc1", "fc1"): Biased()})
    model(INPUT)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(again, mtd.DistillationModel)
        again(INPUT)
        assert again.compute_kd_loss().item() == 1.0
        assert again.student is not model.student


def test_moving_the_model_moves_the_teacher_and_the_losses():
    loss = mtd.MGDLoss(4, 6)
    model = converted({("norm", "norm"): loss}, convolutional(), convolutional(6))
    model.to(torch.float64)
    assert next(loss.parameters()).dtype == torch.float64
    assert next(model.teacher_model.parameters()).dtype == torch.float64
    model(images()[0].double())
    assert model.compute_kd_loss().dtype == torch.float64


# Teacher, criterion and mode are given as ModelOpt takes them.


@pytest.mark.parametrize(
    "teacher", [Net(2.0), Net, lambda: Net(2.0), (Net,), (Net, (2.0,)), (Net, (), {"scale": 2.0})]
)
def test_forms_of_the_teacher(teacher):
    model = converted(nn.MSELoss(), teacher=teacher)
    assert isinstance(model.teacher_model, Net)
    assert not any(p.requires_grad for p in model.teacher_model.parameters())
    assert all(p.requires_grad for p in model.student.parameters())


@pytest.mark.parametrize(
    "wrap", [lambda c: [("kd_loss", c)], lambda c: {"kd_loss": c}, lambda c: (("kd_loss", c),)]
)
def test_forms_of_the_mode(wrap):
    config = {"teacher_model": Net, "criterion": nn.MSELoss()}
    assert isinstance(mtd.convert(Net(), mode=wrap(config)), mtd.DistillationModel)
    assert isinstance(mtd.convert(Net(), mode=wrap(mtd.KDLossConfig(**config))), mtd.DistillationModel)


def test_the_mode_export_student():
    student = Net()
    model = converted(nn.MSELoss(), student)
    assert mtd.convert(model, mode="export_student") is student
    assert mtd.convert(converted(nn.MSELoss(), student), mode=[("export_student", {})]) is student


@pytest.mark.parametrize(
    ("config", "kinds", "message"),
    [
        ({}, (ValueError, AssertionError), "teacher_model"),
        ({"teacher_model": Net}, (ValueError, AssertionError), "criterion"),
        ({"criterion": nn.MSELoss()}, (ValueError, AssertionError), "teacher_model"),
        ({"teacher_model": Net, "criterion": {}}, (ValueError,), "no loss"),
        ({"teacher_model": Net, "criterion": {("fc1", "bogus"): nn.MSELoss()}}, (AttributeError,), "bogus"),
        (
            {"teacher_model": Net, "criterion": {("fcl", "fc1"): nn.MSELoss()}},
            (AttributeError,),
            "did you mean 'fc",
        ),
        ({"teacher_model": Net, "criterion": {"fc1": nn.MSELoss()}}, (ValueError,), "pairs"),
        ({"teacher_model": Net, "criterion": 3}, (TypeError,), "cannot be called"),
        ({"teacher_model": Net, "criterio": 3}, (TypeError,), "did you mean 'criterion'"),
        (
            {"teacher_model": Net, "criterion": {("fc1", "fc1"): nn.MSELoss(), ("fc2", "fc2"): nn.MSELoss()}},
            (ValueError,),
            "multiple layer-loss pairs",
        ),
        (
            {"teacher_model": Net, "criterion": nn.MSELoss(), "loss_balancer": Biased()},
            (AssertionError,),
            "cannot have parameters",
        ),
    ],
)
def test_wrong_configurations_are_refused(config, kinds, message):
    for kind in kinds:
        with pytest.raises(kind, match=message):
            mtd.convert(Net(), mode=[("kd_loss", config)])


def test_wrong_modes_are_refused():
    with pytest.raises(AssertionError):
        mtd.convert(Net(), mode="kd_loss")
    with pytest.raises(ValueError, match="did you mean 'kd_loss'"):
        mtd.convert(Net(), mode="kd_los")
    with pytest.raises(ValueError, match="already"):
        mtd.convert(converted(nn.MSELoss()), mode=[("kd_loss", {"teacher_model": Net, "criterion": nn.MSELoss()})])
    with pytest.raises(ValueError, match="name them"):
        converted(nn.MSELoss(), mode="layerwise_kd")
    shared = Net()
    with pytest.raises(ValueError, match="share weights"):
        converted(nn.MSELoss(), shared, shared)


# What compute_kd_loss gives.


def test_a_loss_of_outputs():
    model = converted(nn.MSELoss())
    model(INPUT)
    loss = model.compute_kd_loss()
    assert loss.item() == 4.0
    loss.backward()
    assert all(p.grad is not None for p in model.student.parameters())
    assert all(p.grad is None for p in model.teacher_model.parameters())


def test_two_pairs_balanced_and_not():
    model = two_pairs()
    model(INPUT)
    assert model.compute_kd_loss(student_loss=torch.tensor(2.0)).item() == 0.25 * 1.0 + 0.25 * 4.0 + 0.5 * 2.0
    model(INPUT)
    losses = model.compute_kd_loss(student_loss=torch.tensor(2.0), skip_balancer=True)
    assert {k: v.item() for k, v in losses.items()} == {"student_loss": 2.0, "MSELoss_0": 1.0, "MSELoss_1": 4.0}
    assert list(losses) == [mtd.STUDENT_LOSS_KEY, "MSELoss_0", "MSELoss_1"]


def test_losses_are_reduced_by_a_function():
    model = converted({("fc1", "fc1"): nn.MSELoss(reduction="none")})
    model(INPUT)
    assert model.compute_kd_loss(loss_reduction_fn=lambda t: t.sum()).item() == 2.0


def test_a_student_loss_needs_a_balancer():
    model = converted(nn.MSELoss())
    model(INPUT)
    with pytest.raises(AssertionError, match="without using Loss Balancer"):
        model.compute_kd_loss(student_loss=torch.tensor(1.0))


def test_own_balancers():
    class Largest(mtd.DistillationLossBalancer):
        def forward(self, loss):
            return max(loss.values())

    model = converted({("fc1", "fc1"): nn.MSELoss(), ("", ""): nn.L1Loss()}, loss_balancer=Largest())
    model(INPUT)
    assert model.compute_kd_loss(student_loss=torch.tensor(0.5)).item() == 2.0
    assert isinstance(model.loss_balancer, Largest)


def test_the_student_loss_is_reduced_by_the_balancer():
    balancer = static()
    balancer.set_student_loss_reduction_fn(torch.mean)
    assert balancer({"student_loss": torch.tensor([1.0, 3.0]), "MSELoss_0": torch.tensor(4.0)}).item() == 3.0


def test_weights_of_the_balancer():
    assert mtd.StaticLossBalancer(1)._kd_loss_weight == [1.0]
    with pytest.raises(ValueError, match="non-negative"):
        mtd.StaticLossBalancer([0.5, -0.3])
    with pytest.raises(ValueError, match="at most 1"):
        mtd.StaticLossBalancer([0.5, 0.6])
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(2.0), "c": torch.tensor(3.0)}
    with pytest.raises(AssertionError, match="2 weights were given for 3"):
        mtd.StaticLossBalancer([0.5, 0.5])(losses)


def test_one_weight_is_for_the_sum_of_all():
    """As their documentation says; their code refuses two losses with one weight, and a whole number."""
    losses = {"student_loss": torch.tensor(10.0), "a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    assert static(0.5)(losses).item() == 0.5 * 3.0 + 0.5 * 10.0
    assert mtd.StaticLossBalancer(1)(losses).item() == 3.0


def test_losses_with_weights_train_in_the_order_of_the_criterion():
    """Theirs come in the order of a set, another one in each process."""
    first, second = Biased(), Biased()
    pairs = {("fc1", "fc1"): first, ("fc2", "fc2"): [nn.MSELoss(), second, first]}
    model = converted(pairs, loss_balancer=mtd.StaticLossBalancer(1.0))
    assert list(model.loss_modules) == [first, second]
    names = [name for name, _ in model.named_parameters()]
    assert names == ["fc1.weight", "fc2.weight", "_loss_modules.0.bias", "_loss_modules.1.bias"]
    model(INPUT)
    model.compute_kd_loss().backward()
    assert first.bias.grad.item() == -2.0 + -4.0
    assert second.bias.grad.item() == -4.0


def test_several_losses_for_one_pair_and_several_teachers_layers_for_one_of_the_student():
    """Theirs keeps one output for each module, and one loss for each pair."""
    pairs = {("fc1", "fc1"): [nn.MSELoss(), nn.L1Loss(reduction="sum")], ("fc1", "fc1.again"): nn.L1Loss()}
    teacher = Net(2.0)
    teacher.fc1 = nn.Sequential()
    teacher.fc1.add_module("again", Net(2.0).fc1)
    model = converted(pairs, teacher=teacher, loss_balancer=mtd.StaticLossBalancer(1.0))
    model(INPUT)
    losses = model.compute_kd_loss(skip_balancer=True)
    assert {k: v.item() for k, v in losses.items()} == {"MSELoss_0": 1.0, "L1Loss_1": 2.0, "L1Loss_2": 1.0}


def test_a_loss_may_be_any_function():
    """Theirs takes a subclass of PyTorch's ``_Loss`` only."""
    model = converted(functional.l1_loss)
    model(INPUT)
    assert {k: v.item() for k, v in model.compute_kd_loss(skip_balancer=True).items()} == {"l1_loss_0": 2.0}
    model = converted(lambda student, teacher: (student - teacher).sum())
    model(INPUT)
    assert model.compute_kd_loss().item() == -2.0


def test_each_loss_is_given_what_it_takes():
    """Theirs gives everything to all of them, and fails."""

    def scaled(student, teacher, *, scale=1.0):
        return scale * functional.l1_loss(student, teacher)

    pairs = {("", ""): [nn.MSELoss(), scaled]}
    model = converted(pairs, loss_balancer=mtd.StaticLossBalancer([0.0, 1.0]))
    model(INPUT)
    assert model.compute_kd_loss(scale=3.0).item() == 6.0
    model(INPUT)
    with pytest.raises(TypeError, match="none of the losses takes 'scal'"):
        model.compute_kd_loss(scal=3.0)


def test_outputs_with_names_are_compared_by_their_logits():
    """Theirs needs a loss of one's own for that; such a loss is given the outputs whole, here too."""
    student, teacher, batch = bert(), bert(width=24, seed=1), text_batch()
    with torch.no_grad():
        theirs = teacher.eval()(**batch).logits
    expected = functional.kl_div(
        student(**batch).logits.log_softmax(-1), theirs.softmax(-1), reduction="batchmean"
    ).item()

    def own(outputs, teacher_outputs):
        assert isinstance(outputs, SequenceClassifierOutput)
        return functional.kl_div(
            outputs.logits.log_softmax(-1), teacher_outputs.logits.softmax(-1), reduction="batchmean"
        )

    for loss in (mtd.LogitsDistillationLoss(), mtd.LMLogitsLoss(), own):
        model = converted(loss, student, teacher)
        model(**batch)
        assert model.compute_kd_loss().item() == pytest.approx(expected, abs=1e-6)
        mtd.export(model)
    model = converted(nn.MSELoss(), student, teacher)
    model(**batch)
    assert model.compute_kd_loss().item() == pytest.approx(
        functional.mse_loss(student(**batch).logits, theirs).item()
    )


def test_the_teacher_gets_only_the_inputs_it_takes():
    class Images(Net):
        def forward(self, x, labels=None, student_only=None):
            return super().forward(x)

    model = converted(nn.MSELoss(), Images())
    model(x=INPUT, student_only=True)
    assert model.compute_kd_loss().item() == 4.0


# Losses.


def test_the_mean_is_over_positions():
    """Theirs divides by the number of classes, too, by default."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6, 10), torch.randn(4, 6, 10)
    each = (
        functional.softmax(teacher / 2, -1)
        * (functional.log_softmax(teacher / 2, -1) - functional.log_softmax(student / 2, -1))
    ).sum(-1) * 4
    expected = {"mean": each.mean(), "batchmean": each.sum() / 4, "sum": each.sum(), "none": each}
    for reduction, value in expected.items():
        assert torch.allclose(mtd.LogitsDistillationLoss(2.0, reduction)(student, teacher), value, atol=1e-5)
    theirs = (
        functional.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").mean() * 4
    )
    assert torch.allclose(mtd.LogitsDistillationLoss(2.0, correct=False)(student, teacher), theirs, atol=1e-6)
    with pytest.raises(ValueError, match="did you mean 'batchmean'"):
        mtd.LogitsDistillationLoss(reduction="batch_mean")


def test_half_precision_is_compared_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 1000).bfloat16(), torch.randn(8, 1000).bfloat16()
    exact = mtd.LogitsDistillationLoss()(student.double(), teacher.double()).item()
    assert mtd.LogitsDistillationLoss()(student, teacher).item() == pytest.approx(exact, rel=1e-5)


def test_padded_vocabularies_are_cut():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 10), torch.randn(2, 12)
    value = mtd.LogitsDistillationLoss(vocab_size=10)(student, teacher)
    assert value == mtd.LogitsDistillationLoss()(student, teacher[:, :10])


def test_minifinetuning_of_sequences_and_without_some_labels():
    """Theirs takes labels of one dimension only, and fails at -100."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 50), torch.randn(2, 8, 50)
    labels = torch.randint(0, 50, (2, 8))
    loss = mtd.MFTLoss(2.0)
    flat = loss(student.reshape(-1, 50), teacher.reshape(-1, 50), labels.reshape(-1))
    assert torch.allclose(loss(student, teacher, labels), flat)
    assert torch.allclose(loss(student, teacher, labels.flatten()), flat)
    each = mtd.MFTLoss(2.0, reduction="none")(student, teacher, labels)
    assert each.shape == (16,)
    labels[1] = -100
    assert torch.allclose(loss(student, teacher, labels), each[:8].mean())
    assert torch.allclose(
        mtd.MFTLoss(2.0, reduction="mean", correct=False)(student, teacher, labels) * 50, each[:8].mean()
    )


def test_minifinetuning_through_the_model():
    model = converted(mtd.MFTLoss(threshold=0.2), perceptron(), perceptron(seed=1))
    x, labels = points()
    model(x)
    assert model.compute_kd_loss(labels=labels).numel() == 1


def test_masked_generation():
    same = mtd.MGDLoss(4, 4, lambda_mgd=0.0)
    assert isinstance(same.align, nn.Identity)
    scaled = mtd.MGDLoss(4, 4, alpha_mgd=3.0, lambda_mgd=0.0)
    scaled.load_state_dict(same.state_dict())
    student, teacher = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    assert torch.allclose(same(student, teacher), functional.mse_loss(same.generation(student), teacher))
    assert torch.allclose(scaled(student, teacher), 3 * same(student, teacher))
    nothing = mtd.MGDLoss(4, 4, lambda_mgd=1.0)
    assert torch.allclose(nothing(student, teacher), nothing(7 * student, teacher))
    with pytest.raises(AssertionError, match="one size"):
        same(student, torch.randn(2, 4, 6, 6))
    other = mtd.MGDLoss(3, 5)
    student = torch.randn(1, 3, 4, 4, requires_grad=True)
    other(student, torch.randn(1, 5, 4, 4)).backward()
    assert student.grad is not None
    assert all(p.grad is not None for p in other.parameters())


# When the teacher runs.


def counting(teacher):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_in_eval_mode_the_teacher_is_not_run_unless_a_loss_is_asked_for():
    teacher = Net(2.0)
    calls = counting(teacher)
    model = converted(nn.MSELoss(), teacher=teacher).eval()
    with torch.no_grad():
        assert model(INPUT).item() == 2.0
        model(INPUT)
        assert not calls
        model(2 * INPUT)
        assert model.compute_kd_loss().item() == 16.0
    assert len(calls) == 1


def test_one_side_alone():
    teacher = Net(2.0)
    calls = counting(teacher)
    model = two_pairs(teacher=teacher)
    with model.only_teacher_forward():
        assert model(INPUT).item() == 4.0
    with pytest.raises(ValueError, match="the student has not seen"):
        model.compute_kd_loss()
    with model.only_student_forward():
        assert model(INPUT).item() == 2.0
    assert len(calls) == 1
    with pytest.raises(ValueError, match="the teacher has not seen"):
        model.compute_kd_loss()
    with model.only_student_forward(), model.only_teacher_forward(enable=False):
        model(INPUT)
    assert len(calls) == 1
    with model.only_teacher_forward():
        model(INPUT)
    assert [v.item() for v in model.compute_kd_loss(skip_balancer=True).values()] == [1.0, 4.0]


def test_what_is_not_used_is_told_and_forgotten():
    model = two_pairs().train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(INPUT)
        model(2 * INPUT)
    assert [str(w.message).split()[2] for w in caught] == ["student", "teacher"]
    assert [v.item() for v in model.compute_kd_loss(skip_balancer=True).values()] == [4.0, 16.0]
    with pytest.raises(ValueError, match="nothing to compare"):
        model.compute_kd_loss()
    model(INPUT)
    model.train()
    assert model.compute_kd_loss(skip_balancer=True)
    model(INPUT)
    model.eval()
    with pytest.raises(ValueError, match="nothing to compare"):
        model.compute_kd_loss()


def test_a_module_that_did_not_run_is_named():
    class Lazy(Net):
        def forward(self, x):
            return self.fc2(x)

    model = converted({("fc1", "fc1"): nn.MSELoss()}, Lazy())
    model(INPUT)
    with pytest.raises(ValueError, match="student's module 'fc1' did not run"):
        model.compute_kd_loss()


def test_outputs_are_what_a_module_returned_whatever_overwrites_it_later():
    """Theirs compares what an in-place ReLU left of it."""
    pairs = {("norm", "norm"): nn.MSELoss()}
    losses = []
    for inplace in (False, True):
        model = converted(pairs, convolutional(inplace=inplace), convolutional(inplace=inplace, seed=1))
        for _ in range(2):
            model(images()[0])
            loss = model.compute_kd_loss()
            losses.append(loss.item())
        loss.backward()
    assert losses[0] == losses[2] > 0
    assert losses[1] == losses[3] > 0


@pytest.mark.parametrize("mode", ["kd_loss", "layerwise_kd"])
def test_activation_checkpointing(mode):
    batch, found = text_batch(), []
    for checkpointing in (False, True):
        student = bert(use_cache=False)
        if checkpointing:
            student.activation_checkpointing_enable()
        pairs = {("bert.encoder.layer.1", "bert.encoder.layer.1"): own_mse}
        model = converted(pairs, student, bert(seed=1), mode)
        model(**batch)
        model.compute_kd_loss().backward()
        found.append(gradients(student))
    assert any(gradient.abs().sum() > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_layer_by_layer_within_what_is_checkpointed_is_refused():
    """The activations would be computed anew from the student's own inputs, without a word."""
    student = bert(use_cache=False)
    student.activation_checkpointing_enable()
    path = "bert.encoder.layer.1.intermediate"
    model = converted({(path, path): own_mse}, student, bert(seed=1), "layerwise_kd")
    model(**text_batch())
    with pytest.raises(ValueError, match="switch it off"):
        model.compute_kd_loss().backward()


def own_mse(student, teacher):
    """A module of transformers returns a tensor or a tuple, as its version has it."""
    return functional.mse_loss(*(side[0] if isinstance(side, tuple) else side for side in (student, teacher)))


# DataParallel, which theirs does not bear.


class OnCPU(nn.DataParallel):
    """Two replicas on the CPU, made and called in threads as `nn.DataParallel` does it on two GPUs."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    def forward(self, x):
        parts = x.chunk(2)
        replicas = [replica_of(self.module) for _ in parts]
        together, grad = threading.Barrier(2), torch.is_grad_enabled()

        def run(replica, part):
            together.wait()
            with torch.set_grad_enabled(grad):
                return replica(part)

        with ThreadPoolExecutor(2) as pool:
            return torch.cat(list(pool.map(run, replicas, parts)))


def replica_of(module):
    """As `torch.nn.parallel.replicate`, which copies weights between GPUs only."""
    replica = module._replicate_for_data_parallel()
    replica._parameters.update({name: p.view_as(p) for name, p in module._parameters.items() if p is not None})
    replica._modules = {name: child and replica_of(child) for name, child in module._modules.items()}
    return replica


def test_replicas_in_threads_give_the_loss_of_the_whole_batch():
    x, labels = points(size=7)
    found = []
    for wrap in (lambda m: m, OnCPU):
        pairs = {("0", "0"): nn.MSELoss(), ("", ""): mtd.MFTLoss(2.0)}
        model = converted(
            pairs, perceptron(), perceptron(seed=1), loss_balancer=mtd.StaticLossBalancer([0.5, 0.5])
        )
        wrapped = wrap(model)
        for _ in range(3):
            wrapped(x)
            loss = model.compute_kd_loss(labels=labels)
        loss.backward()
        found.append((loss.item(), gradients(model.student)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for name, gradient in found[0][1].items():
        assert gradient.abs().sum() > 0
        assert torch.allclose(gradient, found[1][1][name], atol=1e-6)


def test_replicas_in_eval_mode_ask_the_teacher_later():
    model = converted(nn.MSELoss(), perceptron(), perceptron(seed=1)).eval()
    x, _ = points(size=7)
    OnCPU(model)(x)
    assert model.compute_kd_loss().item() == pytest.approx(
        functional.mse_loss(model.student(x), model.teacher_model(x)).item()
    )


def test_two_ranks_train_as_one(tmp_path):
    """DistributedDataParallel averages the gradients of the losses' weights too."""
    port = str(random.Random().randint(20000, 50000))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    script = str(ROOT / "tests" / "workers" / "modelopt.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    expected = modelopt.trained(0, 1)
    assert {name.split(".")[0] for name in expected} == {"0", "3", "_loss_modules"}
    for name, value in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value, atol=1e-6, rtol=1e-5, msg=name)


# State.


def test_the_state_is_the_students_under_its_own_names():
    model = converted(nn.MSELoss())
    assert set(model.state_dict()) == set(Net().state_dict())
    model = converted({("fc1", "fc1"): Biased()})
    assert set(model.state_dict()) == {*Net().state_dict(), "_loss_modules.0.bias"}
    with model.hide_loss_modules():
        assert len(model.loss_modules) == 0
        assert set(model.state_dict()) == set(Net().state_dict())
    assert len(model.loss_modules) == 1


def test_the_teacher_is_in_the_state_if_asked_for():
    model = converted({("fc1", "fc1"): Biased()}, expose_minimal_state_dict=False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert {k.split(".")[0] for k in state} == {"fc1", "fc2", "_loss_modules", "_teacher_model"}
    with torch.no_grad():
        model.fc1.weight.fill_(123.0)
        model.teacher_model.fc1.weight.fill_(123.0)
    model.load_state_dict(state)
    assert torch.equal(model.fc1.weight, torch.eye(2))
    assert torch.equal(model.teacher_model.fc1.weight, 2 * torch.eye(2))
    with model.hide_teacher_model():
        assert type(model.teacher_model) is nn.Module
        assert set(model.state_dict()) == {*Net().state_dict(), "_loss_modules.0.bias"}
    assert isinstance(model.teacher_model, Net)
    with model.hide_teacher_model(enable=False):
        assert isinstance(model.teacher_model, Net)


def test_the_weights_of_a_student_alone_can_be_loaded():
    for minimal in (True, False):
        model = converted({("fc1", "fc1"): Biased()}, expose_minimal_state_dict=minimal)
        model.load_state_dict(Net(5.0).state_dict())
        assert torch.equal(model.fc1.weight, 5 * torch.eye(2))
        assert torch.equal(model.teacher_model.fc1.weight, 2 * torch.eye(2))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"fc1.weight": torch.eye(2)})


def test_saving_and_restoring(tmp_path):
    """Theirs restores the student only, and by a pickle."""
    pairs = {("fc1", "fc1"): Biased()}
    model = converted(pairs)
    with torch.no_grad():
        model.fc1.weight.fill_(3.0)
        model.loss_modules[0].bias.fill_(4.0)
    mtd.save(nn.DataParallel(model), tmp_path / "kept.pt")
    student = Net()
    assert mtd.restore(student, tmp_path / "kept.pt") is student
    assert student.fc1.weight.mean() == 3.0
    assert type(mtd.restore(Net, tmp_path / "kept.pt")) is Net
    again = mtd.restore(converted({("fc1", "fc1"): Biased()}), tmp_path / "kept.pt")
    assert again.fc1.weight.mean() == 3.0
    assert again.loss_modules[0].bias.item() == 4.0
    with pytest.raises(ValueError, match="belongs to another model"):
        mtd.restore(nn.Linear(2, 2), tmp_path / "kept.pt")


def test_pickles_are_not_loaded(tmp_path):
    torch.save({"model_state_dict": Net().state_dict()}, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match="pickles are not loaded"):
        mtd.restore(Net(), tmp_path / "theirs.pt")


def test_export_leaves_nothing_behind(tmp_path):
    student, teacher = Net(), Net(2.0)
    student.fc2.weight.requires_grad_(False)
    model = converted({("fc1", "fc1"): Biased()}, student, teacher)
    model(INPUT)
    model.compute_kd_loss()
    exported = mtd.export(nn.DataParallel(model))
    assert exported is student
    assert type(exported) is Net
    assert not isinstance(exported, StandIn)
    assert hooks(student) == hooks(teacher) == 0
    assert vars(student).keys() == vars(Net()).keys()
    assert [p.requires_grad for p in student.parameters()] == [True, False]
    with pytest.warns(UserWarning, match="Export of model failed"):
        assert mtd.export(student) is student


# Layer by layer.


def layerwise(criterion=None, **config):
    student = perceptron(seed=0)
    criterion = {("0", "0"): nn.MSELoss(), ("3", "3"): nn.MSELoss()} if criterion is None else criterion
    balancer = mtd.StaticLossBalancer(1.0)
    return converted(criterion, student, perceptron(seed=1), "layerwise_kd", loss_balancer=balancer, **config)


def by_hand(model, x):
    """Each of the student's modules on what the teacher's was given."""
    teacher = model.teacher_model
    with torch.no_grad():
        before = teacher[:3](x)
    return [
        functional.mse_loss(model[0](x), teacher[0](x)).item(),
        functional.mse_loss(model[3](before), teacher[3](before)).item(),
    ]


def test_layers_are_given_what_the_teachers_are_given():
    x, _ = points()
    for mode in (True, False):
        model = layerwise().train(mode)
        model(x)
        losses = model.compute_kd_loss(skip_balancer=True)
        assert [v.item() for v in losses.values()] == pytest.approx(by_hand(model, x))
    assert torch.equal(model.eval()(x), model.student(x))


def test_only_the_layers_of_the_criterion_train():
    model = layerwise({("0", "0"): nn.MSELoss()})
    before = copy.deepcopy(model.student.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(points()[0])
    model.compute_kd_loss().backward()
    optimizer.step()
    changed = {
        name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"0"}


def test_layerwise_losses_with_weights_train():
    """Theirs freezes them with the student."""
    model = layerwise({("0", "0"): Biased()})
    assert model.loss_modules[0].bias.requires_grad


def test_layerwise_export_gives_the_student_back_as_it_was():
    """Theirs leaves it frozen, and its head there twice."""
    student = bert()
    names = list(student.state_dict())
    student.bert.embeddings.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in student.named_parameters()}
    pairs = {("bert.encoder.layer.0", "bert.encoder.layer.0"): own_mse}
    model = converted(pairs, student, bert(seed=1), "layerwise_kd")
    batch = text_batch()
    assert model(**batch).logits.shape == (4, 3)
    assert model.compute_kd_loss().requires_grad
    assert mtd.export(model) is student
    assert list(student.state_dict()) == names
    assert {name: p.requires_grad for name, p in student.named_parameters()} == trained
    assert hooks(student) == 0


def test_layerwise_with_one_side_alone():
    model, (x, _) = layerwise(), points()
    with model.only_teacher_forward():
        model(x)
    with model.only_student_forward():
        model(x)
    losses = model.compute_kd_loss(skip_balancer=True)
    assert [v.item() for v in losses.values()] == pytest.approx(by_hand(model, x))


def test_layerwise_students_alone_get_their_own_inputs_and_this_is_told():
    model = layerwise()
    with model.only_student_forward(), pytest.warns(UserWarning, match="has no intermediate input stored"):
        assert model(points()[0]).shape == (6, 3)


def test_the_state_manager_knows_what_is_converted():
    model = converted(nn.MSELoss())
    assert mtd.ModeloptStateManager(nn.DataParallel(model)).has_state
    assert not mtd.ModeloptStateManager.is_converted(mtd.export(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mtd.LogitsDistillationLoss(temperature=0), "temperature must be a finite number above 0, got 0"),
        (lambda: mtd.LogitsDistillationLoss(temperature=float("nan")), "finite number above 0, got nan"),
        (lambda: mtd.LogitsDistillationLoss(temperature="2"), "temperature must be a number, got '2'"),
        (lambda: mtd.MFTLoss(threshold=".1"), "threshold must be a number, got '.1'"),
        (lambda: mtd.MGDLoss(-1, 8), "at least 1, got -1"),
        (lambda: mtd.MGDLoss(8, 8, lambda_mgd=2.0), "a share from 0 to 1, got 2.0"),
        (lambda: mtd.MGDLoss(8, 8)(torch.ones(4, 8), torch.ones(4, 8)), r"compares maps \(B, C, H, W\)"),
        (lambda: mtd.StaticLossBalancer(float("nan")), "kd_loss_weight must be a finite number, got nan"),
        (lambda: mtd.StaticLossBalancer("1"), "kd_loss_weight must be a number, got '1'"),
        (lambda: mtd.StaticLossBalancer(None), "kd_loss_weight must be a number, got None"),
        (lambda: converted(mtd.LogitsDistillationLoss), r"is the class .*; write LogitsDistillationLoss\(\)"),
        (lambda: converted({(0, 1): nn.MSELoss()}), r"pairs of paths .*, got \(0, 1\)"),
        (lambda: converted(nn.MSELoss(), loss_balancer="static"), r"a loss_balancer is a module, got 'static'"),
        (lambda: mtd.convert(None, mode="kd_loss"), "the student is a module, got None"),
        (lambda: mtd.convert(nn.Linear(2, 3), mode=None), r"mode is \[\('kd_loss', {...}\)\], got None"),
        (lambda: mtd.convert(nn.Linear(2, 3), mode=[("kd_loss",)]), r"a mode is its name, .* got \('kd_loss',\)"),
        (
            lambda: mtd.convert(nn.Linear(2, 3), mode=[("kd_loss", {0: 1})]),
            "'kd_loss' has no option 0; known: crit",
        ),
        (lambda: mtd.convert(nn.Linear(2, 3), mode=[("kd_loss", None)]), "'kd_loss' is a dict, got None"),
    ],
)
def test_what_can_never_work_is_refused_where_it_is_written(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_one_mode_without_its_list():
    config = {"teacher_model": nn.Linear(2, 3), "criterion": nn.MSELoss()}
    assert isinstance(mtd.convert(nn.Linear(2, 3), mode=("kd_loss", config)), mtd.DistillationModel)


def test_minifinetuning_without_labels_says_how_to_give_them():
    model = converted(mtd.MFTLoss())
    model(torch.ones(3, 2))
    with pytest.raises(TypeError, match=r"MFTLoss needs labels.*compute_kd_loss\(labels=labels\)"):
        model.compute_kd_loss()
