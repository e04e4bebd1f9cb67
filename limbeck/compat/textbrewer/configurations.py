"""TextBrewer's configurations, checked when they are made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from limbeck.adapted.matches import listed
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
from limbeck.train.refusals import check_device

PAIRED = {"fsp", "gram", "nst", "mmd"}
"""Losses that compare two layers with two."""

ALIKE = {"hidden_mse", "cos", "pkd"}
"""Losses that compare number by number."""


@dataclass(repr=False)
class Config:
    """What all configurations can do: come from a dict or a JSON file, and go back."""

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any]) -> Self:
        """Make it from a dict.

        Raises:
            TypeError: no dict, an unknown key (the message says the nearest), or one that is missing.
        """
        given: Any = dict_object
        if not isinstance(given, Mapping):
            raise TypeError(f"{cls.__name__} is made of a dict, got {given!r}; write its options by their names")
        refuse_unknown(given, [field.name for field in fields(cls)], cls.__name__)
        for field in fields(cls):
            if field.default is MISSING and field.name not in given:
                raise TypeError(f"{cls.__name__} needs {field.name!r}, and got only {sorted(given)}; add it")
        return cls(**given)

    @classmethod
    def from_json_file(cls, json_filename: str | Path) -> Self:
        """Make it from a JSON file."""
        return cls.from_dict(json.loads(Path(json_filename).read_text()))

    def __post_init__(self) -> None:
        self._written = dict(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """What it was made of, as `from_dict` takes it."""
        matches = self._written.get("intermediate_matches") or ()
        plain = [match.to_dict() if isinstance(match, Config) else dict(match) for match in matches]
        return {**self._written, "intermediate_matches": plain} if plain else dict(self._written)

    def to_json_file(self, json_filename: str | Path) -> None:
        """Write what `from_json_file` reads."""
        Path(json_filename).write_text(json.dumps(self.to_dict(), indent=1, default=str) + "\n")

    def __str__(self) -> str:
        return "".join(f"{field.name} : {getattr(self, field.name)}\n" for field in fields(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}:\n{self}"


@dataclass(repr=False)
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

    gradient_accumulation_steps: int = 1
    ckpt_frequency: int = 1
    ckpt_epoch_frequency: int = 1
    ckpt_steps: int | None = None
    log_dir: str | Path | None = None
    output_dir: str | Path = "./saved_models"
    device: Any = None
    fp16: bool = False
    fp16_opt_level: str = "O1"
    data_parallel: bool = False
    local_rank: int = -1
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gradient_accumulation_steps", "ckpt_frequency", "ckpt_epoch_frequency", "ckpt_steps"):
            value = getattr(self, name)
            if value is not None and (_number(name, value) < 1 or value != int(value)):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        find(self.fp16_opt_level, dict.fromkeys(("O0", "O1", "O2", "O3")), "fp16_opt_level")
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(self.device)
        Path(self.output_dir).mkdir(parents=True, exist_ok=True)


@dataclass(repr=False)
class IntermediateMatch(Config):
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

    layer_T: int | Sequence[int]  # noqa: N815
    layer_S: int | Sequence[int]  # noqa: N815
    weight: float
    loss: str
    feature: str
    proj: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        find(self.loss, MATCH_LOSS_MAP, "match loss")
        find(self.feature, dict.fromkeys(FEATURES), "feature")
        _number("the weight of a match", self.weight)
        for name in ("layer_T", "layer_S"):
            layers = getattr(self, name)
            if isinstance(layers, str) or not all(isinstance(layer, Integral) for layer in listed(layers)):
                raise TypeError(f"{name} is a layer's number or a list of them, got {layers!r}")
        counts = {len(listed(self.layer_S)), len(listed(self.layer_T))}
        if len(counts) > 1 or (self.loss in PAIRED and counts != {2}):
            wanted = "two layers of each model" if self.loss in PAIRED else "as many layers of both models"
            layers = f"layer_S={self.layer_S} and layer_T={self.layer_T}"
            raise ValueError(f"loss {self.loss!r} compares {wanted}, got {layers}")
        if self.proj:
            given = self.proj
            self.proj = _projection(*([given] if isinstance(given, str) else given))

    def check_projected(self, state: Tensor) -> None:
        """Refuse a state of the student that the projection does not take."""
        proj, width = self.proj, state.shape[-1]
        if proj and proj[0] in ("linear", "relu", "tanh") and width != proj[1]:
            raise ValueError(
                f"proj {list(proj[:3])} of {self.loss} takes a width of {proj[1]}, and {self.feature} "
                f"{self.layer_S} of the student is {tuple(state.shape)}; write dim_S={width}"
            )

    def check_widths(self, student: Any, teacher: Any) -> None:
        """Refuse states of two widths where a loss compares number by number."""
        if self.loss in ALIKE and student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"{self.loss} compares a width of {student.shape[-1]} ({self.feature} {self.layer_S} of the "
                f"student) with {teacher.shape[-1]} ({self.layer_T} of the teacher); write 'proj': ['linear', "
                f"dim_S, {teacher.shape[-1]}]"
            )


@dataclass(repr=False)
class CustomMatch(Config):
    """A match between the outputs of two modules, wherever they stand.

    Args:
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
    proj_group: Mapping[str, Any] | None = None


def _projection(kind: str, *dims: Any) -> list[Any]:
    """``[kind, dim_S, dim_T, options]``."""
    find(kind, PROJ_MAP, "projection")
    sizes, options = dims[:2], dims[2] if len(dims) == 3 else {}
    is_sized = len(dims) in (2, 3) and all(isinstance(size, Integral) and int(size) > 0 for size in sizes)
    if not is_sized or not isinstance(options, Mapping):
        wanted = f"[{kind!r}, dim_S, dim_T] or [{kind!r}, dim_S, dim_T, {{'lr': 0.001}}]"
        raise ValueError(f"a projection is written {wanted}, got {[kind, *dims]}")
    return [kind, *sizes, dict(options)]


def _number(name: str, value: Any) -> Any:
    """The value, where it is a number.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


@dataclass(repr=False)
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

    temperature: float = 4
    temperature_scheduler: Any = "none"
    hard_label_weight: float = 0
    hard_label_weight_scheduler: Any = "none"
    kd_loss_type: str = "ce"
    kd_loss_weight: float = 1
    kd_loss_weight_scheduler: Any = "none"
    probability_shift: bool = False
    intermediate_matches: Sequence[Any] | None = None
    is_caching_logits: bool = False
    correct: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < _number("temperature", self.temperature) < math.inf:
            raise ValueError(f"a temperature must be positive and finite, got {self.temperature}")
        if not isinstance(self.kd_loss_type, str):  # it is looked up by its name
            raise TypeError(f"kd_loss_type is 'ce' or 'mse', got {self.kd_loss_type!r}")
        find(self.kd_loss_type, KD_LOSS_MAP, "kd_loss_type")
        for name in ("hard_label_weight", "kd_loss_weight"):
            if not 0 <= _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        for name in ("temperature_scheduler", "hard_label_weight_scheduler", "kd_loss_weight_scheduler"):
            table = TEMPERATURE_SCHEDULER if name == "temperature_scheduler" else WEIGHT_SCHEDULER
            chosen = getattr(self, name)
            if chosen in ("flsw", "cwsm"):
                options = "beta, gamma" if chosen == "flsw" else "beta"
                raise ValueError(f"temperature_scheduler {chosen!r} has options; write [{chosen!r}, {options}]")
            setattr(self, name, None if chosen in (None, "none") else find(chosen, table, name))
        if isinstance(self.intermediate_matches, (str, Mapping)):
            raise TypeError(f"intermediate_matches is a list of dicts, got {self.intermediate_matches!r}")
        self.intermediate_matches = [
            match if isinstance(match, IntermediateMatch) else IntermediateMatch.from_dict(match)
            for match in self.intermediate_matches or ()
        ]
