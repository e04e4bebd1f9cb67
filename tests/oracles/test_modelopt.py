"""The door beside ModelOpt itself: the same models, data and seed give the same losses, step by step.

Each script below is run twice, with the old import and with the new one.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import limbeck.compat.modelopt as new
from tests.models import bert, convolutional, images, perceptron, points, text_batch

old = pytest.importorskip("modelopt.torch.distill")
STEPS, TOLERANCE = 20, 1e-9


@pytest.fixture(autouse=True)
def double():
    """So that rounding does not add up over the steps."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Classifier(nn.Module):
    """No nn.Sequential, which theirs does not take for a student."""

    def __init__(self):
        super().__init__()
        self.body = perceptron()

    def forward(self, x):
        return self.body(x)


class OutputLoss(nn.modules.loss._Loss):
    """What a user of ModelOpt writes for models whose outputs have names."""

    def forward(self, student, teacher):
        return functional.mse_loss(student.logits, teacher.logits)


class LayerLoss(nn.modules.loss._Loss):
    """The same for modules that return a tuple, or a tensor."""

    def forward(self, student, teacher):
        return functional.mse_loss(*(side[0] if isinstance(side, tuple) else side for side in (student, teacher)))


def trained(mtd, student, config, inputs, *, labels=None, mode="kd_loss", **extra):
    """The losses of a plain loop, and what came out of it."""
    torch.manual_seed(0)
    model = mtd.convert(student, mode=[(mode, config(mtd))])
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        own = None if labels is None else functional.cross_entropy(getattr(output, "logits", output), labels)
        loss = model.compute_kd_loss(student_loss=own, **extra)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, mtd.export(model)


def both(student, config, inputs, **options):
    """The losses of both, which agree, and so do the students."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (theirs, their_student), (ours, our_student) = (
            trained(mtd, student(), config, inputs, **options) for mtd in (old, new)
        )
    assert len(set(theirs)) > STEPS // 2, "nothing was learned"
    assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)
    for name, value in our_student.state_dict().items():
        torch.testing.assert_close(value, their_student.state_dict()[name], rtol=1e-8, atol=1e-9, msg=name)
    return ours


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_logits_with_labels(reduction):
    def config(mtd):
        loss = mtd.LogitsDistillationLoss(temperature=2.0, reduction=reduction)
        return {
            "teacher_model": perceptron(8, seed=1),
            "criterion": loss,
            "loss_balancer": mtd.StaticLossBalancer(),
        }

    x, labels = points(24)
    both(Classifier, config, x, labels=labels)


def test_the_mean_of_logits_is_theirs_times_the_number_of_classes():
    """A correction: 3 classes here. With ``correct=False`` the losses are theirs."""

    def config(mtd):
        options = {"correct": False} if mtd is new else {}
        loss = mtd.LogitsDistillationLoss(2.0, **options)
        return {
            "teacher_model": perceptron(8, seed=1),
            "criterion": loss,
            "loss_balancer": mtd.StaticLossBalancer(),
        }

    x, labels = points(24)
    both(Classifier, config, x, labels=labels)
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    theirs = old.LogitsDistillationLoss(2.0)(student, teacher)
    assert new.LogitsDistillationLoss(2.0)(student, teacher).item() == pytest.approx(3 * theirs.item(), rel=1e-12)


def test_several_pairs():
    def config(mtd):
        pairs = {
            ("body.0", "0"): nn.MSELoss(),
            ("body.2", "2"): nn.L1Loss(),
            ("body.3", "3"): mtd.LogitsDistillationLoss(2.0, "batchmean"),
        }
        balancer = mtd.StaticLossBalancer([0.2, 0.1, 0.4])
        return {"teacher_model": (perceptron, (), {"seed": 1}), "criterion": pairs, "loss_balancer": balancer}

    x, labels = points(24)
    both(Classifier, config, x, labels=labels)


def test_minifinetuning():
    def config(mtd):
        return {"teacher_model": perceptron(8, seed=1), "criterion": mtd.MFTLoss(2.0, 0.3)}

    x, labels = points(24)

    def trained_on(mtd):
        model = mtd.convert(Classifier(), mode=[("kd_loss", config(mtd))])
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(x)
            loss = model.compute_kd_loss(labels=labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert trained_on(new) == pytest.approx(trained_on(old), rel=TOLERANCE, abs=TOLERANCE)


def test_masked_generation():
    """The same draws too: of the generator's weights, and of the masks."""

    def config(mtd):
        pairs = {("norm", "norm"): mtd.MGDLoss(4, 6, alpha_mgd=0.5)}
        return {"teacher_model": convolutional(6, seed=1), "criterion": pairs}

    losses = both(convolutional, config, images(6)[0])
    assert losses[0] != losses[1]


def test_transformers_with_a_loss_of_ones_own():
    def config(mtd):
        return {"teacher_model": bert(width=24, seed=1), "criterion": OutputLoss(), "loss_balancer": None}

    batch = text_batch(8)
    both(bert, config, {key: batch[key] for key in ("input_ids", "attention_mask")})


def test_the_students_loss_and_ones_own_balancer():
    def config(mtd):
        class Sum(mtd.DistillationLossBalancer):
            def forward(self, loss):
                return loss["student_loss"] + 0.5 * loss["OutputLoss_0"]

        return {"teacher_model": bert(width=24, seed=1), "criterion": OutputLoss(), "loss_balancer": Sum()}

    batch = text_batch(8)
    labels = batch.pop("labels")
    both(bert, config, batch, labels=labels)


def test_layer_by_layer():
    def config(mtd):
        pairs = {(f"bert.encoder.layer.{i}", f"bert.encoder.layer.{i}"): LayerLoss() for i in range(2)}
        return {
            "teacher_model": bert(seed=1),
            "criterion": pairs,
            "loss_balancer": mtd.StaticLossBalancer([0.5, 0.5]),
        }

    both(bert, config, text_batch(8), mode="layerwise_kd")


def test_losses_reduced_by_a_function():
    def config(mtd):
        return {"teacher_model": perceptron(8, seed=1), "criterion": mtd.LogitsDistillationLoss(2.0, "none")}

    x, _ = points(24)
    mask = torch.arange(24) % 3 > 0
    both(Classifier, config, x, loss_reduction_fn=lambda values: (values * mask).sum() / mask.sum())
