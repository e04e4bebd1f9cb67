"""Distilling alongside a loop that runs the student itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.batch import as_batch, view
from limbeck.distiller import Distiller
from limbeck.taps import Read, Recorder, Tap, resolve
from limbeck.teachers import Given, Self, TeacherLike
from limbeck.terms import Term
from limbeck.types import STUDENT, TEACHER, TEACHER_CACHE, Output, Signal


class Alongside:
    """The objective of a Distiller, for a loop that calls the student and computes a loss of its own.

    A Distiller runs the student. Where a script does that itself, this reads the taps while the student runs in
    training mode, and `compare` then gives the loss. Only the last run counts; in eval mode nothing is read.
    What the taps read is copied, since what later changes it in place cannot be seen in time.

    Args:
        student: Any module; the script goes on calling it.
        teacher: As of a `limbeck.Distiller`.
        terms: Likewise. What they learn is in `parameters`, for the script's optimizer.
        read: Likewise.
        teacher_read: Likewise.

    Raises:
        ValueError: as a Distiller does.

    Example:
        >>> import torch
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> with Alongside(student, teacher, [Term("logits", loss="forward_kl")]) as beside:
        ...     inputs = torch.ones(8, 4)
        ...     outputs = student(inputs)
        ...     loss = outputs.square().mean() + beside.compare({"inputs": (inputs,)}, outputs).loss
        >>> len(student._forward_pre_hooks)
        0
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherLike | None,
        terms: Sequence[Term],
        *,
        read: Read | None = None,
        teacher_read: Read | None = None,
    ) -> None:
        self.distiller = Distiller(student, teacher, terms, read=read, teacher_read=teacher_read)
        self._recorder = Recorder(student, self._taps(), read)
        self._recorder.cloned.update(self._recorder.taps)
        self._ran = False
        self._armed = ExitStack()
        self._hook = student.register_forward_pre_hook(_Begin(weakref.ref(self)))

    def compare(
        self,
        batch: Any,
        output: Any,
        *,
        counts: Mapping[str, float] | None = None,
        progress: float | None = None,
    ) -> Output:
        """Compare what the student just did with the teacher.

        Args:
            batch: What the student was given, by name or as a tuple with the labels last; positional inputs
                without labels are ``{"inputs": (x, y)}``. With a part ``"teacher_cache"`` the teacher is not run.
            output: What the student returned.
            counts: As of a Distiller.
            progress: As of a Distiller.

        Raises:
            ValueError: the student has not run in training mode since the last comparison.
        """
        batch = as_batch(batch)
        if not self._ran:
            raise ValueError(
                "the student has not run in training mode since the last comparison; call student.train() and the "
                "student first"
            )
        self._ran = False
        student = Signal(self._recorder.collect(output))
        teacher = self._asked(batch, student)
        found: Output = self.distiller.objective(student, teacher, view(batch, STUDENT), counts, progress)
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the terms learn beside the student: projections and others. They may be given to an optimizer."""
        return self.distiller.objective.parameters()

    def close(self) -> None:
        """Leave the student as it came."""
        self._armed.close()
        self._hook.remove()

    def __enter__(self) -> Alongside:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self) -> None:
        """Read from here on; what was seen before is forgotten. Called when the student is."""
        self._armed.close()
        self._ran = False
        self._armed.enter_context(self._recorder.armed())
        handle = self.distiller.student.register_forward_hook(_End(weakref.ref(self)), always_call=True)
        self._armed.callback(handle.remove)

    def end(self) -> None:
        """Read no more. Called when the student returns."""
        self._armed.close()
        self._ran = True

    def _taps(self) -> dict[str, Tap]:
        own = [tap for term in self.distiller.terms for tap in term.taps]
        if isinstance(self.distiller.teacher, Self):
            own += self.distiller.wants
        return resolve(self.distiller.student, dict.fromkeys(own), any_output=self.distiller.read is not None)

    def _asked(self, batch: Mapping[str, Any], student: Signal) -> Signal:
        """What the teacher says, or the batch for it, or the student to itself."""
        teacher, wants = self.distiller.teacher, self.distiller.wants
        if isinstance(teacher, Self):
            return Signal({tap: student[tap].detach() for tap in wants})
        if teacher is None or not wants:
            return Signal({})
        if TEACHER_CACHE in batch:
            return Given(self.distiller.teacher_read).signal(batch, wants)
        return teacher.signal(view(batch, TEACHER), wants)


@dataclass
class _Begin:
    """Before the student runs. By weak reference, so that copies of the student hold neither teacher nor hooks."""

    owner: weakref.ref[Alongside]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        owner = self.owner()
        if owner is not None and module is owner.distiller.student and module.training:
            owner.begin()


@dataclass
class _End:
    """After the student ran, or failed to."""

    owner: weakref.ref[Alongside]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        owner = self.owner()
        if owner is not None:
            owner.end()
