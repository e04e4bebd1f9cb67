"""How the distillation losses and the student's own become one."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from limbeck.compat.modelopt.config import ConfigError, number

STUDENT_LOSS_KEY = "student_loss"
"""The student's own loss among those that a balancer is given."""


class DistillationLossBalancer(nn.Module):
    """The base of balancers: a module without parameters that makes one loss of many.

    Example:
        >>> class Sum(DistillationLossBalancer):
        ...     def forward(self, loss):
        ...         return sum(loss.values())
        >>> Sum()({"student_loss": 1.0, "MSELoss_0": 2.0})
        3.0
    """

    def __init__(self) -> None:
        super().__init__()
        self._student_loss_reduction_fn: Callable[[Any], Tensor] | None = None

    def set_student_loss_reduction_fn(self, student_loss_reduction_fn: Callable[[Any], Tensor]) -> None:
        """Have the student's own loss reduced by this function first."""
        self._student_loss_reduction_fn = student_loss_reduction_fn

    @abstractmethod
    def forward(self, loss: dict[str, Tensor]) -> Tensor:
        """Make one loss of many.

        Args:
            loss: The losses: ``student_loss``, where there is one, and the others by class and number,
                ``MSELoss_0``.
        """


class StaticLossBalancer(DistillationLossBalancer):
    """A weighted sum; what the weights leave of 1 is the weight of the student's own loss.

    Args:
        kd_loss_weight: The weight of the sum of all distillation losses, or a list with one for each.

    Raises:
        ConfigError: a weight that is negative or NaN, or weights that sum to more than 1.
        TypeError: a weight that is no number.

    Example:
        >>> StaticLossBalancer(1.0)({"MSELoss_0": 2.0, "MSELoss_1": 3.0})
        5.0
    """

    def __init__(self, kd_loss_weight: float | Sequence[float] = 0.5) -> None:
        super().__init__()
        self._shared = not isinstance(kd_loss_weight, (list, tuple))
        weights = list(kd_loss_weight) if isinstance(kd_loss_weight, (list, tuple)) else [kd_loss_weight]
        self._kd_loss_weight = [number("kd_loss_weight", weight) for weight in weights]
        if any(weight < 0 for weight in self._kd_loss_weight):
            raise ConfigError(f"weights of distillation losses must be non-negative, got {self._kd_loss_weight}")
        total = sum(self._kd_loss_weight)
        if total > 1 + 1e-9:
            raise ConfigError(
                f"weights of distillation losses sum to at most 1, got {total:g}; the rest is the student's"
            )
        if total < 1 - 1e-9:
            warnings.warn(
                f"the weights do not sum to 1 but to {total:g}; the rest is for the student's own loss: pass "
                "student_loss to compute_kd_loss",
                stacklevel=2,
            )

    def forward(self, loss: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum.

        Raises:
            ConfigError: another number of losses than of weights.
        """
        losses = [value for name, value in loss.items() if name != STUDENT_LOSS_KEY]
        weights = self._kd_loss_weight * (len(losses) if self._shared else 1)
        if len(weights) != len(losses):
            raise ConfigError(
                f"{len(weights)} weights were given for {len(losses)} distillation losses; give one each"
            )
        terms = [weight * value for weight, value in zip(weights, losses, strict=True)]
        if STUDENT_LOSS_KEY in loss:
            own = loss[STUDENT_LOSS_KEY]
            reduce = self._student_loss_reduction_fn
            terms.append((1.0 - sum(self._kd_loss_weight)) * (own if reduce is None else reduce(own)))
        return sum(terms[1:], start=terms[0])
