"""The objective: terms, the modules that train with them, and how they become one loss.

It compares two Signals and knows no models; the Distiller reads those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from limbeck.balance import build_balance, chosen, gradient_products
from limbeck.batch import ATTENTION_MASK, DECODER_MASK, batch_size, mask_key, task_of, valid_positions
from limbeck.losses.call import Side, Target, compare_valid
from limbeck.projectors import Projector, build_projector
from limbeck.reduce import fitting, masked_mean
from limbeck.registry import nearest
from limbeck.terms import Term, in_term, where
from limbeck.types import EXAMPLE_ID, LABELS, LOGITS, Batch, Output, Signal, Sparse

EXAMPLES, IGNORE = "examples", "ignore_index"

Borrow = Callable[[str, str | None], nn.Module]
"""Finds a module of the teacher by its path; of one task's teacher, where the second names a task."""


@dataclass(frozen=True)
class PlannedTerm:
    """What the preflight found out about one term.

    Attributes:
        term: The term.
        student_shape: Shape of what is read from the student, for two examples; several where the term reads
            several places.
        teacher_shape: Shape of what it is compared with.
        mask: Which entry of the batch masks it, or None.
        value: Its unweighted value before any training.
        parameters: Number of parameters that train with it.
    """

    term: Term
    student_shape: tuple[Any, ...]
    teacher_shape: tuple[Any, ...]
    mask: str | None
    value: float
    parameters: int


class Objective(nn.Module):
    """What is minimised: terms with their projections and whatever else they train, and the balance between them.

    Args:
        terms: The terms, each under a name of its own.
        balance: See `limbeck.balance.build_balance`.
        borrow: Finds a part of the teacher by its path, for losses that ask for one.

    Attributes:
        tasks: The tasks that terms are for; empty where all terms are for every batch.

    Raises:
        ValueError: no term, two of one name, a balance that needs all terms in each step although some are for
            one task alone, or a part that the teacher does not have.
        TypeError: terms that are no list of `Term`.
    """

    def __init__(self, terms: Sequence[Term], balance: str | Mapping[str, Any], borrow: Borrow) -> None:
        super().__init__()
        self.terms = _checked_terms(terms)
        self.projections = nn.ModuleDict(
            {_key(t): build_projector(t.project, t.places) for t in terms if t.project is not None}
        )
        self.learned = nn.ModuleDict(
            {
                _key(t): nn.ModuleDict({name: build_projector(spec) for name, spec in t.learned.items()})
                for t in terms
                if t.learned
            }
        )
        self.balance_spec = balance
        self.balance = build_balance(balance, [t.name for t in terms])
        self.tasks = tuple(dict.fromkeys(t.task for t in terms if t.task is not None))
        self.check_every_term(False)
        self._borrowed: dict[str, dict[str, nn.Module]] = {}
        for term in terms:
            with in_term(term):
                self._borrowed[term.name] = {name: borrow(path, term.task) for name, path in term.borrowed.items()}

    def task(self, batch: Batch) -> str | None:
        """The task of a batch; None where all terms are for every batch, whatever its task.

        Raises:
            ValueError: the batch names no task, or one that no term is for.
        """
        if not self.tasks:
            return None
        task = task_of(batch)
        if task not in self.tasks and all(t.task is not None for t in self.terms):
            raise ValueError(f"no term is for the batch's task {task!r}; {nearest(task, self.tasks)}")
        return task

    def active(self, batch: Batch, names: Collection[str] | None = None) -> tuple[Term, ...]:
        """The terms that a batch counts for: those of its task, and those of all.

        Args:
            batch: The batch.
            names: The only ones that count; None for all.

        Raises:
            ValueError: there is none.
        """
        task = self.task(batch)
        found = tuple(t for t in self.terms if t.task in (None, task) and (names is None or t.name in names))
        if not found:
            raise ValueError(
                f"no term for the batch's task {task!r} counts in this stage, only {', '.join(names or ())}; name "
                "one of each task in the stage's terms"
            )
        return found

    def check_every_term(self, staged: bool) -> None:
        """Refuse a balance that needs all terms in each step where some do not always count.

        Args:
            staged: Whether stages choose between terms.

        Raises:
            ValueError: it does.
        """
        if self.balance.every_term and (self.tasks or staged):
            kind = self.balance_spec if isinstance(self.balance_spec, str) else self.balance_spec["kind"]
            some = f"some are for task {self.tasks[0]!r} alone" if self.tasks else "stages choose between them"
            raise ValueError(
                f"balance {kind!r} needs all terms in each step, and {some}; use 'static' or 'uncertainty'"
            )

    def beside(self, term: Term) -> list[nn.Module]:
        """What trains with a term: its projection, and what its loss learns."""
        return [modules[_key(term)] for modules in (self.projections, self.learned) if _key(term) in modules]

    def forward(
        self,
        student: Signal,
        teacher: Signal,
        batch: Batch,
        counts: Mapping[str, float] | None = None,
        progress: float | None = None,
        measured: Sequence[nn.Parameter] | None = None,
        names: Collection[str] | None = None,
    ) -> Output:
        """Compare two signals of one batch.

        Args:
            student: What was read of the student.
            teacher: What was read of the teacher.
            batch: The batch, for labels and masks.
            counts: Numbers of valid positions in the whole step, when this batch is a part of it.
            progress: Where training is, from 0 to 1; needed where anything is scheduled.
            measured: Parameters in which each term's gradient is to be measured; None for no measurement.
            names: Names of the terms that count now; None for all.
        """
        active = self.active(batch, names)
        values = {t.name: self._value(t, student, teacher, batch, counts, progress) for t in active}
        products = None if measured is None else gradient_products(tuple(values.values()), measured)
        weights = [t.weight_at(progress) for t in self.terms]
        places = [i for i, t in enumerate(self.terms) if t.name in values]
        weighted = [weights[i] * v for i, v in zip(places, values.values(), strict=True)]
        factors, penalty, shown = self.balance.factors(), self.balance.penalty(places), weights
        if factors is None:
            loss = torch.stack(weighted).sum()
        else:
            loss = (torch.stack(weighted) * chosen(factors, places)).sum()
            shown = [w * factor for w, factor in zip(weights, factors.detach(), strict=True)]
        if penalty is not None:
            loss = loss + penalty * (1.0 if counts is None else batch_size(batch) / counts[EXAMPLES])
        found = {name: value.detach() for name, value in values.items()}
        return Output(loss, None, found, {t.name: w for t, w in zip(self.terms, shown, strict=True)}, products)

    def observe(self, values: Mapping[str, Tensor], products: Tensor | None) -> None:
        """Let the balance take notice of a whole step.

        Args:
            values: The unweighted terms of the step, over all its parts.
            products: Dot products of their gradients, where they were measured.
        """
        if not self.balance.observes:
            return
        norms = None if products is None else products.diagonal().clamp_min(0).sqrt()
        self.balance.observe(torch.stack([values[t.name] for t in self.terms]), norms)

    def count(self, batch: Batch) -> dict[str, float]:
        """Count the valid positions of a batch, for each mask that a term may use."""
        counts = {EXAMPLES: float(batch_size(batch))}
        own = [t.mask for t in self.terms if t.mask] + [t.teacher_tap for t in self.terms if t.reads_labels]
        for key in dict.fromkeys((ATTENTION_MASK, DECODER_MASK, LABELS, *own)):
            mask = valid_positions(batch, key)
            if mask is not None:
                counts[key] = float(mask.sum())
        for term in self.active(batch):
            known = _ignored(term)
            if known is not None:
                counts[known] = float(_known(term, batch).sum())
        return counts

    def plan(self, student: Signal, teacher: Signal, batch: Batch) -> list[PlannedTerm]:
        """Size all projections and say what each term will do, at the start and, if scheduled, at the end.

        Raises:
            ValueError: shapes that do not match, or a term that is not finite.
        """
        return [self._plan(term, student, teacher, batch) for term in self.active(batch)]

    def _plan(self, term: Term, student: Signal, teacher: Signal, batch: Batch) -> PlannedTerm:
        with in_term(term):
            read, target = _sides(term, student, teacher, batch)
        value = self._value(term, student, teacher, batch, progress=0.0).item()
        ends = [
            value,
            *([self._value(term, student, teacher, batch, progress=1.0).item()] if term.is_scheduled else []),
        ]
        if _is_one_number(term, read) and self._is_blind(term, student, teacher, batch, value):
            raise ValueError(
                f"{where(term)}: {term.loss_name} is {value:g} whatever the student says, for it compares classes "
                "and the logits are one number; compare numbers, by loss: mse"
            )
        wrong = next((v for v in ends if not math.isfinite(v)), None)
        if wrong is not None:
            raise ValueError(f"{where(term)} is {wrong} before any training; check both models' outputs")
        parameters = sum(p.numel() for module in self.beside(term) for p in module.parameters())
        return PlannedTerm(term, _shape(read), _shape(target), _mask_of(term, read, batch), value, parameters)

    def _is_blind(self, term: Term, student: Signal, teacher: Signal, batch: Batch, value: float) -> bool:
        """Whether a term says the same of a student with other logits, as a softmax over one class does."""
        logits = student[term.tap]
        change = torch.arange(1, logits.numel() + 1, device=logits.device).reshape(logits.shape)
        other = Signal({**student.values, term.tap: logits + change.square()})
        return self._value(term, other, teacher, batch, progress=0.0).item() == value

    def _value(
        self,
        term: Term,
        student: Signal,
        teacher: Signal,
        batch: Batch,
        counts: Mapping[str, float] | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Project, compare and reduce: the unweighted value of one term, a scalar."""
        with in_term(term):
            read, target = _sides(term, student, teacher, batch)
            read = self._project(term, read, target)
            key = _mask_of(term, read, batch)
            mask = None if key is None else _valid(term, key, batch)
            with torch.autocast(_first(read).device.type, enabled=False):
                supplied = {"progress": progress, **self._supplied(term, read, target, batch)}
                if term.reads_labels or (key == LABELS and _by_class(term, read, batch)):  # labels say which count
                    values = term.comparison(read, target, mask=mask, **supplied)
                else:
                    values = compare_valid(term.comparison, read, target, mask, **supplied)
            if values.ndim == 0:  # it describes the batch as a whole, and counts once per example
                values = values.expand(batch_size(batch))
            mask = fitting(mask, values)
            count = None if counts is None else _count_of(counts, EXAMPLES if mask is None else str(key))
            return masked_mean(values, mask, count)

    def _supplied(self, term: Term, read: Side, target: Target, batch: Batch) -> dict[str, Any]:
        """What the loss may ask for beside the two sides and the mask."""
        supplied: dict[str, Any] = {**self._learned(term, read, target), **self._borrowed[term.name]}
        supplied[LABELS] = batch.get(LABELS)
        if EXAMPLE_ID in term.comparison.asks:
            supplied[EXAMPLE_ID] = _entry(batch, EXAMPLE_ID)
        return supplied

    def _learned(self, term: Term, read: Side, target: Target) -> dict[str, nn.Module]:
        if not term.learned:
            return {}
        modules = self.learned[_key(term)]
        assert isinstance(modules, nn.ModuleDict)
        for module in modules.values():
            _ensure_sized(module, read, target)
        return dict(modules.items())

    def _project(self, term: Term, read: Side, target: Target) -> Side:
        if term.project is None:
            return read
        if isinstance(target, Sparse):
            raise ValueError(
                "nothing can be projected to targets that hold only some of the teacher's logits "
                f"({type(target).__name__}); drop project={term.project!r}"
            )
        projector = self.projections[_key(term)]
        _ensure_sized(projector, read, target)
        projected: Side = projector(read, _sizes(target))
        return projected


def _ensure_sized(module: nn.Module, read: Side, target: Target) -> None:
    assert isinstance(module, Projector)
    if not module.sized:
        module.size(_sizes(read), _sizes(target))
        module.to(device=_first(read).device)


def _sides(term: Term, student: Signal, teacher: Signal, batch: Batch) -> tuple[Side, Target]:
    """What a term compares: one tensor on each side, or a tuple of them."""
    read = tuple(student[tap] for tap in term.taps)
    target = (
        (_numbers(_labels(term, batch)),)
        if term.reads_labels
        else tuple(teacher[tap] for tap in term.teacher_taps)
    )
    return (read[0], target[0]) if len(read) == 1 else (read, target)


def _is_one_number(term: Term, read: Side) -> bool:
    """Whether a term compares logits of a single number for each example with the teacher's."""
    return not term.reads_labels and term.tap == LOGITS and isinstance(read, Tensor) and read.shape[-1] == 1


def _first(side: Side) -> Tensor:
    return side[0] if isinstance(side, tuple) else side


def _sizes(side: Target) -> Size | tuple[Size, ...]:
    return tuple(t.shape for t in side) if isinstance(side, tuple) else side.shape


def _shape(side: Target) -> tuple[Any, ...]:
    return tuple(tuple(t.shape) for t in side) if isinstance(side, tuple) else tuple(side.shape)


def _key(term: Term) -> str:
    """The name of a term's modules in the state dict, where dots have a meaning."""
    return term.name.replace("/", "//").replace(".", "/")


def _mask_of(term: Term, read: Side, batch: Batch) -> str | None:
    """The entry of the batch that masks a term: the one it names, the labels' own, or the one whose shape fits."""
    if term.mask is None:
        if term.reads_labels:
            return _ignored(term) or term.teacher_tap
        shape = _first(read).shape
        if _by_class(term, read, batch):
            return LABELS
        between_tokens = len(shape) == 4  # attention has no positions in front: its loss has to ask for the mask
        if between_tokens and "mask" not in term.comparison.asks:
            return None
        return mask_key(shape, batch, term.tap)
    _entry(batch, term.mask)
    return term.mask


def _by_class(term: Term, read: Side, batch: Batch) -> bool:
    """Whether a loss between logits (B, C) also needs each example's class, and is 0 where there is none."""
    labels, shape = batch.get(LABELS), _first(read).shape
    if not term.comparison.needs_labels or not isinstance(labels, Tensor) or len(shape) != 2:
        return False
    return not labels.is_floating_point() and labels.shape == shape[:1]


def _ignored(term: Term) -> str | None:
    """The name, among masks, of the labels but for those that the term's own ``ignore_index`` leaves out."""
    index = term.comparison.options.get(IGNORE) if term.reads_labels else None
    return None if index is None else f"{term.teacher_tap} but {index}"


def _valid(term: Term, key: str, batch: Batch) -> Tensor | None:
    """The mask of a name; see `_mask_of`."""
    return valid_positions(batch, key) if key != _ignored(term) else _known(term, batch)


def _known(term: Term, batch: Batch) -> Tensor:
    """Where labels count, for a term with an ``ignore_index`` of its own."""
    known: Tensor = _labels(term, batch) != term.comparison.options[IGNORE]
    told = valid_positions(batch, str(term.teacher_tap)) if _labels(term, batch).is_floating_point() else None
    return known if told is None else known & told


def _numbers(labels: Tensor) -> Tensor:
    """Labels with 0 in the place of NaN, which is none: it is masked, and its gradient would be NaN times zero."""
    if not labels.is_floating_point() or labels.ndim != 1:
        return labels
    return torch.where(labels.isnan(), torch.zeros_like(labels), labels)


def _labels(term: Term, batch: Batch) -> Tensor:
    labels = batch.get(str(term.labels))
    if not isinstance(labels, Tensor):
        what = LABELS if term.labels == LABELS else f"{term.labels!r} to read as labels"
        raise ValueError(f"the batch has no {what}, only {sorted(batch)}; drop the term or add them")
    return labels


def _entry(batch: Batch, key: str) -> Tensor:
    if key not in batch:
        kind = "example_id, which tells examples apart" if key == EXAMPLE_ID else f"mask {key!r}"
        raise ValueError(f"the batch has no {kind}; {nearest(key, batch)}")
    entry: Tensor = batch[key]
    return entry


def _checked_terms(terms: Sequence[Term]) -> tuple[Term, ...]:
    given: Any = terms  # a user may pass anything
    if not isinstance(given, (list, tuple)) or not all(isinstance(t, Term) for t in given):
        raise TypeError(f"the terms of a Distiller are a list of Term, got {given!r}; write [Term(...), ...]")
    if not terms:
        raise ValueError("a Distiller needs a term; add Term('logits', loss='forward_kl')")
    names = [t.name for t in terms]
    for term in terms:
        if names.count(term.name) > 1:
            raise ValueError(f"two terms are called {term.name!r}; give one another name=")
        if (term.project is not None or term.learned) and _key(term) in dir(nn.ModuleDict):
            raise ValueError(f"a term with a projection cannot be called {term.name!r}; give it another name=")
    return tuple(terms)


def _count_of(counts: Mapping[str, float], key: str) -> float:
    if key not in counts:
        raise ValueError(
            f"counts lack {key!r}, they have {sorted(counts)}; add up distiller.count(part) of all parts"
        )
    return counts[key]
