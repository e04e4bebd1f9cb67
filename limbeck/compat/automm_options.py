"""AutoMM's hyperparameters by their dotted names, and what of limbeck they mean."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from limbeck.registry import nearest, refuse_unknown
from limbeck.tasks.column_kinds import CATEGORICAL, IMAGE, KINDS, NUMERICAL, TEXT
from limbeck.terms import Term
from limbeck.train import Settings

Hyperparameters = Mapping[str, Any] | Sequence[str] | str | None

DEFAULTS: dict[str, Any] = {
    "model.names": None,
    "model.hf_text.checkpoint_name": None,
    "model.hf_text.pooling_mode": "cls",
    "model.hf_text.max_text_len": 512,
    "model.timm_image.checkpoint_name": None,
    "model.fusion_mlp.hidden_sizes": [128],
    "model.fusion_mlp.dropout": 0.1,
    "data.categorical.convert_to_text": False,
    "data.numerical.convert_to_text": False,
    "optim.lr": 1e-4,
    "optim.weight_decay": 1e-3,
    "optim.optim_type": "adamw",
    "optim.lr_schedule": "cosine_decay",
    "optim.warmup_steps": 0.1,
    "optim.max_epochs": 20,
    "optim.max_steps": -1,
    "optim.patience": 10,
    "optim.val_check_interval": 0.5,
    "optim.gradient_clip_val": 1,
    "optim.label_smoothing": 0.0,
    "env.batch_size": 128,
    "env.per_gpu_batch_size": 8,
    "env.num_gpus": -1,
    "env.precision": 32,
    "distiller.temperature": 5.0,
    "distiller.temperature_squared": True,
    "distiller.hard_label_weight": 0.1,
    "distiller.soft_label_weight": 1.0,
    "distiller.soft_label_loss_type": "",
    "distiller.softmax_regression_weight": 0.0,
    "distiller.softmax_regression_loss_type": "mse",
    "distiller.output_feature_loss_weight": 0.01,
    "distiller.output_feature_loss_type": "mse",
    "distiller.rkd_distance_loss_weight": 0.0,
    "distiller.rkd_angle_loss_weight": 0.0,
}
"""What is understood; ``distiller.temperature_squared`` is limbeck's own."""

RENAMED = {
    "optim.learning_rate": "optim.lr",
    "model.fusion_mlp.drop_rate": "model.fusion_mlp.dropout",
    "distiller.embedding_loss_weight": "distiller.output_feature_loss_weight",
    "distiller.embedding_loss_type": "distiller.output_feature_loss_type",
}

UNUSED = {
    *("optim.lr_choice", "optim.lr_decay", "optim.lr_mult", "optim.end_lr", "optim.top_k", "optim.loss_func"),
    *("optim.top_k_average_method", "optim.efficient_finetune", "optim.peft", "optim.loss_function"),
    *("optim.gradient_clip_algorithm", "optim.check_val_every_n_epoch", "model.hf_text.text_trivial_aug_maxscale"),
    *("model.hf_text.text_train_augment_types", "model.timm_image.train_transforms", "data.mixup.turn_on"),
}
"""Known to AutoMM and without a counterpart; whoever sets one is told."""

HARMLESS = {
    *("env.num_workers", "env.num_workers_evaluation", "env.num_workers_inference", "env.num_nodes"),
    *("env.per_gpu_batch_size_evaluation", "env.eval_batch_size_ratio", "env.inference_batch_size_ratio"),
    *("env.strategy", "env.accelerator", "env.deterministic", "env.auto_select_gpus", "optim.track_grad_norm"),
    *("model.hf_text.gradient_checkpointing", "model.hf_text.low_cpu_mem_usage"),
}
"""They change how fast AutoMM is, and not what it learns."""

PRESETS = {
    "medium_quality": ("google/electra-small-discriminator", "microsoft/swin-tiny-patch4-window7-224"),
    "high_quality": ("google/electra-base-discriminator", "microsoft/swin-base-patch4-window7-224"),
    "best_quality": ("microsoft/deberta-v3-base", "microsoft/swin-large-patch4-window7-224"),
}
"""Encoders of texts and images, where none is named."""

READS = {
    "hf_text": {TEXT},
    "timm_image": {IMAGE},
    "categorical_mlp": {CATEGORICAL},
    "categorical_transformer": {CATEGORICAL},
    "numerical_mlp": {NUMERICAL},
    "numerical_transformer": {NUMERICAL},
    "ft_transformer": {CATEGORICAL, NUMERICAL},
    "fusion_mlp": set(),
    "fusion_transformer": set(),
}
"""What kinds of columns each of AutoMM's models reads."""

ABOVE_ZERO = ("env.batch_size", "env.per_gpu_batch_size", "optim.val_check_interval", "distiller.temperature")

SETTINGS = {
    "epochs": "optim.max_epochs",
    "batch_size": "env.batch_size",
    "optimizer": "optim.optim_type",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "warmup": "optim.warmup_steps",
    "clip": "optim.gradient_clip_val",
    "patience": "optim.patience",
}
"""Hyperparameters that are limbeck's settings under another name."""

SCHEDULES = {
    "cosine_decay": "cosine",
    "polynomial_decay": "linear",
    "linear_decay": "linear",
    "constant": "constant",
}
PRECISIONS = {
    "32": "fp32",
    "32-true": "fp32",
    "bf16": "bf16",
    "bf16-mixed": "bf16",
    "16": "fp16",
    "16-mixed": "fp16",
}
FEATURE_LOSSES = {"mse": "mse", "mean_square_error": "mse", "cosine": "cosine", "cosine_distance": "cosine"}
PROJECT = {"project": "linear_where_needed"}
SOFT_LOSSES = {"mse": "logit_mse", "cross_entropy": "soft_cross_entropy"}


def flattened(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Hyperparameters by name, from a dictionary or from ``"name=value"`` in one text or a list.

    Example:
        >>> flattened("optimization.max_epochs=3 env.num_gpus=0")
        {'optim.max_epochs': 3, 'env.num_gpus': 0}
    """
    if isinstance(hyperparameters, str):
        hyperparameters = hyperparameters.split()
    if not isinstance(hyperparameters, Mapping):
        pairs = [text.partition("=") for text in hyperparameters or ()]
        for name, equals, _ in pairs:
            if not equals:
                raise ValueError(f"hyperparameter {name!r} has no value; write it as name=value")
        hyperparameters = {name: yaml.safe_load(value) for name, _, value in pairs}
    given = {_canonical(name): value for name, value in hyperparameters.items()}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _canonical(name: str) -> str:
    """One name of several: of older versions, or of a model that was given a name of its own."""
    name = re.sub(r"^optimization\.", "optim.", name)
    name = re.sub(r"^model\.(hf_text|timm_image|fusion_mlp)_\w+\.", r"model.\1.", name)
    return RENAMED.get(name, name)


@dataclass(frozen=True)
class Options:
    """Hyperparameters, each with its default where it was not given.

    Attributes:
        values: By name.
    """

    values: dict[str, Any]

    @classmethod
    def parse(cls, hyperparameters: Hyperparameters, presets: str | None = None) -> Options:
        """Read hyperparameters.

        Raises:
            TypeError: a name that AutoMM does not have either; the message proposes the nearest.
            ValueError: an unknown preset.

        Example:
            >>> Options.parse({"data.categorical.as_text": True})  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            TypeError: MultiModalPredictor has no option 'data.categorical.as_text'; did you mean ...
        """
        given = flattened(hyperparameters)
        refuse_unknown(given, {*DEFAULTS, *UNUSED, *HARMLESS}, "MultiModalPredictor", RENAMED)
        unused = sorted(given.keys() & UNUSED)
        if unused:
            warnings.warn(f"not used, for limbeck has no counterpart: {', '.join(unused)}", stacklevel=4)
        presets = presets or "high_quality"
        if presets not in PRESETS:
            raise ValueError(f"unknown presets {presets!r}; {nearest(presets, PRESETS)}")
        text, image = PRESETS[presets]
        encoders = {"model.hf_text.checkpoint_name": text, "model.timm_image.checkpoint_name": image}
        values = {**DEFAULTS, **encoders, **{n: v for n, v in given.items() if n in DEFAULTS}}
        for name in ABOVE_ZERO:
            if not isinstance(values[name], (int, float)) or not values[name] > 0:
                raise ValueError(f"{name} is {values[name]!r}; it is a number above 0")
        return cls(values)

    def kinds(self) -> set[str]:
        """The kinds of columns that are read.

        Raises:
            ValueError: a model that is none of AutoMM's, or that limbeck has not.
        """
        named = self.values["model.names"]
        named = re.split(r"[\s,\[\]]+", named.strip("[] ")) if isinstance(named, str) else named
        kinds = set(KINDS) if named is None else set()
        for name in named or ():
            model = next((known for known in READS if name == known or name.startswith(f"{known}_")), None)
            if model is None:
                raise ValueError(f"model.names has {name!r}, which limbeck has not; {nearest(name, READS)}")
            kinds |= READS[model]
        for kind in (CATEGORICAL, NUMERICAL):
            if self.values[f"data.{kind}.convert_to_text"]:
                kinds.discard(kind)
        return kinds

    def architecture(self) -> dict[str, Any]:
        """The arguments of `limbeck.frame_model.FrameModel.build`."""
        get = self.values.__getitem__
        sizes = get("model.fusion_mlp.hidden_sizes")
        return {
            "text": get("model.hf_text.checkpoint_name"),
            "image": get("model.timm_image.checkpoint_name"),
            "pooling": get("model.hf_text.pooling_mode"),
            "max_length": get("model.hf_text.max_text_len"),
            "hidden": sizes if isinstance(sizes, int) else sizes[-1],
            "dropout": get("model.fusion_mlp.dropout"),
        }

    def settings(self, rows: int, seed: int, time_limit: float | None) -> Settings:
        """The settings of a training on so many rows.

        Raises:
            ValueError: a value that there is no setting for.
        """
        get = self.values.__getitem__
        _check_devices(get("env.num_gpus"))
        batch_size, steps = get("env.batch_size"), get("optim.max_steps")
        interval, per_epoch = get("optim.val_check_interval"), math.ceil(rows / batch_size)
        values = {setting: get(name) for setting, name in SETTINGS.items()}
        values |= {
            "steps": steps if steps and steps > 0 else None,
            "accumulation": math.ceil(min(batch_size, rows) / get("env.per_gpu_batch_size")),
            "schedule": _chosen("optim.lr_schedule", get("optim.lr_schedule"), SCHEDULES),
            "clip": values["clip"] or None,
            "patience": values["patience"] or None,
            "precision": _chosen("env.precision", str(get("env.precision")), PRECISIONS),
            "evaluate_every": max(1, int(interval * per_epoch if interval <= 1 else interval)),
        }
        try:
            return Settings(**values, time_limit=time_limit, seed=seed, best=True)
        except ValueError as error:
            setting, colon, problem = str(error).partition(": ")
            raise ValueError(f"{SETTINGS.get(setting, setting)}{colon}{problem}") from None

    def terms(self, regression: bool, taught: bool) -> list[Term]:
        """What is learned.

        Args:
            regression: Whether a number is predicted.
            taught: Whether there is a teacher.

        Raises:
            ValueError: an unknown type of loss, or one that numbers have not.
        """
        get = {name.removeprefix("distiller."): value for name, value in self.values.items()}
        smoothing = {} if regression else {"label_smoothing": get["optim.label_smoothing"]}
        hard = Term(
            "labels",
            loss="label_mse" if regression else "cross_entropy",
            weight=get["hard_label_weight"] if taught else 1.0,
            name="hard_label",
            **smoothing,
        )
        if not taught:
            return [hard]
        feature = _chosen("distiller.output_feature_loss_type", get["output_feature_loss_type"], FEATURE_LOSSES)
        kind = self._kind("softmax_regression_loss_type", regression)
        borrowed = {"loss": "softmax_regression", "head": "head", "kind": kind, **PROJECT}
        weighted: dict[str, tuple[str, dict[str, Any]]] = {
            "output_feature": ("output_feature_loss_weight", {"loss": feature, **PROJECT}),
            "softmax_regression": ("softmax_regression_weight", borrowed),
            "rkd_distance": ("rkd_distance_loss_weight", {"loss": "rkd_distance"}),
            "rkd_angle": ("rkd_angle_loss_weight", {"loss": "rkd_angle"}),
        }
        others = [
            Term("features", name=name, weight=get[weight], **how)
            for name, (weight, how) in weighted.items()
            if get[weight] != 0
        ]
        soft = [self._soft(regression)] if get["soft_label_weight"] != 0 else []
        return [hard, *soft, *others]

    def _soft(self, regression: bool) -> Term:
        """The teacher's answers; AutoMM's own value where T squared is not wanted."""
        weight, temperature = self.values["distiller.soft_label_weight"], self.values["distiller.temperature"]
        kind = self._kind("soft_label_loss_type", regression)
        corrected = self.values["distiller.temperature_squared"]
        options = {"temperature": temperature}
        if kind == "mse":  # whose factor T squared and whose division by T cancel
            options = {} if corrected else options
        elif not corrected:
            weight = weight / temperature**2
        return Term("logits", loss=SOFT_LOSSES[kind], weight=weight, name="soft_label", **options)

    def _kind(self, option: str, regression: bool) -> str:
        """How logits are compared, which is inferred where the option is empty."""
        name = f"distiller.{option}"
        kind = self.values[name] or ("mse" if regression else "cross_entropy")
        _chosen(name, kind, SOFT_LOSSES)
        if regression and kind == "cross_entropy":
            raise ValueError(f"{name} is 'cross_entropy', and a number to predict has no classes; use 'mse'")
        return str(kind)


def _chosen(name: str, value: str, known: Mapping[str, str]) -> str:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; {nearest(str(value), known)}")
    return known[value]


def _check_devices(count: Any) -> None:
    """Refuse a number of devices that a single process does not decide on."""
    there = torch.accelerator.device_count()
    if count == 0 and there:
        raise ValueError("env.num_gpus is 0 and there are accelerators; hide them: CUDA_VISIBLE_DEVICES=")
    if count is not None and count > 1:
        raise ValueError(
            f"env.num_gpus is {count}, and a predictor trains on one device; set it to 1, or call "
            "limbeck.frame_model.fit_frame_model in a script started by accelerate launch"
        )
