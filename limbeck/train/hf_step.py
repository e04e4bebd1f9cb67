"""One update of a Trainer: its micro-batches, what counts in all of them, and what the balance hears of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from limbeck.batch import as_batch
from limbeck.distiller import Distiller
from limbeck.train.averages import TOTAL, Averages, StepTotals
from limbeck.train.loop import SEEN_TWICE
from limbeck.train.ranks import share_signals
from limbeck.types import Output


class Update:
    """The micro-batches of one update on this rank.

    Attributes:
        counts: Valid positions of the whole update, over all ranks, as `Distiller.forward` takes them: divided by
            the number of ranks, since these average their gradients. None for a batch that stands alone.
        number: Micro-batches that were seen.
    """

    def __init__(self, accelerator: Any, distiller: Distiller, batches: Sequence[Any]) -> None:
        self.accelerator = accelerator
        self.distiller = distiller
        self.size = len(batches)
        self.counts = everywhere(accelerator, counted(distiller, batches)) if batches else None
        self.number = 0
        self._totals = StepTotals()

    def measures(self, step: int) -> bool:
        """Whether the balance wants to know the terms' gradients in the next micro-batch."""
        every = self.distiller.objective.balance.every
        return self.number == 0 and every is not None and step % every == 0

    def add(self, output: Output, averages: Averages) -> None:
        """Take notice of a micro-batch; after the last one, let the balance know what the update was."""
        self.number += 1
        self._totals.add(output, 1.0)
        averages.add({**output.terms, TOTAL: output.loss.detach()}, 1.0)
        if self.number < self.size:
            return
        averages.end_step((*self._totals.values, TOTAL))
        if self.distiller.objective.balance.observes and self.counts is not None:
            self.distiller.objective.observe(*self._totals.everywhere(self.accelerator))


def counted(distiller: Distiller, batches: Sequence[Any]) -> dict[str, float]:
    """The valid positions of several batches, for each mask.

    Example:
        >>> import torch
        >>> from limbeck.terms import Term
        >>> distiller = Distiller(torch.nn.Linear(2, 2), None, [Term("labels", loss="cross_entropy")])
        >>> counted(distiller, [(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long)) for n in (3, 2)])
        {'examples': 5.0, 'labels': 5.0}
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for key, count in distiller.count(as_batch(batch)).items():
            totals[key] = totals.get(key, 0.0) + count
    return totals


def everywhere(accelerator: Any, own: Mapping[str, float]) -> dict[str, float]:
    """Counts over all ranks, divided by their number; at least one in all, since the terms divide by them."""
    from accelerate.utils import gather_object

    world = accelerator.num_processes
    totals: dict[str, float] = {}
    for counts in gather_object([dict(own)]) if world > 1 else [own]:  # a rank may have masks that others lack
        for key, count in counts.items():
            totals[key] = totals.get(key, 0.0) + count
    return {key: max(count, 1.0) / world for key, count in totals.items()}


class Remembering(TrainerCallback):  # type: ignore[misc]
    """Takes care, between epochs, of what a cached teacher remembers."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.epochs = 0

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Of an epoch that a resumed training begins in the middle, this process has not seen all."""
        self.epochs = -1 if state.epoch and state.epoch % 1 else 0

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Let each rank know what the others' teachers said; see `Distiller.forget_in_vain`."""
        accelerator, distiller = self.trainer.accelerator, self.trainer.distiller
        share_signals(accelerator, distiller)
        self.epochs += 1
        if self.epochs == SEEN_TWICE:
            distiller.forget_in_vain(1 / accelerator.num_processes)
