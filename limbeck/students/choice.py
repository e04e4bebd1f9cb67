"""Which units of a model are kept, and how its weights are cut to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.students.axes import GROUPS, HEADS, HIDDEN, UNITS, VOCABULARY, Axes, Slot
from limbeck.students.importance import Scores

WHOLE = ""
"""The block of units that are the same everywhere in the model."""


@dataclass
class Kept:
    """The units that are kept.

    Attributes:
        axes: Of the model.
        units: Which units, ascending, by block and axis; all where there is none.
        entries: Which entries of those units, one row for each; only where not all are kept.
        blocks: The block in which the units of a weight are chosen, by axis and the weight's name.
        scale: What queries are multiplied by.
    """

    axes: Axes
    units: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    entries: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    blocks: dict[tuple[str, str], str] = field(default_factory=dict)
    scale: float = 1.0

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a weight, cut to what is kept."""
        result = tensor
        for slot in self.axes.slots[name]:
            place = (self.blocks.get((slot.axis, name), WHOLE), slot.axis)
            if place in self.units:
                index = self._index(slot, place).to(tensor.device)
                result = result.index_select(slot.dim, index)
        if name in self.axes.queries and self.scale != 1.0:
            result = self._scaled(name, result)
        return result.clone(memory_format=torch.contiguous_format)

    def _index(self, slot: Slot, place: tuple[str, str]) -> Tensor:
        """The places of the kept entries along a dimension."""
        units = self.units[place]
        inner = torch.arange(slot.width).expand(len(units), -1)
        if place in self.entries and slot.width > 1:
            inner = self.entries[place]
        once = (units[:, None] * slot.width + inner).flatten()
        return torch.cat([once + block * slot.count * slot.width for block in range(slot.blocks)])

    def _scaled(self, name: str, tensor: Tensor) -> Tensor:
        """Queries as if they were still divided by the root of the old size of a head."""
        slot = next(slot for slot in self.axes.slots[name] if slot.axis == HEADS)
        first, *others = tensor.chunk(slot.blocks, slot.dim)  # of queries, keys and values in one weight
        return torch.cat([first * self.scale, *others], slot.dim)


def choose(
    axes: Axes, sizes: Mapping[str, int], tokens: Sequence[int] | None, scores: Scores, hidden: bool = True
) -> Kept:
    """Choose the most important units.

    Args:
        axes: Of the model.
        sizes: How many are kept along each axis.
        tokens: The rows of the vocabulary that are kept; None for all.
        scores: How important they are.
        hidden: Whether hidden dimensions are chosen, too.
    """
    kept = Kept(axes)
    if tokens is not None:
        kept.units[WHOLE, VOCABULARY] = torch.tensor(tokens)
    if hidden and sizes[HIDDEN] != axes.sizes[HIDDEN]:
        kept.units[WHOLE, HIDDEN] = _best(scores.of(HIDDEN, _names(axes, {HIDDEN})).sum(1), sizes[HIDDEN])
    if sizes[UNITS] != axes.sizes[UNITS]:
        for block, names in _blocks(kept, {UNITS}).items():
            kept.units[block, UNITS] = _best(scores.of(UNITS, names).sum(1), sizes[UNITS])
    size = sizes[HIDDEN] // sizes[HEADS] if axes.tied else axes.head_size
    narrower = size != axes.head_size
    if narrower or any(sizes.get(axis) != axes.sizes.get(axis) for axis in (HEADS, GROUPS)):
        for block, names in _blocks(kept, {HEADS, GROUPS}).items():
            _choose_heads(kept, block, scores.of(HEADS, names), sizes, size)
    if narrower and _divides_by_root(axes.config):
        kept.scale = float((size / axes.head_size) ** 0.5)
    return kept


def _divides_by_root(config: Any) -> bool:
    """Whether attention is divided by the root of a head's size, as it is but where GPT-2's config says no."""
    return bool(vars(config).get("scale_attn_weights", True))


def _choose_heads(kept: Kept, block: str, scores: Tensor, sizes: Mapping[str, int], size: int) -> None:
    """Choose heads of keys and values by all that use them, and then of each the best queries."""
    count, groups = sizes[HEADS], sizes.get(GROUPS, sizes[HEADS])
    before = kept.axes.sizes.get(GROUPS, kept.axes.sizes[HEADS])
    each = scores.sum(1).reshape(before, -1)
    best = _best(each.sum(1), groups)
    queries = torch.stack([_best(each[group], count // groups) + group * each.shape[1] for group in best.tolist()])
    heads = queries.flatten()
    kept.units[block, HEADS] = heads
    if GROUPS in sizes:
        kept.units[block, GROUPS] = best
    if size != kept.axes.head_size:
        kept.entries[block, HEADS] = torch.stack([_best(row, size) for row in scores[heads]])


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the largest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _names(axes: Axes, which: set[str]) -> list[str]:
    return [name for name, slots in axes.slots.items() if any(slot.axis in which for slot in slots)]


def _blocks(kept: Kept, which: set[str]) -> dict[str, list[str]]:
    """The weights that share units, by block: the smallest module in which units are written and read."""
    axes = kept.axes
    found: dict[str, list[str]] = {}
    for name, block in _block_of_each(axes, which).items():
        found.setdefault(block, []).append(name)
    of_heads = [s for name in _names(axes, which) for s in axes.slots[name] if s.axis == HEADS]
    for_each_head = sum(slot.width == 1 < axes.head_size for slot in of_heads)
    if 0 < for_each_head < len(found):  # layers share a position bias, so their heads go together
        found = {WHOLE: [name for names in found.values() for name in names]}
    for block, names in found.items():
        kept.blocks.update({(axis, name): block for axis in which for name in names})
    return found


def _block_of_each(axes: Axes, which: set[str]) -> dict[str, str]:
    names = _names(axes, which)
    sides = {name: {slot.reads for slot in axes.slots[name] if slot.axis in which} for name in names}
    complete: dict[str, set[bool]] = {}
    for name in names:
        for ancestor in _ancestors(name):
            complete.setdefault(ancestor, set()).update(sides[name])
    return {name: next(a for a in _ancestors(name) if len(complete[a]) == 2) for name in names}


def _ancestors(name: str) -> list[str]:
    """The paths of the modules around a weight, the innermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
