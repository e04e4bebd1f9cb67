"""A student that is taken for itself, and a teacher that sees what it sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from limbeck.standin import StandIn
from limbeck.types import STUDENT, TEACHER
from limbeck.witness import Witness

NOT_USED = "what the {} returned for the last batch was not used; take its loss after each call"

NO_INPUTS = (
    "the teacher has no intermediate input stored, so that the student's modules get their own; run the teacher "
    "alone before"
)


class Accompanied(StandIn):
    """A base for stand-ins whose teacher sees what they see, in loops that compute a loss later.

    In training mode both run; in eval mode the student runs, and the teacher only if the values are taken. The
    teacher is frozen and no part of the model, but goes where the model goes.

    Args:
        student: The student.
        teacher: The teacher.
        pairs: Paths of a module of the student and of one of the teacher; "" is the whole model.
        layerwise: Whether each of the student's modules is given what the teacher's was given, and trains alone.

    Raises:
        ValueError: a module that one of the two does not have, or weights that both have.

    Example:
        >>> import torch
        >>> model = Accompanied(nn.Linear(2, 3), nn.Linear(2, 3), [("", "")])
        >>> output = model(torch.ones(4, 2))
        >>> [(ours, theirs)] = model.take()
        >>> ours is output, theirs.requires_grad, len(list(model.parameters()))
        (True, False, 2)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Iterable[tuple[str, str]],
        layerwise: bool = False,
    ) -> None:
        super().__init__(student)
        self._witness = Witness(student, teacher, pairs, layerwise)
        self._trained = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
        self._alone: str | None = None
        self._replica = 0
        if layerwise:
            student.requires_grad_(False)
            for ours, _ in self._witness.pairs:
                student.get_submodule(ours).requires_grad_(True)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Let both see a batch, or the one that runs alone; returns what the student, or this one, returns."""
        witness, replica = self._witness, self._replica
        if self._alone == TEACHER:
            return witness.ask(args, kwargs, replica=replica)
        if self._alone == STUDENT:
            if witness.layerwise and witness.seen(TEACHER, replica) is None:
                warnings.warn(NO_INPUTS, stacklevel=2)
            return witness.learn(self.student, args, kwargs, replica=replica)
        for side in (STUDENT, TEACHER):
            if self.training and witness.seen(side, replica) is not None:
                warnings.warn(NOT_USED.format(side), stacklevel=2)
        return witness.call(self.student, args, kwargs, replica=replica, later=not self.training)

    def take(self) -> list[tuple[Any, Any]]:
        """Both values of each pair, of the last batch; see `Witness.take`."""
        return self._witness.take()

    @contextmanager
    def alone(self, side: str, enable: bool = True) -> Iterator[None]:
        """Run one side alone for a while, ``"student"`` or ``"teacher"``."""
        before, self._alone = self._alone, side if enable else self._alone
        try:
            yield
        finally:
            self._alone = before

    @contextmanager
    def without(self, name: str, enable: bool = True) -> Iterator[None]:
        """Hide a module that stands beside the student from the module tree for a while."""
        there = self._modules.get(name)
        if enable and there is not None:
            self._modules[name] = nn.ModuleList()
        try:
            yield
        finally:
            if there is not None:
                self._modules[name] = there

    def train(self, mode: bool = True) -> Any:
        """Set the mode; what was kept of the other mode is forgotten."""
        if mode != self.training:
            self._witness.forget()
        super().train(mode)
        self._witness.teacher.module.eval()
        return self

    def export(self) -> nn.Module:
        """Give the student back: the object that went in, without hooks, with what was to be trained before."""
        self._witness.end()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(self._trained.get(name, parameter.requires_grad))
        return self.student

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What moves or converts the model does so to the teacher, too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        teacher = self._witness.teacher
        if all(module is not teacher.module for module in self.beside().values()):
            teacher.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        teacher.changed()
        return self

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._replica = self._witness.replicate()
        return replica
