"""What TextBrewer's distillers are made of, for users' own distillers too; `limbeck.adapted` by its old names.

All that is imported here is also what old scripts get by ``from textbrewer.distiller_utils import *``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Dict, List, Optional, Union  # noqa: F401, UP035

import numpy as np  # noqa: F401
import torch
from torch import Tensor, nn  # noqa: F401

from limbeck.adapted import call as auto_forward  # noqa: F401
from limbeck.adapted import entries_of as post_adaptor  # noqa: F401
from limbeck.adapted import outputs_of_both
from limbeck.adapted import select_by_masks as select_logits_with_mask  # noqa: F401
from limbeck.adapted import total_of as sum_of  # noqa: F401
from limbeck.batch import map_tensors
from limbeck.compat.textbrewer import configurations, presets
from limbeck.losses.transforms import probability_shift

CustomMatch, IntermediateMatch = configurations.CustomMatch, configurations.IntermediateMatch
DistillationConfig, TrainingConfig = configurations.DistillationConfig, configurations.TrainingConfig
FEATURES, PROJ_MAP = presets.FEATURES, presets.PROJ_MAP
KD_LOSS_MAP, MATCH_LOSS_MAP = presets.KD_LOSS_MAP, presets.MATCH_LOSS_MAP
TEMPERATURE_SCHEDULER, WEIGHT_SCHEDULER = presets.TEMPERATURE_SCHEDULER, presets.WEIGHT_SCHEDULER

logger = logging.getLogger("Distillation")


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


def get_outputs_from_batch(
    batch: Any, device: Any, model_T: Any, model_S: Any, args: Mapping[str, Any], no_teacher_forward: bool = False
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Run both models; ``(teacher's batch, its output), (student's batch, its output)``."""
    ours, theirs = outputs_of_both(batch, model_S, None if no_teacher_forward else model_T, args, device)
    return theirs, ours
