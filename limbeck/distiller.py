"""The Distiller: the one module that holds a student and the objective that trains with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.batch import as_batch, as_call, from_call, next_tokens, rows, view
from limbeck.checks import (
    check_apart,
    check_causal,
    check_classes,
    check_gradients,
    check_learns,
    check_offers,
    check_same_tokens,
    live_modules,
)
from limbeck.layerwise import Layerwise
from limbeck.objective import Objective, PlannedTerm
from limbeck.stages import Stage, Stages
from limbeck.stopwatch import Stopwatch
from limbeck.taps import Read, Recorder, Tap, read_output, resolve
from limbeck.teachers import (
    ByTask,
    Given,
    ModuleInputs,
    Self,
    Teacher,
    TeacherLike,
    as_teacher,
    record,
)
from limbeck.teachers.memory import forget_in_vain, remembering
from limbeck.teachers.turns import Turns
from limbeck.terms import Term, in_term
from limbeck.types import EXAMPLE_ID, LABELS, STUDENT, TEACHER, TEACHER_CACHE, Batch, Output, Signal

GATHERED = ("loss", "logits", "terms")
"""What there is of an output where `torch.nn.DataParallel` puts several together."""


class Distiller(nn.Module):
    """A student, the projections and terms that train it, and a teacher outside of the module tree.

    In training mode a call returns an `Output` whose ``loss`` is the weighted sum of the terms. In eval mode a
    call *is* the student. The teacher is no submodule: it is not in ``parameters()`` nor in the state dict, and
    nothing saves, moves or synchronises it with the student.

    A student may learn several tasks: each batch then names its own (``"task": "rte"``), only the terms of this
    task count, and only its teacher is asked. The first batch of each task is checked.

    Args:
        student: Any module.
        teacher: A module, a function that makes one, ``(class, args, kwargs)``, the path or hub id of a
            transformers model, any `Teacher`; one of these for each task, ``{"rte": ..., "mnli": ...}``; or None
            where all terms read labels (plain training).
        terms: What is to be learned, each term under a name of its own.
        balance: How the terms become one loss, by name or as ``{"kind": name, **options}``: ``"static"``,
            ``"uncertainty"``, ``"matched_scale"``, ``"gradient_norm"``.
        read: Names the student's outputs where they have no names: ``lambda out: {"logits": out[0]}``.
        teacher_read: The same for the teacher; by default `read`.
        sample: A batch to check everything on at once; without it that happens on the first batch.
        causal: Whether labels (..., L) stand at their own tokens, as in batches for language models, and each
            position's is to be that of the *next* token. Labels are then moved left by one, with -100 at the end,
            for terms, masks and counts alike.
        layerwise: Whether each module that a term taps is given what the teacher's module is given, in place of
            its own input, and learns alone. The rest of the student does not train, until `export`.
        stages: What trains when, and by which terms; see `limbeck.stages.Stage`. Each step then needs `progress`.

    Raises:
        ValueError: a tap that a model does not have, two terms of one name, a teacher that shares weights with
            the student, a term that needs a teacher where there is none, a causal encoder-decoder model, a stage
            of names that are not there.

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
        balance: str | Mapping[str, Any] = "static",
        read: Read | None = None,
        teacher_read: Read | None = None,
        sample: Any = None,
        causal: bool = False,
        layerwise: bool = False,
        stages: Sequence[Stage] = (),
    ) -> None:
        super().__init__()
        self.student = student
        check_apart(student, teacher)
        self.teacher = None if teacher is None else as_teacher(teacher, teacher_read or read)
        check_apart(student, self.teacher)
        self.objective = Objective(terms, balance, self._borrow)
        self.teacher_watch = Stopwatch()
        self.read, self.teacher_read = read, teacher_read or read
        self.causal = causal
        self._label_entries = tuple(dict.fromkeys((LABELS, *(t.labels for t in terms if t.labels))))
        self._call = ModuleInputs(student, self._label_entries)
        self._recorders = self._recorder_of_each_task()
        self._compiled_before = student._compiled_call_impl
        self._turns, self._is_a_replica = Turns(), False
        self._checked: set[str | None] = set()
        self._gradients_checked: set[str | None] = set()
        self._check()
        self._layerwise = Layerwise(student, terms, self._teacher_of) if layerwise else None
        self._stages = Stages(stages, student, terms) if stages else None
        self.objective.check_every_term(self._stages is not None)
        if sample is not None:
            self.preflight(sample)

    def forward(
        self,
        *inputs: Any,
        counts: Mapping[str, float] | None = None,
        progress: float | None = None,
        measure: bool = False,
        **named: Any,
    ) -> Any:
        """Distil one batch in training mode; run the student alone in eval mode.

        Args:
            *inputs: The student's inputs in order, the labels last: ``distiller(x, y)``. With ``labels=`` among
                the named entries, all of them are inputs.
            counts: Numbers of valid positions in the whole step, from `count`, when this batch is a part of it.
            progress: Where training is, from 0 to 1; needed where a weight or an option is scheduled, and for
                stages.
            measure: Whether to measure each term's gradient in the student, at the price of one backward pass
                for each.
            **named: The batch by name: ``distiller(**batch)``.

        Returns:
            An `Output` in training mode, whatever the student returns in eval mode.
        """
        if not self.training:
            return self._call.alone(*as_call(inputs, named, STUDENT), self.student)
        batch = from_call(inputs, named)
        if self.objective.task(batch) not in self._checked:
            self.preflight(batch)
        output = self.distil(batch, counts, progress, measure)
        # What data-parallel replicas return is put together, which takes tensors by name.
        return {key: output[key] for key in GATHERED} if self._is_a_replica else output

    def distil(
        self,
        batch: Batch,
        counts: Mapping[str, float] | None = None,
        progress: float | None = None,
        measure: bool = False,
    ) -> Output:
        """One step up to the loss, whatever the mode; `forward` in training mode."""
        names = None if self._stages is None else self._stages.enter(progress, self._beside())
        active = self.objective.active(batch, names)
        teacher, own = self._teach(batch, active), self._call.prepared(view(batch, STUDENT))
        task = self.objective.task(batch)
        with self._given(teacher):
            output, seen = record(self._recorder(task), lambda **extra: self._call(own, self.student, **extra))
        student = Signal(seen)
        self._check_gradients(student, task)
        self._check_tokens(batch, own, student, teacher, active)
        measured = tuple(self.student.parameters()) if measure else None
        compared, against = self._labelled(own), teacher or _detached(student)
        result: Output = self.objective(student, against, compared, counts, progress, measured, names)
        if torch.is_grad_enabled() and (self.training or self._stages is not None):
            stage = None if self._stages is None else self._stages.described(progress)
            check_learns(self.student, result.loss, stage)
        if counts is None and self.training:  # a whole step; of a part, the backend tells when all are there
            self.objective.observe(result.terms, result.gradients)
        return replace(result, logits=self._logits(seen, output))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the objective."""
        return self.objective.terms

    @property
    def wants(self) -> tuple[str, ...]:
        """All that the terms read of the teacher."""
        return self._wants(self.terms)

    def described(self) -> dict[str, Any]:
        """What of it decides on a training beside terms and balance, as flat JSON, as far as it is used."""
        chosen = {"causal": self.causal, "layerwise": self._layerwise is not None}
        stages = () if self._stages is None else self._stages.stages
        return {k: v for k, v in chosen.items() if v} | {
            f"stage {i}": repr(stage) for i, stage in enumerate(stages)
        }

    @property
    def has_stages(self) -> bool:
        """Whether what trains changes with progress."""
        return self._stages is not None

    def count(self, batch: Any) -> dict[str, float]:
        """Count the valid positions of a batch, for each mask that a term may use.

        Sums of these over the parts of a step (micro-batches, ranks) are what `forward` takes as ``counts``, so
        that the loss does not depend on how the step was cut.

        Example:
            >>> distiller = Distiller(nn.Linear(2, 2), None, [Term("labels", loss="cross_entropy")])
            >>> distiller.count((torch.zeros(3, 2), torch.tensor([0, 1, -100])))
            {'examples': 3.0, 'labels': 2.0}
        """
        return self.objective.count(self._labelled(view(as_batch(batch), STUDENT)))

    def preflight(self, batch: Any) -> list[PlannedTerm]:
        """Check everything on two examples, size the projections, and say what each term will do.

        It happens by itself on the first batch (of each task) in training mode, and at the start of `fit`.

        Nothing is trained and no running statistics move. Only new projections draw random numbers.

        Raises:
            ValueError: shapes that do not match (the message proposes a projection), a module that did not run,
                a term that is not finite.
        """
        batch = rows(as_batch(batch), 0, 2)
        with self._looking():
            active = self.objective.active(batch)
            teacher, own = self._teach(batch, active), self._call.prepared(view(batch, STUDENT))
            task = self.objective.task(batch)
            with self._given(teacher):
                _, seen = record(self._recorder(task), lambda **extra: self._call(own, self.student, **extra))
            self._check_tokens(batch, own, Signal(seen), teacher, active)
            compared = self._labelled(own)
            plan = self.objective.plan(Signal(seen), teacher or _detached(Signal(seen)), compared)
        self._checked.add(task)
        return plan

    @property
    def teacher_examples(self) -> int | None:
        """Examples that teachers were run for, of those that remember; None where none does."""
        found = remembering(self.teacher)
        return sum(cached.computed for cached in found) if found else None

    @teacher_examples.setter
    def teacher_examples(self, count: int | None) -> None:
        found = remembering(self.teacher)
        if found and count is not None:
            found[0].computed += count - sum(cached.computed for cached in found)

    def keep(self) -> None:
        """Bring to disk what the teacher remembers, so that a resumed training finds it as it was."""
        for cached in remembering(self.teacher):
            cached.store.flush()

    def share(self) -> None:
        """Take up what other processes of this training remember, once all have brought theirs to disk."""
        for cached in remembering(self.teacher):
            if cached.store.folder is not None:
                cached.store.refresh()

    def forget_in_vain(self, share: float = 1.0) -> None:
        """Stop remembering a teacher whose examples are new each time; called when the data was seen twice.

        Args:
            share: Of the data that this process sees in an epoch.
        """
        forget_in_vain(self.teacher, share)

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
        if self._layerwise is not None:
            self._layerwise.hold()
        for recorder in self._recorders.values():
            recorder.pin()
        self._compiled_before = self.student._compiled_call_impl
        self.student.compile(**options)

    def _replicate_for_data_parallel(self) -> Distiller:
        """Called by `torch.nn.DataParallel` in each step; replicas share hooks and all else but parameters."""
        if not self._checked:
            raise ValueError(
                "a Distiller in torch.nn.DataParallel has to be checked before its first step; pass sample=batch, "
                "or call distiller.preflight(batch)"
            )
        if self._stages is not None:
            raise ValueError("stages cannot tell torch.nn.DataParallel what trains; use DistributedDataParallel")
        if self._layerwise is not None:
            self._layerwise.hold()
        for recorder in self._recorders.values():
            recorder.pin()
        replica: Distiller = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._is_a_replica = True
        return replica

    def export(self) -> nn.Module:
        """Give back the student: the object that went in, without hooks, teacher, projections or compilation.

        What stages or ``layerwise`` keep from training may train again.
        """
        if self._stages is not None:
            self._stages.release(self._beside())
        if self._layerwise is not None:
            self._layerwise.release()
        for recorder in self._recorders.values():
            recorder.unpin()
        self.student._compiled_call_impl = self._compiled_before
        return self.student

    def _wants(self, terms: Sequence[Term]) -> tuple[str, ...]:
        """All that some of the terms read of the teacher."""
        more = () if self._layerwise is None else self._layerwise.wants(terms)
        return tuple(dict.fromkeys((*read_of_teacher(terms), *more)))

    def _given(self, teacher: Signal | None) -> AbstractContextManager[None]:
        """Where modules of the student are given the teacher's inputs."""
        return nullcontext() if self._layerwise is None or teacher is None else self._layerwise.given(teacher)

    def _beside(self) -> dict[str, list[nn.Module]]:
        return {term.name: self.objective.beside(term) for term in self.terms}

    def _teach(self, batch: Batch, terms: Sequence[Term]) -> Signal | None:
        """What the teacher says to some terms; None where the student is its own."""
        wants = self._wants(terms)
        if self.teacher is None or not wants:
            return Signal({})
        if isinstance(self.teacher, Self):
            return None
        with self._turns, self.teacher_watch:
            if TEACHER_CACHE in batch:
                return Given(self.teacher_read).signal(batch, wants)
            return self.teacher.signal(self._shown(batch), wants)

    def _shown(self, batch: Batch) -> Batch:
        """The batch as a teacher is given it, which may weigh by labels but not compute a loss by others."""
        own = view(batch, TEACHER)
        own = next_tokens(own) if self.causal else own
        hidden = self._call.withheld - {LABELS, EXAMPLE_ID}
        return {key: value for key, value in own.items() if key not in hidden} if hidden else own

    def _labelled(self, own: Batch) -> Batch:
        """The student's view with labels where the terms want them."""
        return next_tokens(own, self._label_entries) if self.causal else own

    def _teacher_of(self, task: str | None) -> Teacher | None:
        """The teacher whom the terms of a task ask."""
        return self.teacher.of(task) if isinstance(self.teacher, ByTask) and task is not None else self.teacher

    def _borrow(self, path: str, task: str | None) -> nn.Module:
        """A part of the teacher, for a loss that passes the student's features through it."""
        live = live_modules(self._teacher_of(task))
        prefix = next((prefix for prefix in sorted(live, reverse=True) if path.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(
                f"the loss needs the teacher's {path!r}, and the teacher is no module in this process"
            )
        return live[prefix].lend(path.removeprefix(prefix))

    def _logits(self, seen: Mapping[str, Tensor], output: Any) -> Tensor | None:
        if "logits" in seen:
            return seen["logits"]
        logits: Tensor | None = read_output(output, self.read).get("logits")
        return logits

    def _recorder(self, task: str | None) -> Recorder:
        return self._recorders.get(task, self._recorders[None])

    def _recorder_of_each_task(self) -> dict[str | None, Recorder]:
        """One for each task, since what others read need not run; under None what is read for all tasks."""
        made: dict[tuple[str, ...], Recorder] = {}
        found: dict[str | None, Recorder] = {}
        for task in (None, *self.objective.tasks):
            taps = self._student_taps(t for t in self.terms if t.task in (None, task))
            found[task] = made.setdefault(tuple(taps), Recorder(self.student, taps, self.read))
        return found

    def _student_taps(self, terms: Iterable[Term]) -> dict[str, Tap]:
        taps: dict[str, Tap] = {}
        for term in terms:
            own = (
                term.taps
                if term.reads_labels or not isinstance(self.teacher, Self)
                else term.taps + term.teacher_taps
            )
            with in_term(term, "student: "):
                taps |= resolve(self.student, own, any_output=self.read is not None)
        return taps

    def _check(self) -> None:
        """Refuse what cannot go together, before any batch."""
        check_offers(self.terms, self._teacher_of)
        if self.read is None and self.teacher_read is None:
            check_classes(self.terms, self.student, self.teacher)
        if self.causal:
            check_causal(self.terms, self.student, self._call.is_encoder_decoder)

    def _check_tokens(
        self, batch: Batch, own: Batch, student: Signal, teacher: Signal | None, terms: Sequence[Term]
    ) -> None:
        """Refuse terms by token where both models were given inputs of their own, of other tokens."""
        if teacher is not None and TEACHER in batch:
            check_same_tokens(terms, student, teacher, own, view(batch, TEACHER))

    def _check_gradients(self, student: Signal, task: str | None) -> None:
        """Once for each task, and only where all trains: what rests gives no gradient."""
        resting = self._layerwise is not None or self._stages is not None
        if task not in self._gradients_checked and torch.is_grad_enabled() and not resting:
            check_gradients(self._recorder(task).taps, self.student, student)
            self._gradients_checked.add(task)


def read_of_teacher(terms: Iterable[Term]) -> tuple[str, ...]:
    """The places where terms read the teacher, each once."""
    return tuple(dict.fromkeys(tap for t in terms if not t.reads_labels for tap in t.teacher_taps))


def _detached(student: Signal) -> Signal:
    """The student as its own teacher."""
    return Signal({tap: tensor.detach() for tap, tensor in student.values.items()})
