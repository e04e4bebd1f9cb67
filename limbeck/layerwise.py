"""Layer by layer: modules of the student are given what modules of the teacher were given, and learn alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.registry import nearest
from limbeck.taps import INPUT, first_named, parse
from limbeck.teachers import Self, Teacher
from limbeck.terms import Term, in_term
from limbeck.types import Signal


class Layerwise:
    """Puts the teacher's inputs in the place of the student's, module by module, and trains these modules alone.

    The hooks stay from the first training step until `release`, since activation checkpointing runs modules once
    more in the backward pass; outside of a step they change nothing.

    Args:
        student: The student. What stands outside of the modules that terms tap stops training.
        terms: The terms, which tap modules on both sides.
        teacher_of: The teacher of a task.

    Attributes:
        sources: By the path of a module of the student: the teacher's tap whose value it is given.

    Raises:
        ValueError: a term that reads labels or an output of the model, one module of the student with two of the
            teacher, a teacher that is the student itself or that does not know its modules' inputs.

    Example:
        >>> from limbeck.teachers import ModuleTeacher
        >>> student, teacher = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
        >>> layerwise = Layerwise(student, [Term("1", loss="mse")], lambda task: ModuleTeacher(teacher))
        >>> layerwise.sources, [name for name, p in student.named_parameters() if p.requires_grad]
        ({'1': '1#input'}, ['1.weight', '1.bias'])
    """

    def __init__(
        self, student: nn.Module, terms: Sequence[Term], teacher_of: Callable[[str | None], Teacher | None]
    ) -> None:
        self.student = student
        self.sources: dict[str, str] = {}
        for term in terms:
            with in_term(term):
                self._take(term, teacher_of(term.task))
        inside = {id(p) for path in self.sources for p in student.get_submodule(path).parameters()}
        self._frozen = [n for n, p in student.named_parameters() if p.requires_grad and id(p) not in inside]
        self._handles: list[RemovableHandle] = []
        self._latest: Mapping[str, Tensor] = {}
        self._of_threads: dict[int, Mapping[str, Tensor]] = {}
        self._freeze(True)

    def wants(self, terms: Sequence[Term]) -> tuple[str, ...]:
        """What some of the terms need of the teacher beside what they compare."""
        return tuple(dict.fromkeys(self.sources[tap.partition("#")[0]] for t in terms for tap in t.taps))

    def hold(self) -> None:
        """Freeze what does not train, and attach the hooks; before each step, since `release` undoes it."""
        if not self._handles:
            self._freeze(True)
            for path in self.sources:
                hook: Any = _Instead(self, path)
                handle = self.student.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.append(handle)

    def release(self) -> None:
        """Take the hooks away, and let train again what trained before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._latest = {}
        self._freeze(False)

    @contextmanager
    def given(self, teacher: Signal) -> Iterator[None]:
        """Inside the block, modules are given the teacher's inputs, as far as the signal has them."""
        self.hold()
        found = {path: teacher[tap] for path, tap in self.sources.items() if tap in teacher.values}
        self._latest = self._of_threads[threading.get_ident()] = found
        try:
            yield
        finally:
            del self._of_threads[threading.get_ident()]

    def value(self, path: str) -> Tensor | None:
        """What a module is to be given now; None for its own input."""
        if torch.compiler.is_compiling():
            return self._latest.get(path)
        values = self._of_threads.get(threading.get_ident())
        if values is None and torch._C._current_graph_task_id() != -1:  # computed once more, in a backward pass
            values = self._latest
        return None if values is None else values.get(path)

    def _take(self, term: Term, teacher: Teacher | None) -> None:
        if term.reads_labels:
            raise ValueError("layerwise=True compares modules, and this term reads labels; drop the term")
        if isinstance(teacher, Self):
            raise ValueError("layerwise=True needs a teacher beside the student; pass a copy of the student")
        paths = [name for name, _ in self.student.named_modules()]
        for tap, teacher_tap in zip(term.taps, term.teacher_taps, strict=True):
            parsed, source = parse(tap, paths, any_output=True), f"{teacher_tap.partition('#')[0]}#{INPUT}"
            if not parsed.module or parsed.part == INPUT:
                raise ValueError(
                    f"layerwise=True gives a module of the student another input, and {tap!r} is no "
                    f"module's output; {nearest(tap, paths)}"
                )
            if teacher is None or not teacher.offers(source):
                names = () if teacher is None else teacher.names()
                raise ValueError(
                    f"layerwise=True needs the input of a module of the teacher, which does not offer {source!r}; "
                    f"{nearest(teacher_tap, names)}"
                )
            if self.sources.setdefault(parsed.module, source) != source:
                raise ValueError(
                    f"{parsed.module!r} would be given both {self.sources[parsed.module]!r} and {source!r}; let "
                    "it learn from one module of the teacher"
                )

    def _freeze(self, frozen: bool) -> None:
        named = dict(self.student.named_parameters())
        for name in self._frozen:
            named[name].requires_grad_(not frozen)


@dataclass
class _Instead:
    """A hook that runs before a module of the student and exchanges its first input."""

    layerwise: Layerwise
    path: str

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        value = self.layerwise.value(self.path)
        if value is None:
            return None
        name = None if inputs else first_named(module, named)
        own = inputs[0] if inputs else named.get(name or "")
        if not isinstance(own, Tensor) or own.shape != value.shape:
            shape = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(
                f"layer by layer, {self.path!r} of the student takes {shape} and is given the teacher's "
                f"{tuple(value.shape)} ({self.layerwise.sources[self.path]}); pair modules whose inputs "
                "have one shape, or leave layerwise out and project"
            )
        value = value.to(own.dtype)
        return (inputs, {**named, name: value}) if name else ((value, *inputs[1:]), named)
