"""What TextBrewer's distillers are made of, for users' own distillers too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Dict, List, Optional, Union  # noqa: UP035

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.batch import map_tensors
from limbeck.compat.textbrewer.configurations import (
    CustomMatch,
    DistillationConfig,
    IntermediateMatch,
    TrainingConfig,
)
from limbeck.compat.textbrewer.presets import (
    FEATURES,
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
)
from limbeck.losses.transforms import probability_shift
from limbeck.types import TEACHER_CACHE

__all__ = [
    "FEATURES",
    "KD_LOSS_MAP",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "TEMPERATURE_SCHEDULER",
    "WEIGHT_SCHEDULER",
    "CustomMatch",
    "Dict",
    "DistillationConfig",
    "IntermediateMatch",
    "List",
    "Optional",
    "TrainingConfig",
    "Union",
    "auto_forward",
    "get_outputs_from_batch",
    "logger",
    "move_to_device",
    "nn",
    "np",
    "post_adaptor",
    "probability_shift_",
    "select_logits_with_mask",
    "torch",
]
"""Also what old scripts get by ``from textbrewer.distiller_utils import *``."""

logger = logging.getLogger("Distillation")

LISTED = ("logits", "logits_mask", "losses", "labels")
"""What an adaptor may give once or in a list."""


def post_adaptor(dict_object: Mapping[str, Any]) -> dict[str, Any]:
    """What an adaptor gave, with lists where there may be several.

    Raises:
        TypeError: the adaptor returned no dict, or None for its logits or losses.

    Example:
        >>> post_adaptor({"losses": 1.0})
        {'losses': [1.0]}
    """
    given: Any = dict_object
    if not isinstance(given, Mapping):
        raise TypeError(f"an adaptor returns a dict, got {type(given).__name__}")
    for name in ("logits", "losses"):
        if given.get(name, ()) is None:
            raise TypeError(f"an adaptor gave None for {name!r}; leave {name!r} out where there is none")
    there = {k: v for k, v in given.items() if v is not None}  # hidden states that a model was not asked for
    return {k: [v] if k in LISTED and not isinstance(v, (list, tuple)) else v for k, v in there.items()}


def select_logits_with_mask(
    logits_list: Sequence[Tensor], masks_list: Sequence[Tensor], dims: int = 3
) -> list[Tensor]:
    """The logits of the positions that masks keep, (N, C) of (B, L, C); logits (B, C) stay as they are.

    Args:
        logits_list: Logits.
        masks_list: As many masks (B, L), or one for all.
        dims: How many dimensions those have that are selected from; of labels 2.

    Raises:
        ValueError: another number of masks, or one of another shape.

    Example:
        >>> both, masks = [torch.zeros(1, 2, 3), torch.ones(1, 2, 3)], [torch.tensor([[1, 0]])]
        >>> [logits.shape[0] for logits in select_logits_with_mask(both, masks)]
        [1, 1]
    """
    masks = list(masks_list) * len(logits_list) if len(masks_list) == 1 else masks_list
    _check_number("logits_mask", masks, logits_list)
    return [_selected(*pair, dims) for pair in zip(logits_list, masks, strict=True)]


def _selected(values: Tensor, mask: Tensor, dims: int) -> Tensor:
    if values.ndim != dims:
        return values
    if mask.shape != values.shape[:2]:
        raise ValueError(f"a logits_mask {tuple(mask.shape)} does not fit {tuple(values.shape)}; give (B, L)")
    return values[mask != 0]


def _check_number(what: str, given: Sequence[Any], logits: Sequence[Any]) -> None:
    if len(given) != len(logits):
        raise ValueError(f"an adaptor gave {len(given)} {what} for {len(logits)} logits; give one for each")


def logits_of(
    results_S: Mapping[str, Any], results_T: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """What counts of both models' logits, pair by pair, and the labels of it where there are some.

    Raises:
        ValueError: different numbers of logits, or masks that keep different positions.
    """
    ours, theirs, labels = results_S["logits"], results_T["logits"], results_S.get("labels")
    _check_number("logits of the teacher", theirs, ours)
    if labels is not None:
        _check_number("labels", labels, ours)
    masks = [results["logits_mask"] for results in (results_S, results_T) if "logits_mask" in results]
    if masks:  # of one model alone it serves both
        labels = None if labels is None else select_logits_with_mask(labels, masks[0], dims=2)
        ours, theirs = select_logits_with_mask(ours, masks[0]), select_logits_with_mask(theirs, masks[-1])
    for own, other in zip(ours, theirs, strict=True):
        if own.shape[:-1] != other.shape[:-1]:
            raise ValueError(f"logits {tuple(own.shape)} of the student meet {tuple(other.shape)} of the teacher")
    return list(zip(ours, theirs, [None] * len(ours) if labels is None else labels, strict=True))


def probability_shift_(tensor: Tensor, labels: Tensor) -> Tensor:
    """The teacher's logits with its largest and that of the label exchanged; the tensor itself is left alone.

    Example:
        >>> probability_shift_(torch.tensor([[5.0, 2.0]]), torch.tensor([1]))
        tensor([[2., 5.]])
    """
    return probability_shift(tensor, tensor, labels=torch.where(labels < 0, -100, labels))[1]


def refuse_other(config: Any, kind: type, place: str) -> None:
    """Refuse a configuration of another kind.

    Raises:
        TypeError: it is of another kind.
    """
    if not isinstance(config, kind):
        raise TypeError(f"the {place} argument of a distiller is a {kind.__name__}, got {said(config)}")


def said(given: Any) -> str:
    """What was given, in few words.

    Example:
        >>> said([]), said([1])
        ('[]', 'a list')
    """
    return f"a {type(given).__name__}" if given or not isinstance(given, (list, tuple, dict)) else f"{given!r}"


def sum_of(losses: Sequence[Any]) -> Any:
    """The sum of an adaptor's losses.

    Raises:
        TypeError: one that is no tensor, from which nothing can be learned.

    Example:
        >>> sum_of([torch.tensor([1.0, 3.0]), torch.tensor(4.0)])
        tensor(6.)
    """
    for loss in losses:
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the losses of an adaptor are tensors, got {loss!r}; is the student given its labels?"
            )
    return sum(loss.mean() for loss in losses)


def check_projected(match: IntermediateMatch, student: Sequence[Tensor]) -> None:
    """Check that a projection takes states of this width.

    Raises:
        ValueError: it takes another one.
    """
    if match.proj is None or match.proj[0] not in ("linear", "relu", "tanh"):
        return
    for state in student:
        if state.shape[-1] != match.proj[1]:
            raise ValueError(
                f"proj {list(match.proj[:3])} of {match.loss} takes a width of {match.proj[1]}, and "
                f"{match.feature} {match.layer_S} of the student is {tuple(state.shape)}; write "
                f"dim_S={state.shape[-1]}"
            )


def check_widths(match: IntermediateMatch, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Check that states, projected, are as wide as the teacher's, for losses that compare number by number.

    Raises:
        ValueError: the widths differ.
    """
    widths = student[0].shape[-1], teacher[0].shape[-1]
    if match.loss in ("hidden_mse", "cos", "pkd") and widths[0] != widths[1]:
        raise ValueError(
            f"{match.loss} compares a width of {widths[0]} ({match.feature} {match.layer_S} of the student) with "
            f"{widths[1]} ({match.layer_T} of the teacher); write 'proj': ['linear', dim_S, {widths[1]}]"
        )


def move_to_device(batch: Any, device: Any) -> Any:
    """The tensors of a batch, whatever its form, on a device."""
    return map_tensors({"batch": batch}, lambda tensor: tensor.to(device))["batch"]


def each(models: Any, function: Callable[[Any], Any]) -> Any:
    """What a function makes of a model, or of each in a list or a dict.

    Example:
        >>> each({"a": 1, "b": 2}, str)
        {'a': '1', 'b': '2'}
    """
    if isinstance(models, Mapping):
        return {name: function(model) for name, model in models.items()}
    return [function(model) for model in models] if isinstance(models, (list, tuple)) else function(models)


def auto_forward(model: Any, batch: Any, args: Mapping[str, Any]) -> Any:
    """Call a model, or each of several, with a batch: by name of a dict, in order of a tuple."""
    if isinstance(batch, Mapping):
        return each(model, lambda one: one(**batch, **args))
    inputs = batch if isinstance(batch, (list, tuple)) else [batch]
    return each(model, lambda one: one(*inputs, **args))


def get_outputs_from_batch(
    batch: Any, device: Any, model_T: Any, model_S: Any, args: Mapping[str, Any], no_teacher_forward: bool = False
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Run both models; ``(teacher's batch, its output), (student's batch, its output)``.

    A batch ``{"student": ..., "teacher": ...}`` has a part for each. Where it has a ``teacher_cache``, that is the
    teacher's output.
    """
    batch = move_to_device(batch, device)
    named = batch if isinstance(batch, Mapping) else {}
    batch_T, batch_S = (
        batch[side] if {"teacher", "student"} <= set(named) else batch for side in ("teacher", "student")
    )
    results_T = named.get(TEACHER_CACHE)
    if TEACHER_CACHE not in named and not no_teacher_forward:
        with torch.no_grad():
            results_T = auto_forward(model_T, batch_T, args)
    return (batch_T, results_T), (batch_S, auto_forward(model_S, batch_S, args))
