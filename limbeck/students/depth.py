"""A shallower student from a teacher's own layers.

Nothing here knows an architecture by name. A transformers model is recognised by its config, which
says how many layers there are; any other model is cut where ``path`` points.
"""

from __future__ import annotations

import copy
import inspect
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from limbeck.registry import nearest

Model = TypeVar("Model", bound=nn.Module)
Stack = nn.ModuleList | nn.Sequential


def take_layers(model: Model, layers: Sequence[int], path: str | None = None) -> Model:
    """Make a student that keeps only some layers of a model, and everything around them.

    The given model is left as it is and shares no storage with the student; the dropped layers are
    never copied. Tied weights stay tied; train or eval mode and ``requires_grad`` stay as they are.
    In a transformers model the config follows (the number of layers, and lists such as
    ``layer_types``), and so does each layer's own ``layer_idx``: caches work, and
    ``from_pretrained`` gives the same student back. A layer that computes with its index (GPT-2's
    ``scale_attn_by_inverse_layer_idx``) computes with the new one from then on.

    Args:
        model: The model to take from, usually the teacher.
        layers: Which layers to keep, in the student's order; negative ones count from the end.
        path: The ``nn.ModuleList`` or ``nn.Sequential`` that holds the layers (``""`` is the model
            itself); needed only where `find_layers` does not find it.

    Returns:
        A new model of the same class.

    Raises:
        TypeError: a layer is not an integer.
        ValueError: `layers` is empty, repeats a layer or is out of range; `path` leads to no list
            of layers; not exactly one stack of layers was found; no config of this model's class
            could describe the student; or a dropped layer is used outside the stack, too.

    Example:
        >>> teacher = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
        >>> student = take_layers(teacher, [0, 2, -1], path="")
        >>> len(teacher), len(student), torch.equal(teacher[5].weight, student[2].weight)
        (6, 3, True)
    """
    path = find_layers(model, path)
    count = len(_stack_at(model, path))
    positions = _positions(layers, count, path)
    # deepcopy takes over what its memo already holds for an object. The configs enter it first and
    # cut, so that what no config can describe fails before any weight is copied.
    memo: dict[int, Any] = {}
    attributes = _cut_configs(model, path, positions, memo)
    student = _copy_cut(model, path, positions, memo)
    _renumber(_stack_at(student, path), positions)
    _recount(student, path, attributes, count, len(positions))
    return student


def find_layers(model: nn.Module, path: str | None = None) -> str:
    """Find the path of a model's stack of layers.

    In a transformers model, or a module that wraps one, this is the outermost ``nn.ModuleList``
    that has as many entries as the config says there are layers.

    Args:
        model: The model to look into.
        path: A path to check instead of searching.

    Returns:
        The path, as in ``model.get_submodule(path)``.

    Raises:
        ValueError: no stack was found, or several (an encoder and a decoder); or `path` leads to no
            ``nn.ModuleList`` or ``nn.Sequential``.

    Example:
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> find_layers(model, "blocks")
        'blocks'
        >>> find_layers(model)
        Traceback (most recent call last):
        ValueError: found no stack of layers in ModuleDict; pass path=, one of: 'blocks' (2 layers)
    """
    if path is not None:
        _stack_at(model, path)
        return path
    counted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _is_counted(model, name, len(module))
    ]
    outermost = [name for name in counted if not any(_is_below(name, other) for other in counted)]
    if len(outermost) != 1:
        raise ValueError(_not_one_stack(model, outermost))
    return str(outermost[0])


def count_layers(model: nn.Module, path: str | None = None) -> int:
    """Count the layers of a model's stack.

    Args:
        model: The model to look into.
        path: Where the stack is; needed only where `find_layers` does not find it.

    Returns:
        The number of layers.

    Raises:
        ValueError: as `find_layers`.

    Example:
        >>> count_layers(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])}), "blocks")
        1
    """
    return len(_stack_at(model, find_layers(model, path)))


def _stack_at(model: nn.Module, path: str) -> Stack:
    modules = dict(model.named_modules(remove_duplicate=False))
    stack = modules.get(path)
    if isinstance(stack, Stack):
        return stack
    lists = [name for name, module in modules.items() if name and isinstance(module, Stack)]
    if stack is None:
        raise ValueError(f"{type(model).__name__} has no {path!r}; {nearest(path, lists)}")
    raise ValueError(
        f"{path!r} is a {type(stack).__name__}, not a list of layers; give the path of an "
        f"nn.ModuleList or nn.Sequential; {nearest(path, lists)}"
    )


def _not_one_stack(model: nn.Module, found: Sequence[str]) -> str:
    """Word the error for a model in which no stack was found, or several were."""
    fact = f"{len(found)} stacks" if found else "no stack"
    start = f"found {fact} of layers in {type(model).__name__}; "
    stacks = {name: part for name, part in model.named_modules() if isinstance(part, Stack)}
    names = found or list(stacks)
    if not names:
        return start + "it has no nn.ModuleList and no nn.Sequential to take layers from"
    shown = [f"{name!r} ({len(stacks[name])} layers)" for name in names[:12]]
    return start + "pass path=, one of: " + ", ".join(shown) + (", ..." if names[12:] else "")


def _positions(layers: Sequence[int], count: int, path: str) -> list[int]:
    """Check which layers were asked for, and count them from 0."""
    if len(layers) == 0:
        raise ValueError(f"layers is empty; name at least one of the {count} layers of {path!r}")
    positions: list[int] = []
    for layer in layers:
        position = _position(layer, count, path)
        if position in positions:
            raise ValueError(f"layer {layer} of {path!r} is given twice; name each layer once")
        positions.append(position)
    return positions


def _position(layer: int, count: int, path: str) -> int:
    try:
        index = operator.index(layer)
    except TypeError:
        fact = f"layer {layer!r} is a {type(layer).__name__}"
        raise TypeError(f"{fact}; give layers by number, as in [0, 2, -1]") from None
    if not -count <= index < count:
        fact = f"layer {index} is out of range, {path!r} has {count} layers"
        raise ValueError(f"{fact}; choose from 0 to {count - 1}, or -{count} to -1")
    return index % count


def _copy_cut(model: Model, path: str, positions: Sequence[int], memo: dict[int, Any]) -> Model:
    """Copy `model` with its stack cut; what `memo` holds is taken over instead of being copied."""
    stack = _stack_at(model, path)
    kept = {id(stack[position]) for position in positions}
    dropped = nn.Identity()  # stands for every dropped layer, so that none of them costs memory
    memo.update({id(layer): dropped for layer in stack if id(layer) not in kept})
    student = copy.deepcopy(model, memo)
    _keep(_stack_at(student, path), _new_names(stack, positions))
    if any(module is dropped for module in student.modules()):
        raise ValueError(
            f"a layer that would be dropped from {path!r} is used elsewhere in "
            f"{type(model).__name__}, too; keep it, or remove the other use"
        )
    return student


def _keep(stack: Stack, names: dict[str, str]) -> None:
    """Cut `stack` in place to the entries in `names`, in that order and under their new names."""
    entries = dict(stack._modules)
    del stack[:]
    for old, new in names.items():
        stack.add_module(new, entries[old])


def _new_names(stack: Stack, positions: Sequence[int]) -> dict[str, str]:
    """Map each kept layer's name to its name in the student; only numbers change."""
    names = list(stack._modules)
    numbered = all(name.isdigit() for name in names)
    kept = [names[position] for position in positions]
    return {name: str(place) if numbered else name for place, name in enumerate(kept)}


def _renumber(stack: Stack, positions: Sequence[int]) -> None:
    """Give the kept layers their new ``layer_idx``: a cache has one place for each layer."""
    for place, (position, layer) in enumerate(zip(positions, stack, strict=True)):
        for module in layer.modules():
            # Another number is not the layer's own (Zamba2 marks parts without a cache by -1).
            if vars(module).get("layer_idx") == position:
                setattr(module, "layer_idx", place)  # noqa: B010  mypy knows no such attribute


def _recount(student: nn.Module, path: str, attributes: Iterable[str], old: int, new: int) -> None:
    """Correct the counts that modules around the stack copied from the config (``n_layers``)."""
    for name, module in student.named_modules():
        for attribute in attributes:
            if _is_within(path, name) and vars(module).get(attribute) == old:
                setattr(module, attribute, new)


def _is_within(path: str, ancestor: str) -> bool:
    return ancestor in ("", path) or path.startswith(ancestor + ".")


def _is_below(path: str, ancestor: str) -> bool:
    return path != ancestor and _is_within(path, ancestor)


def _path_from(ancestor: str, path: str) -> str:
    """Write `path` as seen from the module at `ancestor`."""
    return path.removeprefix(ancestor).removeprefix(".")


def is_transformers_model(module: nn.Module) -> bool:
    """Tell whether `module` is a transformers model, without importing transformers (seconds)."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def _owners(model: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the transformers models around `path`, outermost first, one for each config."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if _is_within(path, name) and is_transformers_model(module):
            owner: Any = module
            if id(owner.config) not in seen:
                seen.add(id(owner.config))
                yield name, owner


def _count_attributes(config: Any, path: str, count: int) -> list[str]:
    """Name the attributes by which `config` says that the stack at `path` has `count` layers.

    ``decoder_layers`` speaks of a stack below ``decoder``. Where no such name fits, the config's
    own name for ``num_hidden_layers`` (see its ``attribute_map``) speaks of any stack.
    """
    fitting = [name for name, value in vars(config).items() if type(value) is int and value == count]
    places = set(path.split(".")) - {"layer", "layers"}
    words = {name: set(name.split("_")) for name in fitting}
    special = [name for name in fitting if "layers" in words[name] and words[name] & places]
    standard = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return special or [name for name in fitting if name == standard]


def _is_counted(model: nn.Module, path: str, count: int) -> bool:
    """Tell whether the innermost config around `path` says that there are `count` layers."""
    owners = list(_owners(model, path))
    if not owners:
        return False
    name, owner = owners[-1]
    return bool(_count_attributes(owner.config, _path_from(name, path), count))


def _cut_configs(model: nn.Module, path: str, positions: Sequence[int], memo: dict[int, Any]) -> set[str]:
    """Put cut copies of the configs around `path` into `memo`; return which attributes count."""
    owners = list(_owners(model, path))
    count = len(_stack_at(model, path))
    if owners and not _is_counted(model, path, count):
        raise ValueError(
            f"the config of {type(owners[-1][1]).__name__} does not say that {path!r} has {count} "
            "layers, so a student with other layers could not be saved and loaded; take layers "
            "from the stack that num_hidden_layers counts"
        )
    counting: set[str] = set()
    for name, owner in owners:
        attributes = _count_attributes(owner.config, _path_from(name, path), count)
        cut_config(copy.deepcopy(owner.config, memo), attributes, count, positions)
        counting.update(attributes)
    _check_rebuild(model, path, positions, memo)
    return counting


def cut_config(config: Any, attributes: Sequence[str], count: int, positions: Sequence[int]) -> None:
    """Set the `attributes` that count layers, and cut the lists with an entry for each layer."""
    if not attributes:
        return
    for name, value in list(vars(config).items()):
        # The name has to speak of layers: two layers do not make image_size a list of layers.
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, name, type(value)(value[position] for position in positions))
    for name in attributes:
        setattr(config, name, len(positions))


def _check_rebuild(model: nn.Module, path: str, positions: Sequence[int], memo: dict[int, Any]) -> None:
    """Check that the class, built from the cut config, has the weights that the student will have.

    Not every cut can be described: ModernBERT's first layer lacks a norm that the others have, T5's
    holds the position bias for all, and some configs count experts up to a layer's number.
    ``from_pretrained`` would make weights up, or fail. Two models that are built from configs are
    compared, so what a user has since done to this one (adapters, quantisation) does not matter.
    """
    buildable = ((name, owner) for name, owner in _owners(model, path) if _needs_only_config(owner))
    for name, owner in buildable:
        names = _new_names(_stack_at(model, path), positions)
        wanted = _cut_shapes(_shapes(owner, owner.config), _path_from(name, path), names)
        rebuilt = _shapes(owner, memo[id(owner.config)])
        differing = sorted(dict(wanted.items() ^ rebuilt.items()))
        if differing:
            raise ValueError(
                f"no config describes a {type(owner).__name__} with layers {list(positions)} of "
                f"{path!r}: a model built from it has another {differing[0]!r}; choose other layers"
            )
        return  # the outermost one has all the others inside


def _needs_only_config(owner: Any) -> bool:
    """Tell whether the class can be built from a config alone; a user's own may want more."""
    try:
        inspect.signature(type(owner)).bind(owner.config)
    except TypeError:
        return False
    return True


def _shapes(owner: Any, config: Any) -> dict[str, torch.Size]:
    """List the weights that `config` gives, at the cost of no memory and no random numbers."""
    with torch.device("meta"):
        built = type(owner)(copy.deepcopy(config))
    return {name: tensor.shape for name, tensor in built.state_dict().items()}


def _cut_shapes(shapes: dict[str, torch.Size], path: str, names: dict[str, str]) -> dict[str, torch.Size]:
    """Cut a list of weights in the way in which the stack at `path` is cut."""
    prefix = f"{path}." if path else ""
    cut = {}
    for name, shape in shapes.items():
        layer, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            cut[name] = shape
        elif layer in names:
            cut[f"{prefix}{names[layer]}.{rest}"] = shape
    return cut
