"""How much each unit of a model matters: each hidden dimension, head and feed-forward unit.

A unit matters by what goes out of it. Three measures, all of squared numbers, so that those of a group add up:

- ``magnitude``: the product of what writes a unit (rows of weights) and what reads it (columns of weights);
- ``activation``: what reads a unit, times the mean square of what it holds on a sample;
- ``taylor``: the square of the first-order change of the loss if the unit were not read, mean over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import add, mul
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.students.axes import Axes, Slot

Importance = Literal["magnitude", "activation", "taylor"]
MEASURES = ("magnitude", "activation", "taylor")
Batch = Mapping[str, Any]


class Scores:
    """Scores of the entries of a model's units.

    Args:
        model: What is scored.
        axes: Of the model.
        importance: The measure.
        sample: A batch, or several, of the model's inputs; with labels for ``taylor``.

    Raises:
        ValueError: a sample is lacking or too much, or no loss comes out of it.
    """

    def __init__(
        self, model: Any, axes: Axes, importance: Importance, sample: Batch | Iterable[Batch] | None
    ) -> None:
        if (sample is None) != (importance == "magnitude"):
            need = "needs no sample; drop it" if importance == "magnitude" else "needs sample=, a batch of inputs"
            raise ValueError(f"importance={importance!r} {need}")
        self.axes = axes
        self.state: dict[str, Tensor] = model.state_dict()
        self.importance = importance
        batches = [] if sample is None else [sample] if isinstance(sample, Mapping) else list(sample)
        readers = {name for name, slots in axes.slots.items() if any(slot.reads for slot in slots)}
        self.measured: dict[str, Tensor] = {}
        if importance == "activation":
            self.measured = _input_squares(model, readers, batches)
        elif importance == "taylor":
            self.measured = _loss_changes(model, readers, batches)

    def of(self, axis: str, names: Iterable[str]) -> Tensor:
        """Scores (units, entries of a unit) of an axis, from those of the weights that are named."""
        sides: dict[bool, list[Tensor]] = {True: [], False: []}
        for name in names:
            for slot in self.axes.slots[name]:
                if slot.axis == axis and (slot.reads or self.importance == "magnitude"):
                    sides[slot.reads].append(self._entries(name, slot))
        # What has one entry for a head counts for all of the head's entries, by broadcasting.
        totals = [reduce(add, side) for side in sides.values() if side]
        return reduce(mul, totals)

    def _entries(self, name: str, slot: Slot) -> Tensor:
        values = self.state[name].detach().double()
        if self.importance == "taylor":
            scores = _sum_but(self.measured[name], slot.dim)
        else:
            scores = _sum_but(values.square(), slot.dim)
        if self.importance == "activation":
            scores = scores * self.measured[name].to(scores.device)
        elif self.importance == "magnitude":
            scores = scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)  # all weights count alike
        return scores.reshape(slot.blocks, slot.count, slot.width).sum(0).cpu()


def _sum_but(values: Tensor, dim: int) -> Tensor:
    others = [other for other in range(values.ndim) if other != dim]
    return values.sum(others) if others else values


def _input_squares(model: Any, readers: set[str], batches: list[Batch]) -> dict[str, Tensor]:
    """Mean square of each input of the linear layers that have these weights, over all valid positions."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: Tensor | None = None

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            vectors = inputs[0].detach()
            channels = vectors.shape[1] if isinstance(module, (nn.Conv1d, nn.Conv2d)) else vectors.shape[-1]
            if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                rows = vectors.movedim(1, -1).reshape(-1, channels)
            elif mask is not None and vectors.shape[:-1] == mask.shape:
                rows = vectors[mask.bool()]
            else:
                rows = vectors.reshape(-1, channels)
            totals[name] = totals.get(name, torch.zeros(())) + rows.double().square().sum(0).cpu()
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in readers}
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        with _as_teacher(model), torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    silent = sorted(set(readers) - set(totals))
    zero = {name: torch.zeros(1, dtype=torch.float64) for name in silent}  # never run: nobody reads by them
    return {**zero, **{name: total / counts[name] for name, total in totals.items()}}


def _loss_changes(model: Any, readers: set[str], batches: list[Batch]) -> dict[str, Tensor]:
    """Square of weight times gradient, mean over batches, for these weights."""
    with _as_teacher(model), _trainable(model), torch.enable_grad():
        own = dict(model.named_parameters(remove_duplicate=False))
        weights = {name: own[name] for name in sorted(readers)}
        totals = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        for batch in batches:
            loss = model(**batch).loss
            if loss is None:
                raise ValueError("importance='taylor' needs a loss, but the sample has no labels; add them")
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                if gradient is not None:
                    totals[name] += (gradient * weight.detach()).double().square()
    return {name: total / len(batches) for name, total in totals.items()}


@contextmanager
def _as_teacher(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
