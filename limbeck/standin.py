"""A module that stands in for a student: to whoever looks, it is the student."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

OWN = frozenset({"student", "training", "forward"})
"""What is set on a stand-in itself, beside names with an underscore in front; all else is set on the student."""


class _Forward:
    """`forward` with the signature of the student at hand.

    Trainers read from it which columns of a data set the model takes. A class has one signature only, and students
    differ; and what is bound when the stand-in is made would stay bound to it in the replicas of DataParallel.
    """

    def __get__(self, model: StandIn | None, owner: type[StandIn]) -> Callable[..., Any]:
        if model is None:
            return owner.run
        bound: Any = functools.partial(owner.run, model)
        bound.__signature__ = inspect.signature(model.student.forward)
        return bound  # type: ignore[no-any-return]


class StandIn(nn.Module):
    """A base for modules that hold a student and are taken for it.

    Attributes and methods are the student's, where a stand-in has none of that name; parameters, modules and the
    state dict have the student's own names; ``isinstance`` says yes to the student's class; ``forward`` shows the
    student's signature. The student itself is not changed, and neither is its class. Modules that are set under a
    name with an underscore in front stand beside it, and so do their weights.

    Args:
        student: The module to stand in for.

    Example:
        >>> class Loud(StandIn):
        ...     def run(self, *args, **kwargs):
        ...         return self.student(*args, **kwargs) * 2
        >>> loud = Loud(nn.Linear(2, 3))
        >>> isinstance(loud, nn.Linear), loud.in_features, sorted(loud.state_dict())
        (True, 2, ['bias', 'weight'])
    """

    student: nn.Module
    forward: Any = _Forward()

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.training = student.training
        self.register_load_state_dict_pre_hook(_under_their_names)  # type: ignore[no-untyped-call]

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What a call does."""

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The student's class, of which `isinstance` asks beside ``type``."""
        student = self.__dict__.get("_modules", {}).get("student")
        return type(self) if student is None else student.__class__

    def beside(self) -> dict[str, nn.Module]:
        """The modules that stand beside the student, by name."""
        return {name: module for name, module in self._modules.items() if module is not None and name != "student"}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get("_modules", {}).get("student")
            if student is None:  # not yet, or while it is unpickled
                raise
            return getattr(student, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.student, name, value)

    def __delattr__(self, name: str) -> None:
        if name in OWN or name.startswith("_"):
            super().__delattr__(name)
        else:
            delattr(self.student, name)

    def __getitem__(self, index: Any) -> Any:
        items: Any = self.student
        return items[index]

    def __len__(self) -> int:
        items: Any = self.student
        return len(items)

    def __bool__(self) -> bool:
        return True  # or it would be asked for its length

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self),), self.__dict__  # by default it would be made anew as a student

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """All modules, those of the student under their own names; parameters and buffers are named by it."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        yield from self.student.named_modules(memo, prefix, remove_duplicate)
        for name, module in self.beside().items():
            yield from module.named_modules(memo, _below(prefix, name), remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The student's state under its own names, and that of what stands beside it."""
        found = self.student.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name, module in self.beside().items():
            module.state_dict(destination=found, prefix=f"{_below(prefix, name)}.", keep_vars=keep_vars)
        return found

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the student and of what stands beside it; returns the stand-in."""
        super().train(mode)
        return self

    def eval(self) -> Any:
        """The same as ``train(False)``."""
        return self.train(False)


def _below(prefix: str, name: str) -> str:
    return f"{prefix.removesuffix('.')}.{name}" if prefix else name


def _blank(kind: type[StandIn]) -> StandIn:
    return kind.__new__(kind)


def _under_their_names(model: StandIn, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading: the student's entries are put where its modules stand; what is not there keeps its state.

    So the weights of a student alone, from before or from elsewhere, can be loaded too.
    """
    beside = model.beside()
    for key in [key for key in state if key.startswith(prefix)]:
        if key.removeprefix(prefix).split(".")[0] not in beside:
            state[f"{prefix}student.{key.removeprefix(prefix)}"] = state.pop(key)
    for name, module in beside.items():
        if not any(key.startswith(f"{prefix}{name}.") for key in state):
            state.update(module.state_dict(prefix=f"{prefix}{name}."))
