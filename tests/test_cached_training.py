"""A training from the cache is the training with the live teacher: step by step, however its data comes."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from limbeck import Callback, Distiller, Examples, Settings, Term, fit
from limbeck.cache import Store
from limbeck.teachers import Cached, ModuleTeacher
from tests.models import perceptron
from tests.test_exactness import largest_difference, run, weights


class Table(nn.Module):
    """A teacher whose answer to an example has the same bits in any batch: it looks it up by the input."""

    def __init__(self):
        super().__init__()
        self.answers = nn.Embedding.from_pretrained(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, features):
        return self.answers((features[:, 0] * 1000).long().abs() % 64)


def data(count=40):
    features = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return [{"features": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(features)]


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = perceptron()

    def forward(self, features):
        return self.body(features)


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_log(self, state):
        self.seen.append(state.loss)


def losses(teacher, examples, **settings):
    """The loss of every step."""
    terms = [Term("logits", loss="forward_kl", temperature=2.0), Term("labels", loss="cross_entropy", weight=0.5)]
    watch = Losses()
    chosen = {"epochs": 4, "batch_size": 8, "learning_rate": 0.05, "optimizer": "sgd", **settings}
    fit(
        Distiller(Student(), teacher, terms), examples, settings=Settings(log_every=1, **chosen), callbacks=[watch]
    )
    return torch.tensor(watch.seen, dtype=torch.float64)


CHANGES = {
    "shuffled": {},
    "accumulated": {"accumulation": 3},
    "other batches": {"batch_size": 5},
    "one by one": {"batch_size": 1, "epochs": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_losses_are_the_same_bit_for_bit(change, tmp_path):
    live = losses(ModuleTeacher(Table()), data(), **CHANGES[change])
    ours = Cached(ModuleTeacher(Table()), Store({}, tmp_path))
    assert torch.equal(losses(ours, data(), **CHANGES[change]), live)
    assert (ours.computed, ours.asked > ours.computed) == (40, True)


@pytest.mark.parametrize("before", [20, 60])
def test_they_are_for_data_that_grew_or_was_filtered(before, tmp_path):
    losses(Cached(ModuleTeacher(Table()), store := Store({}, tmp_path)), data(60)[:before], batch_size=7)
    store.flush()
    ours = Cached(ModuleTeacher(Table()), Store({}, tmp_path))
    assert torch.equal(losses(ours, data(60)[:40]), losses(ModuleTeacher(Table()), data(60)[:40]))
    assert ours.computed == max(0, 40 - before)


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2**-7), ("fp16", 2**-10)])
def test_half_precision_moves_them_by_no_more_than_its_rounding(dtype, bound, tmp_path):
    live = losses(ModuleTeacher(Table()), data())
    kept = losses(Cached(ModuleTeacher(Table()), Store({}, tmp_path), dtype=dtype), data())
    assert 0 < (kept - live).abs().max() < bound


def test_ranks_and_the_cache_together_change_nothing(tmp_path):
    """Of eight updates the last five ask for what was kept, which the teacher computed in other batches."""
    live = weights(tmp_path / "live.safetensors", "--steps", 8)
    kept = weights(tmp_path / "kept.safetensors", "--steps", 8, "--cache", tmp_path / "signals", ranks=2)
    assert largest_difference(live, kept) < 5e-6
    store = Store({}, tmp_path / "signals")
    computed = sum(len(shard.keys) for shard in store.shards.values())
    assert len(store) == 37
    assert computed <= 37 + 2 * 4  # the plan and an uneven batch make ranks compute some examples twice


def test_resume_with_a_cache_is_bit_identical(tmp_path):
    options = ["--steps", 10, "--dropout", 0.1]
    whole = weights(tmp_path / "a.safetensors", *options, "--cache", tmp_path / "one", "--folder", tmp_path / "a")
    options += ["--cache", tmp_path / "two", "--folder", tmp_path / "b"]
    for kill_at in (2, 5, 8):
        assert run(tmp_path / "b.safetensors", *options, "--kill-at", kill_at, check=False).returncode == -9
    resumed = weights(tmp_path / "b.safetensors", *options)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Noisy:
    """A data set that gives other examples each time."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"features": torch.randn(4), "labels": torch.tensor(index % 3)}


def test_remembering_ends_where_examples_are_new_each_time(tmp_path):
    ours = Cached(ModuleTeacher(Table()), tmp_path)
    with pytest.warns(UserWarning, match="no longer remembered: the examples of the second epoch"):
        losses(ours, DataLoader(Noisy(), batch_size=8), epochs=3)
    assert ours.computed == ours.asked - ours.found
    kept = len(ours.store)
    ours.signal({"features": torch.randn(3, 4)}, ["logits"])
    assert len(ours.store) == kept


class Dies(Callback):
    def on_step(self, state):
        if state.step == 8:
            raise InterruptedError


def test_a_training_that_goes_on_with_an_empty_memory_remembers(tmp_path):
    def go_on(*callbacks):
        distiller = Distiller(Student(), teacher := Cached(ModuleTeacher(Table())), [Term("logits", loss="mse")])
        fit(
            distiller,
            data(),
            settings=Settings(epochs=5, batch_size=8, checkpoint_every=1),
            folder=tmp_path,
            callbacks=callbacks,
        )
        return teacher

    with pytest.raises(InterruptedError):
        go_on(Dies())
    ours = go_on()
    assert ours.asked - ours.found == 40


def test_the_share_that_a_rank_sees_again_is_enough():
    ours = Cached(ModuleTeacher(Table()))
    for start in (0, 38):  # one of 40 comes again, as for one rank of 20
        ours.signal({"features": torch.stack([x["features"] for x in data(80)[start : start + 40]])}, ["logits"])
    assert (ours.is_in_vain(), ours.is_in_vain(1 / 20)) == (True, False)


def test_the_plan_asks_in_the_precision_of_the_training():
    class Wide(nn.Sequential):
        def forward(self, features):
            return super().forward(features)

    torch.manual_seed(0)
    teacher = Wide(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
    ours = Cached(teacher)
    distiller = Distiller(Student(), ours, [Term("logits", loss="forward_kl")])
    fit(distiller, data(), settings=Settings(epochs=1, batch_size=8, precision="bf16"))
    batch = {"features": torch.stack([example["features"] for example in data()])}
    with torch.autocast("cpu", torch.bfloat16):
        live = ModuleTeacher(teacher).signal(batch, ["logits"])["logits"]
    assert live.dtype == torch.bfloat16
    kept = ours.signal(batch, ["logits"])["logits"]
    assert torch.equal(kept.bfloat16().float(), kept)  # none was computed in float32


def test_it_goes_on_where_what_is_drawn_repeats():
    def noise(example, generator):
        drawn = torch.from_numpy(generator.normal(size=4)).float()
        return {**example, "features": example["features"] + drawn}

    ours = Cached(ModuleTeacher(Table()))
    examples = Examples(data(), augment=noise, variants=2)
    assert len(losses(ours, examples, epochs=5)) == 25
    assert ours.computed == 80  # two of each
    assert ours.asked >= 200


LEAVES = """
import sys, torch
from torch import nn
from limbeck import Cached
torch.manual_seed(0)
cached = Cached(nn.Linear(4, 3), sys.argv[1])
cached.signal({"input": torch.ones(2, 4) * torch.tensor([[1.0], [2.0]])}, ["logits"])
print(cached.computed)
"""


def test_what_was_said_last_is_kept_when_the_process_ends(tmp_path):
    command = [sys.executable, "-c", LEAVES, str(tmp_path / "kept")]
    said = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for _ in range(2)]
    assert said == ["2", "0"]
