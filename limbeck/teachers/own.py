"""The student as its own teacher: as it is, or with its adapters switched off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from limbeck.cache import json_digest, tensors_digest
from limbeck.taps import Read
from limbeck.teachers.module import Reader
from limbeck.types import Batch, Signal


class Self:
    """Stands where a Distiller expects a teacher, and means: read the teacher's taps from the student.

    The Distiller reads them in the student's own pass and detaches them; this object is never run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from limbeck import Distiller
        >>> from limbeck.terms import self_distillation
        >>> student = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
        >>> terms = self_distillation([["0", "2"]], temperature=3.0)
        >>> out = Distiller(student, Self(), terms)(torch.ones(2, 4), torch.zeros(2))
        >>> sorted(out.terms)
        ['self.0']

    Reference:
        Zhang et al. 2019, Be Your Own Teacher, arXiv:1905.08094.
    """

    def offers(self, tap: str) -> bool:
        """Anything; the student's own taps are checked when they are resolved."""
        return True

    def names(self) -> Iterable[str]:
        """Nothing to suggest."""
        return ()

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Never asked: the signal comes out of the student's pass."""
        raise AssertionError("the student's own signal comes out of its pass")


@runtime_checkable
class Adapted(Protocol):
    """A model whose adapters can be switched off, such as peft's."""

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """Inside the block the model computes as if it had no adapters."""
        ...


class WithoutAdapter:
    """The student's own weights with its adapters switched off: the model that it was before training.

    A second model in memory is not needed. Of the student's modes, gradients and running statistics nothing
    changes by the teacher's pass.

    Args:
        student: The student of the Distiller, a model with ``disable_adapter()``: ``peft.get_peft_model(...)``.
        read: Names the model's outputs where they have no names.

    Raises:
        TypeError: the student has no adapters.

    Example:
        >>> from contextlib import contextmanager
        >>> class Shifted(nn.Linear):
        ...     shift = 1.0
        ...     def forward(self, input):
        ...         return super().forward(input) + self.shift
        ...     @contextmanager
        ...     def disable_adapter(self):
        ...         self.shift = 0.0
        ...         yield
        ...         self.shift = 1.0
        >>> student, x = Shifted(2, 3), torch.ones(1, 2)
        >>> (student(x) - WithoutAdapter(student).signal({"input": x}, ["logits"])["logits"]).detach().round()
        tensor([[1., 1., 1.]])

    Reference:
        Hu et al. 2021, LoRA, arXiv:2106.09685.
    """

    def __init__(self, student: nn.Module, read: Read | None = None) -> None:
        if not isinstance(student, Adapted):
            raise TypeError(
                f"a {type(student).__name__} has no adapters to switch off (no disable_adapter()); "
                "pass what peft.get_peft_model returned, or a copy of the model as the teacher"
            )
        self.student = student
        self._switch: Adapted = student
        self._reader = Reader(student, read)

    def offers(self, tap: str) -> bool:
        """Whether the student has this tap."""
        return self._reader.offers(tap)

    def names(self) -> Iterable[str]:
        """The student's paths and the known output names."""
        return self._reader.names()

    def identity(self) -> Mapping[str, Any]:
        """The weights that do not train, which must be all but the adapters', and the student's structure."""
        frozen = {n: p for n, p in self.student.named_parameters() if not p.requires_grad}
        kept = {**frozen, **dict(self.student.named_buffers())}
        return {
            "teacher": tensors_digest(kept),
            "architecture": json_digest(repr(self.student)),
            "adapters": "off",
        }

    @torch.no_grad()
    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Run the student without adapters, in eval mode, and read the wanted taps."""
        # A compiled student was compiled with its adapters and the student's own taps.
        with left_as_it_is(self.student), self._switch.disable_adapter(), torch.compiler.set_stance("force_eager"):
            return self._reader(batch, wants)


@contextmanager
def left_as_it_is(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and put back afterwards which of its parts were training, and which weights.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> with left_as_it_is(module):
        ...     inside = module.training
        >>> inside, module.training
        (False, True)
    """
    modes = [(part, part.training) for part in module.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, requires_grad in trained:  # peft switches these off and on as well
            parameter.requires_grad_(requires_grad)
