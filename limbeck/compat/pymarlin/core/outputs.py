"""What the steps of an epoch gave, put behind one another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class OutputCollector:
    """Collects what steps give: tensors are put behind one another on the CPU, anything else goes into a list.

    Example:
        >>> collected = OutputCollector()
        >>> collected.collect((torch.tensor(0.5), torch.zeros(2, 3), "a"))
        >>> collected.collect((torch.tensor(0.7), torch.zeros(4, 3), "b"))
        >>> [tuple(each.shape) if isinstance(each, Tensor) else each for each in collected.all_outputs]
        [(2,), (6, 3), ['a', 'b']]
    """

    def __init__(self) -> None:
        self._parts: list[list[Any]] = []

    def collect(self, outputs: Any) -> None:
        """Take up what one step gave."""
        given = [outputs] if isinstance(outputs, (Tensor, str)) or not isinstance(outputs, Iterable) else outputs
        for place, output in enumerate(given):
            if len(self._parts) <= place:
                self._parts.append([])
            self._parts[place].append(output.detach().cpu() if isinstance(output, Tensor) else output)

    def reset(self) -> None:
        """Forget all."""
        self._parts = []

    @property
    def all_outputs(self) -> list[Any]:
        """For each place of a step's outputs, all of them."""
        return [_joined(part) for part in self._parts]

    def everywhere(self) -> list[Any]:
        """The same of all ranks, one rank behind the other."""
        from accelerate.utils import gather_object

        if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            return self.all_outputs
        ranks = gather_object([self._parts])
        merged = OutputCollector()
        merged._parts = [[one for rank in ranks for one in rank[place]] for place in range(len(self._parts))]
        return merged.all_outputs


def _joined(part: list[Any]) -> Any:
    if not all(isinstance(one, Tensor) for one in part):
        return part
    return torch.cat([one.reshape(1) if one.ndim == 0 else one for one in part])
