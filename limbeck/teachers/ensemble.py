"""Several teachers as one: their class logits are mixed, and everything else is read from one of them by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from limbeck.batch import batch_size, take, view
from limbeck.losses.base import full_precision
from limbeck.registry import nearest
from limbeck.teachers.base import Identified, Teacher
from limbeck.teachers.mixing import confidence, mean_of_logits, mean_of_probabilities
from limbeck.teachers.own import Self
from limbeck.types import LABELS, Batch, Signal, Sparse, Value

SEPARATOR = ":"
"""Between a member's name and a tap of it: ``"bert:hidden_states.3"``."""

PROBABILITIES, LOGITS, CONFIDENCE, RANDOM = MIXES = ("probabilities", "logits", "per-sample confidence", "random")


class Ensemble:
    """Several teachers that speak as one.

    The tap ``"logits"``, and any other output whose name ends so (``"start_logits"``), is mixed from all members.
    A tap with a member's name before it, ``"bert:hidden_states.3"``, reads that member alone, so that terms
    between features can say whose they mean. Only members that are needed run; one of weight 0 never does for
    a mixture.

    A member with inputs of its own finds them in the batch under its name:
    ``{"teacher": {"bert": {...}, "roberta": {...}}, "labels": ...}``.

    How logits z_k become one, with weights w_k that sum to 1:

    - ``"probabilities"``: the mean of the members' probabilities at the temperature T. What comes out are the
      logits T log(sum w_k softmax(z_k / T)), so a term at that temperature sees exactly this mean; give both the
      same one.
    - ``"logits"``: the mean of the logits.
    - ``"per-sample confidence"``: the mean of probabilities, where at each position a member counts the more the
      nearer it comes to the label; see `limbeck.teachers.mixing.confidence`. Labels and logits stand at the same
      positions. For cross-entropies and forward KL that is the weighted sum of the members' losses, as published.
      In a batch without labels a member counts the more the surer it is, by its entropy.
    - ``"random"``: of each example one member's, drawn by the weights from PyTorch's generator on the CPU, which
      checkpoints keep; only the drawn examples are run. What a term reads of a mixture in one step is one draw.

    To remember what teachers said, give each member a cache of its own: ``Ensemble([Cached(...), Cached(...)])``.

    Args:
        teachers: Whatever `as_teacher` takes, by name; in a list they are called ``"0"``, ``"1"``, ...
        weights: A number for each, in order or by name, not negative and not all 0; by default all the same.
        mix: How logits are mixed.
        temperature: At which probabilities are averaged.

    Attributes:
        members: The teachers by name.
        weights: Of each, by name; they sum to 1.

    Raises:
        ValueError: no teacher, a name with ``":"`` in it, `Self` as a teacher, an unknown mix, wrong weights or
            temperature.
        TypeError: something that is no teacher, or weights or a temperature that are no numbers.

    Example:
        >>> from torch import nn
        >>> one, two = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> ensemble = Ensemble({"one": one, "two": two}, weights=[3, 1], mix="logits")
        >>> x = torch.ones(4, 2)
        >>> signal = ensemble.signal({"input": x}, ["logits", "two:logits"])
        >>> torch.allclose(signal["logits"], 0.75 * one(x) + 0.25 * two(x))
        True
        >>> torch.equal(signal["two:logits"], two(x))
        True
    """

    def __init__(
        self,
        teachers: Sequence[Any] | Mapping[str, Any],
        weights: Sequence[float] | Mapping[str, float] | None = None,
        mix: str = PROBABILITIES,
        temperature: float = 1.0,
    ) -> None:
        from limbeck.teachers import as_teacher  # which may make ensembles, too

        named = _named(teachers)
        self.members: dict[str, Teacher] = {name: as_teacher(teacher) for name, teacher in named.items()}
        if any(isinstance(member, Self) for member in self.members.values()):
            raise ValueError("Self means the student's own pass, which no ensemble has; take Average(student)")
        self.weights = _checked_weights(weights, list(named))
        if mix not in MIXES:
            raise ValueError(f"an ensemble cannot mix by {mix!r}; {nearest(str(mix), MIXES)}")
        number: Any = temperature
        if not (isinstance(number, Real) and 0 < float(number) < math.inf):
            raise ValueError(f"a temperature is a number above 0, got {temperature!r}; change it")
        self.mix, self.temperature = mix, float(temperature)

    def parts(self) -> Mapping[str, Teacher]:
        """The members."""
        return {f"{name}{SEPARATOR}": member for name, member in self.members.items()}

    def offers(self, tap: str) -> bool:
        """Whether a member has this tap, or, of logits, all that take part in mixing."""
        name, rest = _split(tap)
        if name is not None:
            return name in self.members and self.members[name].offers(rest)
        return is_logits(tap) and all(self.members[n].offers(tap) for n in self._active())

    def names(self) -> Iterable[str]:
        """The logits, and every member's taps."""
        mixed = ["logits"] if self.offers("logits") else []
        return [*mixed, *(f"{n}{SEPARATOR}{tap}" for n, member in self.members.items() for tap in member.names())]

    @torch.no_grad()
    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Ask the members that are needed, and mix their logits.

        Raises:
            ValueError: a tap that is not offered, or logits that cannot be mixed.
        """
        for tap in wants:
            self._check(tap)
        mixed = [tap for tap in wants if _split(tap)[0] is None]
        own = {name: [_split(tap)[1] for tap in wants if _split(tap)[0] == name] for name in self.members}
        answer = self._drawn if mixed and self.mix == RANDOM else self._mixed
        values = answer(batch, mixed, own)
        return Signal({tap: values[tap] for tap in wants})

    def identity(self) -> Mapping[str, Any]:
        """Who the members are, and how they are mixed.

        Raises:
            ValueError: the signals do not follow from the batch alone, and cannot be kept.
        """
        if self.mix == RANDOM:
            self.check_follows_from_inputs()
        parts: dict[str, Any] = {"mix": self.mix, "temperature": self.temperature}
        for name, member in self.members.items():
            parts[f"{name}: weight"] = self.weights[name]
            parts |= {f"{name}: {field}": value for field, value in _identity(name, member).items()}
        return parts

    def check_follows_from_inputs(self) -> None:
        """Refuse to have signals kept by their inputs that depend on more.

        Raises:
            ValueError: labels count in the mixture, or chance.
        """
        if self.mix == RANDOM:
            raise ValueError("an ensemble that draws its teacher has nothing to keep; cache its members instead")
        if self.mix == CONFIDENCE:
            raise ValueError(
                "an ensemble mixed by per-sample confidence depends on labels too, and signals are kept by inputs "
                "alone; cache its members instead"
            )

    def _active(self) -> list[str]:
        """The members that take part in mixing."""
        return [name for name, weight in self.weights.items() if weight > 0]

    def _check(self, tap: str) -> None:
        if self.offers(tap):
            return
        name, rest = _split(tap)
        if name is not None and name not in self.members:
            raise ValueError(f"no teacher of the ensemble for {tap!r}; {nearest(name, self.members)}")
        if name is not None:
            raise ValueError(f"teacher {name!r} has no {tap!r}; {nearest(rest, self.members[name].names())}")
        having = [f"{n}{SEPARATOR}{tap}" for n, member in self.members.items() if member.offers(tap)]
        if is_logits(tap):
            lacking = next(n for n in self._active() if not self.members[n].offers(tap))
            raise ValueError(f"{tap!r} cannot be mixed, teacher {lacking!r} has none; {_choose(having)}")
        if having:
            raise ValueError(f"an ensemble mixes logits alone, and {tap!r} is one teacher's; {_choose(having)}")
        raise ValueError(f"no teacher of the ensemble has {tap!r}; {nearest(tap, self.names())}")

    def _mixed(self, batch: Batch, mixed: list[str], own: Mapping[str, list[str]]) -> dict[str, Value]:
        active = self._active() if mixed else []
        found = {
            name: self._ask(name, self._view(batch, name), [*taps, *(mixed if name in active else ())])
            for name, taps in own.items()
            if taps or name in active
        }
        values = {f"{name}{SEPARATOR}{tap}": found[name][tap] for name, taps in own.items() for tap in taps}
        for tap in mixed:
            values[tap] = self._mean(tap, {name: found[name][tap] for name in active}, batch.get(LABELS))
        return values

    def _ask(self, name: str, batch: Batch, taps: Sequence[str]) -> Signal:
        try:
            return self.members[name].signal(batch, list(dict.fromkeys(taps)))
        except ValueError as error:
            raise ValueError(f"teacher {name!r} of the ensemble: {error}") from error

    def _view(self, batch: Batch, name: str) -> Batch:
        """What a member is given of the batch: its own part, and not those of the others."""
        misnamed = name not in batch and self.members.keys() & batch.keys()
        unknown = [key for key in batch if isinstance(batch[key], Mapping) and key not in self.members]
        if misnamed and unknown:
            raise ValueError(
                f"the batch has no part for teacher {name!r} of the ensemble, and one named {unknown[0]!r} for "
                f"none; name it {name!r}"
            )
        return view(batch, name)

    def _mean(self, tap: str, found: Mapping[str, Value], labels: Any) -> Tensor:
        dense = _checked_logits(tap, found, self.mix)
        weights = [self.weights[name] for name in found]
        if self.mix == LOGITS:
            return mean_of_logits(dense, weights)
        if self.mix == CONFIDENCE:
            known = labels if isinstance(labels, Tensor) else None
            return mean_of_probabilities(dense, confidence(dense, known, weights), self.temperature)
        return mean_of_probabilities(dense, weights, self.temperature)

    def _drawn(self, batch: Batch, mixed: list[str], own: Mapping[str, list[str]]) -> dict[str, Value]:
        """Of each example one member's logits; members that are wanted for themselves run on all examples."""
        chances = torch.tensor(list(self.weights.values()), dtype=torch.float64, device="cpu")
        draws = torch.multinomial(chances, batch_size(batch), replacement=True)
        values: dict[str, Value] = {}
        pieces: dict[str, dict[str, Value]] = {tap: {} for tap in mixed}
        places: list[Tensor] = []
        for number, (name, taps) in enumerate(own.items()):
            drawn = (draws == number).nonzero().flatten()
            places.append(drawn)
            found, piece = self._part(name, self._view(batch, name), taps, mixed, drawn)
            values |= found
            for tap, value in piece.items():
                pieces[tap][name] = value
        order = torch.cat(places).argsort()
        return values | {tap: _joined(tap, found)[order] for tap, found in pieces.items()}

    def _part(
        self, name: str, batch: Batch, taps: list[str], mixed: list[str], drawn: Tensor
    ) -> tuple[dict[str, Value], Mapping[str, Value]]:
        """What one member says for itself of all examples, and its logits of those that are drawn."""
        if not taps:
            rows = self._ask(name, take(batch, drawn.tolist()), mixed).values if len(drawn) else {}
            return {}, rows
        found = self._ask(name, batch, [*taps, *(mixed if len(drawn) else ())])
        own = {f"{name}{SEPARATOR}{tap}": found[tap] for tap in taps}
        return own, {tap: found[tap][drawn] for tap in mixed if len(drawn)}


def is_logits(tap: str) -> bool:
    """Whether a tap without a member's name is one that an ensemble mixes.

    Example:
        >>> is_logits("logits"), is_logits("start_logits"), is_logits("hidden_states.3")
        (True, True, False)
    """
    return tap == "logits" or tap.endswith("_logits")


def _split(tap: str) -> tuple[str | None, str]:
    """A member's name, if there is one, and the tap."""
    name, separator, rest = tap.partition(SEPARATOR)
    return (name, rest) if separator else (None, tap)


def _identity(name: str, member: Teacher) -> Mapping[str, Any]:
    if isinstance(member, Identified):
        return member.identity()
    raise ValueError(
        f"teacher {name!r} of an ensemble, a {type(member).__name__}, cannot say what its signals depend on, so "
        "they cannot be kept; cache the other teachers one by one"
    )


def _choose(taps: Sequence[str]) -> str:
    return f"write {' or '.join(map(repr, taps))}" if taps else "choose another tap"


def _named(teachers: Any) -> Mapping[str, Any]:
    """Teachers by name."""
    if isinstance(teachers, (str, Module)) or not isinstance(teachers, Iterable):
        raise TypeError(f"an ensemble is a list of teachers, or a dict by name, got a {type(teachers).__name__}")
    named = teachers if isinstance(teachers, Mapping) else {str(i): t for i, t in enumerate(teachers)}
    _check_names(named)
    return named


def _check_names(named: Mapping[str, Any]) -> None:
    if not named:
        raise ValueError("an ensemble needs a teacher at least, and there is none; add one")
    for name in named:
        if not isinstance(name, str) or not name or SEPARATOR in name:
            raise ValueError(f"{name!r} cannot name a teacher; take a text without {SEPARATOR!r}")


def _checked_weights(weights: Any, names: list[str]) -> dict[str, float]:
    """Weights by name that sum to 1."""
    if weights is None:
        weights = [1.0] * len(names)
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise TypeError(
            f"weights are numbers, one for each teacher, got {weights!r}; leave them out for all the same"
        )
    if isinstance(weights, Mapping):
        unknown = next((name for name in weights if name not in names), None)
        if unknown is not None:
            raise ValueError(f"a weight for {unknown!r}, which is no teacher; {nearest(str(unknown), names)}")
        missing = next((name for name in names if name not in weights), None)
        if missing is not None:
            raise ValueError(f"teacher {missing!r} has no weight; give it one, 0 to leave it out of mixtures")
        weights = [weights[name] for name in names]
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise TypeError(f"weights are numbers, one for each teacher, got {weights!r}; change them") from None
    if len(numbers) != len(names):
        raise ValueError(f"{len(numbers)} weights for {len(names)} teachers; give each its own")
    if not all(0 <= number < math.inf for number in numbers) or not any(numbers):
        raise ValueError(f"weights are numbers from 0, and not all 0, got {numbers}; change them")
    total = sum(numbers)
    return {name: number / total for name, number in zip(names, numbers, strict=True)}


def _checked_logits(tap: str, found: Mapping[str, Value], mix: str) -> list[Tensor]:
    """Logits that can be averaged: dense, of one shape, of several classes where probabilities are meant."""
    for name, value in found.items():
        if isinstance(value, Sparse):
            raise ValueError(
                f"teacher {name!r} gives a {type(value).__name__} for {tap!r}, whose entries are not those of the "
                f"other teachers; mix={RANDOM!r} can take it, or read '{name}{SEPARATOR}{tap}' alone"
            )
    _check_shapes(tap, {name: tuple(value.shape) for name, value in found.items()})
    dense = [value for value in found.values() if isinstance(value, Tensor)]
    if dense[0].shape[-1] == 1 and mix != LOGITS:
        raise ValueError(
            f"{tap!r} has one class, whose probability is always 1, and mix={mix!r} averages probabilities; "
            f"take mix={LOGITS!r} for numbers"
        )
    return dense


def _check_shapes(tap: str, shapes: Mapping[str, tuple[int, ...]], first: int = 0) -> None:
    """All the same from a dimension on."""
    (one, shape), *others = shapes.items()
    for name, other in others:
        if other[-1] != shape[-1]:
            raise ValueError(
                f"{tap!r} of teacher {one!r} has {shape[-1]} classes, and of teacher {name!r} {other[-1]}; mix "
                f"teachers of the same classes, or read one by its name, '{one}{SEPARATOR}{tap}'"
            )
        if other[first:] != shape[first:]:
            raise ValueError(
                f"{tap!r} of teacher {one!r} has shape {shape}, and of teacher {name!r} {other}, so their "
                "positions are not the same; give both the same inputs, or read one by its name"
            )


def _joined(tap: str, found: Mapping[str, Value]) -> Value:
    """Examples of several members, one after the other."""
    _check_shapes(tap, {name: tuple(value.shape) for name, value in found.items()}, first=1)
    pieces = list(found.values())
    first = pieces[0]
    if isinstance(first, Tensor) and all(isinstance(piece, Tensor) for piece in pieces):
        return torch.cat([full_precision(piece) for piece in pieces if isinstance(piece, Tensor)])
    alike = {(type(p), p.temperatures, p.ids.shape[1:]) for p in pieces if isinstance(p, Sparse)}
    if isinstance(first, Tensor) or not all(isinstance(p, Sparse) for p in pieces) or len(alike) > 1:
        kinds = ", ".join(f"{name!r} a {type(value).__name__}" for name, value in found.items())
        raise ValueError(f"{tap!r} differs in kind, size or temperatures ({kinds}); keep all teachers alike")
    return _joined_sparse([piece for piece in pieces if isinstance(piece, Sparse)])


def _joined_sparse(pieces: Sequence[Sparse]) -> Sparse:
    columns = {field.name: [getattr(piece, field.name) for piece in pieces] for field in fields(pieces[0])}
    tensors: dict[str, Any] = {
        n: torch.cat(column) for n, column in columns.items() if isinstance(column[0], Tensor)
    }
    return replace(pieces[0], **tensors)
