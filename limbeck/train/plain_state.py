"""Where a `limbeck.train.plain` training stands, what watches it, and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from limbeck.train import checkpoint as files
from limbeck.train.saving import check_belongs

WEIGHTS = "model.safetensors"
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers that may have a generator of their own."""

KEPT = ("step", "epoch", "position", "stop")
"""What a checkpoint holds of the state."""


@dataclass
class State:
    """Where a training stands.

    Attributes:
        model: What is trained.
        total_steps: Updates of the whole training; None where the loader has no length.
        step: Updates done.
        epoch: Epochs done.
        position: Updates done in this epoch.
        loss: Of the last update, the mean over its micro-batches, (); of the last micro-batch in `on_backward`.
        checkpoint: The newest checkpoint, or None.
        stop: Why to stop after this step; empty to go on.
    """

    model: nn.Module
    total_steps: int | None
    step: int = 0
    epoch: int = 0
    position: int = 0
    loss: Tensor | None = None
    checkpoint: Path | None = None
    stop: str = ""


def recall(model: nn.Module, checkpoint: Path) -> State:
    """Put a checkpoint's weights into a model, for a training with another optimizer or none at all.

    Returns:
        Where that training stood; an epoch that it had begun begins anew.

    Raises:
        ValueError: the weights are another model's.
    """
    files.load_weights(model, checkpoint / WEIGHTS)
    kept = files.read_tree(checkpoint, "state")["state"]
    return State(model, None, step=kept["step"], epoch=kept["epoch"])


class Callback:
    """Watches a training, on every rank. Override what you need; the rest does nothing."""

    def on_start(self, state: State) -> None:
        """Before the first step, or the first after a resume."""

    def on_epoch_start(self, state: State) -> None:
        """Before the first step of an epoch, or the first after a resume within it."""

    def on_backward(self, state: State) -> None:
        """After the backward pass of each micro-batch, while the gradients are there."""

    def on_step(self, state: State) -> None:
        """After each update."""

    def on_epoch(self, state: State) -> None:
        """After the last step of an epoch."""

    def on_checkpoint(self, state: State) -> None:
        """After each checkpoint was written."""

    def on_end(self, state: State) -> None:
        """After the last step."""


class Draws:
    """All that the data of a training is drawn with: the global generators, the loader's own and its sampler's.

    Example:
        >>> own = torch.Generator().manual_seed(1)
        >>> draws = Draws(DataLoader([1, 2, 3], sampler=RandomSampler([1, 2, 3], generator=own)))
        >>> before = draws.state()
        >>> first = torch.rand((), generator=own)
        >>> draws.set_state(before)
        >>> bool(torch.rand((), generator=own) == first)
        True
    """

    def __init__(self, loader: Any) -> None:
        self.generators: list[torch.Generator] = []
        if not isinstance(loader, DataLoader):
            return
        cut = loader.batch_sampler
        samplers = [loader.sampler, cut.sampler if isinstance(cut, BatchSampler) else None]
        own = [sampler.generator for sampler in samplers if isinstance(sampler, RANDOM)]
        found = [generator for generator in (loader.generator, *own) if generator is not None]
        self.generators = list({id(generator): generator for generator in found}.values())

    def state(self) -> dict[str, Any]:
        """Where they are."""
        own = {str(place): generator.get_state() for place, generator in enumerate(self.generators)}
        return {"global": files.random_state(), "own": own}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go back to where they were."""
        files.set_random_state(state["global"])
        self.set_own(state["own"])

    def set_own(self, states: Mapping[str, Any]) -> None:
        """Put back the loader's and its sampler's generators alone."""
        for place, generator in enumerate(self.generators):
            generator.set_state(states[str(place)])


@dataclass
class Keeping:
    """The checkpoints of a training, in safetensors and JSON; see `limbeck.train.checkpoint`.

    Attributes:
        folder: Where they go; None for nowhere.
        keep: How many stay.
        accelerator: The training's ranks.
        state: Where the training stands, with its model.
        optimizer: Its optimizer.
        scheduler: Its scheduler, or None.
        scaler: Scales the loss in half precision.
        draws: What the data is drawn with.
        belongs: What a checkpoint must agree in with the training that goes on from it.
        begin: A checkpoint to go on from where `folder` holds none.
        drawn_from: The random states that the epoch at hand was drawn from, to draw it again.
    """

    folder: Path | str | None
    keep: int
    accelerator: Any
    state: State
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    draws: Draws
    belongs: dict[str, Any]
    begin: Path | None = None
    drawn_from: dict[str, Any] = field(default_factory=dict)
    saved: tuple[int, int] = (-1, -1)

    def save(self) -> bool:
        """Write a checkpoint, if there is a place for it and none of this very place in the training.

        Raises:
            FloatingPointError: the loss or the weights are no longer finite.
        """
        state, main = self.state, self.accelerator.is_main_process
        if self.folder is None or self.saved == (state.step, state.epoch):
            return False
        self.check_finite()
        partial = files.partial_folder(Path(self.folder), state.step)
        if main:
            files.begin(Path(self.folder), state.step)
            files.save_weights(state.model, partial / WEIGHTS)
            files.write_tree(files.optimizer_state(self.optimizer), partial, "optimizer")
            files.write_tree(self._tree(), partial, "state")
        self.accelerator.wait_for_everyone()
        own = {"now": self.draws.state(), "epoch": self.drawn_from}
        files.write_tree(own, partial, f"rank-{self.accelerator.process_index}")
        self.accelerator.wait_for_everyone()
        if main:
            files.finish(partial, self.keep)
        state.checkpoint = files.step_folder(Path(self.folder), state.step)
        self.saved = state.step, state.epoch
        return True

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            ValueError: it belongs to another training or another model.
        """
        newest = files.latest(None if self.folder is None else Path(self.folder)) or self.begin
        if newest is None:
            return
        tree = files.read_tree(newest, "state")
        check_belongs(newest, tree["belongs"], self.belongs)
        files.load_weights(self.state.model, newest / WEIGHTS)
        files.load_optimizer_state(self.optimizer, files.read_tree(newest, "optimizer"))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(_keyed_as(self.scheduler.state_dict(), tree["scheduler"]))
        if tree["scaler"]:
            self.scaler.load_state_dict(tree["scaler"])
        for name, value in tree["state"].items():
            setattr(self.state, name, value)
        drawn = files.read_tree(newest, f"rank-{self.accelerator.process_index}")
        self.drawn_from = drawn["epoch"]
        self.draws.set_state(drawn["now"])
        self.state.checkpoint, self.saved = newest, (self.state.step, self.state.epoch)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and newest != self.begin:
            files.sweep(newest.parent)

    def check_finite(self) -> None:
        """Keep a spoiled training out of checkpoints.

        Raises:
            FloatingPointError: the loss or the weights are no longer finite.
        """
        state = self.state
        name = files.first_spoiled(state.model)
        spoiled = None if name is None else f"the weights of {name}"
        if state.loss is not None and not torch.isfinite(state.loss):
            spoiled = "the loss"
        if spoiled is not None:
            kept = f"The last good checkpoint is {state.checkpoint}." if state.checkpoint else "None was kept."
            raise FloatingPointError(
                f"{spoiled} is no longer finite at step {state.step}; lower the learning rate or set clip. {kept}"
            )

    def _tree(self) -> dict[str, Any]:
        return {
            "state": {name: getattr(self.state, name) for name in KEPT},
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "belongs": self.belongs,
        }


def _keyed_as(pattern: Any, tree: Any) -> Any:
    """Give dicts the keys they had before JSON made text of them, as the milestones of a scheduler."""
    if not (isinstance(pattern, dict) and isinstance(tree, Mapping)):
        return tree
    names = {str(key): key for key in pattern}
    found = {names.get(key, key): value for key, value in tree.items()}
    return type(pattern)({key: _keyed_as(pattern.get(key), value) for key, value in found.items()})
