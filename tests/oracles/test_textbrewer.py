"""The door and TextBrewer itself, side by side: the same models, data and seed give the same losses."""

import random

import numpy as np
import pytest
import torch

from limbeck.compat import textbrewer as door
from limbeck.compat.textbrewer import data_utils as our_noise
from tests.brewing import Tagger, adaptor, loader, losses_of, match, teacher

textbrewer = pytest.importorskip("textbrewer")
from textbrewer import data_utils as their_noise  # noqa: E402

STEPS = 20
ALL = ("logits", "logits_mask", "labels", "hidden", "attention", "inputs_mask", "losses")
LOGITS, MASKED = ("logits",), ("logits", "logits_mask", "inputs_mask", "hidden", "attention")
PROJECTED = match("hidden_mse", proj=["linear", 8, 12, {"lr": 0.05}])

CASES = {
    "ce": (LOGITS, {"temperature": 8}),
    "ce of masked tokens": (MASKED, {"temperature": 3}),
    "mse": (LOGITS, {"kd_loss_type": "mse", "temperature": 2}),
    "hard labels": (ALL, {"hard_label_weight": 0.3}),
    "labels alone": (("losses",), {"hard_label_weight": 1}),
    "shift": (("logits", "labels"), {"probability_shift": True}),
    "flsw": (LOGITS, {"temperature_scheduler": ["flsw", 1, 2]}),
    "cwsm of masked tokens": (MASKED, {"temperature_scheduler": ["cwsm", 1]}),
    "weights": (ALL, {"kd_loss_weight_scheduler": "linear_decay", "hard_label_weight": 1}),
    "projection": (MASKED, {"intermediate_matches": [PROJECTED, match("pkd", 0, proj=["tanh", 8, 12])]}),
    "relu": (MASKED, {"intermediate_matches": [match("cos", proj=["relu", 8, 12])]}),
    **{
        f"{name}{kind}": (keys, {"intermediate_matches": [match(name)]})
        for name in door.MATCH_LOSS_MAP
        for kind, keys in ((" masked", MASKED), ("", ("logits", "hidden", "attention")))
    },
}


def trained(package, keys, options, folder, kind="GeneralDistiller", epochs=None, **how):
    """Train by one package; gives the loss of each batch and the student."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    wide = {"width": 12} if any(m.get("proj") for m in options.get("intermediate_matches", ())) else {}
    # Each pass of a loader draws a number; ours does so apart, that a resumed training may repeat it.
    student = Tagger(dropout=0.0 if kind == "MultiTaskDistiller" else 0.1)
    configured = package.DistillationConfig(**options)
    torch.manual_seed(2)
    config = package.TrainingConfig(
        output_dir=str(folder / package.__name__), device="cpu", ckpt_steps=7, gradient_accumulation_steps=2
    )
    model = {
        "MultiTeacherDistiller": lambda: [teacher(**wide), teacher(seed=6)],
        "MultiTaskDistiller": lambda: {"a": teacher(), "b": teacher(seed=6)},
    }.get(kind, lambda: teacher(**wide))()
    adapt = adaptor(*keys)
    adapters = dict.fromkeys("ab", adapt) if isinstance(model, dict) else adapt
    torch.manual_seed(3)  # projections are drawn by the global generator
    distiller = getattr(package, kind)(config, configured, model, student, adapters, adapters)
    losses = losses_of(distiller)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    data = (
        {"a": loader(), "b": loader(rows=12, seed=4)} if isinstance(model, dict) else loader(**how.pop("data", {}))
    )
    length = {"num_epochs": epochs} if epochs else {"num_steps": STEPS // 2}
    schedule = {"scheduler_class": torch.optim.lr_scheduler.StepLR, "scheduler_args": {"step_size": 3}}
    torch.manual_seed(4)
    np.random.seed(4)
    with distiller:
        distiller.train(optimizer, data, **length, **schedule, **how)
    return losses, student.state_dict()


def same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert len(ours[0]) == len(theirs[0])
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, atol=2e-5, rtol=1e-4)


def both(tmp_path, *arguments, **options):
    found = [trained(package, *arguments, tmp_path, **options) for package in (door, textbrewer)]
    assert len(found[1][0]) >= STEPS
    assert found[1][0][0] != pytest.approx(found[1][0][-1], abs=1e-4)
    same(*found)


@pytest.mark.parametrize("name", CASES)
def test_twenty_batches(tmp_path, name):
    both(tmp_path, *CASES[name])


def test_epochs_with_shuffling_and_clipping(tmp_path):
    """Four epochs of six batches; the student has dropout, and the loader shuffles, by the same random numbers."""
    both(tmp_path, MASKED, {"hard_label_weight": 0}, epochs=4, data={"shuffle": True}, max_grad_norm=0.1)


def test_several_teachers(tmp_path):
    both(tmp_path, MASKED, {"temperature": 2}, kind="MultiTeacherDistiller")


def test_several_tasks(tmp_path):
    options = {"intermediate_matches": [match("hidden_mse")], "hard_label_weight": 0.5}
    both(tmp_path, ALL, options, kind="MultiTaskDistiller", tau=0.5)


def test_plain_training(tmp_path):
    found = []
    for package in (door, textbrewer):
        model = Tagger()
        config = package.TrainingConfig(output_dir=str(tmp_path), device="cpu", gradient_accumulation_steps=3)
        trainer = package.BasicTrainer(config, model, adaptor("losses"))
        losses = losses_of(trainer)
        torch.manual_seed(0)
        with trainer:
            trainer.train(torch.optim.SGD(model.parameters(), lr=0.1), loader(shuffle=True), 4, max_grad_norm=1.0)
        found.append((losses, model.state_dict()))
    assert len(found[0][0]) == 24
    same(*found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("masking", {"p": 0.3, "mask": 99}),
        ("deleting", {"p": 0.3}),
        ("n_gram_sampling", {}),
        ("n_gram_sampling", {"p_ng": [0.5, 0.5], "l_ng": [2, 7]}),
        ("short_disorder", {"p": [0.2, 0.2, 0.2, 0.2, 0.2]}),
        ("long_disorder", {"p": 0.3, "length": 6}),
        ("long_disorder", {"p": 1, "length": 0.4}),
    ],
)
def test_noise(name, options):
    """Token by token the same, by the same numbers of NumPy's global generator."""
    tokens = list(range(23))
    for seed in range(50):
        found = []
        for package in (our_noise, their_noise):
            np.random.seed(seed)
            found.append((getattr(package, name)(tokens, **options), np.random.rand()))
        assert found[0] == found[1]
    assert tokens == list(range(23))
