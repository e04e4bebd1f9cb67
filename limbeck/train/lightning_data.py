"""Data for a `limbeck.train.lightning.DistillationModule`: the order and the updates of `limbeck.fit`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule

from limbeck.train.data import Batches, Examples, Step, cut
from limbeck.train.mixing import train_batches
from limbeck.train.settings import Settings
from limbeck.types import Batch


class Steps:
    """The steps of a training in the order of `limbeck.fit`, as a loader that Lightning can resume.

    Args:
        batches: From `limbeck.train.mixing.train_batches`.

    Example:
        >>> import torch
        >>> steps = Steps(train_batches([{"x": torch.tensor(float(i))} for i in range(5)], Settings(batch_size=2)))
        >>> [step.examples for step in steps], steps.state_dict()
        ([1, 2, 2], {'epoch': 1, 'position': 0})
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Step]:
        """From where it stands to the end of the epoch."""
        for step in self.batches.epoch(self.epoch, self.position):
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
            yield step

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.position = state["epoch"], state["position"]


class DistillationData(LightningDataModule):  # type: ignore[misc]
    """Data that limbeck batches itself, for a `DistillationModule`.

    Each update has the examples that it has in `limbeck.fit`, for any number of ranks, and a training can be
    resumed exactly, also in the middle of an epoch.

    Args:
        train_data: A data set with a length and an index, a DataLoader, or `Examples`; of several tasks, `Mixed`.
        eval_data: A data set with a length and an index, or `Examples`; None for no validation.
        settings: The module's: ``batch_size`` examples per update over all ranks, cut into ``accumulation``
            parts.

    Example:
        >>> import torch
        >>> data = [{"input": torch.zeros(4), "labels": torch.tensor(0)}] * 5
        >>> loader = DistillationData(data, settings=Settings(batch_size=2)).train_dataloader()
        >>> len(loader)
        3
    """

    def __init__(self, train_data: Any, eval_data: Any = None, settings: Settings | None = None) -> None:
        super().__init__()
        self.train_data, self.eval_data = train_data, eval_data
        self.settings = settings or Settings()
        if eval_data is None:
            self.__dict__["val_dataloader"] = None  # so Lightning knows that there is none

    def train_dataloader(self) -> Steps:
        """The steps of this rank."""
        rank, world = self._place()
        return Steps(train_batches(self.train_data, self.settings, rank, world))

    def val_dataloader(self) -> Any:
        """This rank's share of the evaluation data, in order."""
        data = self.eval_data if isinstance(self.eval_data, Examples) else Examples(self.eval_data)
        rank, world = self._place()
        start, stop = cut(len(data), world)[rank]
        size = self.settings.batch_size
        return _InOrder(data, [range(a, min(a + size, stop)) for a in range(start, stop, size)])

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


@dataclass(frozen=True)
class _InOrder:
    """A loader of fixed batches; Lightning would take a list of them for several loaders."""

    data: Examples
    batches: list[range]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.data.batch, self.batches)
