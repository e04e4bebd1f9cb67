"""The Distiller: the one module that holds a student and everything that trains with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.batch import (
    ATTENTION_MASK,
    as_batch,
    batch_size,
    from_call,
    mask_key,
    rows,
    valid_positions,
)
from limbeck.projectors import Projector, build_projector
from limbeck.reduce import blank, masked_mean
from limbeck.registry import nearest
from limbeck.stopwatch import Stopwatch
from limbeck.taps import Read, Recorder, Tap, read_output, resolve
from limbeck.teachers import ModuleInputs, ModuleTeacher, Teacher, TeacherLike, as_teacher, record
from limbeck.terms import Term
from limbeck.types import LABELS, Batch, Output, Signal

EXAMPLES = "examples"


@dataclass(frozen=True)
class PlannedTerm:
    """What the preflight found out about one term.

    Attributes:
        term: The term.
        student_shape: Shape of what is read from the student, for two examples.
        teacher_shape: Shape of what it is compared with.
        mask: Which entry of the batch masks it, or None.
        value: Its unweighted value before any training.
        parameters: Number of parameters of its projection.
    """

    term: Term
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    mask: str | None
    value: float
    parameters: int


class Distiller(nn.Module):
    """A student, the projections and terms that train it, and a teacher outside of the module tree.

    In training mode a call returns an `Output` whose ``loss`` is the weighted sum of the terms. In eval mode a
    call *is* the student. The teacher is no submodule: it is not in ``parameters()`` nor in the state dict, and
    nothing saves, moves or synchronises it with the student.

    Args:
        student: Any module.
        teacher: A module, a function that makes one, ``(class, args, kwargs)``, the path or hub id of a
            transformers model, any `Teacher`; or None where all terms read labels (plain training).
        terms: What is to be learned, each term under a name of its own.
        read: Names the student's outputs where they have no names: ``lambda out: {"logits": out[0]}``.
        teacher_read: The same for the teacher; by default `read`.
        sample: A batch to check everything on at once; without it that happens on the first batch.

    Raises:
        ValueError: a tap that a model does not have, two terms of one name, a teacher that shares weights with
            the student, a term that needs a teacher where there is none.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> distiller = Distiller(student, teacher, [Term("logits", loss="forward_kl", temperature=2.0)])
        >>> out = distiller(torch.ones(8, 4), torch.zeros(8))
        >>> out.loss.backward()
        >>> distiller.export() is student
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherLike | None,
        terms: Sequence[Term],
        *,
        read: Read | None = None,
        teacher_read: Read | None = None,
        sample: Any = None,
    ) -> None:
        super().__init__()
        self.terms = _checked_terms(terms)
        self.student = student
        self.teacher = None if teacher is None else as_teacher(teacher, teacher_read or read)
        _check_apart(student, self.teacher)
        self.projections = nn.ModuleDict(
            {_key(t): build_projector(t.project) for t in terms if t.project is not None}
        )
        self.wants = tuple(dict.fromkeys(t.teacher_tap for t in terms if not t.reads_labels))
        self.teacher_watch = Stopwatch()
        self._losses = {t.name: t.bound() for t in terms}
        self.read = read
        self._call = ModuleInputs(student)
        self._recorder = Recorder(student, self._student_taps(), read)
        self._checked = False
        self._gradients_checked = False
        self._check_offers()
        if sample is not None:
            self.preflight(sample)

    def forward(self, *inputs: Any, counts: Mapping[str, float] | None = None, **named: Any) -> Any:
        """Distil one batch in training mode; run the student alone in eval mode.

        Args:
            *inputs: The student's inputs in order, the labels last: ``distiller(x, y)``. With ``labels=`` among
                the named entries, all of them are inputs.
            counts: Numbers of valid positions in the whole step, from `count`, when this batch is a part of it.
            **named: The batch by name: ``distiller(**batch)``.

        Returns:
            An `Output` in training mode, whatever the student returns in eval mode.
        """
        if not self.training:
            return self._call.alone(inputs, named)
        batch = from_call(inputs, named)
        if not self._checked:
            self.preflight(batch)
        return self.distil(batch, counts)

    def distil(self, batch: Batch, counts: Mapping[str, float] | None = None) -> Output:
        """One step up to the loss, whatever the mode; `forward` in training mode."""
        teacher = self._teach(batch)
        output, seen = record(self._recorder, lambda **extra: self._call(batch, **extra))
        student = Signal(seen)
        self._check_gradients(student)
        values = {t.name: self._value(t, student, teacher, batch, counts) for t in self.terms}
        loss = torch.stack([t.weight * values[t.name] for t in self.terms]).sum()
        detached = {name: value.detach() for name, value in values.items()}
        return Output(loss, self._logits(seen, output), detached)

    def count(self, batch: Any) -> dict[str, float]:
        """Count the valid positions of a batch, for each mask that a term may use.

        Sums of these over the parts of a step (micro-batches, ranks) are what `forward` takes as ``counts``, so
        that the loss does not depend on how the step was cut.

        Example:
            >>> distiller = Distiller(nn.Linear(2, 2), None, [Term("labels", loss="cross_entropy")])
            >>> distiller.count((torch.zeros(3, 2), torch.tensor([0, 1, -100])))
            {'examples': 3.0, 'labels': 2.0}
        """
        batch = as_batch(batch)
        counts = {EXAMPLES: float(batch_size(batch))}
        for key in dict.fromkeys((ATTENTION_MASK, LABELS, *(t.mask for t in self.terms if t.mask))):
            mask = valid_positions(batch, key)
            if mask is not None:
                counts[key] = float(mask.sum())
        return counts

    def preflight(self, batch: Any) -> list[PlannedTerm]:
        """Check everything on two examples, size the projections, and say what each term will do.

        It happens by itself on the first batch in training mode, and at the start of `fit`.

        Nothing is trained and no running statistics move. Only new projections draw random numbers.

        Raises:
            ValueError: shapes that do not match (the message proposes a projection), a module that did not run,
                a term that is not finite.
        """
        batch = rows(as_batch(batch), 0, 2)
        with self._looking():
            teacher = self._teach(batch)
            _, seen = record(self._recorder, lambda **extra: self._call(batch, **extra))
            plan = [self._plan(t, Signal(seen), teacher, batch) for t in self.terms]
        self._checked = True
        return plan

    @property
    def teacher_seconds(self) -> float:
        """Time that the teacher's forward passes took since the last preflight."""
        return self.teacher_watch.seconds

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Run models without training them: eval mode, no gradient, not compiled; all is put back afterwards."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for module, training in modes.items():
                module.training = training
            self.teacher_watch = Stopwatch()

    def compile_student(self, **options: Any) -> None:
        """Compile the student in place with `torch.compile`; its taps go on working and `export` undoes it."""
        self._recorder.pin()
        self.student.compile(**options)

    def export(self) -> nn.Module:
        """Give back the student: the object that went in, without hooks, teacher, projections or compilation."""
        self._recorder.unpin()
        self.student._compiled_call_impl = None
        return self.student

    def _teach(self, batch: Batch) -> Signal:
        if self.teacher is None or not self.wants:
            return Signal({})
        with self.teacher_watch:
            return self.teacher.signal(batch, self.wants)

    def _value(
        self,
        term: Term,
        student: Signal,
        teacher: Signal,
        batch: Batch,
        counts: Mapping[str, float] | None = None,
    ) -> Tensor:
        """Project, compare and reduce: the unweighted value of one term, a scalar."""
        with _in_term(term):
            target = _labels(batch) if term.reads_labels else teacher[term.teacher_tap]
            read = self._project(term, student[term.tap], target)
            key = _mask_of(term, read, batch)
            mask = None if key is None else valid_positions(batch, key)
            if mask is not None and not term.reads_labels:
                read, target = blank(read, mask), blank(target, mask)
            supplied = {"mask": mask, "labels": batch.get(LABELS)}
            with torch.autocast(read.device.type, enabled=False):
                values = self._losses[term.name](read, target, **{n: supplied[n] for n in term.inputs})
            if values.ndim == 0:  # it describes the batch as a whole, and counts once per example
                mask, values = None, values.expand(batch_size(batch))
            count = None if counts is None else counts[EXAMPLES if mask is None else str(key)]
            return masked_mean(values, mask, count)

    def _project(self, term: Term, read: Tensor, target: Tensor) -> Tensor:
        if term.project is None:
            return read
        projector = self.projections[_key(term)]
        assert isinstance(projector, Projector)
        if not projector.sized:
            projector.size(read.shape, target.shape)
            projector.to(device=read.device)
        projected: Tensor = projector(read, target.shape)
        return projected

    def _plan(self, term: Term, student: Signal, teacher: Signal, batch: Batch) -> PlannedTerm:
        with _in_term(term):
            read = student[term.tap]
            target = _labels(batch) if term.reads_labels else teacher[term.teacher_tap]
        value = self._value(term, student, teacher, batch).item()
        if not math.isfinite(value):
            raise ValueError(f"{_where(term)} is {value} before any training; check both models' outputs")
        sizes = self.projections[_key(term)].parameters() if term.project is not None else ()
        shapes = tuple(read.shape), tuple(target.shape)
        return PlannedTerm(term, *shapes, _mask_of(term, read, batch), value, sum(p.numel() for p in sizes))

    def _logits(self, seen: Mapping[str, Tensor], output: Any) -> Tensor | None:
        if "logits" in seen:
            return seen["logits"]
        logits: Tensor | None = read_output(output, self.read).get("logits")
        return logits

    def _student_taps(self) -> dict[str, Tap]:
        taps: dict[str, Tap] = {}
        for term in self.terms:
            with _in_term(term, "student: "):
                taps |= resolve(self.student, [term.tap], any_output=self.read is not None)
        return taps

    def _check_offers(self) -> None:
        for term in self.terms:
            if term.reads_labels:
                continue
            if self.teacher is None:
                raise ValueError(f"{_where(term)} needs a teacher, and there is none")
            if not self.teacher.offers(term.teacher_tap):
                hint = nearest(term.teacher_tap, self.teacher.names())
                raise ValueError(f"{_where(term)}: the teacher has no {term.teacher_tap!r}; {hint}")

    def _check_gradients(self, student: Signal) -> None:
        """Refuse, once, a tap that silently gives no gradient, as reentrant activation checkpointing does."""
        if self._gradients_checked or not torch.is_grad_enabled():
            return
        modules = dict(self.student.named_modules())
        for text, tap in self._recorder.taps.items():
            trains = any(p.requires_grad for p in modules[tap.module or ""].parameters())
            if trains and text != "logits" and not student[text].requires_grad:
                raise ValueError(
                    f"tap {text!r} carries no gradient, although its module trains; "
                    "under activation checkpointing set use_reentrant=False"
                )
        self._gradients_checked = True


def _key(term: Term) -> str:
    """The name of a term's projection in the state dict, where dots have a meaning."""
    return term.name.replace("/", "//").replace(".", "/")


def _mask_of(term: Term, read: Tensor, batch: Batch) -> str | None:
    """The entry of the batch that masks a term: the one it names, the labels' own, or the one whose shape fits."""
    if term.mask is None:
        return LABELS if term.reads_labels else mask_key(read.shape, batch)
    if term.mask not in batch:
        raise ValueError(f"the batch has no mask {term.mask!r}; {nearest(term.mask, batch)}")
    return term.mask


def _where(term: Term) -> str:
    return f"term {term.name!r} ({term.tap} -> {term.teacher_tap})"


@contextmanager
def _in_term(term: Term, side: str = "") -> Iterator[None]:
    """Say in which term an error arose."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_where(term)}: {side}{error}") from None


def _labels(batch: Batch) -> Tensor:
    labels = batch.get(LABELS)
    if not isinstance(labels, Tensor):
        raise ValueError(f"the batch has no labels, only {sorted(batch)}; drop the term or add them")
    return labels


def _checked_terms(terms: Sequence[Term]) -> tuple[Term, ...]:
    if not terms:
        raise ValueError("a Distiller needs a term; add Term('logits', loss='forward_kl')")
    names = [t.name for t in terms]
    for term in terms:
        if names.count(term.name) > 1:
            raise ValueError(f"two terms are called {term.name!r}; give one another name=")
        if term.project is not None and _key(term) in dir(nn.ModuleDict):
            raise ValueError(f"a term with a projection cannot be called {term.name!r}; give it another name=")
    return tuple(terms)


def _check_apart(student: nn.Module, teacher: Teacher | None) -> None:
    """A teacher is frozen, and a student that shares weights with it would be, too."""
    if not isinstance(teacher, ModuleTeacher):
        return
    if {id(p) for p in student.parameters()} & {id(p) for p in teacher.module.parameters()}:
        raise ValueError("student and teacher share weights; pass copy.deepcopy(teacher) as the teacher")
