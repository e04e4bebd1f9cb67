"""Validation by a step of one's own: what it gives for each batch, put behind one another, of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice, zip_longest
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

from limbeck.train.loop import AUTOCAST
from limbeck.train.plain_state import State


def collect(
    step: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    limit: int | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: torch.device | str = "cpu",
) -> list[Any]:
    """What a step gives for all batches of all ranks, without gradients.

    Args:
        step: Gives one output for a batch, or several.
        batches: Those of this rank; see `RankShare`.
        limit: Number of batches after which it ends; None for all.
        precision: That of the forward pass, by autocast.
        device: What autocast is for.

    Returns:
        For each place of a step's outputs, those of all batches; see `Collected`.

    Example:
        >>> collect(lambda batch: (batch.sum(), batch), [torch.ones(2, 1), torch.ones(3, 1)])[0]
        tensor([2., 3.])
    """
    found, dtype = Collected(), AUTOCAST[precision]
    for batch in islice(batches, limit):
        with torch.no_grad(), torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
            found.add(step(batch))
    return found.of_all_ranks()


class Collected:
    """What steps gave: tensors are put behind one another on the CPU, anything else goes into a list.

    Example:
        >>> collected = Collected()
        >>> collected.add((torch.tensor(0.5), torch.zeros(2, 3), "a"))
        >>> collected.add((torch.tensor(0.7), torch.zeros(4, 3), "b"))
        >>> [tuple(each.shape) if isinstance(each, Tensor) else each for each in collected.outputs()]
        [(2,), (6, 3), ['a', 'b']]
    """

    def __init__(self) -> None:
        self._parts: list[list[Any]] = []

    def add(self, given: Any) -> None:
        """Take up what one step gave, one output or several."""
        outputs = [given] if isinstance(given, (Tensor, str)) or not isinstance(given, Iterable) else list(given)
        self._parts += [[] for _ in range(len(outputs) - len(self._parts))]
        for part, output in zip(self._parts, outputs, strict=False):
            part.append(output.detach().cpu() if isinstance(output, Tensor) else output)

    def outputs(self) -> list[Any]:
        """For each place of a step's outputs, all of them."""
        return [_joined(part) for part in self._parts]

    def of_all_ranks(self) -> list[Any]:
        """The same of all ranks, one rank behind the other."""
        from accelerate.utils import gather_object

        if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            return self.outputs()
        ranks = gather_object([self._parts])
        places = zip_longest(*ranks, fillvalue=())  # a rank with no batch has none
        return [_joined([one for rank in place for one in rank]) for place in places]


def _joined(part: list[Any]) -> Any:
    if not all(isinstance(one, Tensor) for one in part):
        return part
    return torch.cat([one.reshape(1) if one.ndim == 0 else one for one in part])


class Collecting:
    """A step of a `limbeck.train.plain.Loop` that gives more than its loss, all of which is kept for callbacks.

    Args:
        step: Gives the loss of a batch, or the loss and more.

    Example:
        >>> step = Collecting(lambda batch, state: (batch.mean(), batch))
        >>> for batch in torch.ones(2, 3):
        ...     _ = step(batch, None)
        >>> [tuple(each.shape) for each in step.take_update()]
        [(2,), (6,)]
    """

    def __init__(self, step: Callable[[Any, State], Any]) -> None:
        self.step = step
        self._update, self._epoch = Collected(), Collected()

    def __call__(self, batch: Any, state: State) -> Any:
        """The loss."""
        given = self.step(batch, state)
        outputs = [given] if isinstance(given, Tensor) else list(given)
        self._update.add(outputs)
        self._epoch.add(outputs)
        return outputs[0]

    def take_update(self) -> list[Any]:
        """What the steps gave since the last time; for ``on_step``."""
        outputs, self._update = self._update.outputs(), Collected()
        return outputs

    def take_epoch(self) -> list[Any]:
        """What they gave on all ranks since the last time; for ``on_epoch``."""
        outputs, self._epoch = self._epoch.of_all_ranks(), Collected()
        return outputs


class RankShare(Sampler[int]):
    """This rank's share of a data set, in order; over all ranks each example is given once.

    Args:
        dataset: Has a length.

    Example:
        >>> list(RankShare("abc"))
        [0, 1, 2]
    """

    def __init__(self, dataset: Sized) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        several = torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
        return iter(range(rank, len(self.dataset), world))

    def __len__(self) -> int:
        return sum(1 for _ in self)
