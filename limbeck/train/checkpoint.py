"""Checkpoints: all that the next step depends on, in safetensors and JSON, written so that a crash harms nothing.

A checkpoint is a folder ``step-00000078``. It is written under another name and renamed when it is complete, so a
folder with that name is always whole.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from limbeck.atomic import SUFFIX, sync, write_tensors, write_text

PREFIX = "step-"
WEIGHTS = "distiller.safetensors"


def flatten(tree: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of nested dicts and lists: a JSON skeleton and the tensors by their place in it.

    Example:
        >>> skeleton, tensors = flatten({"a": [torch.zeros(2), 3]})
        >>> skeleton, list(tensors)
        ({'a': [{'tensor': '/a/0'}, 3]}, ['/a/0'])
    """
    if isinstance(tree, Tensor):
        return {"tensor": prefix}, {prefix: tree.detach().contiguous()}
    tensors: dict[str, Tensor] = {}
    if isinstance(tree, Mapping):
        parts = {str(key): flatten(value, f"{prefix}/{key}") for key, value in tree.items()}
        for _, found in parts.values():
            tensors |= found
        return {key: skeleton for key, (skeleton, _) in parts.items()}, tensors
    if isinstance(tree, (list, tuple)):
        items = [flatten(value, f"{prefix}/{i}") for i, value in enumerate(tree)]
        for _, found in items:
            tensors |= found
        return [skeleton for skeleton, _ in items], tensors
    return tree, {}


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors back; the inverse of `flatten`, with lists for tuples."""
    if isinstance(skeleton, dict):
        if skeleton.keys() == {"tensor"}:
            return tensors[skeleton["tensor"]]
        return {key: unflatten(value, tensors) for key, value in skeleton.items()}
    if isinstance(skeleton, list):
        return [unflatten(value, tensors) for value in skeleton]
    return skeleton


def save_weights(module: nn.Module, path: Path) -> None:
    """Save a module's state dict; see `save_state`."""
    save_state(module.state_dict(), path)


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Save a state dict, tied tensors once, and replace the file only when it is whole.

    Raises:
        OSError: the disk is full.
    """
    first: dict[tuple[Any, ...], str] = {}
    stored: set[int] = set()
    whole, tied = {}, {}
    for name, tensor in state.items():
        other = first.setdefault(_identity(tensor), name) if tensor.numel() else name
        if other != name:
            tied[name] = other
            continue
        storage = tensor.untyped_storage().data_ptr()
        # Another view of memory that is already in the file, as a transpose: stored as a tensor of its own.
        whole[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in stored else tensor
        stored.add(storage)
    whole = {name: tensor.contiguous() for name, tensor in whole.items()}
    write_tensors(path, whole, {"tied": json.dumps(tied)})


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Two tensors are tied where all of this agrees; the same memory alone may be read in other ways."""
    place = tensor.device, tensor.data_ptr(), tensor.storage_offset()
    return *place, tensor.dtype, tensor.shape, tensor.stride()


def load_weights(module: nn.Module, path: Path) -> None:
    """Load what `save_weights` saved.

    Raises:
        ValueError: the file belongs to another model.
    """
    load_state(path, module.load_state_dict)


def load_state(path: Path, load: Callable[[dict[str, Tensor]], Any]) -> None:
    """Load what `save_state` saved, by a module's ``load_state_dict`` or what stands for it.

    Raises:
        ValueError: the file belongs to another model.
    """
    try:
        load(read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another model: {str(error).splitlines()[1].strip()}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_weights` saved."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    state = load_file(path)
    return state | {name: state[other] for name, other in tied.items()}


def first_spoiled(module: nn.Module) -> str | None:
    """The name of the first parameter that is not finite, which no checkpoint shall hold; None where all are.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.bias.data.fill_(float("nan"))
        >>> first_spoiled(layer)
        'bias'
    """
    return next((name for name, p in module.named_parameters() if not torch.isfinite(p).all()), None)


def random_state() -> dict[str, Any]:
    """The state of every random generator that training draws from."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the random generators back to where `random_state` found them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def write_tree(tree: Any, folder: Path, name: str) -> None:
    """Write nested data with tensors as ``name.json`` and ``name.safetensors``."""
    skeleton, tensors = flatten(tree)
    write_tensors(folder / f"{name}.safetensors", tensors)
    write_text(folder / f"{name}.json", json.dumps(skeleton))


def read_tree(folder: Path, name: str) -> Any:
    """Read what `write_tree` wrote."""
    skeleton = json.loads((folder / f"{name}.json").read_text())
    return unflatten(skeleton, load_file(folder / f"{name}.safetensors"))


def with_text_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state in a form that JSON can key."""
    return {"state": {str(k): v for k, v in state["state"].items()}, "param_groups": state["param_groups"]}


def with_number_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `with_text_keys`."""
    return {"state": {int(k): v for k, v in state["state"].items()}, "param_groups": state["param_groups"]}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state in a form that JSON can key."""
    return with_text_keys(optimizer.state_dict())


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` gave."""
    optimizer.load_state_dict(with_number_keys(state))


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{PREFIX}{step:08d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is prepared."""
    return step_folder(folder, step).with_suffix(SUFFIX)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if p.suffix != SUFFIX and p.is_dir())


def latest(folder: Path | None) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = checkpoints(folder) if folder is not None and folder.is_dir() else []
    return found[-1] if found else None


def newest_within(folder: Path, name: str | None = None) -> Path | None:
    """The newest whole checkpoint of all trainings that have their folders below this one, or None.

    Args:
        folder: Where they are.
        name: The checkpoint of this name instead, ``"model/step-00000120"``.

    Raises:
        ValueError: there is none of this name.
    """
    if name and not (folder / name).is_dir():
        raise ValueError(
            f"there is no checkpoint {name!r} in {folder}; it is a folder such as model/step-00000120"
        )
    if name:
        return folder / name
    trainings = {path.parent for path in folder.rglob(f"{PREFIX}*")}
    found = [path for path in map(latest, trainings) if path is not None]
    return max(found, key=lambda path: (path.stat().st_mtime, path), default=None)


def unused_folder(folder: Path, name: str) -> Path:
    """A place for the checkpoints of a new training: ``name``, or ``name-2`` and so on where others have theirs.

    Example:
        >>> unused_folder(Path("nowhere"), "model").name
        'model'
    """
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder / each for each in names if latest(folder / each) is None)


def remove_trainings(folder: Path, name: str) -> None:
    """Remove the folders with checkpoints whose name begins so."""
    for old in folder.glob(f"{name}*"):
        if latest(old) is not None:
            shutil.rmtree(old)


def new_training(folder: Path, name: str, *, replace: bool = False) -> Path:
    """A place for the checkpoints of a new training, the same on all ranks, each of which calls this.

    Args:
        folder: Where trainings have their folders.
        name: What it is called, if no other has this name; see `unused_folder`.
        replace: Remove the others of this name first.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    ranks = PartialState()
    if replace and ranks.is_main_process:
        remove_trainings(folder, name)
    chosen = [unused_folder(folder, name)]
    return broadcast_object_list(chosen)[0] if ranks.num_processes > 1 else chosen[0]


def begin(folder: Path, step: int) -> Path:
    """Open the folder in which a checkpoint is prepared."""
    partial = partial_folder(folder, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path, keep: int) -> Path:
    """Make a prepared checkpoint valid, on the disk and not only in its cache, and drop the oldest ones."""
    sync(partial)
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)
    for old in checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old)
    return final


def sweep(folder: Path) -> None:
    """Remove what a training that was killed left half written; it would fill the disk for ever."""
    for partial in folder.glob(f"{PREFIX}*{SUFFIX}"):
        shutil.rmtree(partial, ignore_errors=True)
