"""What TextBrewer's distillers are made of, for users' own distillers too."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Optional, Union  # noqa: UP035

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.batch import map_tensors
from limbeck.compat.textbrewer.configurations import DistillationConfig, IntermediateMatch, TrainingConfig
from limbeck.compat.textbrewer.presets import (
    FEATURES,
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
    find,
)
from limbeck.losses.transforms import probability_shift

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
TOKENS = 3
"""Logits with so many dimensions have positions, and a mask of them."""


@dataclass
class CustomMatch:
    """A match between the outputs of two modules, wherever they stand.

    Attributes:
        module_T: The teacher's module, or its path.
        module_S: The student's.
        weight: The factor on the loss.
        loss: A name in `MATCH_LOSS_MAP`, or a function ``(student, teacher, mask_S, mask_T)``, or with one mask.
        proj_func: What is done to the student's output first; a module trains with the student.
        proj_group: Options of the optimizer for it.
    """

    module_T: nn.Module | str  # noqa: N815
    module_S: nn.Module | str  # noqa: N815
    weight: float
    loss: Any
    proj_func: Any = None
    proj_group: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any]) -> CustomMatch:
        """Make it from a dict."""
        return cls(**dict_object)

    def value(self, student: Tensor, teacher: Tensor, mask_S: Tensor | None, mask_T: Tensor | None) -> Tensor:
        """The unweighted loss of two outputs."""
        loss = find(self.loss, MATCH_LOSS_MAP, "match loss") if isinstance(self.loss, str) else self.loss
        student = student if self.proj_func is None else self.proj_func(student)
        try:
            inspect.signature(loss).bind(student, teacher, mask_S, mask_T)
        except TypeError:
            return loss(student, teacher, mask_S)  # type: ignore[no-any-return]
        return loss(student, teacher, mask_S, mask_T)  # type: ignore[no-any-return]


def path_of(model: nn.Module, module: nn.Module | str) -> str:
    """Where a module stands in a model.

    Raises:
        ValueError: nowhere.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> path_of(model, model[1])
        '1'
    """
    if isinstance(module, str):
        return module
    path: str = next((name for name, part in model.named_modules() if part is module), "")
    if not path:
        raise ValueError(f"a {type(module).__name__} to match is no part of the {type(model).__name__}")
    return path


def post_adaptor(dict_object: Mapping[str, Any]) -> dict[str, Any]:
    """What an adaptor gave, with lists where there may be several.

    Raises:
        TypeError: the adaptor returned no dict.

    Example:
        >>> post_adaptor({"losses": 1.0})
        {'losses': [1.0]}
    """
    given: Any = dict_object
    if not isinstance(given, Mapping):
        raise TypeError(f"an adaptor returns a dict, got {type(given).__name__}")
    return {k: [v] if k in LISTED and not isinstance(v, (list, tuple)) else v for k, v in given.items()}


def select_logits_with_mask(logits_list: Sequence[Tensor], masks_list: Sequence[Tensor]) -> list[Tensor]:
    """The logits of the positions that masks keep, (N, C) of (B, L, C); logits (B, C) stay as they are.

    Args:
        logits_list: Logits.
        masks_list: As many masks (B, L), or one for all.

    Raises:
        ValueError: another number of masks, or one of another shape.

    Example:
        >>> both, masks = [torch.zeros(1, 2, 3), torch.ones(1, 2, 3)], [torch.tensor([[1, 0]])]
        >>> [logits.shape[0] for logits in select_logits_with_mask(both, masks)]
        [1, 1]
    """
    return [
        _selected(logits, mask) for logits, mask in zip(logits_list, _spread(masks_list, logits_list), strict=True)
    ]


def _selected(values: Tensor, mask: Tensor, dims: int = TOKENS) -> Tensor:
    if values.ndim != dims:
        return values
    if mask.shape != values.shape[:2]:
        raise ValueError(f"a logits_mask {tuple(mask.shape)} does not fit {tuple(values.shape)}; give (B, L)")
    return values[mask != 0]


def _spread(masks: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
    if len(masks) not in (1, len(logits)):
        raise ValueError(
            f"an adaptor gave {len(masks)} logits_mask for {len(logits)} logits; give one, or one each"
        )
    return list(masks) if len(masks) == len(logits) else [masks[0]] * len(logits)


def logits_of(
    results_S: Mapping[str, Any], results_T: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """What counts of both models' logits, pair by pair, and the labels of it where there are some.

    Raises:
        ValueError: different numbers of logits, or masks that keep different positions.
    """
    ours, theirs = list(results_S["logits"]), list(results_T["logits"])
    if len(ours) != len(theirs):
        raise ValueError(f"the student's adaptor gave {len(ours)} logits and the teacher's {len(theirs)}")
    labels = list(results_S.get("labels", [])) or [None] * len(ours)
    if len(labels) != len(ours):
        raise ValueError(f"the student's adaptor gave {len(labels)} labels for {len(ours)} logits")
    masks_S = results_S.get("logits_mask", results_T.get("logits_mask"))
    masks_T = results_T.get("logits_mask", masks_S)
    if masks_S is not None and masks_T is not None:
        is_token = [logits.ndim == TOKENS for logits in ours]
        masks = zip(labels, _spread(masks_S, ours), is_token, strict=True)
        labels = [_selected(own, mask, 2) if own is not None and token else own for own, mask, token in masks]
        ours, theirs = select_logits_with_mask(ours, masks_S), select_logits_with_mask(theirs, masks_T)
    for own, other in zip(ours, theirs, strict=True):
        if own.shape[:-1] != other.shape[:-1]:
            raise ValueError(f"logits {tuple(own.shape)} of the student meet {tuple(other.shape)} of the teacher")
    return list(zip(ours, theirs, labels, strict=True))


def probability_shift_(tensor: Tensor, labels: Tensor) -> Tensor:
    """The teacher's logits with its largest and that of the label exchanged; the tensor itself is left alone.

    Example:
        >>> probability_shift_(torch.tensor([[5.0, 2.0]]), torch.tensor([1]))
        tensor([[2., 5.]])
    """
    return probability_shift(tensor, tensor, labels=torch.where(labels < 0, -100, labels))[1]


def move_to_device(batch: Any, device: Any) -> Any:
    """The tensors of a batch, whatever its form, on a device."""
    return map_tensors({"batch": batch}, lambda tensor: tensor.to(device))["batch"]


def auto_forward(model: Any, batch: Any, args: Mapping[str, Any]) -> Any:
    """Call a model, or each of several, with a batch: by name of a dict, in order of a tuple."""
    if isinstance(model, (list, tuple)):
        return [auto_forward(one, batch, args) for one in model]
    if isinstance(model, Mapping):
        return {name: auto_forward(one, batch, args) for name, one in model.items()}
    if isinstance(batch, Mapping):
        return model(**batch, **args)
    return model(*batch, **args) if isinstance(batch, (list, tuple)) else model(batch, **args)


def parts_for(batch: Any) -> tuple[Any, Any]:
    """What of a batch is for the teacher, and what for the student."""
    if isinstance(batch, Mapping) and "teacher" in batch and "student" in batch:
        return batch["teacher"], batch["student"]
    return batch, batch


def get_outputs_from_batch(
    batch: Any, device: Any, model_T: Any, model_S: Any, args: Mapping[str, Any], no_teacher_forward: bool = False
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Run both models; ``(teacher's batch, its output), (student's batch, its output)``.

    Where the batch has a ``teacher_cache``, that is the teacher's output.
    """
    batch = move_to_device(batch, device)
    batch_T, batch_S = parts_for(batch)
    results_T = None
    if not no_teacher_forward:
        with torch.no_grad():
            known = isinstance(batch, Mapping) and "teacher_cache" in batch
            results_T = batch["teacher_cache"] if known else auto_forward(model_T, batch_T, args)
    return (batch_T, results_T), (batch_S, auto_forward(model_S, batch_S, args))
