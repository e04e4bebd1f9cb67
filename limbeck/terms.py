"""Terms: the addends of a distillation objective, and the maps that spread one over many layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from limbeck.losses import LOSSES, SUPPLIED
from limbeck.projectors import build_projector
from limbeck.registry import check_options, nearest
from limbeck.types import LABELS


@dataclass(frozen=True, init=False)
class Term:
    """One addend: where to read the student and the teacher, how to compare, how much it counts.

    Args:
        tap: Where to read the student: a module path, ``"logits"``, ``"hidden_states.3"``; or ``"labels"``,
            which compares the student's logits with the batch's labels.
        teacher_tap: Where to read the teacher; by default the same place. ``"labels"`` reads the batch's labels.
        loss: A registered name, ``"package.module:function"``, or a function ``(student, teacher, *, options)``.
        weight: Factor of this term in the sum. Weights need not sum to one.
        name: Its name in logs, recipes and errors; by default the loss's name (and the tap's, off the logits).
        project: A projection of the student's tensor, by name or as ``{"kind": name, **options}``.
        mask: The key in the batch of the mask to use; by default the attention mask or the labels' own, where
            its shape fits.
        **options: Options of the loss, checked here against its signature.

    Raises:
        ValueError: unknown loss or projection, or a weight that is no finite number.
        TypeError: an option that the loss does not have.

    Example:
        >>> Term("logits", loss="forward_kl", temperature=4.0, weight=0.9)
        Term(forward_kl: logits -> logits, weight 0.9, temperature=4.0)
        >>> Term("logits", loss="forward_kl", temprature=4.0)
        Traceback (most recent call last):
        TypeError: loss 'forward_kl' has no option 'temprature'; did you mean 'temperature'?
    """

    tap: str
    teacher_tap: str
    loss: Callable[..., Tensor]
    loss_name: str
    weight: float
    name: str
    project: str | Mapping[str, Any] | None
    mask: str | None
    options: Mapping[str, Any]
    inputs: frozenset[str]

    def __init__(
        self,
        tap: str,
        teacher_tap: str | None = None,
        *,
        loss: str | Callable[..., Tensor],
        weight: float = 1.0,
        name: str | None = None,
        project: str | Mapping[str, Any] | None = None,
        mask: str | None = None,
        **options: Any,
    ) -> None:
        function = LOSSES.get(loss) if isinstance(loss, str) else loss
        loss_name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
        check_options(function, options, SUPPLIED, f"loss {loss_name!r}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of a term must be a finite number, got {weight}")
        if project is not None:
            build_projector(project)
        tap, teacher_tap = ("logits", LABELS) if tap == LABELS else (tap, teacher_tap or tap)
        fields = {
            "tap": tap,
            "teacher_tap": teacher_tap,
            "loss": function,
            "loss_name": loss_name,
            "weight": float(weight),
            "name": name or (loss_name if tap == "logits" else f"{loss_name}[{tap}]"),
            "project": project,
            "mask": mask,
            "options": dict(options),
            "inputs": _asked_for(function),
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    def __repr__(self) -> str:
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        taps = f"{self.tap} -> {self.teacher_tap}"
        return f"Term({self.loss_name}: {taps}, weight {self.weight:g}{options})"

    @property
    def reads_labels(self) -> bool:
        """Whether this term compares with the batch's labels and not with a teacher."""
        return self.teacher_tap == LABELS

    def bound(self) -> Callable[..., Tensor]:
        """The loss with its options filled in."""
        return partial(self.loss, **self.options) if self.options else self.loss


def _asked_for(function: Callable[..., Tensor]) -> frozenset[str]:
    """The inputs beside the two tensors that a loss asks for, as keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return SUPPLIED & {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


LayerMap = str | Sequence[tuple[int, int]]


def layer_pairs(layers: LayerMap, student: int, teacher: int) -> list[tuple[int, int]]:
    """Say which student layer learns from which teacher layer, counted from 0.

    Args:
        layers: ``"uniform"``: spread evenly, last to last (TinyBERT). ``"last"``: the teacher's last layers
            (PKD-Last). ``"skip"``: every k-th teacher layer from the first. Or the pairs themselves.
        student: Number of the student's layers.
        teacher: Number of the teacher's layers.

    Returns:
        Pairs ``(student layer, teacher layer)``. One layer may stand in several pairs.

    Raises:
        ValueError: an unknown map, a layer that is not there, or a student deeper than its teacher.

    Example:
        >>> layer_pairs("uniform", 3, 6), layer_pairs("last", 3, 6), layer_pairs("skip", 3, 6)
        ([(0, 1), (1, 3), (2, 5)], [(0, 3), (1, 4), (2, 5)], [(0, 0), (1, 2), (2, 4)])

    Reference:
        Jiao et al. 2020, TinyBERT, arXiv:1909.10351; Sun et al. 2019, Patient Knowledge Distillation,
        arXiv:1908.09355.
    """
    if not isinstance(layers, str):
        return [_checked_pair(pair, student, teacher) for pair in layers]
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
        raise ValueError(f"unknown layer map {layers!r}; {nearest(layers, maps)}, or a list of pairs")
    return [(i, maps[layers](i)) for i in range(student)]


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
    tap: str,
    teacher_tap: str,
    pairs: Sequence[tuple[int, int]],
    *,
    name: str,
    weight: float = 1.0,
    **arguments: Any,
) -> list[Term]:
    """Make one term for each pair of layers; the ``{}`` in each tap is replaced by the layer's number.

    Args:
        tap: The student's tap with ``{}`` in the place of the layer, ``"encoder.layer.{}"``.
        teacher_tap: The teacher's tap, likewise.
        pairs: From `layer_pairs`.
        name: The terms are called ``name.0``, ``name.1``, ... after the student's layer (and ``name.0-3``
            where a student layer has several teachers).
        weight: Weight of the whole group, shared out evenly.
        **arguments: What else `Term` takes.

    Raises:
        ValueError: a tap without ``{}``.

    Example:
        >>> [t.name for t in spread("layer.{}", "layer.{}", [(0, 1), (1, 3)], name="hidden", loss="mse")]
        ['hidden.0', 'hidden.1']
    """
    for text in (tap, teacher_tap):
        if "{}" not in text:
            raise ValueError(f"tap {text!r} has no {{}} for the layer's number")
    students = [s for s, _ in pairs]
    terms = []
    for student, teacher in pairs:
        suffix = f"{student}-{teacher}" if students.count(student) > 1 else f"{student}"
        taps = (tap.format(student), teacher_tap.format(teacher))
        term = Term(*taps, name=f"{name}.{suffix}", weight=weight / len(pairs), **arguments)
        terms.append(term)
    return terms
