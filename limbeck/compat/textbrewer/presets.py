"""TextBrewer's tables of names, which `register_new` and users' scripts add to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from limbeck import schedules
from limbeck.compat.textbrewer import losses, schedulers
from limbeck.registry import nearest

FEATURES = ["hidden", "attention"]
ADAPTOR_KEYS = ["logits", "logits_mask", "losses", "inputs_mask", "labels", *FEATURES]

Projection = Callable[[int, int], nn.Module]


def linear_projection(dim_in: int, dim_out: int) -> nn.Module:
    """A linear layer, its weights normal with deviation 0.02 and its bias zero."""
    layer = nn.Linear(dim_in, dim_out)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def projection_with_activation(act_fn: str) -> Projection:
    """Make linear projections with an activation of `torch.nn` behind, by its name: ``"ReLU"``.

    Example:
        >>> projection_with_activation("Tanh")(2, 3)[1]
        Tanh()
    """
    activation: Callable[[], nn.Module] = getattr(nn, act_fn)
    return lambda dim_in, dim_out: nn.Sequential(linear_projection(dim_in, dim_out), activation())


TEMPERATURE_SCHEDULER: dict[str, Callable[..., Any]] = {
    "constant": schedulers.constant_temperature_scheduler,
    "flsw": schedulers.flsw_temperature_scheduler_builder,
    "cwsm": schedulers.cwsm_temperature_scheduler_builder,
}
KD_LOSS_MAP: dict[str, Callable[..., Any]] = {"mse": losses.kd_mse_loss, "ce": losses.kd_ce_loss}
MATCH_LOSS_MAP: dict[str, Callable[..., Any]] = {
    "attention_mse_sum": losses.att_mse_sum_loss,
    "attention_mse": losses.att_mse_loss,
    "attention_ce_mean": losses.att_ce_mean_loss,
    "attention_ce": losses.att_ce_loss,
    "hidden_mse": losses.hid_mse_loss,
    "cos": losses.cos_loss,
    "pkd": losses.pkd_loss,
    "gram": losses.fsp_loss,
    "fsp": losses.fsp_loss,
    "mmd": losses.mmd_loss,
    "nst": losses.mmd_loss,
}
PROJ_MAP: dict[str, Projection] = {
    "linear": linear_projection,
    "relu": projection_with_activation("ReLU"),
    "tanh": projection_with_activation("Tanh"),
}
WEIGHT_SCHEDULER: dict[str, Callable[[float], float]] = {
    "linear_decay": schedules.linear_decay,
    "linear_growth": schedules.linear_growth,
}
MAPS: dict[str, dict[str, Any]] = {
    "kd_loss": KD_LOSS_MAP,
    "match_Loss": MATCH_LOSS_MAP,
    "projection": PROJ_MAP,
    "weight_scheduler": WEIGHT_SCHEDULER,
    "temperature_scheduler": TEMPERATURE_SCHEDULER,
}


def register_new(map_name: str, name: str, func: Callable[..., Any]) -> None:
    """Add a function to a table.

    Args:
        map_name: ``"kd_loss"``, ``"match_Loss"``, ``"projection"``, ``"weight_scheduler"`` or
            ``"temperature_scheduler"``.
        name: Its name there.
        func: The function.

    Raises:
        ValueError: an unknown table.
        TypeError: what cannot be called.
    """
    table = find(map_name, MAPS, "table")
    if not callable(func):
        raise TypeError(f"{name!r} must be a function, got {func!r}")
    table[name] = func


def find(entry: Any, table: Mapping[str, Any], what: str) -> Any:
    """An entry of a table: by its name, or as ``[name, *options]`` or ``[name, {option: value}]`` made of them.

    Raises:
        ValueError: there is none of this name (the message says the nearest), or the options do not fit.

    Example:
        >>> find(["power", 3, 3], {"power": lambda base, to: base**to}, "function")
        27
        >>> find("hiden_mse", MATCH_LOSS_MAP, "match loss")
        Traceback (most recent call last):
        ValueError: unknown match loss 'hiden_mse'; did you mean 'hidden_mse'?
    """
    name, *options = (entry or [None]) if isinstance(entry, (list, tuple)) else [entry]
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"unknown {what} {name!r}; {nearest(str(name), table)}")
    if not options:
        return table[name]
    is_named = len(options) == 1 and isinstance(options[0], Mapping)
    arguments, named = ((), options[0]) if is_named else (options, {})
    try:
        inspect.signature(table[name]).bind(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{what} {name!r} does not take {options}: {error}") from None
    return table[name](*arguments, **named)
