"""Terms: the addends of a distillation objective, and the maps that spread one over many layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from limbeck.batch import labels_entry
from limbeck.losses import LOSSES, Comparison, compare_by, traits_of
from limbeck.losses.base import SUPPLIED
from limbeck.losses.call import TransformSpec, takes_several
from limbeck.projectors import build_projector
from limbeck.registry import nearest, refuse_unknown
from limbeck.schedules import Scheduled, build_schedule, value_at
from limbeck.types import LABELS, LOGITS

Taps = str | Sequence[str]
Weight = float | Scheduled | Mapping[str, Any] | Callable[[float], float]

ARGUMENTS = ("tap", "teacher_tap", "loss", "weight", "name", "project", "mask", "transforms", "task")
"""What a Term takes beside the options of its loss."""


@dataclass(frozen=True, init=False)
class Term:
    """One addend: where to read the student and the teacher, how to compare, how much it counts.

    Args:
        tap: Where to read the student: a module path, ``"logits"``, ``"hidden_states.3"``; a list of them, for a
            loss over several places; or ``"labels"``, which compares the student's logits with the batch's labels.
        teacher_tap: Where to read the teacher; by default the same places. ``"labels"`` reads the batch's labels,
            ``"labels.start_positions"`` another entry of the batch as labels.
        loss: A registered name, ``"package.module:function"``, or a function ``(student, teacher, *, options)``.
        weight: Factor of this term in the sum; weights need not sum to one. A number, or one that changes:
            ``{"schedule": "linear_decay", "base": 0.9}``, or a function of progress from 0 to 1.
        name: Its name in logs, recipes and errors; by default the loss's name (and the tap's, off the logits).
        project: A projection of the student's tensor, by name or as ``{"kind": name, **options}``; by default
            that which belongs to the loss, and none for most.
        mask: The key in the batch of the mask to use; by default the attention mask or the labels' own, where
            its shape fits.
        transforms: What is done to both sides before the loss: ``"standardize"``, or a list of such.
        task: Where a student learns several tasks, the one whose batches this term is for (those with
            ``"task": "rte"``); by default it counts for all. It then stands before the term's default name.
        **options: Options of the loss, checked here against its signature. Any of them may be scheduled, as
            `weight`; a ``temperature`` may be one of each example's own, ``"flsw"``. For what a loss learns, the
            options of the module that it trains; for a part of the teacher, the module's path.

    Raises:
        ValueError: unknown loss, projection or schedule, or a weight that is negative or no finite number.
        TypeError: an option that the loss does not have.

    Example:
        >>> Term("logits", loss="forward_kl", temperature=4.0, weight=0.9)
        Term(forward_kl: logits -> logits, weight 0.9, temperature=4.0)
        >>> Term("logits", loss="forward_kl", temprature=4.0)
        Traceback (most recent call last):
        TypeError: loss 'forward_kl' has no option 'temprature'; did you mean 'temperature'?
    """

    taps: tuple[str, ...]
    teacher_taps: tuple[str, ...]
    comparison: Comparison
    weight: float | Scheduled
    name: str
    project: str | Mapping[str, Any] | None
    mask: str | None
    task: str | None
    learned: Mapping[str, Mapping[str, Any]]
    borrowed: Mapping[str, str]

    def __init__(
        self,
        tap: Taps,
        teacher_tap: Taps | None = None,
        *,
        loss: str | Callable[..., Tensor],
        weight: Weight = 1.0,
        name: str | None = None,
        project: str | Mapping[str, Any] | None = None,
        mask: str | None = None,
        transforms: TransformSpec | Sequence[TransformSpec] = (),
        task: str | None = None,
        **options: Any,
    ) -> None:
        check_term_options(loss, options, also=ARGUMENTS)
        learned, borrowed, options = _split_options(loss, options)
        comparison = compare_by(loss, transforms=transforms, given=(*learned, *borrowed), **options)
        project = project or traits_of(comparison.loss).project
        for spec in (*([project] if project else []), *learned.values()):
            build_projector(spec)
        taps, teacher_taps = _paired_taps(tap, teacher_tap)
        if len(taps) > 1 and not takes_several(comparison.loss):
            raise ValueError(f"loss {comparison.name!r} compares one place with one; make a term for each tap")
        if mask is not None and not isinstance(mask, str):
            raise ValueError(f"mask names an entry of the batch, got {mask!r}")
        own_name = comparison.name if taps == (LOGITS,) else f"{comparison.name}[{'+'.join(taps)}]"
        if task is not None and (not isinstance(task, str) or not task):
            raise ValueError(f"a term's task is a name, or None for all tasks, got {task!r}")
        name = name or (own_name if task is None else f"{task}.{own_name}")
        fields = {
            "taps": taps,
            "teacher_taps": teacher_taps,
            "comparison": comparison,
            "weight": _checked_weight(weight, name),
            "name": name,
            "project": project,
            "mask": mask,
            "task": task,
            "learned": learned,
            "borrowed": borrowed,
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    def __repr__(self) -> str:
        shown = self.shown_options() if self.task is None else {"task": self.task, **self.shown_options()}
        options = "".join(f", {k}={v!r}" for k, v in shown.items())
        return f"Term({self.loss_name}: {self.tap} -> {self.teacher_tap}, weight {self.shown_weight()}{options})"

    @property
    def tap(self) -> str:
        """Where the student is read, as text."""
        return " + ".join(self.taps)

    @property
    def teacher_tap(self) -> str:
        """Where the teacher is read, as text."""
        return " + ".join(self.teacher_taps)

    @property
    def places(self) -> int | None:
        """How many tensors each side has, if it is a tuple of them."""
        return len(self.taps) if len(self.taps) > 1 else None

    @property
    def loss_name(self) -> str:
        """The name of the loss."""
        return self.comparison.name

    @property
    def reads_labels(self) -> bool:
        """Whether this term compares with the batch's labels and not with a teacher."""
        return self.labels is not None

    @property
    def labels(self) -> str | None:
        """The entry of the batch that this term reads as labels, if it does."""
        return labels_entry(self.teacher_taps[0]) if len(self.teacher_taps) == 1 else None

    @property
    def is_scheduled(self) -> bool:
        """Whether its weight or one of its options changes with progress."""
        return any(isinstance(v, Scheduled) for v in (self.weight, *self.comparison.options.values()))

    def weight_at(self, progress: float | None) -> float:
        """The weight at a progress from 0 to 1, which a constant weight does not need."""
        return float(value_at(self.weight, progress, f"weight of term {self.name!r}"))

    def shown_weight(self) -> str:
        """The weight as text."""
        return str(self.weight) if isinstance(self.weight, Scheduled) else f"{self.weight:g}"

    def shown_options(self) -> dict[str, Any]:
        """What the loss was given: options, transforms, what it learns and borrows."""
        shown = dict(self.comparison.options)
        if self.comparison.transforms:
            shown["transforms"] = list(self.comparison.transforms)
        kinds = {name: {k: v for k, v in spec.items() if k != "kind"} for name, spec in self.learned.items()}
        return {**shown, **{name: options for name, options in kinds.items() if options}, **self.borrowed}


def check_term_options(
    loss: str | Callable[..., Tensor], options: Mapping[str, Any], also: Iterable[str] = ARGUMENTS
) -> None:
    """Refuse an option that a loss does not have; one of `also` is proposed where the name comes near to it.

    Raises:
        ValueError: an unknown loss.
        TypeError: an unknown option.

    Example:
        >>> check_term_options("mse", {"wieght": 0.5})
        Traceback (most recent call last):
        TypeError: loss 'mse' has no option 'wieght'; did you mean 'weight'?
    """
    function = LOSSES.get(loss) if isinstance(loss, str) else loss
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - SUPPLIED
        name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
        refuse_unknown(options, known, f"loss {name!r}", also)


def _split_options(
    loss: str | Callable[..., Tensor], options: dict[str, Any]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str], dict[str, Any]]:
    """Tell what a loss learns and what it borrows of the teacher from its plain options."""
    traits = traits_of(LOSSES.get(loss) if isinstance(loss, str) else loss)
    learned: dict[str, Mapping[str, Any]] = {}
    for name, kind in traits.learns.items():
        if not isinstance(options.get(name, {}), Mapping):
            raise TypeError(f"{name} is what the loss learns, and takes options {{...}}, got {options[name]!r}")
        learned[name] = {**options.get(name, {}), "kind": kind}
    borrowed: dict[str, str] = {n: options[n] for n in traits.borrows if isinstance(options.get(n), str)}
    return learned, borrowed, {k: v for k, v in options.items() if k not in learned and k not in borrowed}


def _paired_taps(tap: Taps, teacher_tap: Taps | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    taps = _texts(tap)
    if teacher_tap is None and len(taps) == 1 and labels_entry(taps[0]) is not None:
        return (LOGITS,), taps
    if teacher_tap is None:
        return taps, taps
    teacher_taps = _texts(teacher_tap)
    if len(teacher_taps) != len(taps):
        raise ValueError(
            f"{len(taps)} places of the student meet {len(teacher_taps)} of the teacher; name as many of both"
        )
    return taps, teacher_taps


def _texts(tap: Taps) -> tuple[str, ...]:
    taps = (tap,) if isinstance(tap, str) else tuple(tap) if isinstance(tap, Sequence) else ()
    if not taps or not all(isinstance(text, str) for text in taps):
        raise ValueError(f"a tap is the name of a place, or a list of them, got {tap!r}")
    return taps


def _checked_weight(weight: Weight, name: str) -> float | Scheduled:
    what = f"the weight of term {name!r}"
    if callable(weight) or isinstance(weight, Mapping):
        weight = build_schedule(weight)
    if not isinstance(weight, Scheduled):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"{what} must be a finite number or a schedule, got {weight!r}")
        weight = float(weight)
    lowest = weight.lowest() if isinstance(weight, Scheduled) else weight
    if lowest < 0:
        when = f" at its lowest ({weight})" if isinstance(weight, Scheduled) else ""
        raise ValueError(f"{what} is {lowest:g}{when}, which pushes the student away; it must not be negative")
    return weight


def where(term: Term) -> str:
    """A term in an error message."""
    return f"term {term.name!r} ({term.tap} -> {term.teacher_tap})"


@contextmanager
def in_term(term: Term, side: str = "") -> Iterator[None]:
    """Say in which term an error arose."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where(term)}: {side}{error}") from None
    except TypeError as error:  # often from within the loss, hence with the place where it arose
        raise TypeError(f"{where(term)}: {side}{error}") from error


LayerMap = str | Sequence[int] | Sequence[tuple[int, int]]

FOUND = ("cka", "emd")
"""Layer maps that a run finds from data; see `limbeck.matching`."""


def layer_pairs(layers: LayerMap, student: int, teacher: int) -> list[tuple[int, int]]:
    """Say which student layer learns from which teacher layer, counted from 0.

    Args:
        layers: ``"uniform"``: spread evenly, last to last (TinyBERT). ``"last"``: the teacher's last layers
            (PKD-Last). ``"skip"``: every k-th teacher layer from the first. Or a layer of the teacher's for each
            of the student's, where negative ones count from the end. Or the pairs themselves.
        student: Number of the student's layers.
        teacher: Number of the teacher's layers.

    Returns:
        Pairs ``(student layer, teacher layer)``. One layer may stand in several pairs.

    Raises:
        ValueError: an unknown map, a layer that is not there, or a student deeper than its teacher.

    Example:
        >>> layer_pairs("uniform", 3, 6), layer_pairs("last", 3, 6), layer_pairs("skip", 3, 6)
        ([(0, 1), (1, 3), (2, 5)], [(0, 3), (1, 4), (2, 5)], [(0, 0), (1, 2), (2, 4)])
        >>> layer_pairs([0, -1], 2, 6)
        [(0, 0), (1, 5)]

    Reference:
        Jiao et al. 2020, TinyBERT, arXiv:1909.10351; Sun et al. 2019, Patient Knowledge Distillation,
        arXiv:1908.09355.
    """
    if not isinstance(layers, str):
        return [_checked_pair(pair, student, teacher) for pair in _as_pairs(layers, student, teacher)]
    if student > teacher:
        raise ValueError(
            f"map {layers!r} needs a teacher at least as deep as the student, got {student} layers for "
            f"{teacher}; write the pairs out"
        )
    maps: dict[str, Callable[[int], int]] = {
        "uniform": lambda i: (i + 1) * teacher // student - 1,
        "last": lambda i: teacher - student + i,
        "skip": lambda i: i * (teacher // student),
    }
    if layers not in maps:
        raise ValueError(f"{layers!r} is neither a list of pairs nor a known layer map; {nearest(layers, maps)}")
    return [(i, maps[layers](i)) for i in range(student)]


def _as_pairs(layers: Sequence[Any], student: int, teacher: int) -> list[tuple[int, int]]:
    if not any(isinstance(layer, int) for layer in layers):
        return list(layers)
    if len(layers) != student:
        raise ValueError(
            f"the student has {student} layers and {len(layers)} of the teacher's are named; name one for each, "
            "or pairs"
        )
    return [(i, layer + teacher if -teacher <= layer < 0 else layer) for i, layer in enumerate(layers)]


def _checked_pair(pair: tuple[int, int], student: int, teacher: int) -> tuple[int, int]:
    student_layer, teacher_layer = pair
    for layer, count, side in (
        (student_layer, student, "student"),
        (teacher_layer, teacher, "teacher"),
    ):
        if not 0 <= layer < count:
            raise ValueError(f"the {side} has no layer {layer}; it has {count}, counted from 0")
    return student_layer, teacher_layer


def spread(
    tap: Taps,
    teacher_tap: Taps,
    pairs: Sequence[tuple[int, int]],
    /,  # a loss may have an option `pairs`
    *,
    name: str,
    weight: Weight = 1.0,
    shares: Sequence[float] | None = None,
    **arguments: Any,
) -> list[Term]:
    """Make one term for each pair of layers; the ``{}`` in each tap is replaced by the layer's number.

    Args:
        tap: The student's tap with ``{}`` in the place of the layer, ``"encoder.layer.{}"``, or several.
        teacher_tap: The teacher's, likewise.
        pairs: From `layer_pairs` or `limbeck.matching`.
        name: The terms are called ``name.0``, ``name.1``, ... after the student's layer (and ``name.0-3``
            where a student layer has several teachers).
        weight: Weight of the whole group.
        shares: What part of it each pair gets; by default all the same.
        **arguments: What else `Term` takes.

    Raises:
        ValueError: a tap without ``{}``.

    Example:
        >>> [t.name for t in spread("layer.{}", "layer.{}", [(0, 1), (1, 3)], name="hidden", loss="mse")]
        ['hidden.0', 'hidden.1']
    """
    sides = [(side,) if isinstance(side, str) else tuple(side) for side in (tap, teacher_tap)]
    for text in (*sides[0], *sides[1]):
        if "{}" not in text:
            raise ValueError(f"tap {text!r} has no {{}} for the layer's number")
    students = [s for s, _ in pairs]
    terms = []
    for place, pair in enumerate(pairs):
        suffix = f"{pair[0]}-{pair[1]}" if students.count(pair[0]) > 1 else f"{pair[0]}"
        taps = [[text.format(layer) for text in side] for side, layer in zip(sides, pair, strict=True)]
        part = 1 / len(pairs) if shares is None else shares[place]
        terms.append(Term(*taps, name=f"{name}.{suffix}", weight=share_of(weight, part), **arguments))
    return terms


def share_of(weight: Weight, factor: float) -> Weight:
    """A part of a weight that may be scheduled.

    Example:
        >>> share_of(0.5, 0.5), share_of({"schedule": "linear_decay"}, 0.5)
        (0.25, {'schedule': 'linear_decay', 'base': 0.5})
    """
    if isinstance(weight, Scheduled):
        return replace(weight, base=weight.base * factor)
    if isinstance(weight, Mapping):
        return {**weight, "base": weight.get("base", 1.0) * factor}
    return {"schedule": weight, "base": factor} if callable(weight) else weight * factor


def self_distillation(
    exits: Sequence[Sequence[str]],
    *,
    loss: str = "forward_kl",
    weight: Weight = 1.0,
    labels: str | None = None,
    name: str = "self",
    **arguments: Any,
) -> list[Term]:
    """Make the terms by which the earlier exits of a model learn from its last one.

    They go with ``Distiller(student, limbeck.Self(), terms)``: the teacher's taps are read from the student
    itself, in the same pass and without gradient.

    Args:
        exits: Groups of taps from shallow to deep, ``[["exit1.fc", "exit2.fc", "fc"]]``; within a group each tap
            but the last learns from the last. A group is a kind of place: logits, features before the head.
        loss: The loss of all groups; for several kinds of places call this once for each.
        weight: Weight of each group, shared out over its earlier exits.
        labels: A loss with which every exit, the last one too, also learns the labels, ``"cross_entropy"``. None
            for none; the last exit then learns from other terms, or not at all.
        name: The terms are called ``self.exit1.fc``, and ``self.exit1.fc.labels``.
        **arguments: What else `Term` takes: ``temperature``, ``project``.

    Raises:
        ValueError: a group of fewer than two taps.

    Example:
        >>> self_distillation([["exit1", "exit2", "head"]], temperature=3.0)
        [Term(forward_kl: exit1 -> head, weight 0.5, temperature=3.0), Term(forward_kl: exit2 -> head, ...)]

    Reference:
        Zhang et al. 2019, Be Your Own Teacher, arXiv:1905.08094.
    """
    terms = []
    for group in exits:
        if isinstance(group, str):
            raise ValueError(f"exits come in groups, [[{group!r}, ...]], got {list(exits)}")
        if len(group) < 2:
            raise ValueError(f"a group of exits needs two taps or more, from shallow to deep, got {list(group)}")
        *earlier, last = group
        for tap in earlier:
            part = share_of(weight, 1 / len(earlier))
            terms.append(Term(tap, last, loss=loss, weight=part, name=f"{name}.{tap}", **arguments))
        if labels is not None:
            terms += [Term(tap, LABELS, loss=labels, name=f"{name}.{tap}.{LABELS}") for tap in group]
    return terms
