"""Which dimension of which weight is the hidden size, the heads, the feed-forward units or the vocabulary.

No architecture is known by name. The model's class is built from its config on the meta device, which costs no
memory, with one size after the other changed: the dimensions that change with it are that size's. Where a config
has no head size of its own (BERT, GPT-2), the width inside attention changes with the hidden size, and is told
from it by the names that projections have inside an attention module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

HIDDEN, HEADS, GROUPS, UNITS, VOCABULARY = "hidden", "heads", "key_value_heads", "intermediate", "vocabulary"

NAMES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    HIDDEN: (("hidden_size",),),
    HEADS: (("encoder_attention_heads", "decoder_attention_heads"), ("num_attention_heads",)),
    GROUPS: (("num_key_value_heads",),),
    UNITS: (
        ("encoder_ffn_dim", "decoder_ffn_dim"),
        ("intermediate_size",),
        ("n_inner",),
        ("d_ff",),
        ("ffn_dim",),
        ("hidden_dim",),
    ),
    VOCABULARY: (("vocab_size",),),
}
"""How configs call each size; the first that a config has are its own. Two of one entry change together."""

QUERIES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("c_attn",),
)
FIRST = {names[0] for names in QUERIES}
OUTPUTS = ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense")
BESIDE = "output.dense"
"""Where BERT and its kin keep the output projection, seen from the parent of the module with the queries."""
COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class Slot:
    """One dimension of a weight: ``blocks`` times ``count`` units of ``width`` entries each.

    Attributes:
        axis: Whose units they are, `HIDDEN`, `HEADS`, ...
        dim: The dimension.
        count: How many units there are.
        width: Entries of one unit; of a head its size.
        blocks: How often all units stand one after the other, 3 for queries, keys and values in one weight.
        reads: Whether the weight reads the units, as the columns of a linear layer do, or writes them.
    """

    axis: str
    dim: int
    count: int
    width: int = 1
    blocks: int = 1
    reads: bool = False


@dataclass(frozen=True)
class Axes:
    """What was found in a model.

    Attributes:
        config: The model's config with every size said explicitly.
        sizes: Its sizes by axis.
        names: How the config calls them.
        head_size: Entries of one head.
        tied: Whether heads times the head's size has to be the hidden size.
        slots: The dimensions of each weight by its name in the state dict.
        queries: The weights and biases that make queries, where `tied`.
    """

    config: Any
    sizes: Mapping[str, int]
    names: Mapping[str, tuple[str, ...]]
    head_size: int
    tied: bool
    slots: Mapping[str, tuple[Slot, ...]]
    queries: frozenset[str]


Shapes = dict[str, torch.Size]


def find_axes(model: Any) -> Axes:
    """Find out which dimension of which weight is what.

    Args:
        model: A transformers model, as its class builds it from its config.

    Raises:
        ValueError: the config lacks a size, the class does not follow the config in a way that is understood, or
            the model's weights are not those that its config describes.
    """
    kind = type(model).__name__
    config, names = _explicit(model.config, kind)
    sizes = {axis: int(getattr(config, own[0])) for axis, own in names.items()}
    base = _build_shapes(model, config)
    _check_is_built_from_config(model, base)
    head_size, tied = _head_size(model, config, sizes, base)
    found = _Found(kind, base, sizes, head_size, {name: {} for name in base})
    for axis in (UNITS, VOCABULARY):
        if axis in sizes:
            found.add(axis, _changed(model, config, names[axis], sizes[axis] + 1), 1)
    queries: set[str] = set()
    if tied:
        inside = _attention_slots(model, sizes, head_size)
        _add_tied(found, model, config, names, inside)
        queries = {name for (name, _), slot in inside.items() if name.split(".")[-2] in FIRST}
    else:
        found.add(HIDDEN, _changed(model, config, names[HIDDEN], 2 * sizes[HIDDEN]), sizes[HIDDEN])
        _add_heads(found, model, config, names)
    slots = _with_direction(model, found.slots)
    return Axes(config, sizes, names, head_size, tied, slots, frozenset(queries))


def _explicit(given: Any, kind: str) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """A copy of the config in which no size is derived from another one, and how it calls the sizes."""
    config = copy.deepcopy(given)
    names = {axis: found for axis in NAMES if (found := _names_of(config, axis))}
    if names.get(GROUPS, ("",))[0] in names.get(HEADS, ()):  # Whisper: another name for the same
        del names[GROUPS]
    usual = {HIDDEN: "hidden_size", HEADS: "num_attention_heads", UNITS: "intermediate_size"}
    lacking = [name for axis, name in usual.items() if axis not in names]
    if lacking:
        raise ValueError(
            f"the config of {kind} has no {' and no '.join(lacking)}, so it cannot be made narrower; "
            "take layers (take_layers), or make a new model (from_config)"
        )
    if getattr(config, names[UNITS][0]) is None:  # GPT-2: four times the hidden size
        setattr(config, names[UNITS][0], 4 * config.hidden_size)
    for axis, own in names.items():
        values = {name: getattr(config, name) for name in own}
        if len(set(values.values())) != 1 or not all(type(value) is int for value in values.values()):
            raise ValueError(f"{kind} has {values}; only one number for all layers can be made smaller ({axis})")
    return config, names


def _names_of(config: Any, axis: str) -> tuple[str, ...]:
    known = {*vars(config), *config.attribute_map}
    for names in NAMES[axis]:
        if known.issuperset(names):
            own = tuple(config.attribute_map.get(name, name) for name in names)
            if axis == HIDDEN and vars(config).get("embedding_size") == getattr(config, own[0]):
                return (*own, "embedding_size")  # ELECTRA: a projection where they differ
            return own
    return ()


def _build_shapes(model: Any, config: Any) -> Shapes:
    """The weights that the class has with this config; no memory and no random numbers are used."""
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    return {name: tensor.shape for name, tensor in built.state_dict().items()}


def _changed(model: Any, config: Any, names: Sequence[str], size: int, **more: int) -> Shapes:
    changed = copy.deepcopy(config)
    for name, value in {**dict.fromkeys(names, size), **more}.items():
        setattr(changed, name, value)
    return _build_shapes(model, changed)


def _check_is_built_from_config(model: Any, base: Shapes) -> None:
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    differing = sorted(dict(own.items() ^ base.items()))
    if differing:
        raise ValueError(
            f"{len(differing)} weights of this {type(model).__name__} are not as its config says "
            f"({differing[0]!r} is one); shrink it before adapters, quantisation or other changes"
        )


def _head_size(model: Any, config: Any, sizes: Mapping[str, int], base: Shapes) -> tuple[int, bool]:
    """The size of a head, and whether heads and hidden size are bound to each other.

    A class that reads ``head_dim`` from its config gets it there, so that it no longer depends on the other two.
    """
    stated = getattr(config, "head_dim", None)
    size = stated or sizes[HIDDEN] // sizes[HEADS]
    if isinstance(getattr(type(config), "head_dim", None), property):
        return size, True
    trial = copy.deepcopy(config)
    trial.head_dim = 2 * size
    if _build_shapes(model, trial) == base:
        return size, True
    config.head_dim = size
    return size, False


@dataclass
class _Found:
    """Collects slots, and refuses what is not understood."""

    kind: str
    base: Shapes
    sizes: Mapping[str, int]
    head_size: int
    slots: dict[str, dict[int, Slot]]

    def add(
        self, axis: str, changed: Shapes, step: int, known: Mapping[tuple[str, int], Slot] | None = None
    ) -> None:
        """Compare with the shapes after `axis` grew by `step`; what is `known` is no part of this axis."""
        known = known or {}
        for name, dim, grown in self._growth(axis, changed):
            length, count = self.base[name][dim], self.sizes[axis]
            slot = known.get((name, dim))
            if slot is not None:
                self._put(name, slot)
                continue
            if grown % step or length != grown // step * count:
                raise self.unclear(f"dimension {dim} of {name!r} does not simply follow the {axis} size")
            blocks = grown // step
            if axis == UNITS and len(self.base[name]) > 2:  # experts in one weight, in an order of its own
                raise self.unclear(f"{name!r} holds the {axis} units of several layers")
            if axis != UNITS and blocks != 1:
                raise self.unclear(f"dimension {dim} of {name!r} holds {blocks} times the {axis} size")
            self._put(name, Slot(axis, dim, count, blocks=blocks))

    def add_units(self, axis: str, changed: Shapes, step: int) -> None:
        """The same for heads: a dimension of whole heads grows by their size, one with an entry for each by 1."""
        for name, dim, grown in self._growth(axis, changed):
            width, count = grown // step, self.sizes[axis]
            if grown % step or width not in (1, self.head_size) or self.base[name][dim] != width * count:
                raise self.unclear(f"dimension {dim} of {name!r} does not simply follow the number of {axis}")
            self._put(name, Slot(axis, dim, count, width=width))

    def _growth(self, axis: str, changed: Shapes) -> Iterator[tuple[str, int, int]]:
        if changed.keys() != self.base.keys():
            raise self.unclear(f"it has other weights with another {axis} size")
        for name, shape in self.base.items():
            for dim, (before, after) in enumerate(zip(shape, changed[name], strict=True)):
                if before != after:
                    yield name, dim, after - before

    def _put(self, name: str, slot: Slot) -> None:
        if slot.dim in self.slots[name]:
            both = f"{self.slots[name][slot.dim].axis} and {slot.axis}"
            raise self.unclear(f"dimension {slot.dim} of {name!r} follows both {both}")
        self.slots[name][slot.dim] = slot

    def unclear(self, fact: str) -> ValueError:
        """The error for what is not understood."""
        return ValueError(
            f"a {self.kind} cannot be made narrower: {fact}; take layers (take_layers), or make a new model "
            "(from_config)"
        )


def _add_tied(
    found: _Found,
    model: Any,
    config: Any,
    names: Mapping[str, tuple[str, ...]],
    inside: Mapping[tuple[str, int], Slot],
) -> None:
    """Hidden size and heads of a model whose head size is the one over the other."""
    hidden, heads = found.sizes[HIDDEN], found.sizes[HEADS]
    if found.sizes.get(GROUPS, heads) != heads:
        raise found.unclear("several heads share keys, and its config has no head_dim")
    wider = _changed(model, config, names[HIDDEN], 2 * hidden)
    found.add(HIDDEN, wider, hidden, inside)
    more = _changed(model, config, names[HIDDEN], 2 * hidden, **dict.fromkeys(names[HEADS], 2 * heads))
    grown = {
        name: torch.Size(b + m - w for b, m, w in zip(shape, more[name], wider[name], strict=True))
        for name, shape in found.base.items()
    }
    found.add_units(HEADS, grown, heads)  # what has an entry for each head: MPNet's position bias


def _add_heads(found: _Found, model: Any, config: Any, names: Mapping[str, tuple[str, ...]]) -> None:
    """Heads by their own count; a step keeps the number of queries for each key a whole one."""
    heads, groups = found.sizes[HEADS], found.sizes.get(GROUPS, found.sizes[HEADS])
    if GROUPS not in names:
        found.add_units(HEADS, _changed(model, config, names[HEADS], heads + 1), 1)
        return
    found.add_units(HEADS, _changed(model, config, names[HEADS], heads + groups), groups)
    both = dict.fromkeys(names[HEADS], 2 * heads)
    more = _changed(model, config, names[GROUPS], 2 * groups, **both)
    only_heads = _changed(model, config, names[HEADS], 2 * heads)
    own = {
        name: torch.Size(b + m - o for b, m, o in zip(found.base[name], more[name], only_heads[name], strict=True))
        for name in found.base
    }
    found.add_units(GROUPS, own, groups)


def _attention_slots(model: nn.Module, sizes: Mapping[str, int], head_size: int) -> dict[tuple[str, int], Slot]:
    """The dimensions inside attention, where the config gives them no size of their own."""
    heads, slots = sizes[HEADS], {}
    for queries, output in _attentions(model, heads):
        blocks = 3 // len(queries)
        for path in queries:
            slots[f"{path}.weight", 1 - _input_dim(model.get_submodule(path))] = blocks
            slots[f"{path}.bias", 0] = blocks
        slots[f"{output}.weight", _input_dim(model.get_submodule(output))] = 1
    return {(name, dim): Slot(HEADS, dim, heads, head_size, blocks) for (name, dim), blocks in slots.items()}


def _attentions(model: nn.Module, heads: int) -> Iterator[tuple[list[str], str]]:
    """The paths of each attention module's projections: of queries, keys and values, and of the output."""
    paths = dict(model.named_modules())
    for path, module in paths.items():
        children = [name for name, child in module.named_children() if _is_linear(child)]
        queries = next((own for own in QUERIES if set(own) <= set(children)), None)
        counts = any(vars(module).get(name) == heads for name in COUNTS)
        if queries is None and not (counts and children):
            continue
        beside = ".".join((*path.split(".")[:-1], BESIDE))
        outputs = [f"{path}.{name}" for name in OUTPUTS if name in children] or [beside] * (beside in paths)
        unknown = set(children) - set(queries or ()) - set(OUTPUTS)
        if queries is None or not outputs or unknown:
            raise ValueError(
                f"the projections of the attention at {path!r} are called {', '.join(children)}, which says not "
                "what each is, so its heads cannot be made fewer; take layers (take_layers), or make a new model "
                "(from_config)"
            )
        yield [f"{path}.{name}" for name in queries], outputs[0]


def _is_linear(module: nn.Module) -> bool:
    return _input_dim(module) is not None and not isinstance(module, (nn.Conv1d, nn.Conv2d))


def _input_dim(module: nn.Module) -> Any:
    """The dimension of a linear layer's weight that reads its input; nothing for other modules."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return 1
    return 0 if isinstance(module, Conv1D) else None


def _with_direction(model: nn.Module, slots: Mapping[str, Mapping[int, Slot]]) -> dict[str, tuple[Slot, ...]]:
    """Say of each slot whether its weight reads or writes the units."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, own in slots.items():
        path, _, leaf = name.rpartition(".")
        reading = _input_dim(modules[path]) if leaf == "weight" and path in modules else None
        found[name] = tuple(
            Slot(s.axis, s.dim, s.count, s.width, s.blocks, reads=s.dim == reading) for s in own.values()
        )
    return found
