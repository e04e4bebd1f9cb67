"""What the modes of `convert` are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

Loss = Callable[..., Any]
Criterion = Loss | Mapping[tuple[str, str], Loss | Sequence[Loss]]


class ConfigError(ValueError, AssertionError, AttributeError):
    """Something that cannot work as it was asked for.

    ModelOpt asserts in some places and finds no attribute in others; scripts that catch those catch this.
    """


def number(name: str, value: Any, lowest: float = -math.inf) -> float:
    """The value, where it is a finite number above the lowest.

    Raises:
        TypeError: it is no number.
        ConfigError: it is NaN, infinite or too low.

    Example:
        >>> number("temperature", 2, lowest=0)
        2.0
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    found = float(value)
    if not lowest < found < math.inf:
        above = "" if lowest == -math.inf else f" above {lowest:g}"
        raise ConfigError(f"{name} must be a finite number{above}, got {value}")
    return found


@dataclass
class KDLossConfig:
    """The mode ``"kd_loss"``.

    Args:
        teacher_model: A module, a class or function that makes one, ``(class, args, kwargs)``, or the path of a
            transformers model.
        criterion: A loss between the outputs of both models; or losses by pair of modules, ``{(student's path,
            teacher's path): loss}``, a list of them where a pair has several. The path "" is the whole model.
        loss_balancer: What makes one loss of several and the student's own.
        expose_minimal_state_dict: Keep the teacher out of the module tree, so out of the state dict.

    Raises:
        ConfigError: no teacher, no loss, several losses without a balancer, or a balancer with parameters.
        TypeError: a loss that cannot be called, or a balancer that is no module.
    """

    teacher_model: Any = None
    criterion: Criterion | None = None
    loss_balancer: nn.Module | None = None
    expose_minimal_state_dict: bool = True

    def losses(self) -> list[tuple[tuple[str, str], Loss]]:
        """All losses, each with its pair of modules, checked."""
        for name in ("teacher_model", "criterion"):
            if getattr(self, name) is None:
                raise ConfigError(f"the mode needs {name}, and there is none; add {name!r} to its configuration")
        given: Any = self.criterion
        pairs: Mapping[Any, Any] = given if isinstance(given, Mapping) else {("", ""): given}
        found = [
            (pair, loss)
            for pair, of_pair in pairs.items()
            for loss in (of_pair if isinstance(of_pair, (list, tuple)) else [of_pair])
        ]
        for pair, loss in found:
            if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(path, str) for path in pair):
                raise ConfigError(
                    f"losses are given for pairs of paths (student's module, teacher's module), got {pair!r}"
                )
            if isinstance(loss, type) and issubclass(loss, nn.Module):
                raise TypeError(f"the loss of {pair} is the class {loss.__name__}; write {loss.__name__}()")
            if not callable(loss):
                raise TypeError(f"the loss of {pair} cannot be called, it is a {type(loss).__name__}; pass a loss")
        self._check_balancer(len(found))
        return found

    def _check_balancer(self, losses: int) -> None:
        if losses == 0:
            raise ConfigError("the criterion holds no loss; add {('', ''): LogitsDistillationLoss()}")
        if self.loss_balancer is None:
            if losses > 1:
                raise ConfigError("multiple layer-loss pairs need a loss_balancer; add StaticLossBalancer(1.0)")
        elif not isinstance(self.loss_balancer, nn.Module):
            raise TypeError(f"a loss_balancer is a module, got {self.loss_balancer!r}; write StaticLossBalancer()")
        elif next(self.loss_balancer.parameters(), None) is not None:
            raise ConfigError(
                "a loss_balancer cannot have parameters, which nothing would train; keep numbers in it"
            )


@dataclass
class LayerwiseKDConfig:
    """The mode ``"layerwise_kd"``: as `KDLossConfig`, with a criterion by pairs of modules, none a whole model."""

    teacher_model: Any = None
    criterion: Criterion | None = None
    loss_balancer: nn.Module | None = None
    expose_minimal_state_dict: bool = True

    def losses(self) -> list[tuple[tuple[str, str], Loss]]:
        """All losses, each with its pair of modules, checked."""
        plain = KDLossConfig(self.teacher_model, self.criterion, self.loss_balancer)
        found = plain.losses()
        if any("" in pair for pair, _ in found):
            raise ConfigError("layer by layer, losses are given for pairs of modules; name them in the criterion")
        return found


@dataclass
class ExportStudentConfig:
    """The mode ``"export_student"``, which has no options."""
