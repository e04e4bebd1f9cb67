"""TextBrewer's schedulers: of weights, functions of progress from 0 to 1; of the temperature, of both logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from limbeck.losses.transforms import build_temperature
from limbeck.schedules import linear_decay as linear_decay_weight_scheduler  # noqa: F401
from limbeck.schedules import linear_growth as linear_growth_weight_scheduler  # noqa: F401

TemperatureScheduler = Callable[[Tensor, Tensor, float], float | Tensor]
"""``(logits_S, logits_T, base_temperature)`` to a temperature, or one for each position."""


def constant_temperature_scheduler(logits_S: Tensor, logits_T: Tensor, base_temperature: float) -> float:
    """The temperature itself."""
    return base_temperature


def flsw_temperature_scheduler_builder(beta: float, gamma: float, eps: float = 1e-4) -> TemperatureScheduler:
    """Make `limbeck.losses.transforms.flsw` of these options; never below 0.1."""
    return _scheduler(kind="flsw", beta=beta, gamma=gamma, epsilon=eps)


def cwsm_temperature_scheduler_builder(beta: float) -> TemperatureScheduler:
    """Make `limbeck.losses.transforms.cwsm` of this option; never below 0.1."""
    return _scheduler(kind="cwsm", beta=beta)


def _scheduler(**options: Any) -> TemperatureScheduler:
    return lambda logits_S, logits_T, base: build_temperature({**options, "base": base})(logits_S, logits_T)
