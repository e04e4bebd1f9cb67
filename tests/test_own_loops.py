"""What limbeck has for loops of one's own: models that are watched, functions that are remembered."""

import pytest
import torch
from torch import nn

from limbeck.teachers.remembered import Remembered
from limbeck.teachers.watched import Watched
from tests.models import perceptron, points


def test_a_function_is_asked_once_for_each_example():
    model, asked = nn.Linear(3, 2), []

    def ask(batch):
        asked.append(len(batch[0]))
        return {"a": model(batch[0]), "b": (batch[0] * batch[1]).sum(dim=-1)}

    known, inputs, masks = Remembered(ask), torch.randn(12, 3), torch.randint(2, (12, 3))
    for order in (torch.arange(12), torch.randperm(12), torch.randperm(12)):
        for places in order.split(4):
            batch = inputs[places], masks[places]
            found = known(batch)
            torch.testing.assert_close(found["a"], model(batch[0]))
            torch.testing.assert_close(found["b"], (batch[0] * batch[1]).sum(dim=-1))
            assert not found["a"].requires_grad
    assert sum(asked) == 4 + 12  # once more for the names


def test_padding_is_part_of_an_example():
    """Elsewhere an attention mask says which positions count; of a function nobody knows."""
    known = Remembered(lambda batch: {"length": batch["attention_mask"].sum(1) + batch["x"].shape[1]})
    short = {"x": torch.zeros(1, 2), "attention_mask": torch.ones(1, 2)}
    long = {"x": torch.zeros(1, 3), "attention_mask": torch.tensor([[1.0, 1.0, 0.0]])}
    assert [known(batch)["length"].item() for batch in (short, long, short)] == [4, 5, 4]


def test_modules_are_watched():
    model, (features, _) = perceptron(), points()
    watched = Watched(model, [model[1], "0"])
    output = watched(features)
    hidden = model[0](features)
    torch.testing.assert_close(watched.seen, [model[1](hidden), hidden])
    torch.testing.assert_close(output, model(features))
    watched.seen[1].sum().backward()
    assert model[0].weight.grad is not None
    with pytest.raises(ValueError, match="a Linear to watch is no part of the Sequential"):
        Watched(model, [nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="9"):
        Watched(model, ["9"])
