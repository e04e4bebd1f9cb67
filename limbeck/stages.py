"""Stages: which terms count, and what of the student trains, at which part of a training."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from limbeck.registry import nearest
from limbeck.terms import Term


@dataclass(frozen=True)
class Stage:
    """One part of a training.

    Args:
        until: The progress, above 0 and up to 1, at which the next stage begins.
        terms: Names of the terms that count, or patterns of them (``"block.*"``, ``"mse[*]"``); None for all.
        trains: What of the student trains: paths of modules, or patterns of parameters' names
            (``"encoder.layer.0.*"``); None for all that trains without stages. What stands beside the stage's
            terms, projections and the like, trains with them.

    Raises:
        ValueError: a progress outside of (0, 1], or a list without an entry.
        TypeError: a single text where a list is meant.

    Example:
        >>> Stage(until=0.5, trains=["encoder.layer.0"])
        Stage(until=0.5, terms=None, trains=('encoder.layer.0',))
    """

    until: float = 1.0
    terms: Sequence[str] | None = None
    trains: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"a stage lasts until a progress above 0 and up to 1, got {self.until}")
        for field in ("terms", "trains"):
            given: Any = getattr(self, field)
            if isinstance(given, str):
                raise TypeError(f"{field} of a stage is a list of names, got {given!r}; write [{given!r}]")
            if given is not None and not given:
                raise ValueError(f"{field} of a stage is empty; name some, or leave it out for all")
            object.__setattr__(self, field, None if given is None else tuple(given))


class Stages:
    """The stages of one training, found in its models: a function of progress alone, so nothing is to be resumed.

    Args:
        stages: The stages in order; the last one ends at 1.
        student: The student.
        terms: All terms.

    Raises:
        ValueError: stages out of order, or names that are no term's or no parameter's.
        TypeError: no stages.

    Example:
        >>> student, term = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Term("logits", loss="mse")
        >>> stages = Stages([Stage(0.5, trains=["0"]), Stage(trains=["1"])], student, [term])
        >>> stages.enter(0.7, {})
        ('mse',)
        >>> [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        ['1.weight', '1.bias']
    """

    def __init__(self, stages: Sequence[Stage], student: nn.Module, terms: Sequence[Term]) -> None:
        self.stages = _checked(stages)
        self.student = student
        self._names = [t.name for t in terms]
        self._terms = [_matching("term", stage.terms, self._names) for stage in self.stages]
        trained = _trained(student)
        self._all = frozenset(trained)
        self._trains = [
            self._all if s.trains is None else _parameters(s.trains, student, self._all) for s in self.stages
        ]
        self._entered: int | None = None

    def at(self, progress: float | None) -> int:
        """The number of the stage at a progress, counted from 0.

        Raises:
            ValueError: no progress, or one outside of [0, 1].
        """
        if progress is None:
            raise ValueError("what trains follows stages; pass progress=step / (steps - 1) with each batch")
        if not 0 <= progress <= 1:
            raise ValueError(f"progress runs from 0 at the first step to 1 at the last, got {progress}")
        last = len(self.stages) - 1
        return next((number for number, stage in enumerate(self.stages) if progress < stage.until), last)

    def enter(self, progress: float | None, beside: dict[str, list[nn.Module]]) -> tuple[str, ...]:
        """Let train what trains at a progress.

        A parameter that rests has no gradient, also none of zeros: an optimizer would move it by its momentum.

        Args:
            progress: From 0 to 1.
            beside: By the name of each term, what trains beside it.

        Returns:
            Names of the terms that count.
        """
        number = self.at(progress)
        if number != self._entered:
            _let_train(self.student, self._all, self._trains[number])
            for name, modules in beside.items():
                for module in modules:
                    _set(module.parameters(), name in self._terms[number])
            self._entered = number
        return self._terms[number]

    def release(self, beside: dict[str, list[nn.Module]]) -> None:
        """Let all train again that trains without stages."""
        _let_train(self.student, self._all, self._all)
        for modules in beside.values():
            for module in modules:
                _set(module.parameters(), True)
        self._entered = None

    def described(self, progress: float | None) -> str:
        """A stage in an error message."""
        number = self.at(progress)
        return f"stage {number + 1} of {len(self.stages)} (until {self.stages[number].until:g})"


def block_by_block(
    pairs: Sequence[tuple[str, str]],
    *,
    loss: str = "mse",
    last: Sequence[Term] = (),
    share: float | None = None,
    name: str = "block",
    **arguments: Any,
) -> tuple[list[Term], list[Stage]]:
    """Train the student's blocks one after the other, each with a loss of its own; then perhaps all of it.

    The result goes into a Distiller: ``Distiller(student, teacher, terms, stages=stages)``. While a block learns
    to give what the teacher's gives, no other parameter moves.

    Args:
        pairs: The student's and the teacher's modules, ``[("layer.0", "layer.1"), ("layer.1", "layer.3")]``, in
            the order of training.
        loss: Compares the outputs of both.
        last: Terms of a last stage, in which they count alone, and everything trains.
        share: The part of the training that the last stage takes; by default as much as one block.
        name: The terms are called ``block.0``, ``block.1``, ...
        **arguments: What else `limbeck.Term` takes: ``project``, ``weight``, options of the loss.

    Returns:
        The terms, and the stages.

    Raises:
        ValueError: no pairs, or a share outside of (0, 1) or without a last stage.

    Example:
        >>> terms, stages = block_by_block([("layer.0", "layer.1"), ("layer.1", "layer.3")])
        >>> [term.name for term in terms], [(stage.until, stage.trains) for stage in stages]
        (['block.0', 'block.1'], [(0.5, ('layer.0',)), (1.0, ('layer.1',))])

    Reference:
        The "flash distillation" of Intel's Neural Compressor and Extension for Transformers, which trains the
        blocks of a student in turn.
    """
    if not pairs:
        raise ValueError("block_by_block needs pairs of modules, [(student's, teacher's), ...], got none")
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"pairs are [(student's module, teacher's module), ...], got {pairs!r}")
    if share is not None and not (last and 0 < share < 1):
        raise ValueError(f"share={share} is the part of a last stage, between 0 and 1; name its terms by last=")
    count = len(pairs)
    rest = 0.0 if not last else 1 / (count + 1) if share is None else share
    terms = [Term(s, t, loss=loss, name=f"{name}.{i}", **arguments) for i, (s, t) in enumerate(pairs)]
    stages = [
        Stage((1 - rest) * (i + 1) / count, [terms[i].name], [student.partition("#")[0]])
        for i, (student, _) in enumerate(pairs)
    ]
    if last:
        stages.append(Stage(terms=[term.name for term in last]))
    return [*terms, *last], stages


def _checked(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    given: Any = stages
    if not isinstance(given, (list, tuple)) or not all(isinstance(stage, Stage) for stage in given):
        raise TypeError(f"stages are a list of Stage, got {given!r}; write [Stage(...), ...]")
    ends = [stage.until for stage in stages]
    if any(after <= before for before, after in itertools.pairwise(ends)):
        raise ValueError(f"stages end one after the other, got until={ends}; put them in order")
    if ends[-1] != 1:
        raise ValueError(f"the last stage ends at {ends[-1]:g}, and a training at 1; leave its until out")
    return tuple(stages)


def _matching(what: str, patterns: Sequence[str] | None, names: Sequence[str]) -> tuple[str, ...]:
    if patterns is None:
        return tuple(names)
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(f"a stage names the {what} {pattern!r}, and there is none; {nearest(pattern, names)}")
    return tuple(n for n in names if any(_fits(n, pattern) for pattern in patterns))


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern means a name; brackets may be its own, since terms without a name are ``mse[layer.0]``."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("[", "[[]"))


def _trained(student: nn.Module) -> list[str]:
    """Names of the parameters that train, tied ones by each of their names."""
    return [n for n, p in student.named_parameters(remove_duplicate=False) if p.requires_grad]


def _parameters(patterns: Sequence[str], student: nn.Module, trained: frozenset[str]) -> frozenset[str]:
    """Names of the parameters that a stage lets train."""
    named = dict(student.named_parameters(remove_duplicate=False))
    paths = {path for path, _ in student.named_modules()}
    chosen: set[int] = set()
    for pattern in patterns:
        within = f"{pattern}.*" if pattern else "*"
        found = [n for n in named if fnmatchcase(n, within if pattern in paths else pattern)]
        if not found:
            hint = nearest(pattern, {*paths, *named} - {""})
            raise ValueError(
                f"a stage trains {pattern!r}, which is no module and no parameter of the student; {hint}"
            )
        if not trained.intersection(found):
            raise ValueError(f"a stage trains {pattern!r}, of which nothing trains; set requires_grad")
        chosen |= {id(named[n]) for n in found}
    return frozenset(n for n in trained if id(named[n]) in chosen)


def _let_train(student: nn.Module, known: Collection[str], chosen: Collection[str]) -> None:
    named = dict(student.named_parameters(remove_duplicate=False))
    _set((named[n] for n in known if n not in chosen), False)
    _set((named[n] for n in chosen), True)


def _set(parameters: Iterable[nn.Parameter], trains: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
