"""Several optimizers and schedulers as one, against each of them on its own."""

import copy

import pytest
import torch
from torch import nn

from limbeck.train.plain import Loop
from limbeck.train.together import Optimizers, Schedulers


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def parts(net):
    first = torch.optim.SGD(net[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(net[1].parameters(), lr=0.01)
    rates = [torch.optim.lr_scheduler.ExponentialLR(o, gamma) for o, gamma in ((first, 0.5), (second, 0.9))]
    return [first, second], rates


def updates(net, together, rates, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        net(torch.randn(4, 2, generator=generator)).square().mean().backward()
        for each in (*together, *rates):
            each.step()
        for each in together:
            each.zero_grad()


def test_steps_are_those_of_each():
    ours, theirs = model(), model()
    optimizers, rates = parts(ours)
    updates(ours, [Optimizers(optimizers)], [Schedulers(rates)], 5)
    updates(theirs, *parts(theirs), 5)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.1 * 0.5**5, 0.01 * 0.9**5])


def test_a_state_goes_on():
    net = model()
    optimizers, rates = parts(net)
    both, schedulers = Optimizers(optimizers), Schedulers(rates)
    updates(net, [both], [schedulers], 3)
    state = copy.deepcopy((net.state_dict(), both.state_dict(), schedulers.state_dict()))
    updates(net, [both], [schedulers], 3, seed=5)
    other = model()
    optimizers, rates = parts(other)
    both, schedulers = Optimizers(optimizers), Schedulers(rates)
    other.load_state_dict(state[0])
    both.load_state_dict(state[1])
    schedulers.load_state_dict(state[2])
    assert [group["lr"] for group in both.param_groups] == [o.param_groups[0]["lr"] for o in optimizers]
    updates(other, [both], [schedulers], 3, seed=5)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_the_loop_resumes_with_several(tmp_path):
    def trained(net, folder, epochs):
        optimizers, rates = parts(net)
        data = [torch.ones(2, 2), torch.full((2, 2), 0.5)]
        options = {"scheduler": Schedulers(rates), "folder": folder, "epochs": epochs}
        Loop(lambda x, state: net(x).square().mean(), net, data, Optimizers(optimizers), **options).run()
        return net

    whole = trained(model(), tmp_path / "whole", 4)
    trained(model(), tmp_path / "parts", 2)
    resumed = trained(model(), tmp_path / "parts", 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_what_cannot_be_is_refused():
    net = model()
    optimizers, _ = parts(net)
    with pytest.raises(ValueError, match="pass at least one"):
        Optimizers([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Optimizers([optimizers[0], torch.optim.SGD(net.parameters(), lr=1.0)])
    both = Optimizers(optimizers)
    with pytest.raises(ValueError, match="take no closure"):
        both.step(lambda: 0.0)
    with pytest.raises(ValueError, match="has 1 groups of parameters, these optimizers 2"):
        both.load_state_dict(optimizers[0].state_dict())
