"""What two models saw of one call, kept until a loss asks: for loops in which the loss is computed later.

A Distiller reads tensors, and compares at once. Here what modules return is kept whole, as their user's own loss
functions expect it, and calls may run in several threads, as the replicas of DataParallel do.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.hooks import RemovableHandle

from limbeck.registry import nearest
from limbeck.teachers import ModuleInputs
from limbeck.types import STUDENT, TEACHER


@dataclass
class Seen:
    """One call of one model.

    Attributes:
        outputs: What modules returned, by path; "" is the model itself.
        inputs: What they were given in order, by path.
        given: Inputs that modules are to get in place of their own, by path.
        versions: Tensors that were kept as they are, and how often they had been changed in place.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    given: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    versions: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)


class Watch:
    """Watches modules of one model while `call` runs it; calls in several threads do not disturb each other.

    The hooks stay from the start until `end`, since replicas of a module share its hooks and come at any time.

    Args:
        model: The model.
        paths: Which modules to watch; "" is the model itself.
        inputs: Whether to keep what they were given, too.
        gives: Whether calls may give them other inputs than their own.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> watch = Watch(model, ["0"], inputs=True)
        >>> _, seen = watch.call(model, torch.ones(4, 2))
        >>> seen.outputs["0"].shape, seen.inputs["0"][0].shape
        (torch.Size([4, 3]), torch.Size([4, 2]))
        >>> watch.end()
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], inputs: bool = False, gives: bool = False) -> None:
        self.inputs = inputs
        self.handles: list[RemovableHandle] = []
        self._running: dict[int, Seen] = {}
        self._settled: dict[str, bool] = {}
        self._gave = False
        for path in dict.fromkeys(paths):
            module = model.get_submodule(path)
            if inputs or gives:
                self.handles.append(module.register_forward_pre_hook(_Before(self, path)))
            self.handles.append(module.register_forward_hook(_After(self, path)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": {}}  # a copy is made between calls

    def end(self) -> None:
        """Take the hooks away; nothing is kept from now on."""
        self.inputs = False
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def call(
        self,
        run: Callable[..., Any],
        *args: Any,
        given: Mapping[str, tuple[Any, ...]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Seen]:
        """Run the model, or a replica of it, and say what was seen.

        Args:
            run: What to call.
            *args: Its inputs.
            given: Inputs that modules are to get in place of their own, by path.
            **kwargs: Its inputs by name.
        """
        self._gave = bool(given)
        with self._watching(Seen(given=given or {})) as seen:
            output = run(*args, **kwargs)
        seen.given = {}
        self._settle(seen)
        return output, seen

    @contextmanager
    def _watching(self, seen: Seen) -> Iterator[Seen]:
        thread = threading.get_ident()
        self._running[thread] = seen
        try:
            yield seen
        finally:
            del self._running[thread]

    def now(self) -> Seen | None:
        """The call that runs in this thread; None in a backward pass that computes activations anew."""
        return self._running.get(threading.get_ident())

    def refuse_again(self, path: str) -> None:
        """Refuse to compute anew, in a backward pass, what came of inputs that were given in place of others.

        Raises:
            ValueError: activation checkpointing does so.
        """
        if self._gave and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"module {path!r} was given the teacher's inputs, and activation checkpointing computes it anew "
                "from others; switch it off"
            )

    def keep(self, seen: Seen, path: str, output: Any) -> None:
        """Keep an output; a later module may overwrite it in place, and then it is cloned, here and from now on.

        That is not known of the first call, so that all is cloned there.
        """
        if self._settled.get(path, path != ""):
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            seen.versions[path] = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
            output = tree_map_only(Tensor, torch.clone, output)
        seen.outputs[path] = output

    def _settle(self, seen: Seen) -> None:
        for path, tensors in seen.versions.items():
            self._settled[path] = any(tensor._version != version for tensor, version in tensors)


@dataclass
class _Before:
    """A hook; an object, since a model with a closure in it can be neither copied nor pickled."""

    watch: Watch
    path: str

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen = self.watch.now()
        if seen is None:
            self.watch.refuse_again(self.path)
            return None
        if self.watch.inputs:
            seen.inputs[self.path] = inputs
        return seen.given.get(self.path)


@dataclass
class _After:
    """The hook behind a module."""

    watch: Watch
    path: str

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen = self.watch.now()
        if seen is not None:
            self.watch.keep(seen, self.path, output)


class Watched:
    """A frozen teacher under watch, on whichever devices it is asked.

    Args:
        module: The teacher.
        paths: Which of its modules to watch.
        inputs: Whether to keep what they were given, too.

    Example:
        >>> teacher = Watched(nn.Linear(2, 3), [""])
        >>> output, seen = teacher.ask((torch.ones(4, 2),), {"labels": None})
        >>> output.requires_grad, seen.outputs[""] is output
        (False, True)
    """

    def __init__(self, module: nn.Module, paths: Iterable[str], inputs: bool = False) -> None:
        self.module = module.requires_grad_(False).eval()
        self.watch = Watch(module, paths, inputs)
        self._elsewhere: dict[torch.device, tuple[nn.Module, Watch]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_elsewhere": {}}

    def changed(self) -> None:
        """Forget the copies on other devices, since the teacher's weights are others now."""
        self._elsewhere.clear()

    @torch.no_grad()
    def ask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], replica: bool = False) -> tuple[Any, Seen]:
        """Run the teacher, without gradient, on what the student was given; it gets only the names that it takes.

        Args:
            args: Inputs in order.
            kwargs: Inputs by name.
            replica: Whether a replica of the student asks: the teacher then stays where it is, and a copy of it is
                kept on the replica's device. Otherwise it moves to where the inputs are.
        """
        module, watch = self._at(_device_of((args, kwargs)), replica)
        call = ModuleInputs(module)
        known = {key: value for key, value in kwargs.items() if call.is_open or key in call.named}
        return watch.call(module.eval(), *args, **known)

    def _at(self, device: torch.device | None, replica: bool) -> tuple[nn.Module, Watch]:
        weight = next(self.module.parameters(), None)
        if device is None or weight is None or weight.device == device:
            return self.module, self.watch
        if not replica:
            self.module.to(device)
            return self.module, self.watch
        if device not in self._elsewhere:
            module, watch = copy.deepcopy((self.module, self.watch))
            self._elsewhere[device] = module.to(device), watch
        return self._elsewhere[device]


@dataclass
class Kept:
    """What was seen of one batch, or of a replica's part of it.

    Attributes:
        group: Which call of the whole model it is of; the calls of all replicas have one number.
        student: What was seen of the student.
        teacher: What was seen of the teacher.
        call: The call itself, where the teacher has not been asked yet.
    """

    group: int = 0
    student: Seen | None = None
    teacher: Seen | None = None
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = None


class Witness:
    """Lets a student and its teacher see the same calls, and keeps what a loss will compare.

    Args:
        student: The student.
        teacher: The teacher; it is frozen.
        pairs: Paths of a module of the student and of one of the teacher; "" is the whole model.
        layerwise: Whether each of the student's modules is given what the teacher's was given.

    Raises:
        ValueError: student and teacher share weights, or one of them has no such module.

    Example:
        >>> student, teacher = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> witness = Witness(student, teacher, [("", "")])
        >>> output = witness.call(student, (torch.ones(4, 2),), {})
        >>> [(ours, theirs)] = witness.take()
        >>> ours is output, theirs.shape
        (True, torch.Size([4, 3]))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Iterable[tuple[str, str]],
        layerwise: bool = False,
    ) -> None:
        own = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError("student and teacher share weights; pass copy.deepcopy(teacher) as the teacher")
        self.pairs = list(pairs)
        for place, (model, side) in enumerate(((student, STUDENT), (teacher, TEACHER))):
            _check_paths(model, side, [pair[place] for pair in self.pairs])
        self.layerwise = layerwise
        self.student = Watch(student, [ours for ours, _ in self.pairs], gives=layerwise)
        self.teacher = Watched(teacher, [theirs for _, theirs in self.pairs], inputs=layerwise)
        self._kept: dict[int, Kept] = {}
        self._group = 0
        self._replicas = 0
        self._called = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # activations belong to one process and one step

    def end(self) -> None:
        """Take all hooks away and forget what was kept."""
        self.student.end()
        self.teacher.watch.end()
        self.forget()

    def forget(self) -> None:
        """Forget what was kept."""
        self._kept.clear()

    def replicate(self) -> int:
        """Number a new replica, from 1; those of one batch are all made before the first of them is called."""
        if self._called:
            self._replicas, self._group, self._called = 0, self._group + 1, False
        self._replicas += 1
        return self._replicas

    def call(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        replica: int = 0,
        later: bool = False,
    ) -> Any:
        """Let both see a batch; returns what the student returns.

        Args:
            run: The student, or a replica of it.
            args: Inputs in order.
            kwargs: Inputs by name.
            replica: Its number, from `replicate`; 0 for the student itself.
            later: Ask the teacher when `take` is called, if it ever is.
        """
        self._kept.pop(replica, None)
        if not later:
            self.ask(args, kwargs, replica=replica)
        output = self.learn(run, args, kwargs, replica=replica)
        self._kept[replica].call = (run, args, kwargs) if later else None
        return output

    def ask(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, replica: int = 0) -> Any:
        """Let the teacher alone see a batch; returns what it returns."""
        output, seen = self.teacher.ask(args, kwargs, replica > 0)
        self._part(replica, TEACHER).teacher = seen
        return output

    def learn(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, replica: int = 0
    ) -> Any:
        """Let the student alone see a batch; returns what it returns."""
        kept = self._part(replica, STUDENT)
        output, kept.student = self.student.call(run, *args, given=self._given(kept.teacher), **kwargs)
        if kept.teacher is not None:
            kept.teacher.inputs.clear()  # they were needed for the student alone
        return output

    def seen(self, side: str, replica: int = 0) -> Seen | None:
        """What a side, ``"student"`` or ``"teacher"``, saw of a batch of which nothing was taken yet."""
        kept = self._kept.get(replica)
        found: Seen | None = None if kept is None else getattr(kept, side)
        return found

    def take(self) -> list[tuple[Any, Any]]:
        """Both values of each pair, of the last batch; they are then forgotten.

        Raises:
            ValueError: there was no call since the last time, one side has not seen it, or a module did not run.
        """
        parts = [(replica, part) for replica, part in sorted(self._kept.items()) if part.group == self._group]
        self.forget()
        both = [self._both(part, replica) for replica, part in parts]
        if not both:
            raise ValueError("there is nothing to compare; call the model on a batch first, once for each loss")
        return [
            (
                joined([_output(student, ours, STUDENT) for student, _ in both]),
                joined([_output(teacher, theirs, TEACHER) for _, teacher in both]),
            )
            for ours, theirs in self.pairs
        ]

    def _part(self, replica: int, side: str) -> Kept:
        """Where what one side sees next is kept: with what the other saw, unless that is of an older call."""
        kept = self._kept.get(replica)
        if kept is None or getattr(kept, side) is not None:
            kept = self._kept[replica] = Kept()
        self._called = True
        self._group += replica == 0
        kept.group = self._group
        return kept

    def _given(self, teacher: Seen | None) -> dict[str, tuple[Any, ...]]:
        if teacher is None or not self.layerwise:
            return {}
        return {ours: teacher.inputs[theirs] for ours, theirs in self.pairs if theirs in teacher.inputs}

    def _both(self, part: Kept, replica: int) -> tuple[Seen, Seen]:
        student, teacher = part.student, part.teacher
        if part.call is not None:
            run, args, kwargs = part.call
            _, teacher = self.teacher.ask(args, kwargs, replica > 0)
            if self.layerwise:
                _, student = self.student.call(run, *args, given=self._given(teacher), **kwargs)
        if student is None or teacher is None:
            missing = STUDENT if student is None else TEACHER
            raise ValueError(f"the {missing} has not seen the last batch, only the other side has; call it, too")
        return student, teacher


def _check_paths(model: nn.Module, side: str, paths: list[str]) -> None:
    known = dict(model.named_modules())
    for path in paths:
        if path not in known:
            raise ValueError(f"the {side} has no module {path!r}; {nearest(path, set(known) - {''})}")


def _output(seen: Seen, path: str, side: str) -> Any:
    if path not in seen.outputs:
        raise ValueError(f"the {side}'s module {path!r} did not run in the last call; choose one that does")
    return seen.outputs[path]


def _device_of(inputs: Any) -> torch.device | None:
    return next((leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)


def joined(parts: list[Any]) -> Any:
    """One value of the parts that the replicas of DataParallel made of one batch, on the first one's device.

    Example:
        >>> joined([{"logits": torch.zeros(2, 3), "loss": torch.tensor(1.0)}] * 2)["logits"].shape
        torch.Size([4, 3])
    """
    return parts[0] if len(parts) == 1 else tree_map(_together, *parts)


def _together(*values: Any) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0]
    here = [value.to(values[0].device) for value in values]
    return torch.cat(here) if values[0].ndim else torch.stack(here)
