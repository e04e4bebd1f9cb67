"""What every teacher has to do, whatever it stands on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from limbeck.batch import batch_size, map_tensors, rows
from limbeck.teachers import Identified, Teacher
from limbeck.testing.checks import close, require
from limbeck.types import Batch, Sparse


class TeacherContract:
    """What a teacher has to do, whatever it stands on: a module, an ensemble, a cache, a server.

    Attributes:
        wants: Taps that the teacher has.
        wrong_tap: A tap that it does not have.
        tolerance: Relative and absolute tolerance between two signals for the same examples.

    Example:
        >>> from torch import nn
        >>> from limbeck.teachers import ModuleTeacher
        >>> from limbeck.testing import run
        >>> class TestLinear(TeacherContract):
        ...     wants = ("logits", "0")
        ...     def teacher(self):
        ...         torch.manual_seed(0)
        ...         return ModuleTeacher(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
        ...     def batch(self):
        ...         return {"input": torch.linspace(0.0, 1.0, 12).view(3, 4)}
        >>> len(run(TestLinear))
        10
    """

    wants: Sequence[str] = ("logits",)
    wrong_tap: str = "no.such.module"
    tolerance: float = 1e-5

    def teacher(self) -> Teacher:
        """Make the teacher; every call gives the same one or an equal one."""
        raise NotImplementedError

    def batch(self) -> Batch:
        """Make a batch of two or more different examples."""
        raise NotImplementedError

    def test_is_a_teacher(self) -> None:
        """It has the methods of the protocol."""
        require(isinstance(self.teacher(), Teacher), "it lacks offers, names or signal")

    def test_offers_what_it_gives(self) -> None:
        """Every wanted tap is offered, and so is every tap that is suggested to a user."""
        teacher = self.teacher()
        for tap in (*self.wants, *teacher.names()):
            require(teacher.offers(tap), f"{tap!r} is not offered")

    def test_does_not_offer_a_wrong_tap(self) -> None:
        """A tap that is not there is not offered, and asking for it is a ValueError that names it."""
        teacher = self.teacher()
        require(not teacher.offers(self.wrong_tap), f"{self.wrong_tap!r} is offered")
        try:
            teacher.signal(self.batch(), [self.wrong_tap])
        except ValueError as refusal:
            require(self.wrong_tap in str(refusal), f"the message does not name the tap: {refusal}")
        else:
            raise AssertionError(f"{self.wrong_tap!r} gave a signal")

    def test_gives_what_is_wanted(self) -> None:
        """A signal holds the wanted taps and no others, in any number and order."""
        teacher, batch = self.teacher(), self.batch()
        for wants in ([*self.wants], [*self.wants][::-1], [self.wants[0]]):
            require(set(teacher.signal(batch, wants).values) == set(wants), f"wanted {wants}")

    def test_one_row_per_example(self) -> None:
        """The first dimension of every tensor counts the examples."""
        for tap, tensor in self._signal(self.batch()).items():
            require(len(tensor) == batch_size(self.batch()), f"{tap!r} has shape {tuple(tensor.shape)}")

    def test_gives_no_gradient(self) -> None:
        """No tensor carries a gradient, although gradients are enabled."""
        with torch.enable_grad():
            signal = self._signal(self.batch())
        for tap, tensor in signal.items():
            require(not tensor.requires_grad, f"{tap!r} carries a gradient")

    def test_is_deterministic(self) -> None:
        """The same examples give the same signal, whatever the random state: nothing is dropped out."""
        first = self._signal(self.batch())
        with torch.random.fork_rng():
            torch.manual_seed(12345)
            self._compare(self._signal(self.batch()), first, "the second time")

    def test_leaves_the_batch_alone(self) -> None:
        """Nothing in the batch is changed in place."""
        batch, before = self.batch(), map_tensors(self.batch(), torch.clone)
        self.teacher().signal(batch, list(self.wants))
        self._compare(_flat(batch), _flat(before), "after the call")

    def test_does_not_depend_on_order_or_company(self) -> None:
        """Examples in another order give the same rows in that order, and an example alone gives its row."""
        batch, size = self.batch(), batch_size(self.batch())
        together = self._signal(batch)
        order = torch.arange(size).roll(1)
        moved = self._signal(map_tensors(batch, lambda t: t[order] if t.ndim and len(t) == size else t))
        self._compare(moved, {tap: tensor[order] for tap, tensor in together.items()}, "in another order")
        alone = self._signal(rows(batch, 0, 1))
        self._compare(alone, {tap: tensor[:1] for tap, tensor in together.items()}, "alone")

    def test_says_who_it_is(self) -> None:
        """One that says what its signals depend on says the same each time, in a form that JSON can hold."""
        said = [t.identity() for t in (self.teacher(), self.teacher()) if isinstance(t, Identified)]
        texts = [json.dumps(dict(identity), sort_keys=True) for identity in said]
        require(len(set(texts)) <= 1, f"it says {' and then '.join(texts)}")

    def _signal(self, batch: Batch) -> dict[str, Tensor]:
        signal = self.teacher().signal(batch, list(self.wants))
        return {name: tensor for tap in self.wants for name, tensor in _tensors(tap, signal[tap]).items()}

    def _compare(self, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], when: str) -> None:
        for tap, tensor in expected.items():
            close(ours[tap], tensor, f"{tap!r} {when}", self.tolerance)


def _tensors(tap: str, value: Tensor | Sparse) -> dict[str, Tensor]:
    """What was read at one place, as tensors with a row for each example."""
    if isinstance(value, Tensor):
        return {tap: value}
    parts = {f"{tap} {field.name}": getattr(value, field.name) for field in fields(value)}
    return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def _flat(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name."""
    found: dict[str, Tensor] = {}
    for key, value in batch.items():
        entries = value if isinstance(value, tuple) else (value,)
        found |= {f"{key}.{i}": entry for i, entry in enumerate(entries) if isinstance(entry, Tensor)}
    return found
