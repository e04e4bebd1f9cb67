"""The models behind adaptors: how they are called, what a teacher is asked once for, what trains beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapted.entries import Entries, entries_of, mean_of_teachers
from limbeck.batch import map_tensors
from limbeck.registry import refuse_unknown
from limbeck.teachers.remembered import Remembered
from limbeck.types import TEACHER_CACHE

Adaptor = Callable[[Any, Any], Mapping[str, Any]]


class Memory:
    """Asks for a teacher's entries once for each example, and finds them again in whatever batch it comes.

    Args:
        ask: Gives a teacher's entries for its batch.
        layers: What is remembered beside the logits: an entry and the number of a layer in it.

    Example:
        >>> calls = []
        >>> memory = Memory(lambda batch: calls.append(1) or {"logits": [batch[0]]})
        >>> [memory((torch.tensor([[2.0]]),))["logits"] for _ in range(2)], len(calls)
        ([[tensor([[2.]])], [tensor([[2.]])]], 2)
    """

    def __init__(self, ask: Callable[[Any], Entries], layers: Iterable[tuple[str, int]] = ()) -> None:
        self._ask, self._layers = ask, list(layers)
        self._kept = Remembered(self._flat)

    def __call__(self, batch: Any) -> dict[str, Any]:
        """The entries of a batch; layers are found by their numbers."""
        found: dict[str, dict[int, Tensor]] = {}
        for name, value in self._kept(batch).items():
            entry, place = name.rsplit(".", 1)
            found.setdefault(entry, {})[int(place)] = value
        return {name: list(values.values()) if name == "logits" else values for name, values in found.items()}

    def _flat(self, batch: Any) -> dict[str, Tensor]:
        entries = self._ask(batch)
        places = [("logits", place) for place in range(len(entries.get("logits", ())))] + self._layers
        return {f"{name}.{place}": entries[name][place] for name, place in places}


def each(models: Any, function: Callable[[Any], Any]) -> Any:
    """What a function makes of a model, or of each in a list or a dict.

    Example:
        >>> each({"a": 1, "b": 2}, str)
        {'a': '1', 'b': '2'}
    """
    if isinstance(models, Mapping):
        return {name: function(model) for name, model in models.items()}
    return [function(model) for model in models] if isinstance(models, (list, tuple)) else function(models)


def call(models: Any, batch: Any, named: Mapping[str, Any]) -> Any:
    """Call a model, or each of several, with a batch: by the names of a dict, or in the order of a tuple.

    Args:
        models: One, or a list or a dict.
        batch: The batch.
        named: What it is called with beside the batch.

    Example:
        >>> call([max, min], (3, 5), {})
        [5, 3]
    """
    if isinstance(batch, Mapping):
        return each(models, lambda model: model(**batch, **named))
    inputs = batch if isinstance(batch, (list, tuple)) else [batch]
    return each(models, lambda model: model(*inputs, **named))


def outputs_of_both(
    batch: Any, student: Any, teacher: Any, named: Mapping[str, Any], device: Any = None
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Run both models; ``(student's batch, its output), (teacher's batch, its output)``.

    Args:
        batch: For both; or ``{"student": ..., "teacher": ...}``, with a part for each. Where it has a
            ``teacher_cache``, that is the teacher's output.
        student: The student.
        teacher: One, several, or None for none.
        named: What they are called with beside the batch.
        device: Where the batch goes; None leaves it.
    """
    if device is not None:
        batch = map_tensors({"batch": batch}, lambda tensor: tensor.to(device))["batch"]
    known = batch if isinstance(batch, Mapping) else {}
    both = [batch[side] if {"student", "teacher"} <= set(known) else batch for side in ("student", "teacher")]
    outputs = known.get(TEACHER_CACHE)
    if TEACHER_CACHE not in known and teacher is not None:
        with torch.no_grad():
            outputs = call(teacher, both[1], named)
    return (both[0], call(student, both[0], named)), (both[1], outputs)


def read_teacher(adaptor: Adaptor | Sequence[Adaptor], batch: Any, outputs: Any, several: bool) -> dict[str, Any]:
    """The entries of a teacher, or the mean of several.

    Args:
        adaptor: Names the outputs; of several teachers one for all, or one for each.
        batch: What they were called with.
        outputs: What they returned.
        several: Whether there are several teachers, and `outputs` has those of each.

    Raises:
        ValueError: another number of adaptors than of teachers.
    """
    adaptors = list(adaptor) if isinstance(adaptor, Sequence) else [adaptor] * (len(outputs) if several else 1)
    if not several:
        return entries_of(adaptors[0](batch, outputs))
    if len(adaptors) != len(outputs):
        raise ValueError(f"there are {len(outputs)} teachers and {len(adaptors)} adaptors")
    return mean_of_teachers([entries_of(own(batch, out)) for own, out in zip(adaptors, outputs, strict=True)])


def read_both(
    batch: Any,
    student: Any,
    teacher: Any,
    adaptor: Adaptor,
    teacher_adaptor: Adaptor | Sequence[Adaptor],
    *,
    named: Mapping[str, Any] | None = None,
    memory: Memory | None = None,
    device: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run both models; the student's entries and the teacher's.

    Args:
        batch: See `outputs_of_both`.
        student: The student.
        teacher: A teacher, or a list of them, which teach by the mean of their logits.
        adaptor: Names what the student returns.
        teacher_adaptor: Names what the teacher returns; of several one for all, or one for each.
        named: What the models are called with beside the batch.
        memory: Asks for the teacher's entries in place of a call, where the batch brings none.
        device: Where the batch goes; None leaves it.

    Example:
        >>> def adaptor(batch, outputs):
        ...     return {"logits": outputs}
        >>> read_both((torch.ones(1),), nn.Identity(), [nn.Identity(), torch.neg], adaptor, adaptor)
        ({'logits': [tensor([1.])]}, {'logits': [tensor([0.])]})
    """
    remembers = memory is not None and not (isinstance(batch, Mapping) and TEACHER_CACHE in batch)
    ours, theirs = outputs_of_both(batch, student, None if remembers else teacher, named or {}, device)
    entries = entries_of(adaptor(*ours))
    if memory is not None and remembers:
        return entries, memory(theirs[0])
    return entries, read_teacher(teacher_adaptor, *theirs, several=isinstance(teacher, (list, tuple)))


def bare(model: Any) -> Any:
    """A model without the wrapping of several GPUs.

    Example:
        >>> bare(nn.DataParallel(nn.Tanh()))
        Tanh()
    """
    wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return model.module if wrapped else model


@contextmanager
def teaching(student: nn.Module, teachers: Any) -> Iterator[None]:
    """The student in training mode and the teachers in eval mode, and each part back as it was in the end.

    Example:
        >>> student, teacher = nn.Tanh().eval(), nn.Tanh()
        >>> with teaching(student, [teacher]):
        ...     student.training, teacher.training
        (True, False)
        >>> student.training, teacher.training
        (False, True)
    """
    modes: dict[nn.Module, bool] = {}
    for models in (student, teachers):
        each(models, lambda model: modes.update((part, part.training) for part in model.modules()))
    each(teachers, lambda teacher: teacher.eval())
    student.train()
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


def also_train(
    optimizer: torch.optim.Optimizer,
    modules: Iterable[tuple[nn.Module, Mapping[str, Any]]],
    scheduler: Any = None,
) -> None:
    """Add what trains beside a student to its optimizer, unless it is there already.

    Args:
        optimizer: Holds the student's parameters.
        modules: Each with options of the optimizer, such as a rate of its own.
        scheduler: One that is made of the optimizer already, or None.

    Raises:
        TypeError: an option that the optimizer does not have.
        ValueError: there are parameters to add of which the scheduler would not know.

    Example:
        >>> student, width = nn.Linear(2, 2), nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> also_train(optimizer, [(width, {"lr": 0.5})])
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 0.5]
    """
    known = {*optimizer.defaults, *(name for group in optimizer.param_groups for name in group)}
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for module, options in modules:
        new = [p for p in module.parameters() if p not in held]
        if new and scheduler is not None:
            raise ValueError(
                "projections are added to the optimizer after scheduler= was made of it; make it afterwards, or "
                "use scheduler_class= where there is one"
            )
        refuse_unknown(options, known, f"{type(optimizer).__name__} for a projection")
        if new:
            optimizer.add_param_group({"params": new, **options})
