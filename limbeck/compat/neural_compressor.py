"""The door of Neural Compressor 2.x: its distillation configs, and `prepare_compression` for a loop of one's own.

What is not distillation (quantization, pruning, export) is not here. See docs/coming-from.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.alongside import Alongside
from limbeck.compat.intel_configs import absent
from limbeck.compat.intel_criteria import (
    CriterionConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
    SelfKnowledgeDistillationLossConfig,
)
from limbeck.teachers import Given, Self
from limbeck.train.best import BestWeights
from limbeck.types import INPUTS, TEACHER_CACHE

__all__ = [
    "Callbacks",
    "CompressionManager",
    "DistillationConfig",
    "IntermediateLayersKnowledgeDistillationLossConfig",
    "KnowledgeDistillationLossConfig",
    "Model",
    "SelfKnowledgeDistillationLossConfig",
    "prepare_compression",
]


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)


OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


class DistillationConfig:
    """The teacher, the criterion and, which theirs ignores, the optimizer of what the criterion itself learns.

    Args:
        teacher_model: As of a `limbeck.Distiller`; None where each batch brings along what the teacher says.
        criterion: One of the three configs of losses.
        optimizer: ``{"SGD" | "Adam" | "AdamW": {"learning_rate": 1e-4, ...}}`` for linear maps between layers of
            different widths; the student's is the script's own.
    """

    def __init__(
        self,
        teacher_model: Any = None,
        criterion: CriterionConfig | None = None,
        optimizer: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if not isinstance(criterion, CriterionConfig | None):
            raise TypeError(f"criterion is one of this module's configs of losses, got {criterion!r}; make one")
        self.teacher_model = teacher_model
        self.criterion = KnowledgeDistillationLossConfig() if criterion is None else criterion
        self.optimizer = {"SGD": {"learning_rate": 1e-4}} if optimizer is None else optimizer

    def alongside(self, student: nn.Module) -> tuple[float, Alongside]:
        """The own loss's weight, and what compares the student with the teacher."""
        own, terms = self.criterion.terms()
        if not isinstance(self.criterion, SelfKnowledgeDistillationLossConfig):
            return own, Alongside(student, Given() if self.teacher_model is None else self.teacher_model, terms)
        paths = {path for path, _ in student.named_modules()}
        by_key = any(tap not in paths for term in terms for tap in (*term.taps, *term.teacher_taps))
        return own, Alongside(student, Self(), terms, read=dict if by_key else None)


class Callbacks:
    """What a loop calls. Any of them but `on_after_compute_loss` may be left out.

    With a `judge` of the student, the higher the better, the training ends with the student of the best epoch.
    """

    def __init__(
        self, model: nn.Module, conf: DistillationConfig, judge: Callable[[nn.Module], float] | None = None
    ) -> None:
        self.own_weight, self.beside = conf.alongside(model)
        self.model, self.judge, self.best = model, judge, BestWeights(model)
        self.optimizer = self._optimizer(conf.optimizer)

    def on_after_compute_loss(
        self, input: Any, student_output: Any, student_loss: Any, teacher_output: Any = None
    ) -> Any:
        """The loss to call ``backward`` on, for what the model just did; the teacher runs unless it has spoken."""
        given = isinstance(input, (Mapping, Tensor))
        batch = input if isinstance(input, Mapping) else {INPUTS: (input,) if given else tuple(input)}
        if teacher_output is not None and set(self.beside.distiller.wants) == {"logits"}:
            batch = {**batch, TEACHER_CACHE: teacher_output}
        loss = self.beside.compare(batch, student_output).loss
        return loss + self.own_weight * student_loss if self.own_weight else loss

    def on_step(self, *_: Any) -> None:
        """Update what the criterion learns, where there are gradients."""
        if self.optimizer is not None and any(p.grad is not None for p in self.beside.parameters()):
            self.optimizer.step()
            self.optimizer.zero_grad()

    on_train_begin = on_epoch_begin = on_step_begin = on_before_optimizer_step = on_after_optimizer_step = on_step
    on_step_end = on_before_eval = on_after_eval = on_step

    def on_epoch_end(self) -> list[Any]:
        """After an epoch."""
        self.on_step()
        if self.judge is not None:
            self.best.offer_by(self.judge)
        return []

    def on_train_end(self) -> None:
        """After the training: the student is left as it came."""
        self.on_step()
        self.beside.close()
        self.best.restore()

    def trained_by(self, train: Callable[[nn.Module], Any]) -> nn.Module:
        """Let a function train the student, and leave nothing in it, whatever happens."""
        try:
            train(self.model)
        finally:
            self.on_train_end()
        return self.model

    def _optimizer(self, spec: Mapping[str, Mapping[str, Any]]) -> torch.optim.Optimizer | None:
        if len(spec) != 1 or not spec.keys() <= OPTIMIZERS.keys():
            raise ValueError(f"optimizer is one of {', '.join(OPTIMIZERS)} with its options, got {dict(spec)}")
        ((name, options),) = spec.items()
        learned = list(self.beside.parameters())
        given = {"lr" if key == "learning_rate" else key: value for key, value in options.items()}
        return OPTIMIZERS[name](learned, **given) if learned else None


class Model(nn.Module):
    """The student as `prepare_compression` hands it out; it itself is ``model.model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the student does."""
        return self.model(*args, **kwargs)

    def save(self, root: str | Path) -> None:
        """Write the student's weights to ``best_model.pt`` in a folder, as scripts load them."""
        Path(root).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), Path(root) / "best_model.pt")


class CompressionManager:
    """A model and the callbacks that its loop calls."""

    def __init__(self, model: nn.Module, conf: DistillationConfig) -> None:
        self.model, self.conf = Model(model), conf
        self.callbacks = Callbacks(model, conf)

    def save(self, root: str | Path) -> None:
        """Write the student's weights to ``best_model.pt`` in a folder."""
        self.model.save(root)


def prepare_compression(model: nn.Module, confs: Any) -> CompressionManager:
    """Make ready for a loop of one's own.

    Raises:
        TypeError: another config than one `DistillationConfig`, or a list of it.

    Example:
        >>> manager = prepare_compression(nn.Linear(4, 3), DistillationConfig(nn.Linear(4, 3)))
        >>> inputs = torch.ones(8, 4)
        >>> outputs = manager.model(inputs)
        >>> loss = manager.callbacks.on_after_compute_loss(inputs, outputs, outputs.square().mean())
        >>> loss.backward()
    """
    found = confs if isinstance(confs, list) else [confs]
    if len(found) != 1 or not isinstance(found[0], DistillationConfig):
        raise TypeError(f"prepare_compression distils, by one DistillationConfig; got {confs!r}")
    return CompressionManager(model, found[0])
