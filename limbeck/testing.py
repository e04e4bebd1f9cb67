"""Conformance suites: what every loss and every teacher has to do, for authors of plug-ins to run on their own.

Subclass a contract in a test file, say what the object promises, and pytest runs the inherited tests. They are
plain methods with plain assertions, so that `run` works where pytest is not installed.

Shape legend: B examples, L positions, D features or classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from limbeck.batch import batch_size, map_tensors, rows
from limbeck.losses import LOSSES
from limbeck.reduce import masked_mean
from limbeck.teachers import Teacher
from limbeck.types import Batch

Example = dict[str, Tensor]
"""What a loss is called with: ``student``, ``teacher`` and whatever else it asks for by name."""
EXACT = 1e-9
"""Relative and absolute tolerance of comparisons in float64."""


def run(contract: type) -> list[str]:
    """Run every test of a contract, without pytest.

    Args:
        contract: A subclass of `LossContract` or `TeacherContract`.

    Returns:
        The names of the tests that passed; those that do not apply are left out.

    Raises:
        AssertionError: a test failed.

    Example:
        >>> class TestForwardKL(LossContract):
        ...     loss = "forward_kl"
        ...     logits = shift_invariant = True
        >>> len(run(TestForwardKL))
        13
    """
    passed = []
    for name in sorted(n for n in dir(contract) if n.startswith("test_")):
        try:
            getattr(contract(), name)()
        except SkipTest:
            continue
        passed.append(name)
    return passed


class LossContract:
    """What a loss has to do.

    Attributes:
        loss: A registered name or ``"package.module:function"``, or the function itself.
        options: Options of the loss.
        identity: Value and gradient are zero where the student equals the teacher.
        non_negative: No value is below zero.
        logits: The inputs are logits: a class that cannot occur is minus infinity on both sides.
        shift_invariant: A constant added to all logits of a position changes nothing.
        per_example: The value of an example does not depend on the other examples of the batch.
        leading: Leading dimensions to try, ``(B,)`` and ``(B, L)``.
        half_bound: How far half precision may be from float32 on the same numbers, relative to 1 + value.

    Example:
        >>> class TestAbsolute(LossContract):
        ...     def loss(student, teacher):
        ...         return (student.float() - teacher.float()).abs().mean(-1)
        >>> TestAbsolute().test_half_precision_stays_close()
        >>> TestAbsolute().test_gives_a_gradient_to_the_student_alone()
        Traceback (most recent call last):
        AssertionError: the teacher gets a gradient; detach it
    """

    loss: str | Callable[..., Tensor]
    options: Mapping[str, Any] = MappingProxyType({})
    identity: bool = True
    non_negative: bool = True
    logits: bool = False
    shift_invariant: bool = False
    per_example: bool = True
    leading: Sequence[tuple[int, ...]] = ((4,), (3, 5))
    half_bound: float = 1e-3

    def example(self, *leading: int) -> Example:
        """Make inputs in float64 with these leading dimensions; override it for other shapes and inputs.

        Args:
            *leading: ``B`` or ``B, L``.

        Returns:
            ``student`` and ``teacher``, and what else the loss asks for: ``labels``, ``mask``.
        """
        generator = torch.Generator().manual_seed(7)
        shape = (2, *leading, 7)
        student, teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
        return {"student": student, "teacher": teacher}

    def at_equality(self, example: Example) -> Example:
        """Make the student equal to the teacher; override it where their shapes differ."""
        return {**example, "student": example["teacher"].clone()}

    def call(self, example: Example) -> Tensor:
        """Call the loss on an example."""
        found = inspect.getattr_static(type(self), "loss")  # as an attribute, a function would become a method
        found = found.__func__ if isinstance(found, staticmethod) else found
        function = LOSSES.get(found) if isinstance(found, str) else found
        asked = {name: tensor for name, tensor in example.items() if name not in ("student", "teacher")}
        values: Tensor = function(example["student"], example["teacher"], **self.options, **asked)
        return values

    def gradient(
        self, example: Example, mask: Tensor | None = None, count: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The reduced value of an example and its gradient in the student."""
        student = example["student"].detach().clone().requires_grad_()
        total = masked_mean(self.call({**example, "student": student}), mask, count)
        (gradient,) = torch.autograd.grad(total, student)
        return total.detach(), gradient

    def examples(self) -> list[Example]:
        """One example for each entry of `leading`."""
        return [self.example(*leading) for leading in self.leading]

    def test_keeps_the_leading_dimensions(self) -> None:
        """One value per position, (B,) or (B, L); a loss over the whole batch may give a scalar."""
        for leading, example in zip(self.leading, self.examples(), strict=True):
            values = self.call(example)
            kept = values.shape[: len(leading)] == leading or (values.ndim == 0 and not self.per_example)
            _require(kept, f"inputs with {leading} give values {tuple(values.shape)}")

    def test_is_zero_at_equality(self) -> None:
        """Value and gradient vanish where the student equals the teacher."""
        _skip_unless(self.identity, "identity")
        for example in self.examples():
            equal = self.at_equality(example)
            _, gradient = self.gradient(equal)
            worst, steepest = self.call(equal).abs().max().item(), gradient.abs().max().item()
            _require(worst <= EXACT, f"a value at equality is {worst}")
            _require(steepest <= EXACT, f"the gradient at equality is {steepest}")

    def test_is_never_negative(self) -> None:
        """No value is below zero, far from the teacher and near it."""
        _skip_unless(self.non_negative, "non_negative")
        for example in self.examples():
            for scale in (0.01, 1.0, 100.0):
                lowest = self.call({**example, "student": scale * example["student"]}).min()
                _require(lowest >= -EXACT, f"the value is {lowest.item()} with the student times {scale}")

    def test_follows_a_permutation_of_the_examples(self) -> None:
        """Other order, same values in that order."""
        for example in self.examples():
            values = self.call(example)
            order = torch.arange(len(example["student"])).roll(1)
            moved = self.call({name: tensor[order] for name, tensor in example.items()})
            _close(moved, values[order] if values.ndim else values, "in another order")

    def test_ignores_a_constant_added_to_the_logits(self) -> None:
        """A constant on all logits of a position changes neither value nor gradient."""
        _skip_unless(self.shift_invariant, "shift_invariant")
        for example in self.examples():
            shift = torch.linspace(-50.0, 50.0, example["student"][..., 0].numel(), dtype=torch.float64)
            shift = shift.view(example["student"].shape[:-1]).unsqueeze(-1)
            moved = {**example, "student": example["student"] + shift}
            if _floating(example["teacher"]):
                moved["teacher"] = example["teacher"] - 2 * shift
            for ours, before in zip(self.gradient(moved), self.gradient(example), strict=True):
                _close(ours, before, "with a constant added")

    def test_gives_a_gradient_to_the_student_alone(self) -> None:
        """The student's gradient is not zero, and the teacher gets none."""
        for example in self.examples():
            floating = {n: t.clone().requires_grad_() for n, t in example.items() if _floating(t)}
            values = self.call({**example, **floating})
            _require(values.requires_grad, "the student gets no gradient")
            sides = [floating[side] for side in ("student", "teacher") if side in floating]
            gradient, *teacher = torch.autograd.grad(values.sum(), sides, allow_unused=True)
            _require(gradient is not None and gradient.any(), "the student's gradient is zero")
            _require(teacher in ([], [None]), "the teacher gets a gradient; detach it")

    def test_gradient_is_the_derivative(self) -> None:
        """Autograd agrees with finite differences in float64."""
        for example in self.examples():
            student = example["student"].clone().requires_grad_()
            torch.autograd.gradcheck(lambda s, e=example: self.call({**e, "student": s}), (student,))

    def test_half_precision_stays_close(self) -> None:
        """In float16 and bfloat16 the value is that of the same numbers in float32, within `half_bound`."""
        for dtype in (torch.float16, torch.bfloat16):
            for example in self.examples():
                half = {n: t.to(dtype) if _floating(t) else t for n, t in example.items()}
                full = {n: t.float() if _floating(t) else t for n, t in half.items()}
                values, reference = self.call(half).float(), self.call(full)
                off = ((values - reference).abs() / (1 + reference.abs())).max().item()
                _require(
                    off <= self.half_bound,
                    f"{dtype}: values are up to {off:.4f} off, more than {self.half_bound}",
                )
                gradient, expected = self.gradient(half)[1], self.gradient(full)[1].to(dtype)
                torch.testing.assert_close(gradient, expected, rtol=0.02, atol=1e-3)

    def test_extreme_inputs_stay_finite(self) -> None:
        """Large, zero and masked inputs and a batch of one give finite values and gradients, or a ValueError."""
        example = {n: t.float() if _floating(t) else t for n, t in self.example(*self.leading[0]).items()}
        for what, extreme in self._extremes(example).items():
            try:
                value, gradient = self.gradient(extreme)
            except ValueError as refusal:
                _require(str(refusal) != "", f"{what}: a refusal says why")
                continue
            _require(value.isfinite(), f"{what}: the value is {value.item()}")
            _require(gradient.isfinite().all(), f"{what}: the gradient is not finite")

    def test_leaves_its_inputs_alone(self) -> None:
        """Nothing is changed in place."""
        for example in self.examples():
            before = {name: tensor.clone() for name, tensor in example.items()}
            self.gradient(example)
            self.call(example)
            for name, tensor in example.items():
                _require(torch.equal(tensor, before[name]), f"{name!r} was changed in place")

    def test_does_not_depend_on_padding(self) -> None:
        """More padding changes nothing, and padding gets no gradient at all."""
        leading = self._sequences()
        example = self.example(*leading)
        padded = {name: _pad(name, tensor) for name, tensor in example.items()}
        mask = _pad("mask", torch.ones(leading))
        value, gradient = self.gradient(padded, mask)
        expected, expected_gradient = self.gradient(example, torch.ones(leading))
        _close(value, expected, "with more padding")
        _close(gradient[:, : leading[1]], expected_gradient, "with more padding")
        _require(not gradient[:, leading[1] :].any(), "padding gets a gradient")

    def test_masked_positions_do_not_leak(self) -> None:
        """Not even an infinity or a NaN at a masked position reaches the value or another position."""
        leading = self._sequences()
        example = self.example(*leading)
        mask = torch.arange(leading[0] * leading[1]).view(leading) % 3 > 0
        value, gradient = self.gradient(example, mask)
        _require(not gradient[~mask].any(), "a masked position gets a gradient")
        for poison in (float("inf"), float("nan")):
            poisoned = {
                name: torch.where(_behind(mask, tensor), tensor, poison) if _floating(tensor) else tensor
                for name, tensor in example.items()
            }
            ours, its_gradient = self.gradient(poisoned, mask)
            _close(ours, value, f"with {poison} at masked positions")
            _close(its_gradient[mask], gradient[mask], f"with {poison} at masked positions")

    def test_does_not_depend_on_the_cut(self) -> None:
        """Parts of a batch, each divided by the count of the whole, sum up to the batch."""
        _skip_unless(self.per_example, "per_example")
        for leading, example in zip(self.leading, self.examples(), strict=True):
            mask = torch.arange(torch.Size(leading).numel()).view(leading) % 4 != 1
            value, gradient = self.gradient(example, mask)
            pieces = [slice(0, 1), slice(1, leading[0])]
            parts = [
                self.gradient({n: t[cut] for n, t in example.items()}, mask[cut], float(mask.sum()))
                for cut in pieces
            ]
            _close(parts[0][0] + parts[1][0], value, "cut in two")
            _close(torch.cat([g for _, g in parts]), gradient, "cut in two")

    def _sequences(self) -> tuple[int, int]:
        """The first (B, L) of `leading`."""
        found = [leading for leading in self.leading if len(leading) == 2]
        _skip_unless(bool(found), "leading with positions")
        batch, length = found[0]
        return batch, length

    def _extremes(self, example: Example) -> dict[str, Example]:
        student, teacher = example["student"], example["teacher"]
        zero_teacher = teacher * 0
        extremes = {
            "student times 1e4": {**example, "student": 1e4 * student},
            "student zero": {**example, "student": 0 * student},
            "batch of one": {name: tensor[:1] for name, tensor in example.items()},
        }
        if _floating(teacher):
            extremes["both times 1e4"] = {**example, "student": 1e4 * student, "teacher": 1e4 * teacher}
            extremes["teacher zero"] = {**example, "teacher": zero_teacher}
            extremes["both zero"] = {**example, "student": 0 * student, "teacher": zero_teacher}
        if self.logits:
            impossible = torch.zeros_like(student)
            impossible[..., -1] = -float("inf")
            extremes["a class at -inf"] = {**example, "student": student + impossible}
            if _floating(teacher):
                extremes["a class at -inf"]["teacher"] = teacher + impossible
        return extremes


class TeacherContract:
    """What a teacher has to do, whatever it stands on: a module, an ensemble, a cache, a server.

    Attributes:
        wants: Taps that the teacher has.
        wrong_tap: A tap that it does not have.
        tolerance: Relative and absolute tolerance between two signals for the same examples.

    Example:
        >>> from torch import nn
        >>> from limbeck.teachers import ModuleTeacher
        >>> class TestLinear(TeacherContract):
        ...     wants = ("logits", "0")
        ...     def teacher(self):
        ...         torch.manual_seed(0)
        ...         return ModuleTeacher(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
        ...     def batch(self):
        ...         return {"input": torch.linspace(0.0, 1.0, 12).view(3, 4)}
        >>> len(run(TestLinear))
        9
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
        _require(isinstance(self.teacher(), Teacher), "it lacks offers, names or signal")

    def test_offers_what_it_gives(self) -> None:
        """Every wanted tap is offered, and so is every tap that is suggested to a user."""
        teacher = self.teacher()
        for tap in (*self.wants, *teacher.names()):
            _require(teacher.offers(tap), f"{tap!r} is not offered")

    def test_does_not_offer_a_wrong_tap(self) -> None:
        """A tap that is not there is not offered, and asking for it is a ValueError that names it."""
        teacher = self.teacher()
        _require(not teacher.offers(self.wrong_tap), f"{self.wrong_tap!r} is offered")
        try:
            teacher.signal(self.batch(), [self.wrong_tap])
        except ValueError as refusal:
            _require(self.wrong_tap in str(refusal), f"the message does not name the tap: {refusal}")
        else:
            raise AssertionError(f"{self.wrong_tap!r} gave a signal")

    def test_gives_what_is_wanted(self) -> None:
        """A signal holds the wanted taps and no others, in any number and order."""
        teacher, batch = self.teacher(), self.batch()
        for wants in ([*self.wants], [*self.wants][::-1], [self.wants[0]]):
            _require(set(teacher.signal(batch, wants).values) == set(wants), f"wanted {wants}")

    def test_one_row_per_example(self) -> None:
        """The first dimension of every tensor counts the examples."""
        for tap, tensor in self._signal(self.batch()).items():
            _require(len(tensor) == batch_size(self.batch()), f"{tap!r} has shape {tuple(tensor.shape)}")

    def test_gives_no_gradient(self) -> None:
        """No tensor carries a gradient, although gradients are enabled."""
        with torch.enable_grad():
            signal = self._signal(self.batch())
        for tap, tensor in signal.items():
            _require(not tensor.requires_grad, f"{tap!r} carries a gradient")

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

    def _signal(self, batch: Batch) -> dict[str, Tensor]:
        signal = self.teacher().signal(batch, list(self.wants))
        return {tap: signal[tap] for tap in self.wants}

    def _compare(self, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], when: str) -> None:
        for tap, tensor in expected.items():
            _close(ours[tap], tensor, f"{tap!r} {when}", self.tolerance)


def _require(condition: bool | Tensor, message: str) -> None:
    """Assert, with nothing but our message, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def _skip_unless(promised: bool, what: str) -> None:
    if not promised:
        raise SkipTest(f"the contract does not promise: {what}")


def _close(ours: Tensor, expected: Tensor, when: str, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(
        ours, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"differs {when}: {text}"
    )


def _floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _behind(mask: Tensor, tensor: Tensor) -> Tensor:
    """A mask (B, L) that broadcasts over whatever stands behind the positions of a tensor."""
    return mask.view(*mask.shape, *[1] * (tensor.ndim - mask.ndim))


def _pad(name: str, tensor: Tensor) -> Tensor:
    """Three more positions (B, L + 3, ...) that do not count: large numbers, a repeated label, a mask of zeros."""
    more = tensor[:, :1].expand(-1, 3, *tensor.shape[2:])
    if name == "mask":
        more = torch.zeros_like(more)
    elif _floating(tensor):
        more = 100.0 * more + 50.0
    return torch.cat([tensor, more], dim=1)


def _flat(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name."""
    found: dict[str, Tensor] = {}
    for key, value in batch.items():
        entries = value if isinstance(value, tuple) else (value,)
        found |= {f"{key}.{i}": entry for i, entry in enumerate(entries) if isinstance(entry, Tensor)}
    return found
