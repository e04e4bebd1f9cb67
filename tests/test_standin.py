"""A module that is taken for its student, and what two models saw of one call, both without any door."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

from limbeck.standin import StandIn
from limbeck.witness import Watch, Witness, joined
from tests.models import hooks, perceptron, points


class Doubled(StandIn):
    """Twice what the student returns."""

    def run(self, *args, **kwargs):
        return 2 * self.student(*args, **kwargs)


class Scaled(nn.Module):
    """A student with a parameter of its own at the root, beside a module."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.body = nn.BatchNorm1d(2)

    def forward(self, x, factor=1.0):
        return self.body(x) * self.scale * factor


def test_names_of_parameters_buffers_and_modules():
    student = Scaled()
    standin = Doubled(student)
    standin._beside = nn.Linear(1, 1)
    own = [name for name, _ in student.named_parameters()]
    assert [name for name, _ in standin.named_parameters()] == [*own, "_beside.weight", "_beside.bias"]
    assert [n for n, _ in standin.named_buffers()] == [n for n, _ in student.named_buffers()]
    assert dict(standin.named_modules())["body"] is student.body
    assert list(standin.state_dict()) == [*student.state_dict(), "_beside.weight", "_beside.bias"]


def test_states_are_loaded_at_any_depth():
    standin = Doubled(Scaled())
    outer = nn.Sequential(standin)
    state = {f"0.{name}": torch.full_like(value, 3) for name, value in Scaled().state_dict().items()}
    assert set(outer.state_dict()) == set(state)
    outer.load_state_dict(state)
    assert standin.student.scale.tolist() == [3.0, 3.0]
    assert standin.student.body.running_mean.tolist() == [3.0, 3.0]


def test_calls_go_through_run_and_arguments_by_name():
    standin = Doubled(Scaled().eval())
    x = torch.tensor([[1.0, 2.0]])
    assert torch.equal(standin(x, factor=3.0), 2 * standin.student(x, 3.0))


def test_copies_stand_in_for_copies():
    standin = Doubled(Scaled())
    for again in (copy.deepcopy(standin), pickle.loads(pickle.dumps(standin))):
        assert type(again) is Doubled
        assert isinstance(again, Scaled)
        assert again.student is not standin.student
        assert not again.eval().student.training


def test_compiled():
    standin = Doubled(perceptron())
    x, _ = points()
    compiled = torch.compile(standin, backend="eager")
    torch.testing.assert_close(compiled(x), standin(x))


def test_calls_in_threads_are_kept_apart():
    model, barrier = perceptron(), threading.Barrier(4)
    watch = Watch(model, ["0", "3"], inputs=True)
    inputs = [torch.full((2, 4), float(i)) for i in range(4)]

    def run(x):
        barrier.wait()
        return watch.call(model, x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, inputs))
    for x, (output, seen) in zip(inputs, found, strict=True):
        assert torch.equal(seen.inputs["0"][0], x)
        assert torch.equal(seen.outputs["0"], model[0](x))
        assert torch.equal(seen.outputs["3"], output)
    watch.end()
    assert hooks(model) == 0


def test_a_call_that_fails_leaves_nothing_behind():
    model = perceptron()
    watch = Watch(model, ["0"])
    with pytest.raises(RuntimeError, match="shape"):
        watch.call(model, torch.zeros(2, 5))
    assert watch.now() is None


def test_witness_gives_pairs_once():
    student, teacher, (x, _) = perceptron(), perceptron(seed=1), points()
    witness = Witness(student, teacher, [("0", "3"), ("", "")])
    output = witness.call(student, (x,), {})
    (first, third), (whole, theirs) = witness.take()
    assert whole is output
    assert torch.equal(first, student[0](x))
    assert torch.equal(third, theirs)
    assert torch.equal(theirs, teacher(x))
    assert first.requires_grad
    assert not theirs.requires_grad
    with pytest.raises(ValueError, match="nothing to compare"):
        witness.take()


def test_witness_layer_by_layer():
    student, teacher, (x, _) = perceptron(), perceptron(seed=1), points()
    witness = Witness(student, teacher, [("3", "3")], layerwise=True)
    witness.call(student, (x,), {})
    [(ours, theirs)] = witness.take()
    before = teacher[:3](x)
    assert torch.equal(ours, student[3](before))
    assert torch.equal(theirs, teacher[3](before))
    functional.mse_loss(ours, theirs).backward()
    assert student[0].weight.grad is None
    assert student[3].weight.grad is not None


def test_parts_are_joined_in_every_shape():
    one = {"logits": torch.zeros(2, 3), "loss": torch.tensor(1.0), "states": (torch.ones(2, 1),), "name": "a"}
    two = joined([one, one])
    assert two["logits"].shape == (4, 3)
    assert two["loss"].tolist() == [1.0, 1.0]
    assert two["states"][0].shape == (4, 1)
    assert two["name"] == "a"


def test_replicas_of_an_older_batch_do_not_count():
    """Three parts of a batch of which nothing was taken, then a whole one, then two parts of another."""
    student, teacher, (x, _) = perceptron(), perceptron(seed=1), points()
    witness = Witness(student, teacher, [("", "")])
    for parts in (3, 1, 2):
        numbers = [witness.replicate() for _ in range(parts)] if parts > 1 else [0]
        outputs = [
            witness.call(student, (part,), {}, replica=number)
            for number, part in zip(numbers, x.chunk(parts), strict=True)
        ]
    [(ours, theirs)] = witness.take()
    assert torch.equal(ours, torch.cat(outputs))
    assert theirs.shape == (6, 3)


def elsewhere(module):
    """A replica on another device, of which a CPU machine has one that holds no values."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = {name: p.to("meta") for name, p in module._parameters.items()}
    return replica


@pytest.mark.parametrize("later", [False, True])
def test_a_replica_elsewhere_asks_a_copy_of_the_teacher_there(later):
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    witness, (x, _) = Witness(student, teacher, [("", "")]), points()
    for _ in range(2):
        numbers = [witness.replicate() for _ in range(2)]
        witness.call(elsewhere(student), (x.to("meta"),), {}, replica=numbers[0], later=later)
        witness.call(student, (x,), {}, replica=numbers[1], later=later)
        [(ours, theirs)] = witness.take()
        assert ours.shape == theirs.shape == (12, 3)
        assert teacher.weight.device.type == "cpu"
    assert len(witness.teacher._elsewhere) == 1
    witness.teacher.changed()
    assert not witness.teacher._elsewhere


def test_a_teacher_alone_follows_its_inputs():
    teacher = nn.Linear(4, 3)
    student = elsewhere(nn.Linear(4, 3))
    witness = Witness(student, teacher, [("", "")])
    witness.call(student, (points()[0].to("meta"),), {})
    assert teacher.weight.device.type == "meta"
