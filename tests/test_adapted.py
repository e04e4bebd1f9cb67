"""Distilling by adaptors, without any door: entries, matches, several teachers, memory, and what trains beside."""

import pytest
import torch
from torch import nn

from limbeck.adapted import (
    AdaptedObjective,
    Match,
    Memory,
    also_train,
    entries_of,
    mean_of_teachers,
    outputs_of_both,
    paired_logits,
    read_both,
    select_by_masks,
    teaching,
    total_of,
)
from limbeck.adapted.models import read_teacher
from limbeck.train.plain import Loop
from limbeck.train.snapshots import Snapshots


class Two(nn.Module):
    """Hidden states and logits, in a tuple without names; counts how many examples it is asked for."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head, self.asked = nn.Linear(2, width), nn.Linear(width, 3), 0

    def forward(self, inputs, labels=None, scale=1.0):
        self.asked += len(inputs)
        hidden = self.body(scale * inputs).tanh()
        return [hidden], self.head(hidden)


def adaptor(batch, outputs):
    return {"hidden": outputs[0], "logits": outputs[1]}


def squares(ours, theirs, *others):
    return (ours - theirs).square().mean()


def data(count=4, rows=8):
    torch.manual_seed(3)
    return [(torch.randn(rows, 2), torch.randint(3, (rows,))) for _ in range(count)]


def test_the_sum_is_that_of_its_parts():
    student, teacher, width = Two(4, 0), Two(6, 1), nn.Linear(4, 6)
    match = Match("hidden", 0, 0, squares, 0.5, width, "squares")
    objective = AdaptedObjective({"logits": 2.0, "losses": 3.0}, lambda s, t, labels: (s - t).abs().sum(), [match])
    batch = data(1)[0]

    def with_loss(batch, outputs):
        return {**adaptor(batch, outputs), "losses": [outputs[1].mean(), outputs[1].square()]}

    total, parts = objective(*read_both(batch, student, teacher, with_loss, adaptor, named={"scale": 2.0}))
    (hidden, ours), (other, theirs) = ([h[0], z] for h, z in (m(batch[0], scale=2.0) for m in (student, teacher)))
    expected = {
        "logits": (ours - theirs).abs().sum(),
        "hidden_squares_0_0": (width(hidden) - other).square().mean(),
        "losses": ours.mean() + ours.square().mean(),
    }
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)
    weighted = 2 * expected["logits"] + 0.5 * expected["hidden_squares_0_0"] + 3 * expected["losses"]
    torch.testing.assert_close(total, weighted)
    total.backward()
    assert width.weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())


def test_masks_choose_positions_labels_too():
    logits, labels = torch.arange(12.0).view(2, 3, 2), torch.arange(6).view(2, 3)
    masks = torch.tensor([[1, 0, 1], [0, 1, 0]])
    student = entries_of(
        {"logits": [logits, logits.mean(1)], "logits_mask": masks, "labels": [labels, labels[:, 0]]}
    )
    (ours, theirs, kept), (whole, _, rows) = paired_logits(
        student, entries_of({"logits": [2 * logits, logits[:, 0]]})
    )
    assert ours.tolist() == [[0, 1], [4, 5], [8, 9]]
    assert torch.equal(theirs, 2 * ours)
    assert kept.tolist() == [0, 2, 4]
    assert (whole.shape, rows.shape) == ((2, 2), (2,))


def test_a_match_of_several_layers_gets_both_masks():
    seen = []
    match = Match("hidden", [0, 2], [1, 1], lambda *sides: seen.append(sides) or torch.tensor(1.0), name="pair")
    layers = [torch.full((1, 2), float(n)) for n in range(3)]
    match({"hidden": layers, "inputs_mask": 5}, {"hidden": layers, "inputs_mask": 7})
    [(ours, theirs, mask, other)] = seen
    assert [side[0, 0].item() for side in (*ours, *theirs)] == [0, 2, 1, 1]
    assert (mask, other) == (5, 7)
    assert str(match) == "hidden_pair_0-2_1-1"


@pytest.mark.parametrize("adaptors", [adaptor, [adaptor, adaptor]])
def test_several_teachers_are_their_mean(adaptors):
    student, teachers, batch = Two(4, 0), [Two(6, 1), Two(6, 2)], data(1)[0]
    _, theirs = read_both(batch, student, teachers, adaptor, adaptors)
    mean = sum(teacher(batch[0])[1] for teacher in teachers) / 2
    torch.testing.assert_close(theirs["logits"], [mean.detach()])


def test_a_memory_asks_once_and_gives_the_same():
    student, teacher = Two(4, 0), Two(4, 1)
    memory = Memory(lambda batch: read_teacher(adaptor, batch, teacher(*batch), several=False), [("hidden", 0)])
    (inputs, labels), other = data(2)
    order, counts = torch.randperm(8), []
    for batch in ((inputs, labels), other, (inputs[order], labels[order])):
        _, known = read_both(batch, student, teacher, adaptor, adaptor, memory=memory)
        hidden, logits = teacher(*batch)
        teacher.asked -= len(logits)
        torch.testing.assert_close(known["logits"][0], logits.detach())
        torch.testing.assert_close(known["hidden"][0], hidden[0].detach())
        counts.append(teacher.asked)
    assert counts == [16, 24, 24]  # the first batch twice, since nobody knows the names of its entries before
    given = {"student": other, "teacher": other, "teacher_cache": ([inputs], inputs)}
    assert read_both(given, student, None, adaptor, adaptor, memory=memory)[1]["logits"][0] is inputs


def test_batches_have_a_part_for_each():
    batch = {"student": {"inputs": torch.ones(1, 2)}, "teacher": {"inputs": torch.zeros(3, 2)}}
    (own, ours), (other, theirs) = outputs_of_both(batch, Two(4, 0), Two(4, 1), {}, "cpu")
    assert (len(own["inputs"]), len(ours[1]), len(other["inputs"]), len(theirs[1])) == (1, 1, 3, 3)
    assert ours[1].requires_grad
    assert not theirs[1].requires_grad


def test_snapshots_are_taken_at_parts_of_epochs():
    taken, model = [], nn.Linear(2, 1)
    snapshots = Snapshots(taken.append, per_epoch=2, epochs=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshots.loop = Loop(
        lambda batch, state: model(batch[0]).mean(), model, data(), optimizer, epochs=3, callbacks=[snapshots]
    )
    snapshots.loop.run()
    assert taken == [6, 8, 10, 12]  # halves of the second epoch, and of the last


def test_a_loop_on_no_device_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="unknown device 'gpu'; write 'cpu'"):
        Loop(squares, model, data(), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, device="gpu")


def test_modes_come_back_after_an_error():
    student, teacher = nn.Sequential(nn.Tanh()).eval(), nn.Sequential(nn.Tanh())
    teacher[0].eval()

    def interrupted():
        with teaching(student, {"a": teacher}):
            assert (student[0].training, teacher.training) == (True, False)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (student.training, teacher.training, teacher[0].training) == (False, True, False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: entries_of(3), TypeError, "an adaptor returns a dict, got int"),
        (lambda: entries_of({"logits": None}), TypeError, "an adaptor gave None for 'logits'"),
        (lambda: total_of([2.0]), TypeError, "the losses of an adaptor are tensors, got 2.0"),
        (
            lambda: select_by_masks([torch.zeros(1, 2, 3)], [torch.ones(1, 3)]),
            ValueError,
            r"does not fit \(1, 2, 3\)",
        ),
        (lambda: mean_of_teachers([{"hidden": []}]), ValueError, "several teachers teach by their logits"),
        (lambda: read_teacher([adaptor], 0, [1, 2], True), ValueError, "there are 2 teachers and 1 adaptors"),
        (
            lambda: Match("hidden", 4, 0, squares)({"hidden": []}, {"hidden": []}),
            ValueError,
            "match reads hidden 4 of the student, and its adaptor gave 0 of them",
        ),
        (
            lambda: AdaptedObjective({"losses": 1.0})({"logits": []}, {}),
            ValueError,
            r"'losses' counts, and the adaptor of the student gave only \['logits'\]",
        ),
        (
            lambda: AdaptedObjective({"logits": 1.0})(
                {"logits": [torch.ones(1, 2)]}, {"logits": [torch.ones(1, 2)]}
            ),
            ValueError,
            "no loss for them; pass logits=",
        ),
        (
            lambda: paired_logits({"logits": [torch.ones(1, 2)]}, {"logits": [torch.ones(3, 2)]}),
            ValueError,
            r"logits \(1, 2\) of the student meet \(3, 2\) of the teacher",
        ),
        (
            lambda: also_train(
                torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), [(nn.Linear(1, 1), {"l": 1})]
            ),
            TypeError,
            "no option 'l'; did you mean 'lr'",
        ),
        (
            lambda: also_train(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), [(nn.Linear(1, 1), {})], 1),
            ValueError,
            "after scheduler= was made of it; make it afterwards",
        ),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()
