"""A loss made ready: options checked, schedules and transforms built, whatever the Distiller has to add known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from torch import Tensor

from limbeck.losses.base import LOSSES, SUPPLIED, refuse_sparse, traits_of
from limbeck.losses.transforms import OwnTemperature, Transform, build_temperature, build_transform
from limbeck.reduce import blank, fitting, reduce
from limbeck.registry import check_options
from limbeck.schedules import Scheduled, build_schedule, is_schedule, value_at
from limbeck.types import EXAMPLE_ID, IGNORE_INDEX, LABELS, Sparse

Side = Tensor | tuple[Tensor, ...]
"""What a loss reads of one model: a tensor, or several from several places."""

Target = Side | Sparse
"""What it is compared with, which may be a few entries of logits."""

TransformSpec = str | Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A loss with its options, and what is done to both sides before it.

    Attributes:
        name: The loss's name.
        loss: The function.
        options: Its options; a `limbeck.schedules.Scheduled` among them is evaluated at each call.
        transforms: How they were written; they are applied in this order.
        asks: What of `SUPPLIED` the loss asks for.

    Example:
        >>> import torch
        >>> kd = compare_by("forward_kl", transforms=["standardize"], temperature=2.0)
        >>> abs(kd(torch.tensor([[1.0, 3.0]]), torch.tensor([[10.0, 30.0]])).item()) < 1e-6
        True
    """

    name: str
    loss: Callable[..., Tensor]
    options: Mapping[str, Any]
    transforms: tuple[TransformSpec, ...]
    asks: frozenset[str]
    steps: tuple[Transform, ...] = field(compare=False, repr=False)

    def __call__(
        self,
        student: Side,
        teacher: Target,
        *,
        progress: float | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        **supplied: Any,
    ) -> Tensor:
        """Compare two sides.

        Args:
            student: What was read of the student.
            teacher: What was read of the teacher.
            progress: From 0 to 1; needed where an option is scheduled.
            labels: The batch's labels, for losses and transforms that ask.
            mask: Positions that count, likewise.
            **supplied: What else the loss asks for.
        """
        for target in teacher if isinstance(teacher, tuple) else (teacher,):
            refuse_sparse(f"loss {self.name!r}", traits_of(self.loss).sparse, target)
        student, teacher = self._transformed(student, teacher, labels)
        options = {k: value_at(v, progress, f"{k} of {self.name}") for k, v in self.options.items()}
        if callable(options.get("temperature")):
            options["temperature"] = options["temperature"](student, teacher, mask)
        if LABELS in self.asks:
            supplied[LABELS] = self._known(labels)
        if "mask" in self.asks:
            supplied["mask"] = mask
        return self.loss(student, teacher, **options, **supplied)

    def _transformed(self, student: Side, teacher: Target, labels: Tensor | None) -> tuple[Side, Target]:
        for transform in self.steps:
            if isinstance(student, tuple) or isinstance(teacher, tuple):
                raise ValueError("transforms are for logits, and this term reads several places; drop transforms")
            student, teacher = transform(student, teacher, labels)
        if isinstance(student, tuple) and not takes_several(self.loss):
            raise ValueError(f"loss {self.name!r} compares one place with one, got {len(student)}; name one tap")
        return student, teacher

    @property
    def needs_labels(self) -> bool:
        """Whether the loss itself cannot do without the batch's labels."""
        if LABELS not in self.asks:
            return False
        return inspect.signature(self.loss).parameters[LABELS].default is inspect.Parameter.empty

    def _known(self, labels: Tensor | None) -> Tensor | None:
        if labels is None and self.needs_labels:
            raise ValueError(f"loss {self.name!r} needs labels, and there are none; add them to the batch")
        return labels

    def __repr__(self) -> str:
        shown = [f"{k}={v!r}" for k, v in self.options.items()]
        shown += [f"transforms={list(self.transforms)!r}"] if self.transforms else []
        return ", ".join([self.name, *shown])


def compare_valid(
    comparison: Comparison, student: Side, teacher: Target, mask: Tensor | None, **supplied: Any
) -> Tensor:
    """Compare two sides where a mask says that they count; nothing of the rest gets into a value or a gradient.

    Examples that do not count, by a mask (B,), are left out of the comparison altogether: a loss that relates the
    examples of a batch must not see them. At positions that do not count, by a mask (B, L), both sides are zero.

    Args:
        comparison: The loss.
        student: What was read of the student.
        teacher: What was read of the teacher.
        mask: (B,) or (B, L), or None where all count.
        **supplied: What else the loss asks for; see `Comparison`.

    Returns:
        The values of all positions; 0 for examples that were left out.
    """
    if mask is None:
        return comparison(student, teacher, mask=None, **supplied)
    if mask.ndim > 1:
        return comparison(blanked(student, mask), blanked(teacher, mask), mask=mask, **supplied)
    first = student[0] if isinstance(student, tuple) else student
    if mask.shape != first.shape[:1]:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not fit a batch of {len(first)} examples")
    keep = mask != 0
    if not keep.any():
        return blank(first.reshape(len(first), -1), keep).sum(dim=-1)  # zeros, with a gradient of zeros
    batch = {
        key: value for key, value in supplied.items() if isinstance(value, Tensor) and len(value) == len(keep)
    }
    kept = {**supplied, **{key: value[keep] for key, value in batch.items()}}
    values = comparison(_rows(student, keep), _rows(teacher, keep), mask=None, **kept)
    if values.ndim == 0:
        return values
    return values.new_zeros(len(keep), *values.shape[1:]).index_put((keep.nonzero().flatten(),), values)


@overload
def blanked(side: Side, mask: Tensor) -> Side: ...


@overload
def blanked(side: Target, mask: Tensor) -> Target: ...


def blanked(side: Target, mask: Tensor) -> Target:
    """Zeros at masked positions (B, L), of every tensor that has these positions in front."""

    def of(tensor: Any) -> Any:
        if isinstance(tensor, Sparse):
            return tensor if tensor.shape[: mask.ndim] != mask.shape else tensor.map(lambda t: blank(t, mask))
        is_square = tensor.ndim == 4 and tensor.shape[2] == tensor.shape[3]  # attention, with heads in front
        return tensor if is_square or tensor.shape[: mask.ndim] != mask.shape else blank(tensor, mask)

    changed: Target = tuple(of(t) for t in side) if isinstance(side, tuple) else of(side)
    return changed


@overload
def _rows(side: Side, keep: Tensor) -> Side: ...


@overload
def _rows(side: Target, keep: Tensor) -> Target: ...


def _rows(side: Target, keep: Tensor) -> Target:
    return tuple(t[keep] for t in side) if isinstance(side, tuple) else side[keep]


def compare_by(
    loss: str | Callable[..., Tensor],
    *,
    transforms: TransformSpec | Sequence[TransformSpec] = (),
    given: Sequence[str] = (),
    **options: Any,
) -> Comparison:
    """Make a loss ready.

    Args:
        loss: A registered name, ``"package.module:function"`` or a function.
        transforms: What is done to both sides first: names from `limbeck.losses.transforms`, or
            ``{"kind": name, **options}``.
        given: Keyword-only parameters that the caller fills in at each call, beside `SUPPLIED`.
        **options: Options of the loss. A mapping with the key ``schedule`` changes with progress; a
            ``temperature`` may also be the name of one that each example has of its own.

    Raises:
        ValueError: unknown names.
        TypeError: an option that the loss does not have.

    Example:
        >>> compare_by("forward_kl", transforms="standardize", temperature={"schedule": "linear", "start": 8})
        forward_kl, temperature=1 x linear(start=8), transforms=['standardize']
    """
    function = LOSSES.get(loss) if isinstance(loss, str) else loss
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    check_options(function, options, SUPPLIED | set(given), f"loss {name!r}")
    written = (transforms,) if isinstance(transforms, (str, Mapping)) else tuple(transforms)
    steps = tuple(build_transform(spec) for spec in written)
    return Comparison(name, function, _built(options), written, _asked_for(function), steps)


def takes_several(function: Callable[..., Tensor]) -> bool:
    """Whether a loss takes tuples of tensors, by its signature; one that does not say may.

    Example:
        >>> takes_several(LOSSES.get("fsp")), takes_several(LOSSES.get("mse"))
        (True, False)
    """
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first is None or first.annotation not in (Tensor, "Tensor")


def _built(options: Mapping[str, Any]) -> dict[str, Any]:
    built = {key: build_schedule(value) if is_schedule(value) else value for key, value in options.items()}
    temperature = built.get("temperature")
    if callable(temperature) and not isinstance(temperature, OwnTemperature):  # of progress, as a weight may be
        built["temperature"] = temperature = build_schedule(temperature)
    if isinstance(temperature, Mapping) and any(is_schedule(value) for value in temperature.values()):
        raise ValueError(f"the options of each example's own temperature cannot be scheduled, got {temperature}")
    if isinstance(temperature, (str, Mapping)):
        built["temperature"] = build_temperature(temperature)
    if isinstance(temperature, Scheduled) and temperature.lowest() <= 0:
        raise ValueError(
            f"a temperature must be positive, and {temperature} goes down to {temperature.lowest():g}"
        )
    return built


def _asked_for(function: Callable[..., Tensor]) -> frozenset[str]:
    """The inputs beside the two sides that a loss asks for, as keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return SUPPLIED & {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def evaluate(
    name: str | Callable[..., Tensor],
    student: Side,
    teacher: Target,
    reduction: Literal["mean", "batchmean", "sum"] = "mean",
    *,
    mask: Tensor | None = None,
    transforms: TransformSpec | Sequence[TransformSpec] = (),
    progress: float | None = None,
    **options: Any,
) -> Tensor:
    """Compute one number from a loss, outside of any Distiller.

    Args:
        name: A registered name, ``"package.module:function"`` or a function.
        student: What is read of the student, a tensor or a tuple of tensors.
        teacher: What it is compared with; `limbeck.types.TopK` may stand where a loss reads logits.
        reduction: ``"mean"`` over valid positions, ``"sum"`` over them, or ``"batchmean"``: the sum divided by
            the number of examples.
        mask: (B,) or (B, L), 0 where a position does not count; it is also given to a loss that asks for one. By
            default the positions with a label count, where there are labels for positions.
        transforms: See `compare_by`.
        progress: Where training is, from 0 to 1, for scheduled options.
        **options: Options of the loss, and the ``labels`` or ``example_id`` that it asks for. Where it asks for
            no labels, those of positions are its mask.

    Returns:
        A scalar.

    Raises:
        ValueError: an unknown name or reduction, or inputs that do not fit.
        TypeError: an option that the loss does not have, or one that it needs and did not get.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> round(evaluate("forward_kl", student, teacher, temperature=4.0).item(), 4)
        0.4848
    """
    supplied = {key: options.pop(key) for key in (*SUPPLIED, *_brought(name)) if key in options}
    comparison = compare_by(name, transforms=transforms, given=tuple(supplied), **options)
    labels = supplied.get("labels")
    mask = None if mask is None else mask != 0
    if EXAMPLE_ID in supplied and EXAMPLE_ID not in comparison.asks:
        raise TypeError(f"loss {comparison.name!r} has no option {EXAMPLE_ID!r}; leave it out")
    values = compare_valid(comparison, student, teacher, mask, progress=progress, **supplied)
    if mask is None:
        mask = _labelled(teacher if labels is None else labels, values, options.get("ignore_index"))
        if labels is not None and mask is None and not ("labels" in comparison.asks or comparison.steps):
            raise TypeError(
                f"loss {comparison.name!r} reads no labels, and those of shape {tuple(labels.shape)} are no mask "
                f"for values of shape {tuple(values.shape)}; leave them out"
            )
    return reduce(values, fitting(mask, values), reduction)


def _labelled(labels: Target, values: Tensor, ignore_index: Any) -> Tensor | None:
    """Which positions have a label, where these are labels of positions: class indices, or numbers to predict."""
    if not isinstance(labels, Tensor) or labels.shape != values.shape:
        return None
    if ignore_index is None and labels.is_floating_point():
        return None
    return labels != (IGNORE_INDEX if ignore_index is None else ignore_index)


def _brought(loss: str | Callable[..., Tensor]) -> tuple[str, ...]:
    traits = traits_of(LOSSES.get(loss) if isinstance(loss, str) else loss)
    return (*traits.learns, *traits.borrows)
