"""The door of Intel Extension for Transformers 1.x: `NLPTrainer.distill` and its configs.

What is not distillation (quantization, pruning, the search for an architecture) is not here. See
docs/coming-from.md.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import transformers
from torch import nn

from limbeck.compat import neural_compressor as inc
from limbeck.compat.intel_configs import (
    Criterion,
    DistillationConfig,
    DistillationCriterionMode,
    FlashDistillationConfig,
    Metric,
    Objective,
    absent,
)
from limbeck.compat.intel_trainer import (
    NLPSeq2SeqTrainer,
    NLPTrainer,
    parts,
)

__all__ = [
    "Criterion",
    "DistillationConfig",
    "DistillationCriterionMode",
    "FlashDistillationConfig",
    "NLPSeq2SeqTrainer",
    "NLPTrainer",
    "NoTrainerOptimizer",
    "OptimizedModel",
    "TFOptimization",
    "metric",
    "metrics",
    "objectives",
]

metrics = metric = SimpleNamespace(Metric=Metric)
"""Stands for their module of this name, which their page imports as `metric`, too."""

objectives = SimpleNamespace(
    Objective=Objective,
    performance=Objective("performance"),
    modelsize=Objective("modelsize", greater_is_better=False),
)
"""Likewise. Scripts import it beside the rest; what takes objectives, quantization, is not here."""


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)


def TFOptimization(*_: Any, **__: Any) -> Any:  # noqa: N802
    """Not here: limbeck trains PyTorch models."""
    raise ValueError("TFOptimization trains TensorFlow models, and this door PyTorch ones; take NLPTrainer")


class OptimizedModel:
    """Loads what a trainer saved, whatever its class."""

    @staticmethod
    def from_pretrained(folder: str, **options: Any) -> Any:
        """The model in a folder, of the class that its config names."""
        config = transformers.AutoConfig.from_pretrained(folder)
        return getattr(transformers, config.architectures[0]).from_pretrained(folder, **options)


class NoTrainerOptimizer:
    """Distils with functions of one's own; `train_func` calls ``optimizer.distiller.on_...``."""

    def __init__(self, model: nn.Module, output_dir: str = "saved_results") -> None:
        self.model, self.output_dir = model, output_dir
        self.eval_func: Callable[[nn.Module], float] | None = None
        self.train_func: Callable[[nn.Module], Any] | None = None
        self.component: inc.Callbacks | None = None
        self.distiller: inc.Callbacks | None = None

    def distill(
        self,
        distillation_config: DistillationConfig | inc.DistillationConfig,
        teacher_model: Any = None,
        provider: str = "inc",
        eval_func: Callable[[nn.Module], float] | None = None,
        train_func: Callable[[nn.Module], Any] | None = None,
    ) -> nn.Module:
        """Train the student by `train_func`, keep the best by `eval_func`, and save it.

        Raises:
            ValueError: no `train_func`.
        """
        criterion, teacher, _ = parts(distillation_config, teacher_model, None)
        judge, train = eval_func or self.eval_func, train_func or self.train_func
        if train is None:
            raise ValueError("NoTrainerOptimizer trains by a function of yours; pass train_func=")
        config = inc.DistillationConfig(teacher, criterion)
        self.component = self.distiller = inc.Callbacks(self.model, config, judge)
        trained = self.distiller.trained_by(train)
        self.save_model(self.output_dir)
        return trained

    def save_model(self, output_dir: str, tokenizer: Any = None) -> None:
        """Write the student, and its tokenizer, to a folder."""
        if isinstance(self.model, transformers.PreTrainedModel):
            self.model.save_pretrained(output_dir)
        else:
            inc.Model(self.model).save(output_dir)
        if tokenizer is not None:
            tokenizer.save_pretrained(output_dir)
