"""The names of ``pymarlin.utils.distributed``; ranks are those of ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed
from torch.utils.data import Sampler

from limbeck.compat.pymarlin.utils.arguments import arguments

Result = TypeVar("Result")


@arguments
@dataclass
class DistributedTrainingArguments:
    """What a script may state of its ranks; the launcher decides, and a `Trainer` refuses what contradicts it.

    Example:
        >>> DistributedTrainingArguments().world_size
        1
    """

    local_rank: int = 0
    global_rank: int = 0
    world_size: int = 1
    backend: str = "nccl"
    init_method: str = "env://"
    gather_frequency: int | None = None


class SequentialDistributedSampler(Sampler[int]):
    """This rank's share of a data set, in order; no example is given twice.

    Example:
        >>> list(SequentialDistributedSampler("abc"))
        [0, 1, 2]
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        several = torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
        return iter(range(rank, len(self.dataset), world))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def rank_zero_only(function: Callable[..., Result]) -> Callable[..., Result | None]:
    """Run a function on the first rank only.

    Example:
        >>> rank_zero_only(len)([1, 2])
        2
    """

    @functools.wraps(function)
    def called(*values: Any, **named: Any) -> Result | None:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return None
        return function(*values, **named)

    return called
