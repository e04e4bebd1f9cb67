"""Where a trainer's checkpoints lie, by the options of PyMarlin's checkpointer."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.compat.pymarlin.utils.arguments import arguments
from limbeck.train import checkpoint as files

LOGGER = logging.getLogger(__name__)
REST = "what is no tensor"


@arguments
@dataclass
class DefaultCheckpointerArguments:
    """Where checkpoints go and where a training begins.

    They are folders of safetensors and JSON, not pickles, so that `file_ext` has no say, and one is written after
    each epoch whatever `period` says.

    Attributes:
        checkpoint: Whether to write any.
        delete_existing_checkpoints: Delete those of earlier trainings of this prefix under `save_dir` first.
        period: Accepted, and of no effect.
        save_dir: Each training gets a folder of its own here, ``model``, ``model-2``, ...
        model_state_save_dir: Where the module's state goes at the end; None for nowhere.
        load_dir: Where to look for a checkpoint to go on from, the newest there is. Where it lies under
            `save_dir`, its own training goes on.
        load_filename: The checkpoint under `load_dir` to begin from, ``"model/step-00000120"``.
        file_prefix: The name of the trainings' folders.
        file_ext: Accepted, and of no effect.
        log_level: Of this module's log.

    Example:
        >>> DefaultCheckpointerArguments(checkpoint=False).file_prefix
        'model'
    """

    checkpoint: bool = True
    delete_existing_checkpoints: bool = False
    period: int = 1
    save_dir: str = field(default_factory=lambda: str(Path.cwd() / "checkpoints"))
    model_state_save_dir: str | None = field(default_factory=lambda: str(Path.cwd() / "checkpoints"))
    load_dir: str | None = None
    load_filename: str | None = None
    file_prefix: str = "model"
    file_ext: str = "safetensors"
    log_level: str = "INFO"


def find_checkpoint(args: DefaultCheckpointerArguments) -> Path | None:
    """The checkpoint to begin from, or None.

    Raises:
        ValueError: `load_filename` is no checkpoint, or what is to be loaded would be deleted first.

    Example:
        >>> find_checkpoint(DefaultCheckpointerArguments()) is None
        True
    """
    if not args.load_dir:
        return None
    place = Path(args.load_dir)
    if args.delete_existing_checkpoints and args.checkpoint and _is_in(place, Path(args.save_dir)):
        raise ValueError(f"delete_existing_checkpoints=True would delete what load_dir={args.load_dir!r} holds")
    if args.load_filename:
        path = place / args.load_filename
        if not path.is_dir():
            raise ValueError(f"there is no checkpoint {path}; it is a folder such as model/step-00000120")
        return path
    found = [
        path for folder in {p.parent for p in place.rglob(f"{files.PREFIX}*")} for path in [files.latest(folder)]
    ]
    newest = max((p for p in found if p is not None), key=lambda p: (p.stat().st_mtime, p), default=None)
    if newest is None:
        LOGGER.info("no checkpoint lies under %s; training begins anew", place)
    return newest


def prepare_folder(args: DefaultCheckpointerArguments, start: Path | None, copied: bool) -> Path | None:
    """The folder of this training's checkpoints, with the one to go on from in it; None for no checkpoints.

    Args:
        args: The options.
        start: From `find_checkpoint`.
        copied: Whether a training that begins from `start` takes over all of it.

    Example:
        >>> import tempfile
        >>> args = DefaultCheckpointerArguments(save_dir=tempfile.mkdtemp())
        >>> prepare_folder(args, None, copied=True).name
        'model'
    """
    if not args.checkpoint:
        return None
    place = Path(args.save_dir)
    if args.delete_existing_checkpoints:
        for old in _trainings(args):
            shutil.rmtree(old)
    if start is not None and copied and not args.load_filename and _is_in(start, place):
        return start.parent
    taken = {old.name for old in _trainings(args)}
    names = (args.file_prefix if i == 1 else f"{args.file_prefix}-{i}" for i in range(1, len(taken) + 2))
    folder = place / next(name for name in names if name not in taken)
    folder.mkdir(parents=True, exist_ok=True)
    if start is not None and copied:
        shutil.copytree(start, folder / start.name)
    return folder


def _trainings(args: DefaultCheckpointerArguments) -> list[Path]:
    """The folders under `save_dir` that hold checkpoints of this prefix."""
    found = Path(args.save_dir).glob(f"{args.file_prefix}*")
    return [p for p in found if p.is_dir() and any(p.glob(f"{files.PREFIX}*"))]


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


class Kept(nn.Module):
    """A module whose state dict is what its ``get_state()`` gives, tensors and all else, for files of tensors.

    Args:
        module: What is trained.

    Example:
        >>> class Counting(nn.Linear):
        ...     def get_state(self):
        ...         return {"weights": self.state_dict(), "seen": 3}
        ...     def update_state(self, state):
        ...         print(state["seen"], sorted(state["weights"]))
        >>> kept = Kept(Counting(1, 1))
        >>> _ = kept.load_state_dict(kept.state_dict())
        3 ['bias', 'weight']
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Tensors by name.

        Raises:
            TypeError: ``get_state`` gave something that is neither a tensor nor JSON.
        """
        skeleton, tensors = files.flatten(self.module.get_state())
        try:
            text = json.dumps(skeleton)
        except TypeError as error:
            kinds = "tensors, numbers, text, lists and dicts"
            raise TypeError(
                f"get_state gave something that no checkpoint can hold ({error}); give {kinds}"
            ) from None
        return {**tensors, REST: torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Hand it to ``update_state``."""
        skeleton = json.loads(bytes(state_dict[REST].tolist()))
        self.module.update_state(files.unflatten(skeleton, state_dict))
