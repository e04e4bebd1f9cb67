"""Settings of a training, all that a run needs beside models, terms and data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from limbeck.registry import refuse_unknown
from limbeck.strict import Strict

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}

FUSED = ("adamw", "adam", "sgd")

SETTINGS_OF_THEIR_OWN = {"lr": "learning_rate", "weight_decay": "weight_decay beside optimizer_options"}
"""Options of optimizers that are settings of a training."""


class Settings(Strict):
    """How to train.

    ``batch_size`` is what the mathematics sees: the examples of one update, over all ranks. ``accumulation`` only
    cuts it into parts that fit the memory; neither it nor the number of ranks changes the update.

    Raises:
        ValueError: an unknown name or a value out of range; the message names the field.

    Example:
        >>> Settings(epochs=2, batch_size=16).total_steps(batches_per_epoch=10)
        20
        >>> Settings(epochs=4, steps=7).total_steps(batches_per_epoch=10)
        7
    """

    epochs: float = Field(3, gt=0, description="passes over the training data")
    steps: int | None = Field(None, gt=0, description="number of updates, instead of epochs")
    least_steps: int | None = Field(None, gt=0, description="updates at the least, where the epochs have fewer")
    time_limit: float | None = Field(None, gt=0, description="seconds after which training stops")
    batch_size: int = Field(32, gt=0, description="examples per update, over all ranks")
    accumulation: int = Field(1, gt=0, description="parts that a rank cuts its share of a batch into")
    optimizer: Literal["adamw", "adam", "sgd", "adafactor"] = "adamw"
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    learning_rate: float = Field(5e-5, gt=0)
    projection_learning_rate: float | None = Field(None, gt=0, description="by default learning_rate")
    weight_decay: float = Field(0.01, ge=0, description="not applied to biases and norms")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.1, ge=0, description="share of the steps, or their number from 1 on")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = Field(False, description="torch.compile the student")
    bucket: bool = Field(True, description="batch texts of like length together")
    seed: int = Field(0, ge=0)
    evaluate_every: int | None = Field(None, gt=0, description="steps; by default each epoch")
    checkpoint_every: int | None = Field(None, gt=0, description="steps; by default at each evaluation")
    keep: int = Field(1, gt=0, description="number of checkpoints kept, beside the best")
    best: bool = Field(False, description="end with the weights of the best evaluation, not the last")
    patience: int | None = Field(None, gt=0, description="evaluations without a better score before stopping")
    log_every: int = Field(10, gt=0, description="steps between lines of the log")
    gradients_every: int | None = Field(
        None, gt=0, description="steps between measurements of each term's gradient; a backward pass per term"
    )
    trackers: list[str] = Field(default_factory=list, description="accelerate's trackers: tensorboard, ...")

    def total_steps(self, batches_per_epoch: int) -> int:
        """The number of updates of a whole training."""
        return self.steps or max(self.least_steps or 1, math.ceil(self.epochs * batches_per_epoch))

    def rate(self, step: int, total: int) -> float:
        """The factor on the learning rate at a step counted from 0: a pure function, nothing to resume.

        Example:
            >>> [round(Settings(warmup=0.5).rate(step, 4), 2) for step in range(4)]
            [0.5, 1.0, 1.0, 0.5]
        """
        warmup = int(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1, total - warmup)
        return 1.0 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def build_optimizer(self, student: nn.Module, objective: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer, with groups for what trains with the student and for what weight decay leaves alone.

        Raises:
            TypeError: an option that the optimizer does not have, or a value of a wrong kind.
            ValueError: a value that the optimizer refuses.
        """
        self._check_optimizer_options()
        groups = [
            *self._groups(student.parameters(), self.learning_rate),
            *self._groups(objective.parameters(), self.projection_learning_rate or self.learning_rate),
        ]
        # Fused, SGD with momentum fails on parameters that come into play later than others.
        slow = self.optimizer == "sgd" and self.optimizer_options.get("momentum")
        options: dict[str, Any] = {"fused": True} if self.optimizer in FUSED and not slow else {}
        try:
            return OPTIMIZERS[self.optimizer](groups, **options | self.optimizer_options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"optimizer_options of {self.optimizer!r}: {error}") from None

    def _check_optimizer_options(self) -> None:
        """Options that the groups of parameters would overrule are refused, too."""
        what = f"optimizer {self.optimizer!r}"
        for name in self.optimizer_options:
            if name in SETTINGS_OF_THEIR_OWN:
                raise TypeError(f"{name!r} is no option of {what}; set {SETTINGS_OF_THEIR_OWN[name]}")
        known = set(inspect.signature(OPTIMIZERS[self.optimizer]).parameters) - {"params", *SETTINGS_OF_THEIR_OWN}
        refuse_unknown(self.optimizer_options, known, what)

    def _groups(self, parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
        trained = [p for p in parameters if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1]
        plain = [p for p in trained if p.ndim <= 1]
        return [
            {"params": members, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for members, decay in ((decayed, self.weight_decay), (plain, 0.0))
            if members
        ]
