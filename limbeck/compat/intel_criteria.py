"""Neural Compressor's criteria, which Intel Extension for Transformers stands on, and the terms they mean."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from limbeck.registry import nearest
from limbeck.taps import Picked
from limbeck.terms import Term

KNOWLEDGE = {"CE": "soft_cross_entropy", "KL": "forward_kl", "MSE": "logit_mse"}
FEATURES: dict[str, dict[str, Any]] = {
    "MSE": {"loss": "mse"},
    "L1": {"loss": "l1"},
    "KL": {"loss": "forward_kl", "transforms": "log_of_probabilities"},
}


@dataclass
class _Criterion:
    """What the three have in common: their options under `config`, as scripts reach for them."""

    @property
    def config(self) -> SimpleNamespace:
        """The options, under the criterion's name."""
        return SimpleNamespace(**{type(self).__name__.removesuffix("Config"): self})


@dataclass
class KnowledgeDistillationLossConfig(_Criterion):
    """The own loss and the distance to the teacher's logits: ``w0 * loss + w1 * distance * temperature ** 2``.

    `loss_types` are the own loss (the script's in any case) and the distance: CE, KL or MSE, which has no
    temperature. The weights need not sum to 1.
    """

    temperature: float = 1.0
    loss_types: Sequence[str] = ("CE", "CE")
    loss_weights: Sequence[float] = (0.5, 0.5)

    def terms(self, taps: Sequence[str] = ("logits",)) -> tuple[float, list[Term]]:
        """The own loss's weight, and the terms; of several taps (start and end) the mean."""
        (_, _, own), (_, kind, weight) = _rows([0, 1], self, "CE", KNOWLEDGE)
        options: dict[str, Any] = {"loss": KNOWLEDGE[kind], "weight": weight / len(taps)}
        if kind != "MSE":
            options["temperature"] = self.temperature
        return own, [Term(tap, **options) for tap in taps]


@dataclass
class IntermediateLayersKnowledgeDistillationLossConfig(_Criterion):
    """Distances between layers: ``sum_i w_i * distance_i``, by MSE (the default), L1 or KL.

    An item of `layer_mappings` is ``[layer]`` or ``[student's, teacher's]``. A layer is a module's path or
    ``(path, pick)``: an index or a key as text, or a function of what it returns; ``""`` is the whole model. The
    own loss counts with weight 1 if `add_origin_loss`; the weights are by default equal, 1 together.
    """

    layer_mappings: Sequence[Any] = ()
    loss_types: Sequence[str] = ()
    loss_weights: Sequence[float] = ()
    add_origin_loss: bool = False

    def terms(self, name: str = "layers") -> tuple[float, list[Term]]:
        """The own loss's weight, and a term for each pair of layers, under a name and its number."""
        made = []
        for i, (item, kind, weight) in enumerate(_rows(self.layer_mappings, self, "MSE", FEATURES)):
            if isinstance(item, str) or not 1 <= len(item) <= 2:
                raise ValueError(f"layer_mappings[{i}] is [layer] or [student's, teacher's], got {item!r}")
            student, teacher = _tap(item[0], f"{i}.student"), _tap(item[-1], f"{i}.teacher")
            how = {"project": "linear_where_needed", **FEATURES[kind]}
            made.append(Term(student, teacher, weight=weight, name=f"{name}.{i}", **how))
        return float(self.add_origin_loss), made


@dataclass
class SelfKnowledgeDistillationLossConfig(_Criterion):
    """Distances between a model's earlier exits and its last, in groups: ``sum_i w_i * (sum of group i)``.

    A group is a list of ``[earlier, last]``: paths of modules, or keys of the outputs that `on_after_compute_loss`
    is given. Of a group CE (the default) and KL are softened by `temperature`; L2 is the Euclidean distance.
    """

    layer_mappings: Sequence[Any] = ()
    temperature: float = 1.0
    loss_types: Sequence[str] = ()
    loss_weights: Sequence[float] = ()
    add_origin_loss: bool = False

    def terms(self) -> tuple[float, list[Term]]:
        """The own loss's weight, and a term for each pair."""
        made = []
        for i, (group, kind, weight) in enumerate(_rows(self.layer_mappings, self, "CE", {"CE", "KL", "L2"})):
            soft = {"loss": KNOWLEDGE.get(kind), "temperature": self.temperature}
            how: dict[str, Any] = {"loss": euclidean} if kind == "L2" else soft
            for j, (earlier, last) in enumerate(group):
                made.append(Term(earlier, last, weight=weight, name=f"exits.{i}.{j}", **how))
        return float(self.add_origin_loss), made


CriterionConfig = (
    KnowledgeDistillationLossConfig
    | IntermediateLayersKnowledgeDistillationLossConfig
    | SelfKnowledgeDistillationLossConfig
)


def euclidean(student: Tensor, teacher: Tensor) -> Tensor:
    """The Euclidean distance of each example's features (B, ...): (B,)."""
    distance: Tensor = torch.linalg.vector_norm((student - teacher.detach()).flatten(1), dim=1)
    return distance


def _rows(
    items: Sequence[Any], criterion: CriterionConfig, default: str, known: Collection[str]
) -> Iterator[tuple[Any, str, float]]:
    """What belongs together: an item, the type of its loss, and its weight."""
    kinds = criterion.loss_types or [default] * len(items)
    weights = criterion.loss_weights or [1 / len(items)] * len(items)
    if not items or not len(items) == len(kinds) == len(weights):
        raise ValueError(
            f"layer_mappings, loss_types and loss_weights are as many, got {len(items)}, {len(kinds)} and "
            f"{len(weights)}; knowledge has 2 types and 2 weights"
        )
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"unknown loss type {kind!r}; {nearest(str(kind), known)}")
    for weight in weights:
        if not isinstance(weight, (int, float)):
            raise TypeError(f"weights of losses are numbers, got {weight!r}")
    return zip(items, kinds, weights, strict=True)


def _tap(layer: Any, name: str) -> str:
    named = isinstance(layer, (list, tuple)) and layer and isinstance(layer[0], str)
    if not isinstance(layer, str) and not named:
        raise ValueError(f"a layer is a module's path or (path, pick), got {layer!r}; {name} in layer_mappings")
    path, pick = (layer, "") if isinstance(layer, str) else (layer[0], layer[1] if len(layer) > 1 else "")
    if callable(pick):
        return Picked(path, pick, name)
    return f"{path}#{pick}" if str(pick) else path
