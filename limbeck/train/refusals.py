"""What a training refuses before it begins, whichever front end runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.distiller import Distiller
from limbeck.objective import Objective
from limbeck.train.settings import Settings


def check_kinds(distiller: Any, settings: Any) -> None:
    """Refuse a model that is no Distiller, and settings that are none.

    Raises:
        TypeError: either.

    Example:
        >>> from torch import nn
        >>> check_kinds(nn.Linear(2, 2), Settings())
        Traceback (most recent call last):
        TypeError: what trains is a Distiller, got a Linear; write limbeck.Distiller(student, teacher, [Term(...)])
    """
    if not isinstance(distiller, Distiller):
        raise TypeError(
            f"what trains is a Distiller, got a {type(distiller).__name__}; write "
            "limbeck.Distiller(student, teacher, [Term(...)])"
        )
    if not isinstance(settings, Settings):
        hint = "limbeck.Settings(**settings)" if isinstance(settings, dict) else "limbeck.Settings(...)"
        raise TypeError(f"settings are limbeck.Settings, got a {type(settings).__name__}; write {hint}")


def check_callbacks(callbacks: Any, kind: type) -> None:
    """Refuse what cannot watch a training.

    Raises:
        TypeError: no list, or something in it that is no callback.

    Example:
        >>> from limbeck.train.callbacks import Callback
        >>> check_callbacks([print], Callback)
        Traceback (most recent call last):
        TypeError: a callback is a limbeck.train.callbacks.Callback, got print; override what you need of one
    """
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"callbacks are a list, got a {type(callbacks).__name__}; write [callback]")
    for one in callbacks:
        if not isinstance(one, kind):
            name = getattr(one, "__name__", f"a {type(one).__name__}")
            raise TypeError(
                f"a callback is a {kind.__module__}.{kind.__qualname__}, got {name}; override what you need of one"
            )


def check_folder(folder: Path | str | None) -> None:
    """Refuse a file where checkpoints shall go.

    Raises:
        ValueError: it is a file, or lies in one.

    Example:
        >>> check_folder(__file__ + "/runs")
        Traceback (most recent call last):
        ValueError: checkpoints go into a folder, and ...refusals.py is a file; pass another folder=
    """
    if folder is None:
        return
    path = Path(folder)
    for place in (path, *path.parents):
        if place.is_file():
            raise ValueError(f"checkpoints go into a folder, and {place} is a file; pass another folder=")


def check_trains(distiller: Distiller) -> None:
    """Refuse a training of nothing.

    Raises:
        ValueError: neither the student nor anything beside it has a parameter that trains.

    Example:
        >>> from torch import nn
        >>> from limbeck import Term
        >>> frozen = nn.Linear(2, 2).requires_grad_(False)
        >>> check_trains(Distiller(frozen, nn.Linear(2, 2), [Term("logits", loss="mse")]))
        Traceback (most recent call last):
        ValueError: nothing of the student (Linear) trains; call requires_grad_(True) on what shall
    """
    if not any(parameter.requires_grad for parameter in distiller.parameters()):
        name = type(distiller.student).__name__
        raise ValueError(f"nothing of the student ({name}) trains; call requires_grad_(True) on what shall")


def check_device(device: Any) -> None:
    """Refuse where nothing can train.

    Args:
        device: A device, its name, or the number of a GPU.

    Raises:
        ValueError: what PyTorch knows as no device, or a GPU where there is none.

    Example:
        >>> check_device("gpu")
        Traceback (most recent call last):
        ValueError: unknown device 'gpu'; write 'cpu', 'cuda' or 'cuda:0'
    """
    try:
        kind = "cuda" if isinstance(device, int) else torch.device(device).type
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {device!r}; write 'cpu', 'cuda' or 'cuda:0'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, and there is no GPU; write device='cpu', or leave it out")


def check_held(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Refuse projections, and what else of an objective learns, that would stay as they were drawn.

    Args:
        model: A Distiller, or what holds one or its objective.
        *optimizers: What trains it.

    Raises:
        ValueError: some of their parameters are in no optimizer.

    Example:
        >>> from limbeck import Term
        >>> sides = nn.Linear(2, 2), nn.Linear(2, 3)
        >>> distiller = Distiller(*sides, [Term("logits", loss="mse", project="linear")])
        >>> _ = distiller.preflight({"input": torch.zeros(1, 2)})
        >>> check_held(distiller, torch.optim.SGD(distiller.student.parameters()))
        Traceback (most recent call last):
        ValueError: 2 parameters of projections are in no optimizer; build it of all parameters() that train
    """
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    learned = {p for part in model.modules() if isinstance(part, Objective) for p in part.parameters()}
    idle = sum(p.requires_grad for p in learned - held)
    if idle:
        raise ValueError(
            f"{idle} parameters of projections are in no optimizer; build it of all parameters() that train"
        )
