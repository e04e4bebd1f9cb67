"""TextBrewer's door: what it corrects, and what a script may use."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import limbeck.compat.textbrewer as textbrewer
from limbeck.compat.textbrewer import (
    data_utils,
    distiller_basic,
    distiller_general,
    distiller_utils,
    losses,
    presets,
)
from limbeck.compat.textbrewer.distiller_utils import post_adaptor, sum_of
from limbeck.losses import evaluate
from limbeck.report.parameters import parameter_tree
from limbeck.tasks import noise
from tests.brewing import CLASSES, LENGTH, Tagger, adaptor, loader, losses_of, match, teacher, tensors
from tests.test_exactness import largest_difference, run

WORKER = Path(__file__).parent / "workers" / "brewing.py"
MASKED = ("logits", "logits_mask", "inputs_mask", "hidden", "attention")


@pytest.fixture
def brew(tmp_path):
    """Train a student through the door; gives the distiller, with its losses and what its callback saw."""

    def train(
        keys=("logits",),
        distil=None,
        kind="GeneralDistiller",
        student=None,
        model=None,
        data=None,
        adapt=None,
        lr=0.05,
        extra=None,
        args=None,
        **how,
    ):
        torch.manual_seed(0)
        config = {"output_dir": tmp_path / "out", "device": "cpu", **how.pop("config", {})}
        model = teacher() if model is None else model
        adapt = adapt or adaptor(*keys)
        distiller = getattr(textbrewer, kind)(
            textbrewer.TrainingConfig(**config),
            textbrewer.DistillationConfig(**(distil or {})),
            model,
            student or Tagger(),
            adapt,
            adapt,
            **(extra or {}),
        )
        distiller.losses, distiller.called = losses_of(distiller), []
        optimizer = torch.optim.SGD(distiller.model_S.parameters(), lr=lr)
        distiller.optimizer = optimizer
        length = {} if "num_steps" in how else {"num_epochs": 1}
        torch.manual_seed(1)
        distiller.train(
            optimizer,
            data if data is not None else loader(),
            callback=lambda model, step: distiller.called.append((model, step)),
            **{**length, **how},
            **(args or {}),
        )
        return distiller

    return train


def outputs(batch, **options):
    """Both models' outputs for a batch, as at the first step of `brew` without dropout."""
    student, model = Tagger(dropout=0.0), teacher(**options).eval()
    return student(*batch), model(*batch)


# What is corrected


def test_custom_matches_run(brew):
    """In TextBrewer a KeyError; here the outputs of two modules, wherever they stand, projected and compared."""
    student, model = Tagger(dropout=0.0), teacher(width=12)
    project = nn.Linear(8, 12)
    before = project.weight.clone()
    matches = [
        textbrewer.CustomMatch(model.layers[2], student.layers[0], 2.0, "hidden_mse", project, {"lr": 0.5}),
        {
            "module_T": "layers.0",
            "module_S": "layers.1",
            "weight": 0.5,
            "loss": lambda s, t, mask_S, mask_T: (s.mean() - t.mean()) ** 2 + 0 * mask_T.sum(),
        },
    ]
    batch = tensors(rows=4)
    seen = {}
    for part in (model.layers[2], model.layers[0], student.layers[0], student.layers[1]):
        part.register_forward_hook(lambda module, _, out: seen.update({module: out}))
    model.eval()(*batch), student(*batch)
    squares = (project(seen[student.layers[0]]) - seen[model.layers[2]]).square() * batch[1][..., None]
    other = (seen[student.layers[1]].mean() - seen[model.layers[0]].mean()) ** 2
    expected = 2.0 * squares.sum() / (batch[1].sum() * 12) + 0.5 * other
    done = brew(
        ("inputs_mask",), student=student, model=model, data=loader(rows=4), extra={"custom_matches": matches}
    )
    assert done.losses == [pytest.approx(expected.item(), rel=1e-5)]
    assert (project.weight - before).abs().max() > 0
    assert [group["lr"] for group in done.optimizer.param_groups] == [0.05, 0.5]
    assert distiller_utils.CustomMatch.from_dict(matches[0].to_dict()) == matches[0]
    with pytest.raises(ValueError, match="to watch is no part of the Tagger"):
        brew(extra={"custom_matches": [textbrewer.CustomMatch(nn.Linear(2, 2), student, 1, "hidden_mse")]})


def test_steps_need_no_ckpt_steps(brew, tmp_path):
    done = brew(num_steps=3)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["gs3.pkl"]
    assert [step for _, step in done.called] == [3]


def by_hand(ours, theirs, temperature=4.0):
    p = torch.softmax(theirs / temperature, dim=-1)
    return -(p * torch.log_softmax(ours / temperature, dim=-1)).sum(dim=-1).mean().item()


def test_a_mask_goes_with_the_shift(brew):
    batch = tensors(rows=4)
    (ours, *_), (theirs, *_) = outputs(batch)
    ours, theirs, labels = (side[batch[1] == 1] for side in (ours, theirs, batch[2]))
    shifted = theirs.clone()
    for row, label in enumerate(labels.tolist()):
        best = theirs[row].argmax()
        shifted[row, best], shifted[row, label] = theirs[row, label], theirs[row, best]
    assert not torch.equal(shifted, theirs)
    keys = ("logits", "logits_mask", "labels")
    done = brew(keys, {"probability_shift": True}, student=Tagger(dropout=0.0), data=loader(rows=4))
    assert done.losses == [pytest.approx(by_hand(ours, shifted), rel=1e-5)]


@pytest.mark.parametrize("listed", [False, True])
def test_one_mask_for_two_logits(brew, listed):
    """Also where everything is a list, and a third logits of whole texts has no positions to mask."""

    def adapt(batch, outputs):
        logits = [outputs[0], 2 * outputs[0], outputs[0].mean(dim=1)]
        return {"logits": logits, "logits_mask": [batch[1]] if listed else batch[1]}

    batch = tensors(rows=4)
    (ours, *_), (theirs, *_) = outputs(batch)
    kept = [side[batch[1] == 1] for side in (ours, theirs)]
    expected = by_hand(*kept) + by_hand(2 * kept[0], 2 * kept[1]) + by_hand(ours.mean(1), theirs.mean(1))
    done = brew(adapt=adapt, student=Tagger(dropout=0.0), data=loader(rows=4))
    assert done.losses == [pytest.approx(expected, rel=1e-5)]


def test_a_distiller_without_logits(brew):
    batch = tensors(rows=4)
    loss = outputs(batch)[0][3]
    options = {"hard_label_weight": 3}
    done = brew(("losses",), options, kind="BasicDistiller", student=Tagger(dropout=0.0), data=loader(rows=4))
    assert done.losses == [pytest.approx(3 * loss.item())]
    with pytest.raises(ValueError, match="the adaptors gave nothing to learn"):
        brew(("labels",), kind="BasicDistiller")


def test_a_mask_that_keeps_nothing_gives_nothing(brew):
    def adapt(batch, outputs):
        return {"logits": outputs[0], "logits_mask": 0 * batch[1]}

    student = Tagger()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert brew(adapt=adapt, student=student).losses == [0.0] * 6
    assert largest_difference(before, student.state_dict()) == 0


def test_accumulation_may_be_longer_than_the_loader(brew, tmp_path):
    done = brew(config={"gradient_accumulation_steps": 100}, num_epochs=2)
    assert [step for _, step in done.called] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gs1.pkl", "gs2.pkl"]


def test_the_last_batches_of_an_epoch_are_an_update(brew):
    """Six batches by four: the other two are an update too, and weigh as much as two."""
    student, reference = Tagger(dropout=0.0), Tagger(dropout=0.0)
    brew(student=student, config={"gradient_accumulation_steps": 4})
    model = teacher().eval()
    batches = list(loader())
    for group in (batches[:4], batches[4:]):
        for parameter in reference.parameters():
            parameter.grad = None
        for batch in group:
            p = torch.softmax(model(*batch)[0].detach() / 4, dim=-1)
            loss = -(p * torch.log_softmax(reference(*batch)[0] / 4, dim=-1)).sum(dim=-1).mean() / len(group)
            loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.05 * parameter.grad
    assert largest_difference(student.state_dict(), reference.state_dict()) < 1e-6


def test_schedules_multiply_the_weights(brew):
    """A weight of 5 that decays is 5, 3.33, 1.67; in TextBrewer 5, 0.67, 0.33, and 0 for whoever comes next."""
    config = {"kd_loss_weight": 5, "kd_loss_weight_scheduler": "linear_decay", "temperature": 1}
    plain = brew(distil={"temperature": 1}, lr=0.0, student=Tagger(dropout=0.0), num_steps=3)
    done = brew(distil=config, lr=0.0, student=Tagger(dropout=0.0), num_steps=3)
    shares = [weighted / value for weighted, value in zip(done.losses, plain.losses, strict=True)]
    assert shares == pytest.approx([5, 10 / 3, 5 / 3])
    growing = {"hard_label_weight": 2, "hard_label_weight_scheduler": "linear_growth", "kd_loss_weight": 0}
    done = brew(("logits", "losses"), growing, lr=0.0, num_steps=4)
    assert done.losses[0] == 0
    given = textbrewer.DistillationConfig(**config)
    distiller = textbrewer.BasicDistiller(
        done.t_config, given, teacher(), Tagger(), adaptor("logits"), adaptor("logits")
    )
    for _ in range(2):
        distiller.train(torch.optim.SGD(distiller.model_S.parameters(), lr=0.0), loader(), num_steps=2)
    assert given.kd_loss_weight == 5
    with pytest.raises(ValueError, match="kd_loss_weight_scheduler needs a loader with a length, or num_steps"):
        distiller.train(torch.optim.SGD(distiller.model_S.parameters(), lr=0.0), Unsized(), num_epochs=1)


class Unsized:
    """Batches without a length."""

    def __iter__(self):
        return iter(loader())


def test_data_without_a_length(brew):
    done = brew(data=Unsized(), num_epochs=2)
    assert [step for _, step in done.called] == [6, 12]


class Padded(Dataset):
    """Texts of several lengths, as dicts."""

    def __init__(self):
        self.tokens, self.masks, self.labels = tensors()

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index], self.masks[index], self.labels[index]

    @staticmethod
    def collate(items):
        tokens, masks, labels = (torch.stack(column) for column in zip(*items, strict=True))
        length = int(masks.sum(dim=1).max())
        return {"tokens": tokens[:, :length], "mask": masks[:, :length], "labels": labels[:, :length]}


@pytest.mark.parametrize("kind", ["BasicDistiller", "GeneralDistiller"])
@pytest.mark.parametrize("dicts", [False, True])
@pytest.mark.parametrize("length", [{"num_epochs": 4}, {"num_steps": 24}])
def test_a_teacher_is_asked_once_for_each_example_however_they_are_shuffled(brew, kind, dicts, length):
    """In TextBrewer the batches of the first epoch stay together for ever; with `num_steps` it is refused."""
    keys = ("logits", "hidden", "inputs_mask", "logits_mask")
    plain = adaptor(*keys)

    def adapt(batch, outputs):
        batch = (batch["tokens"], batch["mask"], batch["labels"]) if dicts else batch
        return plain(batch, outputs)

    results = []
    for caching in (False, True):
        model, asked = teacher(), []
        model.register_forward_hook(
            lambda module, inputs, named, out, n=asked: n.append(len(out[0])), with_kwargs=True
        )
        data = DataLoader(Padded(), 4, shuffle=True, collate_fn=Padded.collate) if dicts else loader(shuffle=True)
        matches = [match("hidden_mse")] if kind == "GeneralDistiller" else None
        options = {"is_caching_logits": caching, "intermediate_matches": matches}
        done = brew(distil=options, kind=kind, model=model, data=data, adapt=adapt, **length)
        results.append((done.losses, sum(asked)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert len(set(results[0][0])) > 12
    assert results[0][1] == 96
    assert results[1][1] <= (60 if dicts else 28)  # padding to another length is another input


def test_clipping_reaches_the_projections(brew):
    torch.manual_seed(3)
    options = {
        "kd_loss_weight": 0,
        "intermediate_matches": [match("hidden_mse", weight=1e4, proj=["linear", 8, 12])],
    }
    student = Tagger(dropout=0.0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    done = brew(
        ("hidden",), options, student=student, model=teacher(width=12), num_steps=1, max_grad_norm=0.5, lr=1.0
    )
    torch.manual_seed(0)
    moved = [(value - before[name]).flatten() for name, value in student.state_dict().items()]
    gradients = [p.flatten() for p in done.projs[0].parameters()]
    fresh = presets.PROJ_MAP["linear"]
    torch.manual_seed(0)
    start = [p.flatten() for p in fresh(8, 12).parameters()]
    moved += [after - first for after, first in zip(gradients, start, strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.5, rel=1e-3)
    assert torch.cat(moved[-2:]).norm() > 0.1


def test_a_training_goes_on_where_it_was_left(brew, tmp_path):
    options = {"intermediate_matches": [match("cos", proj=["tanh", 8, 12])]}
    schedule = {
        "scheduler_class": torch.optim.lr_scheduler.MultiStepLR,
        "scheduler_args": {"milestones": [2, 5], "gamma": 0.3},
    }

    def train(folder, stop_at=None, **config):
        def stop(batch):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return batch

        calls = []
        return brew(
            ("logits", "hidden", "inputs_mask"),
            options,
            student=Tagger(),
            model=teacher(width=12),
            data=loader(shuffle=True),
            num_steps=8,
            batch_postprocessor=stop,
            config={"output_dir": tmp_path / folder, "ckpt_steps": 3, **config},
            **schedule,
        )

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("cut", stop_at=6, resume=True)
    resumed = train("cut", resume=True)
    assert len(resumed.losses) == 5
    assert resumed.losses == whole.losses[3:]
    assert largest_difference(whole.model_S.state_dict(), resumed.model_S.state_dict()) == 0
    assert largest_difference(whole.projs[0].state_dict(), resumed.projs[0].state_dict()) == 0
    assert train("cut", resume=False).losses == whole.losses


def test_ranks_change_nothing(tmp_path):
    """With a frozen teacher, which TextBrewer cannot wrap, and a projection in step on both ranks."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, worker=WORKER)
    run(two, worker=WORKER, ranks=2)
    for folder in (one, two):
        assert sorted(p.name for p in folder.glob("gs*")) == ["gs3.pkl", "gs6.pkl"]
    student = [torch.load(folder / "gs6.pkl", weights_only=True) for folder in (one, two)]
    assert largest_difference(*student) < 1e-6
    projections = [load_file(two / f"projection-{rank}.safetensors") for rank in (0, 1)]
    assert largest_difference(*projections) == 0
    assert largest_difference(projections[0], load_file(one / "projection-0.safetensors")) < 1e-6


def test_the_teacher_is_in_eval_mode_in_training_alone(brew):
    model = teacher(dropout=0.9).train()
    modes = []
    model.register_forward_hook(
        lambda module, inputs, out: modes.append(module.training or module.dropout.training)
    )
    student = Tagger().eval()
    brew(model=model, student=student)
    assert set(modes) == {False}
    assert model.training
    assert not student.training
    distiller = textbrewer.BasicDistiller(
        textbrewer.TrainingConfig(device="cpu", output_dir="/tmp"),
        textbrewer.DistillationConfig(),
        model,
        student,
        0,
        0,
    )
    with distiller as entered:
        assert entered is distiller
        assert (model.training, student.training) == (False, True)
    assert (model.training, student.training) == (True, False)


def test_temperatures_stay_positive(brew):
    """A large beta makes TextBrewer's negative."""
    options = {"temperature_scheduler": ["cwsm", 50], "temperature": 1}
    done = brew(distil=options)
    assert np.isfinite(done.losses).all()
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    warmth = done.d_config.temperature_scheduler(logits, logits, 1.0)
    assert warmth.min() == pytest.approx(0.1)


# What correct=True changes


def test_correct_has_the_square_of_the_temperature(brew):
    found = {
        correct: brew(distil={"temperature": 8, "correct": correct}, student=Tagger(dropout=0.0), lr=0.0).losses
        for correct in (False, True)
    }
    assert found[True] == pytest.approx([64 * value for value in found[False]], rel=1e-5)
    (ours, *_), (theirs, *_) = outputs(next(iter(loader())))
    assert found[True][0] == pytest.approx(
        evaluate("soft_cross_entropy", ours, theirs, temperature=8.0).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    "name", ["attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean", "nst"]
)
def test_correct_has_limbecks_losses(brew, name):
    """The others are right already."""
    options = {"attention_mse": {}, "attention_mse_sum": {"heads": "sum"}, "nst": {}}.get(
        name, {"kind": "cross_entropy", **({"heads": "mean"} if name.endswith("mean") else {})}
    )
    loss = {"attention_ce": "attention_kl", "attention_ce_mean": "attention_kl", "nst": "mmd"}.get(name, name)
    keys = MASKED if name == "nst" else ("attention",)
    batch = next(iter(loader()))
    (_, hidden, scores, _), (_, theirs, other, _) = outputs(batch)
    sides = ((hidden[1],) * 2, (theirs[1],) * 2) if name == "nst" else (scores[1], other[1])
    expected = evaluate(loss.removesuffix("_sum"), *sides, mask=batch[1] if name == "nst" else None, **options)
    found = {}
    for correct in (False, True):
        distil = {"correct": correct, "kd_loss_weight": 0, "intermediate_matches": [match(name, weight=1)]}
        found[correct] = brew(keys, distil, student=Tagger(dropout=0.0), num_steps=1).losses[0]
    assert found[True] == pytest.approx(expected.item(), rel=1e-5)
    assert found[True] != pytest.approx(found[False], rel=1e-3)


# What a script may use


def test_configurations_come_from_dicts_and_files_and_go_back(tmp_path):
    written = {"temperature": 8, "temperature_scheduler": ["flsw", 1, 2], "intermediate_matches": [match("cos")]}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(written))
    config = textbrewer.DistillationConfig.from_json_file(file)
    config.to_json_file(tmp_path / "again.json")
    again = textbrewer.DistillationConfig.from_json_file(tmp_path / "again.json")
    for read in (config, again):
        assert (read.temperature, read.intermediate_matches[0].loss) == (8, "cos")
        assert read.to_dict() == config.to_dict()
    assert "temperature : 8\n" in str(config)
    assert repr(config).startswith("DistillationConfig:\n")
    training = textbrewer.TrainingConfig.from_dict({"device": "cpu", "output_dir": str(tmp_path / "new")})
    assert (tmp_path / "new").is_dir()
    assert textbrewer.TrainingConfig.from_dict(training.to_dict()).to_dict() == training.to_dict()
    proj = ["linear", 8, 12]
    textbrewer.DistillationConfig(intermediate_matches=[match("cos", proj=proj)])
    assert proj == ["linear", 8, 12]
    made = textbrewer.DistillationConfig(intermediate_matches=[textbrewer.IntermediateMatch(**match("cos"))])
    made.to_json_file(tmp_path / "made.json")
    assert vars(
        textbrewer.DistillationConfig.from_json_file(tmp_path / "made.json").intermediate_matches[0]
    ) == vars(made.intermediate_matches[0])


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"temprature": 2}, TypeError, "no option 'temprature'; did you mean 'temperature'"),
        ({"temperature": 0}, ValueError, "a temperature must be positive and finite, got 0"),
        ({"kd_loss_type": "kl"}, ValueError, "unknown kd_loss_type 'kl'; known: ce, mse"),
        ({"kd_loss_weight": -1}, ValueError, "kd_loss_weight must be a number from 0 on, got -1"),
        (
            {"temperature_scheduler": ["flws", 1]},
            ValueError,
            "unknown temperature_scheduler 'flws'; did you mean 'flsw'",
        ),
        ({"kd_loss_weight_scheduler": "linear"}, ValueError, "did you mean 'linear_decay'"),
        ({"intermediate_matches": [{"layer_T": 1}]}, TypeError, "needs 'layer_S'"),
        (
            {"intermediate_matches": [match("cos") | {"layers": 1}]},
            TypeError,
            "IntermediateMatch has no option",
        ),
        (
            {"intermediate_matches": [match("fsp") | {"layer_S": 1}]},
            ValueError,
            "compares two layers of each model",
        ),
        ({"intermediate_matches": [match("cos") | {"layer_S": [1, 2]}]}, ValueError, "as many layers of both"),
        ({"intermediate_matches": [match("cos") | {"feature": "hiden"}]}, ValueError, "did you mean 'hidden'"),
        ({"intermediate_matches": [match("cos", proj=["lin", 8, 12])]}, ValueError, "unknown projection 'lin'"),
        ({"intermediate_matches": [match("cos", proj=["linear", 8])]}, ValueError, "a projection is written"),
        ({"intermediate_matches": [match("cos", proj=["linear", 8, 12, 1e-3])]}, ValueError, "is written"),
        ({"intermediate_matches": [match("cos", proj="linear")]}, ValueError, "a projection is written"),
        ({"intermediate_matches": match("cos")}, TypeError, "intermediate_matches is a list of dicts"),
        ({"intermediate_matches": [[1, 1]]}, TypeError, r"is made of a dict, got \[1, 1\]"),
        ({"intermediate_matches": [match("cos") | {"weight": "1"}]}, TypeError, "weight of a match must be a num"),
        ({"intermediate_matches": [match("cos") | {"layer_T": "1"}]}, TypeError, "layer_T is a layer's number"),
        ({"temperature": "8"}, TypeError, "temperature must be a number, got '8'"),
        ({"kd_loss_type": ["ce"]}, TypeError, "kd_loss_type is 'ce' or 'mse'"),
        ({"temperature_scheduler": "flsw"}, ValueError, r"write \['flsw', beta, gamma\]"),
        ({"temperature_scheduler": ["flsw", 1]}, ValueError, "does not take .*'gamma'"),
        ({"temperature_scheduler": []}, ValueError, "unknown temperature_scheduler None"),
        ([1], TypeError, r"DistillationConfig is made of a dict, got \[1\]"),
    ],
)
def test_wrong_configurations_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        textbrewer.DistillationConfig.from_dict(config)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "gpu"}, ValueError, "unknown device 'gpu'"),
        ({"ckpt_steps": "5"}, TypeError, "ckpt_steps must be a number, got '5'"),
        ({"gradient_accumulation_steps": 1.5}, ValueError, "whole number of at least 1, got 1.5"),
        ({"fp16_opt_level": "O9"}, ValueError, "unknown fp16_opt_level 'O9'"),
    ],
)
def test_wrong_training_configurations_are_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        textbrewer.TrainingConfig(output_dir=tmp_path, **options)


@pytest.mark.parametrize(
    ("kind", "teachers", "message"),
    [
        ("GeneralDistiller", lambda one: [one], "GeneralDistiller has one teacher, got a list"),
        ("MultiTeacherDistiller", lambda one: one, "a list of teachers, got a Linear"),
        ("MultiTeacherDistiller", lambda one: [], r"a list of teachers, got \[\]"),
        ("MultiTaskDistiller", lambda one: one, "a dict of teachers by task, got a Linear"),
    ],
)
def test_as_many_teachers_as_the_distiller_has(kind, teachers, message, tmp_path):
    configs = textbrewer.TrainingConfig(output_dir=tmp_path), textbrewer.DistillationConfig()
    models = teachers(nn.Linear(2, 3)), nn.Linear(2, 3)
    with pytest.raises(TypeError, match=message):
        getattr(textbrewer, kind)(*configs, *models, None, None)
    with pytest.raises(TypeError, match="first argument of a distiller is a TrainingConfig, got a Distill"):
        getattr(textbrewer, kind)(*reversed(configs), *models, None, None)


def test_projections_that_do_not_fit_are_refused_in_the_scripts_own_words(brew):
    wrong = {"intermediate_matches": [match("hidden_mse", proj=["linear", 7, 8])]}
    with pytest.raises(ValueError, match=r"takes a width of 7, and hidden 1 of the student .* write dim_S=8"):
        brew(("hidden",), wrong)
    with pytest.raises(ValueError, match=r"width of 7 .* with 8 .* write 'proj': \['linear', dim_S, 8\]"):
        brew(("hidden",), {"intermediate_matches": [match("hidden_mse", proj=["linear", 8, 7])]})
    misspelled = {"intermediate_matches": [match("hidden_mse", proj=["linear", 8, 8, {"lrr": 0.1}])]}
    with pytest.raises(TypeError, match="for a projection has no option 'lrr'; did you mean 'lr'"):
        brew(("hidden",), misspelled)


def test_an_adaptor_that_gives_no_losses_for_labels_that_count_is_told(brew):
    with pytest.warns(UserWarning, match=r"hard_label_weight is 1, .* no 'losses', only \['logits'\]"):
        brew(("logits",), {"hard_label_weight": 1})


def test_what_an_adaptor_gives_as_none():
    """Hidden states are None in a model that was not asked for them, and an adaptor may give them all the same."""
    assert post_adaptor({"logits": 1, "hidden": None, "labels": None}) == {"logits": [1]}
    with pytest.raises(TypeError, match="an adaptor gave None for 'losses'"):
        post_adaptor({"losses": None})
    with pytest.raises(TypeError, match="the losses of an adaptor are tensors, got None"):
        sum_of([None])


def test_wrong_trainings_are_refused(brew, tmp_path):
    with pytest.raises(ValueError, match="ckpt_frequency must be a whole number of at least 1, got 0"):
        textbrewer.TrainingConfig(ckpt_frequency=0, output_dir=tmp_path)
    if not torch.cuda.is_available():
        assert textbrewer.TrainingConfig(output_dir=tmp_path).device == "cpu"
        with pytest.raises(ValueError, match="device is 'cuda', and there is no GPU"):
            textbrewer.TrainingConfig(device="cuda", output_dir=tmp_path)
    with pytest.raises(ValueError, match="train for epochs or for steps"):
        brew(num_epochs=None)
    matches = {"intermediate_matches": [match("hidden_mse", layers=9)]}
    with pytest.raises(
        ValueError, match="hidden_mse reads hidden 9 of the student, and its adaptor gave 3 of them"
    ):
        brew(("hidden",), matches)
    with pytest.warns(UserWarning, match="BasicDistiller compares no layers; use GeneralDistiller"):
        brew(distil=matches, kind="BasicDistiller")
    with pytest.raises(TypeError, match="an adaptor returns a dict, got NoneType"):
        brew(adapt=lambda batch, outputs: None)
    with pytest.raises(ValueError, match="probability_shift needs 'labels'"):
        brew(distil={"probability_shift": True})
    with pytest.raises(ValueError, match=r"2 logits_mask for 1 logits"):
        brew(adapt=lambda batch, out: {"logits": out[0], "logits_mask": [batch[1]] * 2})
    with pytest.raises(ValueError, match=r"a logits_mask \(4,\) does not fit \(4, 6, 3\)"):
        brew(adapt=lambda batch, out: {"logits": out[0], "logits_mask": batch[1][:, 0]})
    projected = {"intermediate_matches": [match("cos", proj=["linear", 8, 12])]}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="projections are added to the optimizer after scheduler="):
        brew(("hidden",), projected, scheduler=scheduler)
    with pytest.raises(TypeError, match="the loader gives batches, got StepLR"):
        brew(data=scheduler)


def test_students_are_saved_as_often_as_asked(brew, tmp_path):
    """As state dicts that `torch.load` reads without unpickling anything."""
    done = brew(num_epochs=3, config={"ckpt_frequency": 2, "ckpt_epoch_frequency": 2})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gs12.pkl", "gs15.pkl", "gs18.pkl", "gs9.pkl"]
    assert [step for _, step in done.called] == [9, 12, 15, 18]
    assert all(model is done.model_S for model, _ in done.called)
    fresh = Tagger(seed=9)
    fresh.load_state_dict(torch.load(tmp_path / "out" / "gs18.pkl", weights_only=True))
    assert largest_difference(fresh.state_dict(), done.model_S.state_dict()) == 0
    done = brew(num_steps=5, config={"ckpt_steps": 2, "output_dir": tmp_path / "steps"})
    assert [step for _, step in done.called] == [2, 4, 5]


def test_the_losses_go_to_tensorboard(brew, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"intermediate_matches": [match("hidden_mse"), match("fsp")], "hard_label_weight": 1}
    done = brew(("losses", "logits", "hidden"), options, config={"log_dir": tmp_path / "log"})
    log = EventAccumulator(str(tmp_path / "log"))
    log.Reload()
    names = ["kd_loss", "hidden_hidden_mse_1_1", "hidden_fsp_1-1_1-1", "hard_label_loss"]
    assert set(log.Tags()["scalars"]) == {"scalar/total_loss", *(f"scalar/unweighted_{name}" for name in names)}
    assert [event.value for event in log.Scalars("scalar/total_loss")] == pytest.approx(done.losses)


def test_the_scheduler_may_stand_before_the_data(brew, tmp_path):
    """As in TextBrewer's tutorial and its example on CoNLL 2003, which its later versions cannot run."""
    done = brew(lr=0.5)
    distiller = textbrewer.GeneralDistiller(
        done.t_config, done._given, teacher(), Tagger(), adaptor("logits"), adaptor("logits")
    )
    for scheduler, rate in ((True, 0.05), (None, 0.5)):
        optimizer = torch.optim.SGD(distiller.model_S.parameters(), lr=0.5)
        made = scheduler and torch.optim.lr_scheduler.StepLR(optimizer, 6)
        distiller.train(optimizer, made, loader(), num_epochs=1, callback=None)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    with pytest.raises(TypeError, match="the loader gives batches, got NoneType"):
        distiller.train(optimizer, None, num_epochs=1)


def test_batches_may_be_prepared_and_models_called_with_more(brew):
    def doubled(batch):
        assert isinstance(batch, (list, tuple))
        return (*batch[:2], batch[2])

    plain = brew(student=Tagger(dropout=0.0), lr=0.0)
    done = brew(student=Tagger(dropout=0.0), lr=0.0, args={"scale": 3.0}, batch_postprocessor=doubled)
    assert done.losses != pytest.approx(plain.losses, rel=1e-5)
    (ours, *_), (theirs, *_) = (
        m(*next(iter(loader())), scale=3.0) for m in (Tagger(dropout=0.0), teacher().eval())
    )
    assert done.losses[0] == pytest.approx(by_hand(ours, theirs), rel=1e-5)


def test_several_teachers_with_adaptors_of_their_own(brew, tmp_path):
    models = [teacher(), teacher(seed=6)]
    config = textbrewer.TrainingConfig(device="cpu", output_dir=tmp_path)
    adaptors = [lambda batch, out, n=n: {"logits": n * out[0]} for n in (1, 3)]
    student = Tagger(dropout=0.0)
    for caching in (False, True):
        distil = textbrewer.DistillationConfig(is_caching_logits=caching)
        distiller = textbrewer.MultiTeacherDistiller(config, distil, models, student, adaptors, adaptors[0])
        kept = losses_of(distiller)
        distiller.train(torch.optim.SGD(student.parameters(), lr=0.0), loader(), num_epochs=2)
        batch = next(iter(loader()))
        mean = (models[0].eval()(*batch)[0] + 3 * models[1].eval()(*batch)[0]) / 2
        assert kept[0] == pytest.approx(by_hand(student(*batch)[0], mean), rel=1e-5)
        assert kept[:6] == pytest.approx(kept[6:], rel=1e-5)
    distiller = textbrewer.MultiTeacherDistiller(config, distil, models, student, adaptors[:1], adaptors[0])
    with pytest.raises(ValueError, match="there are 2 teachers and 1 adaptors"):
        distiller.train(torch.optim.SGD(student.parameters(), lr=0.0), loader(), num_epochs=1)


def test_several_tasks(tmp_path):
    """Each batch by its own teacher, in proportion to the tasks' sizes; a resumed training repeats the order."""
    config = textbrewer.TrainingConfig(device="cpu", output_dir=tmp_path, ckpt_steps=10, resume=True)
    data = {"a": loader(shuffle=True), "b": loader(rows=8, seed=4, shuffle=True)}
    seen = []

    def distiller(stop_at=None):
        def adapt(task):
            def own(batch, outputs):
                seen.append(task)
                if len(seen) == stop_at:
                    raise KeyboardInterrupt
                return {"logits": outputs[0]}

            return own

        adaptors = {task: adapt(task) for task in data}
        plain = {task: adaptor("logits") for task in data}
        models = {"a": teacher(), "b": teacher(seed=6)}
        distil = textbrewer.DistillationConfig()
        return textbrewer.MultiTaskDistiller(config, distil, models, Tagger(), plain, adaptors)

    def train(made, steps=40):
        torch.manual_seed(0), np.random.seed(0)
        kept = losses_of(made)
        made.train(torch.optim.SGD(made.model_S.parameters(), lr=0.1), data, steps)
        return kept

    with pytest.raises(KeyboardInterrupt):
        train(distiller(stop_at=26))
    resumed = distiller()
    rest = train(resumed)
    assert len(rest) == 20
    config.resume = False
    seen.clear()
    whole = distiller()
    losses = train(whole)
    assert losses[20:] == rest
    assert largest_difference(whole.model_S.state_dict(), resumed.model_S.state_dict()) == 0
    assert 0.6 < seen.count("a") / len(seen) < 0.9  # six batches and two
    with pytest.raises(ValueError, match=r"model_T has the tasks \['a', 'b'\], and there is data for \['c'\]"):
        whole.train(whole, {"c": loader()}, 1)
    optimizer = torch.optim.SGD(whole.model_S.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    whole.train(optimizer, scheduler, data, 3)  # as TextBrewer's first versions had it
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_functions_may_be_registered(brew):
    def absolute(feature_S, feature_T, mask=None):
        return (feature_S - feature_T).abs().mean()

    def half(dim_in, dim_out):
        layer = nn.Linear(dim_in, dim_out, bias=False)
        nn.init.constant_(layer.weight, 0.5)
        return layer

    textbrewer.register_new("match_Loss", "absolute", absolute)
    textbrewer.register_new("projection", "half", half)
    textbrewer.register_new("kd_loss", "first", lambda s, t, temperature: (s[..., 0] - t[..., 0]).abs().mean())
    textbrewer.register_new("weight_scheduler", "always", lambda x: 2.0)
    textbrewer.register_new("temperature_scheduler", "twice", lambda n: lambda s, t, base: n * base)
    batch = next(iter(loader()))
    (ours, hidden, *_), (theirs, other, *_) = outputs(batch, width=12)
    options = {
        "kd_loss_type": "first",
        "kd_loss_weight_scheduler": "always",
        "temperature_scheduler": ["twice", 2],
        "intermediate_matches": [match("absolute", proj=["half", 8, 12], weight=1)],
    }
    found = brew(
        ("logits", "hidden", "inputs_mask"),
        options,
        student=Tagger(dropout=0.0),
        model=teacher(width=12),
        num_steps=1,
    ).losses
    expected = 2 * (ours[..., 0] - theirs[..., 0]).abs().mean()
    expected = expected + (0.5 * hidden[1].sum(-1, keepdim=True) - other[1]).abs().mean()
    assert found == [pytest.approx(expected.item(), rel=1e-5)]
    with pytest.raises(ValueError, match="unknown table 'match_loss'; did you mean 'match_Loss'"):
        textbrewer.register_new("match_loss", "x", absolute)
    with pytest.raises(TypeError, match="'x' must be a function"):
        textbrewer.register_new("match_Loss", "x", 3)


class Averaging(distiller_basic.BasicDistiller):
    """A distiller of a user's own, on TextBrewer's parts, as its BERT-EMD example is."""

    def __init__(self, *arguments, weight):
        super().__init__(*arguments)
        self.weight = weight
        self.projs = [presets.PROJ_MAP["linear"](8, 12).to(self.t_config.device)]
        self.projs_group = [{}]

    def train_on_batch(self, batch, args):
        (teacher_batch, results_T), (student_batch, results_S) = distiller_utils.get_outputs_from_batch(
            batch, self.t_config.device, self.model_T, self.model_S, args
        )
        results_T = distiller_utils.post_adaptor(self.adaptor_T(teacher_batch, results_T))
        results_S = distiller_utils.post_adaptor(self.adaptor_S(student_batch, results_S))
        return self.compute_loss(results_S, results_T)

    def compute_loss(self, results_S, results_T):
        logits_S = distiller_utils.select_logits_with_mask(results_S["logits"], results_S["logits_mask"])
        logits_T = distiller_utils.select_logits_with_mask(results_T["logits"], results_T["logits_mask"])
        total = sum(self.kd_loss(s, t, self.d_config.temperature) for s, t in zip(logits_S, logits_T, strict=True))
        compare = presets.MATCH_LOSS_MAP["hidden_mse"]
        mean = compare(
            self.projs[0](results_S["hidden"][1]), results_T["hidden"][1], mask=results_S["inputs_mask"]
        )
        return total * self.d_config.kd_loss_weight + self.weight * mean, {"unweighted_mean": mean}


def test_a_distiller_of_ones_own(tmp_path):
    student = Tagger(dropout=0.0)
    config = textbrewer.TrainingConfig(device="cpu", output_dir=tmp_path)
    adapt = adaptor(*MASKED)
    made = Averaging(config, textbrewer.DistillationConfig(), teacher(width=12), student, adapt, adapt, weight=2.0)
    kept, before = losses_of(made), made.projs[0].weight.clone()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    with made:
        made.train(optimizer, loader(), num_epochs=3)
    assert kept[-1] < kept[0]
    assert not torch.equal(before, made.projs[0].weight)
    assert distiller_general.GeneralDistiller is textbrewer.GeneralDistiller is textbrewer.Distillers["General"]


def test_old_star_imports_find_their_names():
    found = {}
    exec("from limbeck.compat.textbrewer.distiller_utils import *", found)
    assert {
        "np",
        "torch",
        "nn",
        "Optional",
        "Dict",
        "logger",
        "PROJ_MAP",
        "post_adaptor",
        "FEATURES",
    } <= found.keys()


def test_plain_training(tmp_path):
    model = Tagger(of_tokens=False, dropout=0.0)
    trainer = textbrewer.BasicTrainer(
        textbrewer.TrainingConfig(device="cpu", output_dir=tmp_path), model, adaptor("losses")
    )
    kept = losses_of(trainer)
    with trainer:
        trainer.train(torch.optim.Adam(model.parameters(), lr=0.05), loader(of_tokens=False), num_epochs=20)
    assert kept[-1] < 0.5 * kept[0]
    trainer.adaptor = adaptor("logits")
    with pytest.raises(ValueError, match="the adaptor gave no 'losses', only"):
        trainer.train(torch.optim.Adam(model.parameters()), loader(of_tokens=False), num_epochs=1)


def test_half_precision_is_autocast(brew):
    """In TextBrewer Apex, which is gone. What is compared is compared in full precision."""
    full = brew(student=Tagger(dropout=0.0), lr=0.0)
    half = brew(student=Tagger(dropout=0.0), lr=0.0, config={"fp16": True})
    off = brew(student=Tagger(dropout=0.0), lr=0.0, config={"fp16": True, "fp16_opt_level": "O0"})
    assert half.losses != full.losses == off.losses
    assert half.losses == pytest.approx(full.losses, rel=1e-2)
    assert half.model_S.head.weight.dtype == torch.float32
    student, model = Tagger(dropout=0.0), teacher(width=12)
    options = {"kd_loss_weight": 0, "intermediate_matches": [match("cos", proj=["linear", 8, 12])]}
    custom = textbrewer.CustomMatch("layers.0", "layers.0", 1.0, "hidden_mse", nn.Linear(8, 12))
    how = {"student": student, "model": model, "lr": 0.0, "extra": {"custom_matches": [custom]}}
    losses = [brew(("hidden",), options, config={"fp16": fp16}, **how).losses for fp16 in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_a_wrapped_student_is_saved_bare(brew, tmp_path):
    done = brew(student=nn.DataParallel(Tagger()), config={"data_parallel": True})
    assert torch.load(tmp_path / "out" / "gs6.pkl", weights_only=True).keys() == Tagger().state_dict().keys()
    assert isinstance(done.model_S, nn.DataParallel)


# Losses, presets, helpers


def test_the_scripts_of_the_documents_run(tmp_path, monkeypatch):
    """All of TextBrewer's section but the import lines, in one go, and the loop of one's own."""
    monkeypatch.chdir(tmp_path)
    docs = Path(__file__).parent.parent / "docs"
    section = (docs / "coming-from.md").read_text().split("## TextBrewer\n")[1].split("\n## ")[0]
    scripts = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert "import textbrewer  # old" in scripts[0]
    exec(compile("".join(scripts[1:]), "coming-from.md", "exec"), {"__name__": "__main__"})
    assert [p.name for p in sorted((tmp_path / "saved_models").iterdir())] == ["gs16.pkl", "gs8.pkl"]
    loops = re.findall(r"```python\n(.*?)```", (docs / "loops.md").read_text(), flags=re.DOTALL)
    own = next(script for script in loops if "limbeck.train.plain import Loop" in script)
    exec(compile(own, "loops.md", "exec"), {"__name__": "__main__"})


def test_losses_of_attention_without_heads_and_of_single_vectors():
    student, other = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    for loss in (losses.att_mse_sum_loss, losses.att_ce_mean_loss):
        for keep in (None, mask):
            one_head = loss(student[:, None], other[:, None], mask=keep)
            torch.testing.assert_close(loss(student, other, mask=keep), one_head)
    torch.testing.assert_close(losses.pkd_loss(student, other), losses.pkd_loss(student[:, 0], other[:, 0]))
    gaps = nn.functional.normalize(student[:, 0], dim=-1) - nn.functional.normalize(other[:, 0], dim=-1)
    torch.testing.assert_close(losses.pkd_loss(student, other), gaps.square().sum(-1).mean())


def test_tables_of_presets():
    assert presets.TEMPERATURE_SCHEDULER["constant"](0, 0, 3.0) == 3.0
    assert presets.find(["flsw", {"beta": 1, "gamma": 2}], presets.TEMPERATURE_SCHEDULER, "scheduler")(
        torch.eye(2), torch.eye(2), 3.0
    ).shape == (2,)
    assert "flsw" in presets.TEMPERATURE_SCHEDULER
    assert len(presets.TEMPERATURE_SCHEDULER) >= 3
    assert textbrewer.FEATURES == ["hidden", "attention"]
    assert "logits_mask" in textbrewer.ADAPTOR_KEYS
    assert presets.WEIGHT_SCHEDULER["linear_decay"](0.25) == 0.75


def test_parameters_are_displayed():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "head": nn.Linear(4, 4)})
    model["head"].weight = model["body"][0].weight
    text, tree = textbrewer.utils.display_parameters(model, max_level=2)
    assert tree.count == 16 + 4 + 4 * 4 + 1 + 4
    assert tree.parts["head"].parts["weight"].shared
    assert tree.parts["head"].count == 4
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["part", "model", "body", "0", "1", "head", "weight", "bias"]
    assert "weight (shared)" in text
    assert lines[1].split()[1:3] == ["41", "100.0%"]
    with pytest.raises(TypeError, match="parameters are those of a module or a state dict, got int"):
        parameter_tree(3)


def test_noise_is_drawn_as_its_probabilities_say():
    """The order of TextBrewer's draws is held in tests/oracles."""
    generator, tokens = np.random.default_rng(0), list(range(2000))
    masked = noise.masking(tokens, generator, p=0.3, mask=-1)
    assert [b for a, b in zip(tokens, masked, strict=True) if a != b] == [-1] * masked.count(-1)
    assert 0.26 < masked.count(-1) / 2000 < 0.34
    assert 0.66 < len(kept := noise.deleting(tokens, generator, p=0.3)) / 2000 < 0.74
    assert kept == sorted(kept)
    spans = [
        noise.n_gram_sampling(tokens[:8], generator, lengths=(2, 5), probabilities=(0.25, 0.75))
        for _ in range(400)
    ]
    assert all(span == list(range(span[0], span[0] + len(span))) for span in spans)
    assert 0.68 < sum(len(span) == 5 for span in spans) / 400 < 0.82
    assert {span[0] for span in spans if len(span) == 5} == {0, 1, 2, 3}
    assert noise.n_gram_sampling([7, 8], generator) in ([7], [8], [7, 8])
    for probabilities, order in zip(
        np.eye(5), (([0, 1, 2]), [1, 0, 2], [2, 1, 0], [2, 0, 1], [1, 2, 0]), strict=True
    ):
        assert noise.short_disorder([0, 1, 2], generator, probabilities=probabilities) == order
    assert noise.short_disorder([0, 1], generator, probabilities=[0, 0, 1, 0, 0]) == [1, 0]
    assert sorted(noise.short_disorder(tokens, generator, probabilities=[0.2] * 5)) == tokens
    assert noise.long_disorder(tokens[:6], generator, p=1, length=4) == [2, 3, 0, 1, 4, 5]
    assert noise.long_disorder([], generator) == []
    assert data_utils.masking(["a"], p=1) == ["[MASK]"]
    assert data_utils.deleting(["a"], p=1) == []
    assert data_utils.n_gram_sampling([1, 2], [1.0], [2]) == [1, 2]
    assert data_utils.short_disorder([1, 2], [0, 1, 0, 0, 0]) == [2, 1]
    assert data_utils.long_disorder([1, 2], 1, 2) == [2, 1]
    with pytest.raises(ValueError, match="p is a probability from 0 to 1, got 2"):
        noise.masking(tokens, generator, p=2)
    with pytest.raises(ValueError, match="there must be 5 probabilities that sum to 1"):
        noise.short_disorder(tokens, generator, probabilities=[1.0])
    with pytest.raises(ValueError, match="the length of a span must be positive"):
        noise.long_disorder(tokens, generator, length=0)


def test_sizes_of_the_models_here():
    assert outputs(tensors(rows=2))[0][0].shape == (2, LENGTH, CLASSES)
