"""The configs of Intel Extension for Transformers, and the metrics by which it chooses a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from limbeck.compat.intel_criteria import (
    CriterionConfig,
    IntermediateLayersKnowledgeDistillationLossConfig,
    KnowledgeDistillationLossConfig,
)
from limbeck.registry import nearest

ELSEWHERE = ("Config", "Mode", "Provider", "PrunerV2", "TFOptimization", "Orchestrate_optimizer")
"""How names end of what these doors lack: quantization, pruning, their search and TensorFlow."""


class DistillationCriterionMode(Enum):
    """The criteria, and Neural Compressor's names of them."""

    KNOWLEDGELOSS = "KnowledgeDistillationLoss"
    INTERMEDIATELAYERSLOSS = "IntermediateLayersKnowledgeDistillationLoss"


@dataclass
class Criterion:
    """What is learned: "KnowledgeLoss" or "IntermediateLayersLoss", whose temperature does not count."""

    name: str = "KnowledgeLoss"
    temperature: float = 1.0
    loss_types: Sequence[str] = ("CE", "CE")
    loss_weight_ratio: Sequence[float] = (0.5, 0.5)
    layer_mappings: Sequence[Any] | None = None
    add_origin_loss: bool = False

    def config(self) -> CriterionConfig:
        """Neural Compressor's config of the same criterion."""
        if self.name.upper() == "KNOWLEDGELOSS":
            return KnowledgeDistillationLossConfig(self.temperature, self.loss_types, self.loss_weight_ratio)
        if self.name.upper() == "INTERMEDIATELAYERSLOSS":
            return IntermediateLayersKnowledgeDistillationLossConfig(
                self.layer_mappings or (), self.loss_types, self.loss_weight_ratio, self.add_origin_loss
            )
        known = ["KnowledgeLoss", "IntermediateLayersLoss"]
        raise ValueError(f"unknown criterion {self.name!r}; {nearest(self.name, known)}")


@dataclass
class FlashDistillationConfig:
    """Block after block: for each stage the names of what trains, pairs of layers, and a number of updates.

    A stage trains all parameters whose name its block's name is in; ``""`` is in all. By default its types are
    MSE, its weights are equal, 1 together, and it has 500 updates. All lists have an entry for each stage.
    """

    block_names: Sequence[str] = ()
    layer_mappings_for_knowledge_transfer: Sequence[Any] = ()
    loss_types: Sequence[Sequence[str]] = ()
    loss_weights: Sequence[Sequence[float]] = ()
    add_origin_loss: Sequence[bool] = ()
    train_steps: Sequence[int] = ()

    def criteria(self) -> list[tuple[str, IntermediateLayersKnowledgeDistillationLossConfig, int]]:
        """What trains, by which criterion and for how many updates, stage by stage."""
        mappings = self.layer_mappings_for_knowledge_transfer
        given = {
            "block_names": self.block_names or [""] * len(mappings),
            "loss_types": self.loss_types or [[]] * len(mappings),
            "loss_weights": self.loss_weights or [[]] * len(mappings),
            "add_origin_loss": self.add_origin_loss or [False] * len(mappings),
            "train_steps": self.train_steps or [500] * len(mappings),
        }
        for name, entries in given.items():
            if not mappings or len(entries) != len(mappings):
                raise ValueError(
                    f"{name} has {len(entries)} entries for {len(mappings)} stages; give one for each"
                )
        return [
            (block, IntermediateLayersKnowledgeDistillationLossConfig(pairs, kinds, weights, adds), steps)
            for pairs, block, kinds, weights, adds, steps in zip(mappings, *given.values(), strict=True)
        ]


@dataclass
class Metric:
    """By what the best student is chosen; of several, by the sum with their `weight_ratio`.

    `is_relative` and `criterion` are for quantization, which is not here.
    """

    name: str
    greater_is_better: bool = True
    is_relative: bool = True
    criterion: float = 0.01
    weight_ratio: float | None = None


@dataclass
class Objective:
    """What quantization weighs against a metric; distillation reads none."""

    name: str
    greater_is_better: bool = True
    weight_ratio: float | None = None


@dataclass
class DistillationConfig:
    """The criterion, and the metric or metrics by which the best student is chosen; without any it is the last."""

    framework: str = "pytorch"
    criterion: Criterion | None = None
    metrics: Metric | Sequence[Metric] | None = None

    def __post_init__(self) -> None:
        if self.framework not in ("pytorch", "pytorch_fx"):
            raise ValueError(f"framework {self.framework!r} is not here; {nearest(self.framework, ['pytorch'])}")
        self.criterion = self.criterion or Criterion()
        if not isinstance(self.criterion, Criterion):
            raise TypeError(f"criterion is a Criterion, got {self.criterion!r}; write Criterion(name=...)")
        weights(self.metrics)


def weights(metrics: Any) -> dict[str, float]:
    """What `limbeck.train.hf_best.KeepBest` takes: each metric's weight, negative where lower is better."""
    chosen = metrics if isinstance(metrics, (list, tuple)) else [] if metrics is None else [metrics]
    for metric in chosen:
        if not isinstance(metric, Metric):
            raise TypeError(f"metrics are Metrics, got {metric!r}; write metrics.Metric(name=...)")
        if len(chosen) > 1 and metric.weight_ratio is None:
            raise ValueError(f"of several metrics each has a weight_ratio; {metric.name!r} has none")
    signs = {m.name: 1.0 if m.greater_is_better else -1.0 for m in chosen}
    return {m.name: signs[m.name] * (1.0 if m.weight_ratio is None else m.weight_ratio) for m in chosen}


def absent(door: str, name: str) -> Exception:
    """The error for a name that a door lacks: of what Intel's packages have for other things, in a line."""
    if not name.endswith(ELSEWHERE):
        return AttributeError(f"module {door!r} has no attribute {name!r}")
    return ImportError(
        f"{door} distils PyTorch models and has no {name}; drop that part of the script, or run it with Intel's "
        "own package on the student that was saved"
    )
