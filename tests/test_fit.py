"""The loop: what its settings do, what callbacks see, what data it takes."""

import json
import math
import random
import weakref

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from limbeck import Callback, Distiller, Examples, Settings, Term, fit
from limbeck.testing import BackendContract
from limbeck.train import JsonLog, predict, read_log
from limbeck.train.data import ExampleBatches, LoaderBatches, as_batches
from limbeck.train.ranks import any_without_gradient


def items(count=48):
    points = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return [{"input": x, "labels": (x.sum() > 0).long()} for x in points]


def plain(**options):
    return Distiller(nn.Linear(4, 2), None, [Term("labels", loss="cross_entropy")], **options)


def with_teacher():
    terms = [Term("logits", loss="forward_kl", name="kd"), Term("labels", loss="cross_entropy", weight=0.5)]
    return Distiller(nn.Linear(4, 2), nn.Linear(4, 2), terms)


class Watch(Callback):
    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def on_start(self, state):
        self.calls.append("start")

    def on_step(self, state):
        self.calls.append(state.step)
        if state.step == self.stop_at:
            state.stop = "enough"

    def on_evaluate(self, state):
        self.calls.append("evaluate")

    def on_checkpoint(self, state):
        self.calls.append("checkpoint")

    def on_end(self, state):
        self.calls.append("end")


def test_it_learns():
    result = fit(plain(), items(), items(), Settings(epochs=30, learning_rate=0.1))
    assert result.history[-1][1] > 0.95
    assert result.steps == 60
    assert result.stopped == "done"


def test_callbacks_in_order(tmp_path):
    watch = Watch()
    fit(plain(), items(), items(), Settings(epochs=2), callbacks=[watch], folder=tmp_path)
    assert watch.calls == ["start", 1, 2, "evaluate", "checkpoint", 3, 4, "evaluate", "checkpoint", "end"]


def test_a_callback_may_stop():
    result = fit(plain(), items(), settings=Settings(epochs=9), callbacks=[Watch(stop_at=3)])
    assert (result.steps, result.stopped) == (3, "enough")


def test_time_limit():
    result = fit(plain(), items(), settings=Settings(epochs=10**6, time_limit=0.2))
    assert result.stopped == "time limit"
    assert result.seconds < 20


def test_best_and_patience_follow_the_metric(tmp_path):
    """With a rate that spoils the model, the best evaluation is an early one, and its weights come back."""
    for folder in (None, tmp_path):
        torch.manual_seed(0)
        distiller = plain()
        with torch.no_grad():
            distiller.student.weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
        bad = [{**item, "labels": 1 - item["labels"]} for item in items()]
        settings = Settings(epochs=50, learning_rate=0.3, best=True, patience=3, warmup=0, evaluate_every=1)
        result = fit(distiller, bad, items(), settings, folder=folder)
        assert "no better score" in result.stopped
        predictions = predict(distiller.export(), items())
        assert (predictions.logits.argmax(1) == predictions.labels).mean() == result.best_score


def test_lower_is_better_metrics_choose_the_lowest():
    data = [{"input": x["input"], "labels": x["input"].sum()} for x in items()]
    distiller = Distiller(nn.Linear(4, 1), None, [Term("labels", loss="label_mse")])
    result = fit(distiller, data, data, Settings(epochs=9, learning_rate=0.05, best=True), metric="mse")
    assert result.best_score == min(score for _, score in result.history)
    assert result.history[-1][1] < result.history[0][1]


def test_log_holds_raw_and_weighted_terms(tmp_path):
    log = tmp_path / "log.jsonl"
    fit(with_teacher(), items(), items(), Settings(epochs=5, log_every=2), callbacks=[JsonLog(log, "student")])
    lines = read_log(log)
    losses = [line for line in lines if "terms" in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8, 10]
    for line in losses:
        assert line["weighted"]["cross_entropy"] == pytest.approx(0.5 * line["terms"]["cross_entropy"])
        assert line["loss"] == pytest.approx(sum(line["weighted"].values()))
    assert [line["step"] for line in lines if "scores" in line] == [2, 4, 6, 8, 10]


def test_a_cut_off_line_of_the_log_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


def test_checkpoints_are_pruned_and_hold_no_teacher(tmp_path):
    from safetensors.torch import load_file

    fit(with_teacher(), items(), settings=Settings(epochs=5, keep=2), folder=tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000008", "step-00000010"]
    assert set(load_file(tmp_path / "step-00000010" / "distiller.safetensors")) == {
        "student.weight",
        "student.bias",
    }
    assert not any(p.suffix in (".pt", ".bin", ".pkl") for p in tmp_path.rglob("*"))


def test_nan_names_the_term_and_keeps_good_checkpoints(tmp_path):
    class Poison(Callback):
        def on_step(self, state):
            if state.step == 7:
                state.distiller.student.weight.data.fill_(math.nan)

    settings = Settings(epochs=9, checkpoint_every=2, log_every=1)
    with pytest.raises(FloatingPointError, match=r"term 'kd' became nan at or before step 8.*step-00000006"):
        fit(with_teacher(), items(), settings=settings, callbacks=[Poison()], folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006"]


def test_spoilt_weights_are_not_saved(tmp_path):
    class Poison(Callback):
        def on_step(self, state):
            state.distiller.student.weight.data[0, 0] = math.inf

    with pytest.raises(FloatingPointError, match=r"student.weight are no longer finite at step 1"):
        fit(
            plain(),
            items(),
            settings=Settings(epochs=2, checkpoint_every=1),
            callbacks=[Poison()],
            folder=tmp_path,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16"}, {"compile": True}, {"optimizer": "sgd"}, {"optimizer": "adafactor"}]
)
def test_settings_run(settings, monkeypatch):
    if "compile" in settings:
        compiled = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda self, **o: compiled(self, backend="aot_eager", **o))
    distiller = with_teacher()
    result = fit(distiller, items(), items(), Settings(epochs=30, learning_rate=0.1, **settings))
    assert result.history[-1][1] > 0.6
    assert distiller.export()._compiled_call_impl is None


def test_half_precision_scales_the_loss(tmp_path):
    distiller, log = with_teacher(), tmp_path / "log.jsonl"
    before = distiller.student.weight.detach().clone()
    settings = Settings(steps=3, precision="fp16", learning_rate=0.01, log_every=1)
    fit(distiller, items(), settings=settings, folder=tmp_path, callbacks=[JsonLog(log)])
    assert all(math.isfinite(line["loss"]) for line in read_log(log))
    moved = (distiller.student.weight - before).abs().max().item()
    assert 0.001 < moved < 0.1
    kept = json.loads((tmp_path / "step-00000003" / "state.json").read_text())["scaler"]
    assert kept["scale"] == 2.0**16
    assert kept["_growth_tracker"] == 3


def test_the_environment_of_accelerate_changes_nothing(monkeypatch):
    """Precision and accumulation are the settings' alone, and nothing stays patched."""

    def trained():
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        distiller = with_teacher()
        fit(distiller, items(), settings=Settings(steps=3, learning_rate=0.1, clip=None, optimizer="sgd"))
        assert "forward" not in vars(distiller)
        return distiller.student.weight.detach()

    expected = trained()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert torch.equal(trained(), expected)


def test_a_tracker_that_is_not_installed_is_refused():
    with pytest.raises(ValueError, match="tracker 'wandb' is not installed; pip install wandb"):
        fit(plain(), items(), settings=Settings(trackers=["wandb"]))


def test_looking_for_gradients_leaves_no_trace():
    """The look that DDP needs moves neither running statistics, nor random state, nor modes."""
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    student.add_module("unused", nn.Identity())
    distiller = Distiller(student, None, [Term("labels", loss="cross_entropy")])
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    state = torch.get_rng_state()
    batch = {"input": torch.ones(2, 4), "labels": torch.tensor([0, 1])}
    student.eval()
    assert not any_without_gradient(distiller, batch)
    assert all(torch.equal(before[name], value) for name, value in distiller.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not student.training
    assert distiller.training
    distiller.spare = nn.Parameter(torch.zeros(1))
    assert any_without_gradient(distiller, batch)


def test_nan_logits_are_never_the_best(tmp_path):
    """Weights that are finite can give logits that are not; accuracy would take NaN for a class."""

    class Poison(Callback):
        def on_step(self, state):
            if state.step == 2:
                state.distiller.student.weight.data.fill_(3e38)

    settings = Settings(epochs=2, batch_size=24, best=True, evaluate_every=2)
    data = [
        {"input": x["input"] * torch.tensor([10.0, -10.0, 10.0, -10.0]), "labels": x["labels"]} for x in items()
    ]
    with pytest.raises(FloatingPointError, match=r"logits are NaN in the evaluation at step 2"):
        fit(plain(), items(), data, settings, callbacks=[Poison()], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trackers_receive_the_terms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = Settings(epochs=4, log_every=1, trackers=["tensorboard"])
    fit(with_teacher(), items(), items(), settings, folder=tmp_path)
    events = EventAccumulator(str(next(tmp_path.glob("limbeck"))))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"terms/kd", "weighted/kd", "train/loss", "train/learning_rate", "eval/accuracy"} <= tags


def test_projections_have_a_rate_of_their_own():
    terms = [Term("0", "0", loss="mse", project="linear")]
    distiller = Distiller(nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 3)), terms)
    distiller.preflight({"input": torch.zeros(2, 4)})
    settings = Settings(learning_rate=0.1, projection_learning_rate=0.7)
    groups = settings.build_optimizer(distiller.student, distiller.objective).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.01), (0.1, 0.0), (0.7, 0.01), (0.7, 0.0)]


def test_schedules():
    linear = Settings(warmup=0.1, schedule="linear")
    assert [linear.rate(s, 100) for s in (0, 9, 10, 55)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    cosine = Settings(warmup=0, schedule="cosine")
    assert [cosine.rate(s, 100) for s in (0, 50)] == pytest.approx([1.0, 0.5])
    constant = Settings(warmup=4, schedule="constant")
    assert [constant.rate(s, 100) for s in (0, 3, 99)] == pytest.approx([0.25, 1.0, 1.0])


def test_order_is_a_function_of_seed_and_epoch():
    data = Examples(items(50), lengths=list(range(50)))
    batches = ExampleBatches(data, Settings(batch_size=8))
    assert batches.order(3) == ExampleBatches(data, Settings(batch_size=8)).order(3)
    assert batches.order(3) != batches.order(4)
    assert batches.order(3) != ExampleBatches(data, Settings(batch_size=8, seed=1)).order(3)
    assert sorted(i for batch in batches.order(3) for i in batch) == list(range(50))
    assert all(max(batch) - min(batch) < 8 for batch in batches.order(0))  # like lengths stand together


def test_skipping_continues_an_epoch():
    batches = ExampleBatches(Examples(items()), Settings(batch_size=10))
    whole = [step.micro_batches[0]["input"] for step in batches.epoch(2)]
    rest = [step.micro_batches[0]["input"] for step in batches.epoch(2, skip=3)]
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_a_shuffling_loader_repeats_its_order():
    points = torch.arange(20.0).view(20, 1)
    batches = LoaderBatches(DataLoader(TensorDataset(points, points), batch_size=4, shuffle=True), Settings())
    whole = inputs(batches.epoch(1))
    torch.rand(7)
    rest = inputs(batches.epoch(1, skip=2))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert not torch.equal(torch.cat(whole), torch.cat(inputs(batches.epoch(2))))


class Augmented:
    """A data set that draws random numbers from all generators."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        noise = torch.rand(1) + float(np.random.rand()) + random.random()
        return noise + index, torch.tensor(0)


@pytest.mark.parametrize("own", [False, True])
def test_an_augmenting_loader_repeats_its_batches(own):
    """Also where each start makes the loader anew, whatever the random state, and beside the training's own."""

    def steps(epoch, skip=0):
        generator = torch.Generator() if own else None
        loader = DataLoader(Augmented(), batch_size=4, shuffle=True, generator=generator)
        return LoaderBatches(loader, Settings()).epoch(epoch, skip)

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    whole = inputs(steps(1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    torch.rand(7), np.random.rand(3), random.random()
    rest = inputs(steps(1, skip=2))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert not torch.equal(torch.cat(whole), torch.cat(inputs(steps(2))))


def test_drawing_batches_leaves_the_gpus_alone(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a GPU was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    assert len(inputs(LoaderBatches(DataLoader(Augmented(), batch_size=4), Settings()).epoch(0))) == 5


def test_skipped_batches_are_not_kept():
    alive = weakref.WeakSet()

    class Point(torch.Tensor):
        pass

    def collate(examples):
        point = torch.zeros(len(examples), 1).as_subclass(Point)
        alive.add(point)
        return point, torch.zeros(len(examples))

    batches = LoaderBatches(DataLoader(Augmented(), batch_size=1, collate_fn=collate), Settings())
    next(batches.epoch(0, skip=15))
    assert len(alive) <= 2


@pytest.mark.parametrize("loader", [False, True])
def test_ranks_see_the_same_steps(loader):
    """33 examples in batches of 8: five steps on any number of ranks, all examples once, none left out."""
    pairs = TensorDataset(torch.arange(33.0).view(33, 1), torch.zeros(33))
    examples = Examples(pairs, lengths=list(range(33)))
    data = DataLoader(pairs, batch_size=8, shuffle=True) if loader else examples
    alone = list(as_batches(data, Settings(batch_size=8)).epoch(0))
    for world in (2, 3):
        ranks = [as_batches(data, Settings(batch_size=8), rank, world) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {5}
        for whole, *parts in zip(alone, *(batches.epoch(0) for batches in ranks), strict=True):
            assert {part.examples for part in parts} == {whole.examples}
            counted = [part.micro_batches[0]["inputs"][0] for part in parts if part.share]
            assert torch.equal(torch.cat(counted), whole.micro_batches[0]["inputs"][0])


def test_examples_are_counted_in_the_global_batch():
    class Count(Callback):
        def on_end(self, state):
            counted.append(state.examples)

    counted = []
    fit(plain(), items(33), settings=Settings(epochs=2, batch_size=8), callbacks=[Count()])
    assert counted == [66]


def test_data_that_can_be_read_once_only():
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.points = iter(TensorDataset(torch.randn(4, 4), torch.zeros(4).long()))

        def __len__(self):
            return 4

        def __iter__(self):
            return self.points

    with pytest.raises(ValueError, match="epoch 1 of the training data is empty"):
        fit(plain(), DataLoader(Once(), batch_size=2), settings=Settings(epochs=3))


def inputs(steps):
    return [step.micro_batches[0]["inputs"][0] for step in steps]


def test_tuple_data_sets_and_loaders():
    pairs = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
    for data in (pairs, DataLoader(pairs, batch_size=8)):
        assert fit(plain(), data, data, Settings(steps=2)).steps == 2


def test_bad_data():
    with pytest.raises(TypeError, match="cannot batch a int"):
        as_batches(3, Settings())
    with pytest.raises(ValueError, match="training data is empty"):
        fit(plain(), [])
    with pytest.raises(TypeError, match="cannot predict on a int"):
        fit(plain(), items(), 3, Settings(steps=1))
    with pytest.raises(ValueError, match="evaluation data is empty"):
        fit(plain(), items(), [], Settings(steps=1))


def test_texts_as_a_tokenizer_leaves_them():
    """Plain lists, which transformers' Trainer pads by itself, and PyTorch would batch the wrong way round."""
    rows = [{"input": [1.0, 2.0, 3.0, 4.0], "labels": i % 2} for i in range(8)]
    with pytest.raises(ValueError, match=r"'input' of the examples is a list of numbers.*\(data, collate="):
        fit(plain(), rows, settings=Settings(steps=1))
    uneven = [{"input": torch.ones(3 + i % 2), "labels": i % 2} for i in range(8)]
    with pytest.raises(ValueError, match=r"examples of one batch differ in shape .*or a DataLoader that pads"):
        fit(plain(), uneven, settings=Settings(steps=1))

    def collate(examples):
        return {key: torch.tensor([one[key] for one in examples]) for key in ("input", "labels")}

    assert fit(plain(), Examples(rows, collate=collate), settings=Settings(steps=1)).steps == 1


def test_arguments_of_another_kind_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(TypeError, match="what trains is a Distiller, got a Linear"):
        fit(nn.Linear(4, 2), items())
    with pytest.raises(TypeError, match=r"settings are limbeck.Settings, got a dict; write .*\(\*\*settings"):
        fit(plain(), items(), settings={"epochs": 1})
    with pytest.raises(TypeError, match="Settings stand where data for evaluations do"):
        fit(plain(), items(), Settings(epochs=1))
    with pytest.raises(TypeError, match="callbacks are a list, got a Callback"):
        fit(plain(), items(), callbacks=Callback())
    with pytest.raises(TypeError, match=r"a callback is a limbeck.train.callbacks.Callback, got print"):
        fit(plain(), items(), callbacks=[print])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoints go into a folder, and .*file is a file"):
        fit(plain(), items(), folder=tmp_path / "file" / "below")
    frozen = nn.Linear(4, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing of the student \(Linear\) trains"):
        fit(Distiller(frozen, nn.Linear(4, 2), [Term("logits", loss="mse")]), items())


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="learning_rat"):
        Settings(learning_rat=1)
    with pytest.raises(ValueError, match="optimizer"):
        Settings(optimizer="adamm")


@pytest.mark.parametrize("choice", [{"best": True}, {"patience": 1}])
def test_choosing_needs_evaluations(choice):
    with pytest.raises(ValueError, match="best and patience choose by evaluations; pass eval_data"):
        fit(plain(), items(), None, Settings(**choice))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bets": 1}, "optimizer 'adamw' has no option 'bets'; did you mean 'betas'"),
        ({"lr": 1}, "'lr' is no option of optimizer 'adamw'; set learning_rate"),
        ({"betas": 1}, "optimizer_options of 'adamw': "),
    ],
)
def test_options_that_the_optimizer_does_not_have(options, message):
    with pytest.raises(TypeError, match=message):
        fit(plain(), items(), settings=Settings(optimizer_options=options))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(plain(), items(), settings=Settings(steps=2), folder=tmp_path)
    other = Distiller(nn.Linear(4, 3), None, [Term("labels", loss="cross_entropy")])
    with pytest.raises(ValueError, match="belongs to another model"):
        fit(other, items(), settings=Settings(steps=2), folder=tmp_path)


def test_distiller_is_left_in_eval_mode_and_student_without_hooks():
    distiller = with_teacher()
    fit(distiller, items(), settings=Settings(steps=2))
    assert not distiller.training
    assert all(not m._forward_hooks for m in distiller.export().modules())


class TestFitIsABackend(BackendContract):
    fit = fit
