"""The log of a loop of one's own, and what else such a loop takes: several optimizers, a state, folders."""

import pytest
import torch
from torch import nn

from limbeck import Distiller, Term
from limbeck.train.checkpoint import new_training, newest_within
from limbeck.train.collecting import Collecting
from limbeck.train.notes import Notes, show
from limbeck.train.plain import Callback, Loop, recall
from limbeck.train.ranks import cut_batch
from limbeck.yaml_options import change_values

DATA = [torch.full((4, 1), float(i)) for i in range(1, 4)]


def line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(1, 1)


def loop(model, step=None, optimizer=None, **options):
    step = step or (lambda x, state: (model(x) - 2 * x).square().mean())
    return Loop(step, model, DATA, optimizer or torch.optim.SGD(model.parameters(), lr=0.01), **options)


def test_a_loop_writes_the_mean_of_its_losses():
    model, losses, written = line(), [], []
    twin = line()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    for _ in range(2):
        for x in DATA:
            loss = (twin(x) - 2 * x).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    notes = Notes([lambda values, step: written.append((step, values))], every=2)
    loop(model, epochs=2, callbacks=[notes]).run()
    assert [step for step, _ in written] == [2, 4, 6]
    expected = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [values["loss"] for _, values in written] == pytest.approx(expected, abs=1e-6)


def test_numbers_of_an_epoch_are_written_once(capsys):
    class Counting(Callback):
        def on_step(self, state):
            notes.note("seen", torch.tensor(state.step), of_step=False)

    notes = Notes([show], every=100)
    loop(line(), epochs=2, callbacks=[Counting(), notes]).run()
    assert capsys.readouterr().out.splitlines() == ["step = 3, seen : 3.0", "step = 6, seen : 6.0"]


def test_a_step_may_give_more_than_its_loss():
    model, seen = line(), []

    def both(x, state):
        predicted = model(x)
        return (predicted - 2 * x).square().mean(), predicted

    class Keep(Callback):
        def on_step(self, state):
            seen.append([tuple(each.shape) for each in step.take_update()])

        def on_epoch(self, state):
            seen.append([tuple(each.shape) for each in step.take_epoch()])

    step = Collecting(both)
    loop(model, step, epochs=2, accumulation=2, callbacks=[Keep()]).run()
    epoch = [[(2,), (8, 1)], [(1,), (4, 1)], [(3,), (12, 1)]]
    assert seen == [*epoch, *epoch]


def test_several_optimizers_and_schedulers_are_those_of_a_naive_loop():
    def parts(model):
        made = [torch.optim.SGD([model.weight], lr=0.01), torch.optim.Adam([model.bias], lr=0.1)]
        return made, [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in made]

    model, twin = line(), line()
    optimizers, schedulers = parts(model)
    loop(model, optimizer=optimizers, scheduler=schedulers, epochs=2).run()
    optimizers, schedulers = parts(twin)
    for _ in range(2):
        for x in DATA:
            (twin(x) - 2 * x).square().mean().backward()
            for one in (*optimizers, *schedulers):
                one.step()
            twin.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_training_goes_on_with_another_optimizer(tmp_path):
    first = line()
    loop(first, epochs=2, folder=tmp_path / "a").run()
    second = line(seed=1)
    state = recall(second, newest_within(tmp_path, "a/step-00000006"))
    assert (state.step, state.epoch) == (6, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    optimizer = torch.optim.Adam(second.parameters(), lr=0.1)
    done = loop(second, optimizer=optimizer, epochs=3, folder=tmp_path / "b", after=state).run()
    assert (done.step, done.epoch) == (9, 3)
    assert optimizer.state[second.weight]["step"] == 3
    with pytest.raises(ValueError, match=r"there is no checkpoint 'a/last' in .*; it is a folder such as"):
        newest_within(tmp_path, "a/last")


def test_a_loop_refuses_projections_that_would_stay_as_drawn():
    distiller = Distiller(nn.Linear(1, 2), nn.Linear(1, 3), [Term("logits", loss="mse", project="linear")])
    distiller.preflight({"input": DATA[0]})
    student = torch.optim.SGD(distiller.student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"2 parameters of projections are in no optimizer"):
        loop(distiller, optimizer=student, epochs=1)
    rest = torch.optim.SGD(distiller.objective.parameters(), lr=0.1)
    assert loop(distiller, lambda x, state: distiller.distil({"input": x}).loss, [student, rest], epochs=1).run()


def test_trainings_have_folders_of_their_own(tmp_path):
    for name in ("run", "run-2"):
        place = new_training(tmp_path, "run")
        assert place == tmp_path / name
        loop(line(), epochs=1, folder=place).run()
    assert new_training(tmp_path, "run", replace=True) == tmp_path / "run"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", range(1, 40))
@pytest.mark.parametrize("most", [None, 1, 4, 7, 64])
def test_a_batch_is_cut_into_equal_parts(size, most):
    part, count = cut_batch(size, most=most)
    assert part * count == size
    assert part <= (most or size)
    assert not any(size % n == 0 for n in range(part + 1, min(size, most or size) + 1))


def test_ranks_share_a_batch_equally():
    assert cut_batch(12, ranks=2, most=4) == (3, 2)
    with pytest.raises(ValueError, match="2 ranks cannot share a batch of 7; take a multiple of 2"):
        cut_batch(7, ranks=2)


def test_values_of_a_file_are_changed_by_their_kind(capsys):
    made = {"a": {"whole": 1, "share": 0.5, "word": "x", "on": False, "none": None}, "list": [1]}
    arguments = ["--a.whole=2", "--a.share", "1", "--a.word", "7", "--a.on", "--a.none=[1, b]", "--list=3"]
    found = change_values(made, arguments)
    assert found == {"a": {"whole": 2, "share": 1.0, "word": "7", "on": True, "none": [1, "b"]}, "list": 3}
    assert type(found["a"]["share"]) is float
    assert change_values({"list": [1]}, ["--list=3+4"], readers={list: lambda text: text.split("+")}) == {
        "list": ["3", "4"]
    }
    with pytest.raises(SystemExit):
        change_values({"epochs": 1}, ["--epoch", "3"])
    assert "the YAML file has no '--epoch'; did you mean '--epochs'" in capsys.readouterr().err
