"""What every loss has to do.

Shape legend: B examples, L positions, D features or classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from limbeck.losses import LOSSES
from limbeck.reduce import masked_mean
from limbeck.testing.checks import EXACT, close, is_floating, require, skip_unless

Example = dict[str, Tensor]
"""What a loss is called with: ``student``, ``teacher`` and whatever else it asks for by name."""


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
        sides = (self.cut(example["student"]), self.cut(example["teacher"]))
        values: Tensor = function(*sides, **self.options, **asked)
        return values

    def cut(self, tensor: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Cut a side of the example into the tensors that the loss takes; override it where it takes several."""
        return tensor

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
            require(kept, f"inputs with {leading} give values {tuple(values.shape)}")

    def test_keeps_double_precision(self) -> None:
        """Inputs in float64 give values in float64, without which the other tests compare rounding errors."""
        for example in self.examples():
            dtype = self.call(example).dtype
            cure = "lift half precision alone, with limbeck.losses.full_precision"
            require(dtype == torch.float64, f"inputs in float64 give values in {dtype}; {cure}")

    def test_is_zero_at_equality(self) -> None:
        """Value and gradient vanish where the student equals the teacher."""
        skip_unless(self.identity, "identity")
        for example in self.examples():
            equal = self.at_equality(example)
            _, gradient = self.gradient(equal)
            worst, steepest = self.call(equal).abs().max().item(), gradient.abs().max().item()
            require(worst <= EXACT, f"a value at equality is {worst}")
            require(steepest <= EXACT, f"the gradient at equality is {steepest}")

    def test_is_never_negative(self) -> None:
        """No value is below zero, far from the teacher and near it."""
        skip_unless(self.non_negative, "non_negative")
        for example in self.examples():
            for scale in (0.01, 1.0, 100.0):
                lowest = self.call({**example, "student": scale * example["student"]}).min()
                require(lowest >= -EXACT, f"the value is {lowest.item()} with the student times {scale}")

    def test_follows_a_permutation_of_the_examples(self) -> None:
        """Other order, same values in that order."""
        for example in self.examples():
            values = self.call(example)
            order = torch.arange(len(example["student"])).roll(1)
            moved = self.call({name: tensor[order] for name, tensor in example.items()})
            close(moved, values[order] if values.ndim else values, "in another order")

    def test_ignores_a_constant_added_to_the_logits(self) -> None:
        """A constant on all logits of a position changes neither value nor gradient."""
        skip_unless(self.shift_invariant, "shift_invariant")
        for example in self.examples():
            shift = torch.linspace(-50.0, 50.0, example["student"][..., 0].numel(), dtype=torch.float64)
            shift = shift.view(example["student"].shape[:-1]).unsqueeze(-1)
            moved = {**example, "student": example["student"] + shift}
            if is_floating(example["teacher"]):
                moved["teacher"] = example["teacher"] - 2 * shift
            for ours, before in zip(self.gradient(moved), self.gradient(example), strict=True):
                close(ours, before, "with a constant added")

    def test_gives_a_gradient_to_the_student_alone(self) -> None:
        """The student's gradient is not zero, and the teacher gets none."""
        for example in self.examples():
            floating = {n: t.clone().requires_grad_() for n, t in example.items() if is_floating(t)}
            values = self.call({**example, **floating})
            require(values.requires_grad, "the student gets no gradient")
            sides = [floating[side] for side in ("student", "teacher") if side in floating]
            gradient, *teacher = torch.autograd.grad(values.sum(), sides, allow_unused=True)
            require(gradient is not None and gradient.any(), "the student's gradient is zero")
            require(teacher in ([], [None]), "the teacher gets a gradient; detach it")

    def test_gradient_is_the_derivative(self) -> None:
        """Autograd agrees with finite differences in float64."""
        for example in self.examples():
            student = example["student"].clone().requires_grad_()
            torch.autograd.gradcheck(lambda s, e=example: self.call({**e, "student": s}), (student,))

    def test_half_precision_stays_close(self) -> None:
        """In float16 and bfloat16 the value is that of the same numbers in float32, within `half_bound`."""
        for dtype in (torch.float16, torch.bfloat16):
            for example in self.examples():
                half = {n: t.to(dtype) if is_floating(t) else t for n, t in example.items()}
                full = {n: t.float() if is_floating(t) else t for n, t in half.items()}
                values, reference = self.call(half).float(), self.call(full)
                off = ((values - reference).abs() / (1 + reference.abs())).max().item()
                require(
                    off <= self.half_bound,
                    f"{dtype}: values are up to {off:.4f} off, more than {self.half_bound}",
                )
                gradient, expected = self.gradient(half)[1], self.gradient(full)[1].to(dtype)
                torch.testing.assert_close(gradient, expected, rtol=0.02, atol=1e-3)

    def test_extreme_inputs_stay_finite(self) -> None:
        """Large, zero and masked inputs and a batch of one give finite values and gradients, or a ValueError."""
        example = {n: t.float() if is_floating(t) else t for n, t in self.example(*self.leading[0]).items()}
        for what, extreme in self._extremes(example).items():
            try:
                value, gradient = self.gradient(extreme)
            except ValueError as refusal:
                require(str(refusal) != "", f"{what}: a refusal says why")
                continue
            require(value.isfinite(), f"{what}: the value is {value.item()}")
            require(gradient.isfinite().all(), f"{what}: the gradient is not finite")

    def test_leaves_its_inputs_alone(self) -> None:
        """Nothing is changed in place."""
        for example in self.examples():
            before = {name: tensor.clone() for name, tensor in example.items()}
            self.gradient(example)
            self.call(example)
            for name, tensor in example.items():
                require(torch.equal(tensor, before[name]), f"{name!r} was changed in place")

    def test_does_not_depend_on_padding(self) -> None:
        """More padding changes nothing, and padding gets no gradient at all."""
        leading = self._sequences()
        example = self.example(*leading)
        padded = {name: _pad(name, tensor) for name, tensor in example.items()}
        mask = _pad("mask", torch.ones(leading))
        value, gradient = self.gradient(padded, mask)
        expected, expected_gradient = self.gradient(example, torch.ones(leading))
        close(value, expected, "with more padding")
        close(gradient[:, : leading[1]], expected_gradient, "with more padding")
        require(not gradient[:, leading[1] :].any(), "padding gets a gradient")

    def test_masked_positions_do_not_leak(self) -> None:
        """Not even an infinity or a NaN at a masked position reaches the value or another position."""
        leading = self._sequences()
        example = self.example(*leading)
        mask = torch.arange(leading[0] * leading[1]).view(leading) % 3 > 0
        value, gradient = self.gradient(example, mask)
        require(not gradient[~mask].any(), "a masked position gets a gradient")
        for poison in (float("inf"), float("nan")):
            poisoned = {
                name: torch.where(_behind(mask, tensor), tensor, poison) if is_floating(tensor) else tensor
                for name, tensor in example.items()
            }
            ours, its_gradient = self.gradient(poisoned, mask)
            close(ours, value, f"with {poison} at masked positions")
            close(its_gradient[mask], gradient[mask], f"with {poison} at masked positions")

    def test_an_empty_mask_gives_zero(self) -> None:
        """Where no position counts, the reduced value is 0 and no position gets a gradient."""
        for leading, example in zip(self.leading, self.examples(), strict=True):
            empty = {
                name: torch.zeros_like(tensor) if name == "mask" else tensor for name, tensor in example.items()
            }
            whole = self.call(empty).ndim == 0
            skip_unless(not whole or "mask" in example, "one value per example, or a mask that it asks for")
            value, gradient = self.gradient(empty, torch.zeros(leading))
            require(value.isfinite() if whole else value == 0, f"the value is {value.item()}")
            require(not gradient.any(), "a position that does not count gets a gradient")

    def test_does_not_depend_on_the_cut(self) -> None:
        """Parts of a batch, each divided by the count of the whole, sum up to the batch."""
        skip_unless(self.per_example, "per_example")
        for leading, example in zip(self.leading, self.examples(), strict=True):
            mask = torch.arange(torch.Size(leading).numel()).view(leading) % 4 != 1
            value, gradient = self.gradient(example, mask)
            pieces = [slice(0, 1), slice(1, leading[0])]
            parts = [
                self.gradient({n: t[cut] for n, t in example.items()}, mask[cut], float(mask.sum()))
                for cut in pieces
            ]
            close(parts[0][0] + parts[1][0], value, "cut in two")
            close(torch.cat([g for _, g in parts]), gradient, "cut in two")

    def _sequences(self) -> tuple[int, int]:
        """The first (B, L) of `leading`."""
        found = [leading for leading in self.leading if len(leading) == 2]
        skip_unless(bool(found), "leading with positions")
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
        if is_floating(teacher):
            extremes["both times 1e4"] = {**example, "student": 1e4 * student, "teacher": 1e4 * teacher}
            extremes["teacher zero"] = {**example, "teacher": zero_teacher}
            extremes["both zero"] = {**example, "student": 0 * student, "teacher": zero_teacher}
        if self.logits:
            impossible = torch.zeros_like(student)
            impossible[..., -1] = -float("inf")
            extremes["a class at -inf"] = {**example, "student": student + impossible}
            if is_floating(teacher):
                extremes["a class at -inf"]["teacher"] = teacher + impossible
        return extremes


def _behind(mask: Tensor, tensor: Tensor) -> Tensor:
    """A mask (B, L) that broadcasts over whatever stands behind the positions of a tensor."""
    return mask.view(*mask.shape, *[1] * (tensor.ndim - mask.ndim))


def _pad(name: str, tensor: Tensor) -> Tensor:
    """Three more positions (B, L + 3, ...) that do not count: large numbers, a repeated label, a mask of zeros."""
    more = tensor[:, :1].expand(-1, 3, *tensor.shape[2:])
    if name == "mask":
        more = torch.zeros_like(more)
    elif is_floating(tensor):
        more = 100.0 * more + 50.0
    return torch.cat([tensor, more], dim=1)
