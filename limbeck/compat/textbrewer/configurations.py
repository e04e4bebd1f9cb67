"""TextBrewer's two configurations, checked when they are made."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from limbeck.compat.textbrewer.presets import (
    FEATURES,
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
    find,
)
from limbeck.registry import refuse_unknown

PAIRED = {"fsp", "gram", "nst", "mmd"}
"""Losses that compare two layers with two."""


class Config:
    """What both configurations can do: come from a dict or a JSON file, and go back."""

    _written: dict[str, Any]

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any]) -> Self:
        """Make it from a dict.

        Raises:
            TypeError: an unknown key; the message says the nearest.
        """
        refuse_unknown(dict_object, inspect.signature(cls).parameters, cls.__name__)
        return cls(**dict_object)

    @classmethod
    def from_json_file(cls, json_filename: str | Path) -> Self:
        """Make it from a JSON file."""
        return cls.from_dict(json.loads(Path(json_filename).read_text()))

    def to_dict(self) -> dict[str, Any]:
        """What it was made of, as `from_dict` takes it."""
        return dict(self._written)

    def to_json_file(self, json_filename: str | Path) -> None:
        """Write what `from_json_file` reads."""
        Path(json_filename).write_text(json.dumps(self.to_dict(), indent=1, default=str) + "\n")

    def __str__(self) -> str:
        return "".join(f"{key} : {value}\n" for key, value in vars(self).items() if not key.startswith("_"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}:\n{self}"


class TrainingConfig(Config):
    """How to train, and what to keep.

    Args:
        gradient_accumulation_steps: Batches of one update.
        ckpt_frequency: How often in an epoch the student is saved.
        ckpt_epoch_frequency: Every how many epochs.
        ckpt_steps: With ``num_steps``, after how many updates; None for the end alone.
        log_dir: Where TensorBoard's files go; None for none.
        output_dir: Where the student's weights go, as ``gs{step}.pkl``.
        device: By default a GPU where there is one.
        fp16: Half precision by autocast.
        fp16_opt_level: Apex's; ``"O0"`` is full precision, the others are autocast.
        data_parallel: Spread each batch over the GPUs of this process.
        local_rank: Not -1 in a training of several processes.
        resume: Keep whole checkpoints in ``output_dir/resume`` too, and go on from there.

    Raises:
        ValueError: a number out of range, or a GPU that is not there.

    Example:
        >>> TrainingConfig.from_dict({"ckpt_frequncy": 2})
        Traceback (most recent call last):
        TypeError: TrainingConfig has no option 'ckpt_frequncy'; did you mean 'ckpt_frequency' ...
    """

    def __init__(
        self,
        gradient_accumulation_steps: int = 1,
        ckpt_frequency: int = 1,
        ckpt_epoch_frequency: int = 1,
        ckpt_steps: int | None = None,
        log_dir: str | Path | None = None,
        output_dir: str | Path = "./saved_models",
        device: str | torch.device | None = None,
        fp16: bool = False,
        fp16_opt_level: str = "O1",
        data_parallel: bool = False,
        local_rank: int = -1,
        resume: bool = False,
    ) -> None:
        self._written = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.ckpt_frequency = ckpt_frequency
        self.ckpt_epoch_frequency = ckpt_epoch_frequency
        self.ckpt_steps = None if ckpt_steps is None else int(ckpt_steps)
        self.log_dir, self.output_dir = log_dir, output_dir
        self.device = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        self.fp16, self.fp16_opt_level = fp16, fp16_opt_level
        self.data_parallel, self.local_rank, self.resume = data_parallel, local_rank, resume
        for name in ("gradient_accumulation_steps", "ckpt_frequency", "ckpt_epoch_frequency", "ckpt_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device is {self.device!r}, and there is no GPU; write device='cpu', or leave it out"
            )
        Path(output_dir).mkdir(parents=True, exist_ok=True)


class IntermediateMatch:
    """One pair of layers, or of two layers each, and how they are compared.

    Args:
        layer_T: The teacher's, as a number in the adaptor's list; for fsp and nst two of them.
        layer_S: The student's.
        weight: The factor on the loss.
        loss: A name in `MATCH_LOSS_MAP`.
        feature: ``"hidden"`` or ``"attention"``.
        proj: ``[kind, dim_S, dim_T]``, and options of the optimizer for it.

    Raises:
        ValueError: an unknown name, or layers that do not go with the loss.
    """

    def __init__(
        self,
        layer_T: int | Sequence[int],
        layer_S: int | Sequence[int],
        weight: float,
        loss: str,
        feature: str,
        proj: Sequence[Any] | None = None,
    ) -> None:
        find(loss, MATCH_LOSS_MAP, "match loss")
        find(feature, dict.fromkeys(FEATURES), "feature")
        counts = [len(layers) if isinstance(layers, Sequence) else 1 for layers in (layer_S, layer_T)]
        if counts[0] != counts[1] or (loss in PAIRED and counts[0] != 2):
            wanted = "two layers of each model" if loss in PAIRED else "as many layers of both models"
            raise ValueError(f"loss {loss!r} compares {wanted}, got layer_S={layer_S} and layer_T={layer_T}")
        self.layer_T, self.layer_S = layer_T, layer_S
        self.feature, self.weight, self.loss = feature, weight, loss
        self.proj = _checked_projection(proj)

    def __repr__(self) -> str:
        return "\nIntermediateMatch: " + ", ".join(f"{key} : {value}" for key, value in vars(self).items())

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any] | None) -> IntermediateMatch | None:
        """Make it from a dict; None stays None.

        Raises:
            TypeError: an unknown key; the message says the nearest.
        """
        if dict_object is None:
            return None
        refuse_unknown(dict_object, inspect.signature(cls).parameters, "an intermediate match")
        return cls(**dict_object)


def _checked_projection(proj: Sequence[Any] | None) -> list[Any] | None:
    """``[kind, dim_S, dim_T, options]``; the user's own list is left as it is."""
    if not proj:
        return None
    kind, *dims = proj[:3]
    options = dict(proj[3]) if len(proj) > 3 else {}
    find(kind, PROJ_MAP, "projection")
    if len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        raise ValueError(f"a projection is written [{kind!r}, dim_S, dim_T], got {list(proj)}")
    return [kind, *dims, options]


class DistillationConfig(Config):
    """What is to be learned: the loss of the logits, that of the labels, and matches between layers.

    Args:
        temperature: T, softens both models' logits.
        temperature_scheduler: ``"constant"``, ``["flsw", beta, gamma]``, ``["cwsm", beta]``, or ``"none"``.
        hard_label_weight: The factor on the sum of the adaptor's ``losses``.
        hard_label_weight_scheduler: ``"linear_decay"``, ``"linear_growth"`` or ``"none"``; multiplies the weight.
        kd_loss_type: ``"ce"`` or ``"mse"``.
        kd_loss_weight: The factor on it.
        kd_loss_weight_scheduler: As above.
        probability_shift: Whether the teacher is put right where it is wrong, by the adaptor's ``labels``.
        intermediate_matches: A list of `IntermediateMatch`, as dicts.
        is_caching_logits: Whether what the teacher says of an example is remembered.
        correct: Whether the losses are limbeck's: ``"ce"`` with the factor T², attention without a mask with all
            its scores, ``"nst"`` with a mask over the width. By default they have TextBrewer's values.

    Raises:
        ValueError: an unknown name, or a value out of range.

    Example:
        >>> DistillationConfig(temperature_scheduler=["flsw", 1, 2]).to_dict()["temperature_scheduler"]
        ['flsw', 1, 2]
    """

    def __init__(
        self,
        temperature: float = 4,
        temperature_scheduler: Any = "none",
        hard_label_weight: float = 0,
        hard_label_weight_scheduler: Any = "none",
        kd_loss_type: str = "ce",
        kd_loss_weight: float = 1,
        kd_loss_weight_scheduler: Any = "none",
        probability_shift: bool = False,
        intermediate_matches: Sequence[Mapping[str, Any] | IntermediateMatch] | None = None,
        is_caching_logits: bool = False,
        correct: bool = False,
    ) -> None:
        self._written = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        if intermediate_matches is not None:
            self._written["intermediate_matches"] = [
                vars(match) if isinstance(match, IntermediateMatch) else dict(match)
                for match in intermediate_matches
            ]
        self.temperature = temperature
        self.temperature_scheduler = _chosen(temperature_scheduler, TEMPERATURE_SCHEDULER, "temperature_scheduler")
        self.hard_label_weight = hard_label_weight
        self.hard_label_weight_scheduler = _chosen(
            hard_label_weight_scheduler, WEIGHT_SCHEDULER, "hard_label_weight_scheduler"
        )
        find(kd_loss_type, KD_LOSS_MAP, "kd_loss_type")
        self.kd_loss_type, self.kd_loss_weight = kd_loss_type, kd_loss_weight
        self.kd_loss_weight_scheduler = _chosen(
            kd_loss_weight_scheduler, WEIGHT_SCHEDULER, "kd_loss_weight_scheduler"
        )
        self.probability_shift = probability_shift
        self.intermediate_matches = [_match(match) for match in intermediate_matches or ()]
        self.is_caching_logits, self.correct = is_caching_logits, correct
        if not temperature > 0:
            raise ValueError(f"a temperature must be positive, got {temperature}")
        for name in ("hard_label_weight", "kd_loss_weight"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a number from 0 on, got {getattr(self, name)}")


def _chosen(name: Any, table: Mapping[Any, Any], what: str) -> Any:
    return None if name is None or name == "none" else find(name, table, what)


def _match(match: Mapping[str, Any] | IntermediateMatch) -> IntermediateMatch:
    if isinstance(match, IntermediateMatch):
        return match
    made = IntermediateMatch.from_dict(match)
    assert made is not None
    return made
