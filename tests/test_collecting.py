"""Validation by a step of one's own, and what of a loop of one's own does not stand in the loader."""

import os
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from limbeck.train import checkpoint
from limbeck.train.collecting import Collected, RankShare, collect
from limbeck.train.plain import Loop


def test_outputs_are_put_behind_one_another():
    collected = Collected()
    for part in (2, 3):
        collected.add((torch.tensor(1.0), torch.zeros(part, 4), "text"))
    shapes = [tuple(each.shape) for each in collected.outputs()[:2]]
    assert shapes == [(2,), (5, 4)]
    assert collected.outputs()[2] == ["text", "text"]
    alone = Collected()
    alone.add("text")
    assert alone.outputs() == [["text"]]


def test_nothing_collected_has_a_gradient():
    model = nn.Linear(1, 1)
    batches = [torch.ones(2, 1), torch.ones(3, 1), torch.ones(4, 1)]
    (found,) = collect(model, batches, limit=2)
    torch.testing.assert_close(found, model(torch.ones(5, 1)).detach())
    assert not found.requires_grad
    (half,) = collect(model, batches, precision="bf16")
    assert half.dtype is torch.bfloat16


def test_one_ranks_share_is_all():
    assert list(RankShare(range(3))) == [0, 1, 2]
    assert len(RankShare(range(3))) == 3


def trained(loader, **options):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    seen = []

    def step(batch, state):
        seen.append(batch)
        return model(batch[0]).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    Loop(step, model, loader, optimizer, **options).run()
    return model, seen


DATA = torch.utils.data.TensorDataset(torch.arange(12.0).reshape(6, 2) / 12)


def test_a_loader_may_be_made_for_each_epoch():
    asked = []

    def made(epoch):
        asked.append(epoch)
        return DataLoader(DATA, 2, shuffle=True)

    ours, _ = trained(made, epochs=3)
    plain, _ = trained(DataLoader(DATA, 2, shuffle=True), epochs=3)
    assert asked[-3:] == [0, 1, 2]
    assert torch.equal(ours.weight, plain.weight)


def test_a_made_loader_resumes_within_an_epoch(tmp_path):
    def made(epoch):
        return DataLoader(DATA, 2, shuffle=True, generator=torch.Generator().manual_seed(epoch))

    whole, _ = trained(made, steps=7)
    trained(made, steps=4, folder=tmp_path)
    resumed, _ = trained(made, steps=7, folder=tmp_path)
    assert torch.equal(whole.weight, resumed.weight)


def test_a_batch_may_be_left_where_it_is():
    class Batch(dict):
        pass

    def made(epoch):
        return [Batch({0: torch.ones(1, 2)})]

    assert type(trained(made, epochs=1, place=False)[1][0]) is Batch
    assert type(trained(made, epochs=1)[1][0]) is dict


def test_a_training_begins_from_another_ones_checkpoint(tmp_path):
    loader = DataLoader(DATA, 2, shuffle=True)
    whole, _ = trained(loader, epochs=4)
    trained(loader, epochs=2, folder=tmp_path / "a")
    begin = checkpoint.latest(tmp_path / "a")
    gone_on, _ = trained(loader, epochs=4, folder=tmp_path / "b", begin=begin)
    assert torch.equal(whole.weight, gone_on.weight)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "a")] == ["step-00000006"]
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "b")] == ["step-00000012"]


@pytest.fixture
def trainings(tmp_path):
    now = time.time()
    for age, name in enumerate(["model/step-00000009", "model-2/step-00000003", "other/step-00000001"]):
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, (now - age, now - age))
    return tmp_path


def test_the_newest_of_several_trainings(trainings):
    assert checkpoint.newest_within(trainings) == trainings / "model/step-00000009"
    assert checkpoint.newest_within(trainings / "nowhere") is None


def test_a_new_training_has_a_place_of_its_own(trainings):
    assert checkpoint.unused_folder(trainings, "model") == trainings / "model-3"
    assert checkpoint.unused_folder(trainings, "mine") == trainings / "mine"


def test_trainings_of_a_name_are_removed(trainings):
    (trainings / "model-notes").mkdir()
    checkpoint.remove_trainings(trainings, "model")
    assert sorted(p.name for p in trainings.iterdir()) == ["model-notes", "other"]
