"""Between the loop and a module: the batches of each epoch, and the calls of the module's callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DistributedSampler

from limbeck.compat.pymarlin.core.outputs import OutputCollector
from limbeck.train.plain import Callback, State

if TYPE_CHECKING:
    from limbeck.compat.pymarlin.core.trainer import Trainer


class Boxed:
    """A batch that the loop hands on as it is: a script's own step moves it to the device."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


class Epochs:
    """The batches of an epoch each time they are asked for, from a loader that the module makes anew."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.length = len(self._loader())

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Boxed]:
        loader = self._loader()
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(self.trainer.state.epoch)
        return map(Boxed, loader)

    def _loader(self) -> Any:
        trainer = self.trainer
        return trainer.module.get_train_dataloader(
            batch_size=trainer.train_step_batch_size, sampler=trainer.train_sampler
        )


class Hooks(Callback):
    """Calls the module's callbacks."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.module = trainer, trainer.module
        self.of_step, self.of_epoch = OutputCollector(), OutputCollector()
        self.loss = torch.zeros(())

    def note(self, outputs: list[Any]) -> None:
        """Take up what a training step gave."""
        self.loss = outputs[0]
        self.of_step.collect(outputs)
        self.of_epoch.collect(outputs)

    def on_epoch_start(self, state: State) -> None:
        """The module says how it begins, and trains with a teacher that does not."""
        self.module.on_begin_train_epoch(state.step, state.epoch)
        self.module.freeze_teacher()
        self.module.train()
        self.of_epoch.reset()

    def on_backward(self, state: State) -> None:
        """The loss as a part of its update."""
        self.module.on_end_backward(state.step, self.loss / self.trainer.gradient_accumulation)
        self.loss = self.loss.detach()  # lets go of the graph

    def on_step(self, state: State) -> None:
        """What the update's parts gave, and numbers to log."""
        self.trainer.stats.update("loss", float(state.loss), frequent=True)  # type: ignore[arg-type]
        outputs = self.of_step.all_outputs
        self.of_step.reset()
        self.module.on_end_train_step(state.step, *outputs)
        self.trainer.stats.log_stats(state.step)

    def on_epoch(self, state: State) -> None:
        """Validation, and what the whole epoch gave."""
        outputs = self.of_epoch.everywhere()
        self.trainer.validated()
        self.module.on_end_train_epoch(state.step, *outputs)
        self.trainer.stats.log_long_stats(state.step)
