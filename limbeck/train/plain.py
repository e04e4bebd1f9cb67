"""A loop for those who bring their own: loader, optimizer, scheduler, and a step from a batch to a loss.

`fit` builds all of these itself, and its batches do not depend on how they are cut. Here the data and the order in
which it comes are the user's, drawn just as a loop written by hand would draw them.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from limbeck.batch import batch_size, map_tensors
from limbeck.train import checkpoint as files
from limbeck.train.loop import AUTOCAST
from limbeck.train.ranks import start_accelerator
from limbeck.train.saving import check_belongs
from limbeck.train.settings import Settings

WEIGHTS = "model.safetensors"
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


def size_of(batch: Any) -> float:
    """How much a micro-batch counts among those of its update: the number of its examples.

    Example:
        >>> size_of((torch.zeros(3, 2), torch.zeros(3)))
        3.0
    """
    return float(batch_size({"batch": batch}))


@dataclass
class Loop:
    """A training by steps of the user's own.

    Args:
        step: Gives the loss of a batch, one number, the mean over its examples: ``step(batch, state)``.
        model: Holds all that trains, and is what checkpoints keep; `step` may call any part of it.
        loader: Gives the batches of an epoch each time it is read. Each of several ranks reads its own share.
        optimizer: Holds parameters of `model`.
        epochs: Passes over the loader; or `steps`.
        steps: Number of updates, over as many epochs as it takes.
        epoch_steps: Updates after which an epoch ends early.
        scheduler: Anything with ``step()`` and a state dict, made of `optimizer`.
        scheduler_every: After what the scheduler makes a step.
        accumulation: Batches of one update. The last update of an epoch may have fewer.
        clip: Largest norm of the gradient of all that the optimizer holds; None for no clipping.
        precision: That of the forward pass, by autocast.
        device: Where to train; by default where accelerate says.
        callbacks: What watches.
        folder: Where checkpoints go. If it holds one, training goes on from there, bit for bit as if it had never
            been interrupted. None for no checkpoints.
        checkpoint_every: Steps; by default each epoch. There is always one at the end.
        keep: Number of checkpoints kept.
        weigh: How much a batch counts among those of its update.

    Raises:
        ValueError: epochs and steps, or neither; parameters that are in no part of the model; an empty loader.

    Example:
        >>> model, data = nn.Linear(1, 1), [torch.ones(8, 1)] * 4
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> Loop(lambda x, state: (model(x) - 3).square().mean(), model, data, optimizer, epochs=10).run().step
        40
        >>> round(model(torch.ones(1, 1)).item(), 3)
        3.0
    """

    step: Callable[[Any, State], Tensor]
    model: nn.Module
    loader: Iterable[Any]
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    epochs: int | None = None
    steps: int | None = None
    epoch_steps: int | None = None
    scheduler: Any = None
    scheduler_every: Literal["step", "epoch"] = "step"
    accumulation: int = 1
    clip: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: torch.device | str | None = None
    callbacks: Sequence[Callback] = ()
    folder: Path | str | None = None
    checkpoint_every: int | None = None
    keep: int = 1
    weigh: Callable[[Any], float] = size_of

    def __post_init__(self) -> None:
        self._check()
        self.accelerator = start_accelerator(Settings(), None)
        self._place = torch.device(self.device or self.accelerator.device)
        self._scaler = torch.amp.GradScaler(self._place.type, enabled=self.precision == "fp16")
        self._held = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._random: dict[str, Any] = {}  # where the epoch at hand was drawn from
        self._saved = -1, -1
        self.state = State(self.model, self.total_steps())

    def total_steps(self) -> int | None:
        """The number of updates of the whole training; None where the loader has no length."""
        if self.steps is not None or self.epochs is None:
            return self.steps
        per_epoch = self.updates_per_epoch()
        return None if per_epoch is None else per_epoch * self.epochs

    def updates_per_epoch(self) -> int | None:
        """The number of updates of one epoch, its last smaller one included."""
        if not isinstance(self.loader, Sized):
            return self.epoch_steps
        updates = math.ceil(len(self.loader) / self.accumulation)
        return updates if self.epoch_steps is None else min(updates, self.epoch_steps)

    def run(self) -> State:
        """Train to the end, from the newest checkpoint where there is one.

        Raises:
            FloatingPointError: the loss or the weights are no longer finite.
            TypeError: a step that returns no single number.
            ValueError: a folder that holds another training, a loader that gives nothing, or ranks that would all
                read the same data.
        """
        state = self.state
        self._prepare()
        self._call("on_start")
        while not self._is_done():
            self._call("on_epoch_start")
            for batches in self._updates():
                self._train_step(batches)
                self._call("on_step")
                if self.checkpoint_every and state.step % self.checkpoint_every == 0:
                    self._save()
                if self._is_done() and state.position != self.updates_per_epoch():
                    break
            else:
                self._end_epoch()
        self._save()
        self._call("on_end")
        return state

    def _train_step(self, batches: Sequence[Any]) -> None:
        """One update from some batches."""
        state, sizes, loss = self.state, [self.weigh(batch) for batch in batches], torch.zeros(())
        for number, batch in enumerate(batches, start=1):
            share = sizes[number - 1] / sum(sizes)
            with self._sync(last=number == len(batches)):
                with self._autocast():
                    state.loss = _single(self._called(self._placed(batch)))
                self._scaler.scale(state.loss * share).backward()  # type: ignore[no-untyped-call]
            state.loss = state.loss.detach()
            loss = loss.to(state.loss) + state.loss * share
            self._call("on_backward")
        if self.clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._held, self.clip)
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
        overflown = self._scaler.get_scale() < scale  # the optimizer made no step
        if self.scheduler is not None and self.scheduler_every == "step" and not overflown:
            self.scheduler.step()
        state.step, state.position, state.loss = state.step + 1, state.position + 1, loss

    def _updates(self) -> Iterator[list[Any]]:
        """The batches of each update that is left of this epoch.

        Those before are drawn again, from where the epoch had been drawn from, and passed over.
        """
        done, now = self.state.position, files.random_state()
        own = self.loader.generator if isinstance(self.loader, DataLoader) else None
        if done:
            files.set_random_state(self._random["global"])
            if own is not None:
                own.set_state(self._random["loader"])
        self._random = {"global": files.random_state(), "loader": None if own is None else own.get_state()}
        if isinstance(sampler := _sampler(self.loader), DistributedSampler):
            sampler.set_epoch(self.state.epoch)
        batches = iter(self.loader)
        updates = iter(lambda: list(itertools.islice(batches, self.accumulation)), [])
        updates = itertools.islice(updates, self.epoch_steps)
        if done:
            deque(itertools.islice(updates, done), maxlen=0)
            files.set_random_state(now)
        yield from updates

    def _end_epoch(self) -> None:
        state = self.state
        if not state.position:
            raise ValueError(f"epoch {state.epoch} of the loader is empty; pass one that can be read again")
        state.epoch, state.position = state.epoch + 1, 0
        if self.scheduler is not None and self.scheduler_every == "epoch":
            self.scheduler.step()
        self._check_finite()
        self._call("on_epoch")
        if self.checkpoint_every is None:
            self._save()

    def _is_done(self) -> bool:
        state = self.state
        enough = state.epoch >= self.epochs if self.epochs is not None else state.step >= (self.steps or 0)
        return bool(state.stop) or enough

    def _prepare(self) -> None:
        """Place the model, wrap it for several ranks, and go on where a checkpoint lies."""
        accelerator = self.accelerator
        self.model.to(self._place)
        self._called: nn.Module = _Called(self.model, lambda batch: self.step(batch, self.state))
        if accelerator.num_processes > 1:
            from accelerate import DistributedDataParallelKwargs

            if isinstance(_sampler(self.loader), (RandomSampler, SequentialSampler)):
                raise ValueError(
                    f"all {accelerator.num_processes} ranks would read the same data; give the loader a "
                    "DistributedSampler"
                )
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
            self._called = accelerator.prepare_model(self._called)
        self._resume()
        self.model.train()

    def _save(self) -> None:
        state, main = self.state, self.accelerator.is_main_process
        if self.folder is None or self._saved == (state.step, state.epoch):
            return
        self._check_finite()
        partial = files.partial_folder(Path(self.folder), state.step)
        if main:
            files.begin(Path(self.folder), state.step)
            files.save_weights(self.model, partial / WEIGHTS)
            files.write_tree(files.optimizer_state(self.optimizer), partial, "optimizer")
            kept = {name: getattr(state, name) for name in KEPT}
            scheduler = None if self.scheduler is None else self.scheduler.state_dict()
            scaler = self._scaler.state_dict()
            tree = {"state": kept, "scheduler": scheduler, "scaler": scaler, "belongs": self._belongs()}
            files.write_tree(tree, partial, "state")
        self.accelerator.wait_for_everyone()
        own = {"now": files.random_state(), **self._random}
        files.write_tree(own, partial, f"rank-{self.accelerator.process_index}")
        self.accelerator.wait_for_everyone()
        if main:
            files.finish(partial, self.keep)
        state.checkpoint = files.step_folder(Path(self.folder), state.step)
        self._saved = state.step, state.epoch
        self._call("on_checkpoint")

    def _resume(self) -> None:
        newest = files.latest(None if self.folder is None else Path(self.folder))
        if newest is None:
            return
        tree = files.read_tree(newest, "state")
        check_belongs(newest, tree["belongs"], self._belongs())
        files.load_weights(self.model, newest / WEIGHTS)
        files.load_optimizer_state(self.optimizer, files.read_tree(newest, "optimizer"))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(_keyed_as(self.scheduler.state_dict(), tree["scheduler"]))
        if tree["scaler"]:
            self._scaler.load_state_dict(tree["scaler"])
        for name, value in tree["state"].items():
            setattr(self.state, name, value)
        self._random = files.read_tree(newest, f"rank-{self.accelerator.process_index}")
        files.set_random_state(self._random.pop("now"))
        self.state.checkpoint, self._saved = newest, (self.state.step, self.state.epoch)

    def _belongs(self) -> dict[str, Any]:
        """What a checkpoint must agree in with the training that goes on from it."""
        return {
            "updates per epoch": self.updates_per_epoch(),
            "accumulation": self.accumulation,
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "ranks": self.accelerator.num_processes,
        }

    def _check(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"train for epochs or for steps, got epochs={self.epochs} and steps={self.steps}")
        for name in ("epochs", "steps", "epoch_steps", "accumulation", "checkpoint_every", "keep"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None for no clipping, got {self.clip!r}")
        if isinstance(self.loader, Sized) and not len(self.loader):
            raise ValueError("the loader is empty; check its data set and drop_last")
        own = set(self.model.parameters())
        strange = sum(p not in own for group in self.optimizer.param_groups for p in group["params"])
        if strange:
            raise ValueError(
                f"{strange} parameters of the optimizer are in no part of the model; pass one that holds them all"
            )

    def _check_finite(self) -> None:
        """Keep a spoiled training out of checkpoints."""
        state = self.state
        spoiled = "the loss" if state.loss is not None and not torch.isfinite(state.loss) else None
        for name, parameter in self.model.named_parameters():
            if spoiled is None and not torch.isfinite(parameter).all():
                spoiled = f"the weights of {name}"
        if spoiled is not None:
            kept = (
                f"The last good checkpoint is {state.checkpoint}."
                if state.checkpoint
                else "No checkpoint is kept."
            )
            raise FloatingPointError(
                f"{spoiled} is no longer finite at step {state.step}; lower the learning rate or set clip. {kept}"
            )

    def _sync(self, last: bool) -> Any:
        """Synchronise gradients between ranks in the last micro-batch of an update only."""
        return nullcontext() if last else self.accelerator.no_sync(self._called)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self._place.type, dtype=dtype, enabled=dtype is not None)

    def _placed(self, batch: Any) -> Any:
        return map_tensors({"batch": batch}, lambda t: t.to(self._place, non_blocking=True))["batch"]

    def _call(self, name: str) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self.state)


class _Called(nn.Module):
    """A step as the forward of a module, so that DDP sees it whatever part of the model it calls."""

    def __init__(self, model: nn.Module, step: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Any) -> Tensor:
        return self.step(batch)


def _single(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"a step returns its loss, a tensor with one number, got {got}; take the mean")
    return loss.reshape(())


def _sampler(loader: Any) -> Any:
    return loader.sampler if isinstance(loader, DataLoader) else None


def _keyed_as(pattern: Any, tree: Any) -> Any:
    """Give dicts the keys they had before JSON made text of them, as the milestones of a scheduler."""
    if isinstance(pattern, dict) and isinstance(tree, Mapping):
        names = {str(key): key for key in pattern}
        return type(pattern)(
            {
                names.get(key, key): _keyed_as(pattern.get(names.get(key, key)), value)
                for key, value in tree.items()
            }
        )
    return tree
