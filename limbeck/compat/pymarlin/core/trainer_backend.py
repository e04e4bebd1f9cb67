"""The names of ``pymarlin.core.trainer_backend``: how a training runs, which accelerate and autocast do here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from limbeck.compat.pymarlin.utils.distributed import SequentialDistributedSampler
from limbeck.registry import nearest


@dataclass(frozen=True)
class TrainerBackend:
    """How a training runs.

    Attributes:
        precision: That of the forward pass.
        distributed: Whether it may run on several ranks, as ``accelerate launch`` or ``torchrun`` start them.

    Example:
        >>> build_trainer_backend("ddp-amp")
        TrainerBackend(precision='fp16', distributed=True)
    """

    precision: Literal["fp32", "fp16"] = "fp32"
    distributed: bool = False

    @property
    def train_sampler(self) -> Callable[..., Any]:
        """What draws the training examples of a rank."""
        return DistributedSampler if self.distributed else RandomSampler

    @property
    def val_sampler(self) -> Callable[..., Any]:
        """What orders the validation examples of a rank."""
        return SequentialDistributedSampler if self.distributed else SequentialSampler


def SingleProcess() -> TrainerBackend:  # noqa: N802
    """One process, full precision.

    Example:
        >>> SingleProcess().precision
        'fp32'
    """
    return TrainerBackend()


def SingleProcessAmp(enable_amp: bool = True) -> TrainerBackend:  # noqa: N802
    """One process, half precision with a scaled loss.

    Example:
        >>> SingleProcessAmp().precision
        'fp16'
    """
    return TrainerBackend("fp16" if enable_amp else "fp32")


def DDPTrainerBackend(  # noqa: N802
    trainer_backend: TrainerBackend, gather_frequency: int | None = None
) -> TrainerBackend:
    """Several processes; outputs are gathered over all of them, whatever `gather_frequency` says.

    Raises:
        TypeError: a backend of the script's own.

    Example:
        >>> DDPTrainerBackend(SingleProcess()).distributed
        True
    """
    if not isinstance(trainer_backend, TrainerBackend):
        raise TypeError(f"{trainer_backend!r} is no backend; pass SingleProcess() or SingleProcessAmp()")
    return replace(trainer_backend, distributed=True)


def SingleProcessApexAmp(*args: Any, **kwargs: Any) -> TrainerBackend:  # noqa: N802
    """Not here.

    Raises:
        ValueError: always.
    """
    raise ValueError("apex is not supported, PyTorch does what it did; use 'sp-amp' or SingleProcessAmp()")


def SingleProcessDpSgd(*args: Any, **kwargs: Any) -> TrainerBackend:  # noqa: N802
    """Not here.

    Raises:
        ValueError: always.
    """
    raise ValueError("training with differential privacy (Opacus) is not supported; use another backend than 'dp'")


BACKENDS: dict[str, Callable[[], TrainerBackend]] = {
    "sp": SingleProcess,
    "sp-amp": SingleProcessAmp,
    "sp-amp-apex": SingleProcessApexAmp,
    "sp-dp": SingleProcessDpSgd,
    "ddp": lambda: DDPTrainerBackend(SingleProcess()),
    "ddp-amp": lambda: DDPTrainerBackend(SingleProcessAmp()),
    "ddp-amp-apex": SingleProcessApexAmp,
    "ddp-dp": SingleProcessDpSgd,
}


def build_trainer_backend(trainer_backend_name: str) -> TrainerBackend:
    """Make a backend by name.

    Raises:
        ValueError: an unknown name, or a backend that is not supported here.

    Example:
        >>> build_trainer_backend("sp-dp")
        Traceback (most recent call last):
        ValueError: training with differential privacy (Opacus) is not supported; use another backend than 'dp'
    """
    if trainer_backend_name not in BACKENDS:
        raise ValueError(f"unknown backend {trainer_backend_name!r}; {nearest(trainer_backend_name, BACKENDS)}")
    return BACKENDS[trainer_backend_name]()
