"""The loop of one's own: the same as code written by hand, and exact resume."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from limbeck.train import plain
from limbeck.train.loaders import MixedLoaders
from limbeck.train.plain import Loop
from limbeck.train.scalars import Scalars
from limbeck.types import Output
from tests.test_exactness import largest_difference, run

WORKER = Path(__file__).parent / "workers" / "plain.py"


def data(rows=23):
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator))


class Parts:
    """A model with dropout and batch norm, an optimizer with momentum, and a shuffling loader."""

    def __init__(self, own_generator=False, scheduler="milestones", **options):
        self.seed()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(3) if own_generator else None
        self.loader = DataLoader(data(), batch_size=3, shuffle=True, generator=generator)
        schedulers = torch.optim.lr_scheduler
        self.scheduler = {
            "milestones": lambda: schedulers.MultiStepLR(self.optimizer, [2, 5], gamma=0.5),
            "warmup": lambda: schedulers.SequentialLR(
                self.optimizer,
                [schedulers.LinearLR(self.optimizer), schedulers.LambdaLR(self.optimizer, lambda n: 0.9**n)],
                milestones=[3],
            ),
            "none": lambda: None,
        }[scheduler]()
        self.losses = []
        self.options = {"accumulation": 3, "clip": 0.5, "scheduler": self.scheduler, **options}

    def seed(self):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)

    def step(self, batch, state):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.model(inputs * (1 + random.random() + np.random.rand())), labels)
        self.losses.append(loss.item())
        return loss

    def loop(self, **options):
        self.seed()
        return Loop(self.step, self.model, self.loader, self.optimizer, **{**self.options, **options})


def by_hand(parts, epochs, every="step"):
    """The same training, written out."""
    parts.seed()
    losses = []
    for _ in range(epochs):
        batches = list(parts.loader)
        for start in range(0, len(batches), 3):
            group = batches[start : start + 3]
            examples = sum(len(labels) for _, labels in group)
            total = 0.0
            for batch in group:
                loss = parts.step(batch, None) * len(batch[1]) / examples
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(parts.model.parameters(), 0.5)
            parts.optimizer.step()
            if every == "step":
                parts.scheduler.step()
            parts.optimizer.zero_grad()
            losses.append(total)
        if every == "epoch":
            parts.scheduler.step()
    return losses


class Watch(plain.Callback):
    def __init__(self, stop_at=None, raise_at=None):
        self.calls, self.losses = [], []
        self.stop_at, self.raise_at = stop_at, raise_at

    def on_start(self, state):
        self.calls.append("start")

    def on_epoch_start(self, state):
        self.calls.append(f"epoch {state.epoch}")

    def on_backward(self, state):
        self.calls.append("backward")

    def on_step(self, state):
        self.calls.append(f"step {state.step}")
        self.losses.append(state.loss.item())
        if state.step == self.stop_at:
            state.stop = "enough"
        if state.step == self.raise_at:
            raise KeyboardInterrupt

    def on_checkpoint(self, state):
        self.calls.append(f"checkpoint {state.checkpoint.name}")

    def on_epoch(self, state):
        self.calls.append(f"end of epoch {state.epoch}")

    def on_end(self, state):
        self.calls.append("end")


@pytest.mark.parametrize("scheduler", ["milestones", "warmup"])
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_it_is_the_loop_that_one_writes_by_hand(scheduler, every):
    """Eight batches in updates of three: the last of an epoch has two, and the last batch two examples."""
    ours, theirs, watch = Parts(scheduler=scheduler), Parts(scheduler=scheduler), Watch()
    state = ours.loop(epochs=2, scheduler_every=every, callbacks=[watch]).run()
    losses = by_hand(theirs, 2, every)
    assert state.step == state.total_steps == 6
    assert ours.losses == theirs.losses
    assert watch.losses == pytest.approx(losses, abs=1e-6)
    assert largest_difference(ours.model.state_dict(), theirs.model.state_dict()) == 0


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("scheduler", ["milestones", "warmup", "none"])
def test_an_interruption_after_any_step_changes_nothing(tmp_path, own_generator, scheduler):
    whole = Parts(own_generator, scheduler)
    whole.loop(epochs=3).run()
    for step in (1, 2, 4, 6, 7, 9):  # the checkpoint before lies in, and at the end of, an epoch
        first = Parts(own_generator, scheduler)
        with pytest.raises(KeyboardInterrupt):
            first.loop(
                epochs=3, folder=tmp_path / f"{step}", checkpoint_every=1, callbacks=[Watch(raise_at=step)]
            ).run()
        second = Parts(own_generator, scheduler)
        loop = second.loop(epochs=3, folder=tmp_path / f"{step}", checkpoint_every=1)
        if step > 1:  # there is a checkpoint of the step before, and the new process is somewhere else
            torch.rand(step), random.random(), np.random.rand()
        state = loop.run()
        assert (state.step, state.epoch) == (9, 3)
        assert largest_difference(whole.model.state_dict(), second.model.state_dict()) == 0
        rates = [[g["lr"] for g in p.optimizer.param_groups] for p in (whole, second)]
        assert rates[0] == rates[1]


@pytest.mark.parametrize("place", ["loader", "sampler", "batch sampler"])
@pytest.mark.parametrize("every", [None, 2])
def test_wherever_the_loader_has_its_generator_an_interruption_changes_nothing(tmp_path, place, every):
    """Each epoch is drawn in an order of its own, also in a process that goes on after the first."""

    def weights(folder, stop=None):
        parts, own = Parts(scheduler="none"), torch.Generator().manual_seed(3)
        sampler = RandomSampler(data(), generator=own)
        parts.loader = {
            "loader": lambda: DataLoader(data(), batch_size=3, shuffle=True, generator=own),
            "sampler": lambda: DataLoader(data(), batch_size=3, sampler=sampler),
            "batch sampler": lambda: DataLoader(data(), batch_sampler=BatchSampler(sampler, 3, False)),
        }[place]()
        parts.loop(epochs=3, folder=folder, checkpoint_every=every, callbacks=[Watch(raise_at=stop)]).run()
        return parts.model.state_dict()

    whole = weights(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "cut", stop=5)
    assert largest_difference(weights(tmp_path / "cut"), whole) == 0


def test_a_training_that_ended_is_not_trained_on(tmp_path):
    first = Parts()
    first.loop(epochs=1, folder=tmp_path).run()
    second = Parts()
    watch = Watch()
    assert second.loop(epochs=1, folder=tmp_path, callbacks=[watch]).run().step == 3
    assert watch.calls == ["start", "end"]
    assert largest_difference(first.model.state_dict(), second.model.state_dict()) == 0
    longer = Parts()
    longer.loop(epochs=2, folder=tmp_path).run()
    whole = Parts()
    whole.loop(epochs=2).run()
    assert largest_difference(whole.model.state_dict(), longer.model.state_dict()) == 0


def test_callbacks_are_called_in_order(tmp_path):
    watch = Watch()
    Parts().loop(epochs=2, epoch_steps=1, callbacks=[watch], folder=tmp_path).run()
    epochs = [
        [
            f"epoch {n}",
            *["backward"] * 3,
            f"step {n + 1}",
            f"end of epoch {n + 1}",
            f"checkpoint step-0000000{n + 1}",
        ]
        for n in range(2)
    ]
    assert watch.calls == ["start", *epochs[0], *epochs[1], "end"]


def test_steps_end_where_they_should():
    watch = Watch()
    assert Parts().loop(steps=4, callbacks=[watch]).run().epoch == 1
    assert [c for c in watch.calls if "epoch" in c] == ["epoch 0", "end of epoch 1", "epoch 1"]
    whole = Watch()
    assert Parts().loop(steps=6, callbacks=[whole]).run().epoch == 2
    stopped = Watch(stop_at=2)
    assert Parts().loop(steps=6, callbacks=[stopped]).run().step == 2


def test_an_update_longer_than_the_loader_is_one_update():
    watch = Watch()
    assert Parts().loop(epochs=2, accumulation=100, callbacks=[watch]).run().step == 2


def test_clipping_reaches_all_that_the_optimizer_holds():
    torch.manual_seed(0)
    model = nn.ModuleDict({"student": nn.Linear(2, 2), "projection": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model["student"].parameters(), lr=1.0)
    optimizer.add_param_group({"params": model["projection"].parameters()})
    Loop(
        lambda x, _: 1e4 * model["projection"](model["student"](x)).square().mean(),
        model,
        [torch.ones(2, 2)],
        optimizer,
        steps=1,
        clip=0.5,
    ).run()
    moved = torch.cat([(value - before[name]).flatten() for name, value in model.state_dict().items()])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_autocast(precision):
    def trained(**options):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        kinds = []

        def step(batch, state):
            logits = model(batch[0])
            kinds.append(logits.dtype)
            return nn.functional.cross_entropy(logits.float(), batch[1])

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Loop(step, model, DataLoader(data(), batch_size=4), optimizer, epochs=1, **options).run()
        return model.state_dict(), kinds

    half, kinds = trained(precision=precision)
    assert set(kinds) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert half["weight"].dtype == torch.float32
    assert 0 < largest_difference(half, trained()[0]) < 0.01


def test_an_update_that_overflows_moves_neither_weights_nor_schedule():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = model.weight.item()
    loop = Loop(
        lambda x, _: model(x).float().mean() * 1e38,
        model,
        [torch.ones(1, 1)],
        optimizer,
        steps=1,
        scheduler=scheduler,
        precision="fp16",
    )
    loop.run()
    assert model.weight.item() == before
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_ranks_change_nothing(tmp_path):
    """Two ranks, left and taken up again between two checkpoints, end as one process does."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    run(one, worker=WORKER)
    run(two, "--folder", tmp_path / "kept", "--stop-at", 3, worker=WORKER, ranks=2, check=False)
    assert not two.exists()
    assert (tmp_path / "kept" / "step-00000002").is_dir()
    run(two, "--folder", tmp_path / "kept", worker=WORKER, ranks=2)
    assert largest_difference(load_file(one), load_file(two)) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "train for epochs or for steps, got epochs=None and steps=None"),
        ({"epochs": 1, "steps": 1}, "got epochs=1 and steps=1"),
        ({"epochs": 0}, "epochs must be a whole number from 1 on, got 0"),
        ({"epochs": 1, "accumulation": 0}, "accumulation must be"),
        ({"epochs": 1, "precision": "bf61"}, "precision is one of fp32, bf16, fp16, got 'bf61'"),
        ({"epochs": 1, "scheduler_every": "batch"}, "scheduler_every is one of step, epoch, got 'batch'"),
        ({"epochs": 1, "folder": __file__}, "checkpoints go into a folder, and .*test_plain.py is a file"),
        ({"epochs": 1, "clip": -1.0}, "clip must be positive, or None for no clipping, got -1.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Parts().loop(**options)


def test_what_cannot_be_trained_is_refused(tmp_path):
    parts = Parts()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="2 parameters of the optimizer are in no part of the model"):
        Loop(parts.step, parts.model, parts.loader, other, epochs=1)
    with pytest.raises(ValueError, match="the loader is empty"):
        Loop(parts.step, parts.model, [], parts.optimizer, epochs=1)
    with pytest.raises(ValueError, match="epoch 1 of the loader is empty; pass one that can be read again"):
        Loop(parts.step, parts.model, iter(list(parts.loader)), parts.optimizer, epochs=2).run()
    for wrong, got in ((None, "NoneType"), (torch.ones(2), r"\(2,\)")):
        with pytest.raises(TypeError, match=f"a tensor with one number, got {got}"):
            Loop(lambda batch, _, w=wrong: w, parts.model, parts.loader, parts.optimizer, epochs=1).run()
    with pytest.raises(ValueError, match="the loss of a step depends on nothing that trains"):
        Loop(lambda *_: torch.zeros(()), parts.model, parts.loader, parts.optimizer, epochs=1).run()
    output = Output(torch.zeros(()), None, {}, {})
    with pytest.raises(TypeError, match=r"got a Distiller's output; add \.loss"):
        Loop(lambda *_: output, parts.model, parts.loader, parts.optimizer, epochs=1).run()
    with pytest.raises(TypeError, match=r"a callback is a limbeck\.train\.plain_state\.Callback, got print"):
        parts.loop(epochs=1, callbacks=[print])
    Parts().loop(epochs=1, folder=tmp_path).run()
    with pytest.raises(ValueError, match="accumulation is 3 there and 2 here"):
        Parts().loop(epochs=1, folder=tmp_path, accumulation=2).run()


def test_a_spoiled_training_is_not_kept(tmp_path):
    parts = Parts()
    loop = parts.loop(epochs=2, folder=tmp_path, checkpoint_every=1)
    loop.step = lambda batch, state: parts.step(batch, state) * (float("nan") if state.step >= 2 else 1)
    with pytest.raises(FloatingPointError, match=r"the loss is no longer finite at step 3; .*step-00000002"):
        loop.run()


def test_a_loader_gives_batches():
    parts = Parts()
    with pytest.raises(TypeError, match="the loader gives batches, got StepLR"):
        Loop(
            parts.step, parts.model, torch.optim.lr_scheduler.StepLR(parts.optimizer, 1), parts.optimizer, steps=1
        )


def test_loaders_of_several_tasks():
    """In proportion to their numbers of batches to the power tau; each is used up before it begins anew."""
    loaders = {"a": DataLoader(range(90), batch_size=10, shuffle=True), "b": [100]}
    for tau, share in ((1.0, 0.9), (0.5, 0.75), (0.0, 0.5)):
        np.random.seed(0)
        batches = list(MixedLoaders(loaders, tau, 900, {"b": lambda batch: -batch}))
        names = [name for _, name in batches]
        assert len(names) == 900
        assert names.count("a") / 900 == pytest.approx(share, abs=0.04)
        assert {batch for batch, name in batches if name == "b"} == {-100}
        first = torch.cat([batch for batch, name in batches if name == "a"][:9])
        assert sorted(first.tolist()) == list(range(90)) != first.tolist()
        np.random.seed(0)
        again = list(MixedLoaders(loaders, tau, 900))
        assert [name for _, name in again] == names
        assert torch.equal(torch.cat([batch for batch, name in again if name == "a"][:9]), first)
    np.random.seed(0)
    alike = [name for _, name in MixedLoaders({"a": Unsized([1, 2, 3]), "b": [4]}, 1.0, 400)]
    assert alike.count("a") / 400 == pytest.approx(0.5, abs=0.08)  # nobody knows how much there is of one
    with pytest.raises(ValueError, match="the loader of task 'a' is empty"):
        list(MixedLoaders({"a": []}, 0.0, 1))


class Unsized:
    """Can be read again and again, and has no length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_scalars_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Scalars(tmp_path) as scalars:
        for value in (0.5, torch.tensor(2.0, requires_grad=True)):
            scalars.write({"loss": value})
        scalars.write({"loss": 3}, step=7)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    assert [(event.step, event.value) for event in log.Scalars("loss")] == [(0, 0.5), (1, 2.0), (7, 3.0)]
