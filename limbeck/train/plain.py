"""A loop for those who bring their own: loader, optimizer, scheduler, and a step from a batch to a loss.

`fit` builds all of these itself, and its batches do not depend on how they are cut. Here the data and the order in
which it comes are the user's, drawn just as a loop written by hand would draw them.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from limbeck.batch import batch_size, map_tensors
from limbeck.train.checkpoint import random_state, set_random_state
from limbeck.train.loop import AUTOCAST
from limbeck.train.plain_state import WEIGHTS, Callback, Draws, Keeping, State, recall
from limbeck.train.ranks import start_accelerator
from limbeck.train.refusals import check_callbacks, check_device, check_folder, check_held
from limbeck.train.settings import Settings
from limbeck.train.together import Schedulers, as_one
from limbeck.types import Output

__all__ = ["WEIGHTS", "Callback", "Loop", "State", "recall", "size_of"]


def size_of(batch: Any) -> float:
    """How much a micro-batch counts among those of its update: the number of its examples, or 1 where it has none.

    Example:
        >>> size_of((torch.zeros(3, 2), torch.zeros(3))), size_of("all of them")
        (3.0, 1.0)
    """
    try:
        return float(batch_size({"batch": batch}))
    except ValueError:
        return 1.0


@dataclass
class Loop:
    """A training by steps of the user's own.

    Args:
        step: Gives the loss of a batch, one number, the mean over its examples: ``step(batch, state)``.
        model: Holds all that trains, and is what checkpoints keep; `step` may call any part of it.
        loader: Gives the batches of an epoch each time it is read, or a function that makes the loader of an epoch
            from its number, counted from 0. Each of several ranks reads its own share.
        optimizer: Holds parameters of `model`; or several, which make their steps together.
        epochs: Passes over the loader; or `steps`.
        steps: Number of updates, over as many epochs as it takes.
        epoch_steps: Updates after which an epoch ends early.
        scheduler: Anything with ``step()`` and a state dict, made of `optimizer`; or several.
        scheduler_every: After what the scheduler makes a step.
        accumulation: Batches of one update. The last update of an epoch may have fewer.
        clip: Largest norm of the gradient of all that the optimizer holds; None for no clipping.
        precision: That of the forward pass, by autocast.
        device: Where to train; by default where accelerate says.
        callbacks: What watches.
        folder: Where checkpoints go. If it holds one, training goes on from there, bit for bit as if it had never
            been interrupted. None for no checkpoints.
        begin: A checkpoint of another folder to go on from where `folder` holds none.
        after: Where another training stood, as `recall` gives it, to go on from with a new optimizer.
        checkpoint_every: Steps; by default each epoch. There is always one at the end.
        keep: Number of checkpoints kept.
        weigh: How much a batch counts among those of its update.
        prepare: What is done to a batch before it is placed on the device.
        place: Whether batches are placed on the device; False where the step does so itself.

    Raises:
        TypeError: a loader that gives nothing, callbacks that are none.
        ValueError: epochs and steps, or neither; parameters that are in no part of the model; projections that are
            in no optimizer; an empty loader; a file where the folder shall be.

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
    loader: Iterable[Any] | Callable[[int], Iterable[Any]]
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
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
    begin: Path | None = None
    after: State | None = None
    checkpoint_every: int | None = None
    keep: int = 1
    weigh: Callable[[Any], float] = size_of
    prepare: Callable[[Any], Any] | None = None
    place: bool = True

    def __post_init__(self) -> None:
        self._first = self._loader_of(0)
        self._optimizer = as_one(self.optimizer)
        several = isinstance(self.scheduler, Sequence)
        self._scheduler = Schedulers(self.scheduler) if several else self.scheduler
        self._check()
        self.accelerator = start_accelerator(Settings(), None)
        self._place = torch.device(self.device or self.accelerator.device)
        self._scaler = torch.amp.GradScaler(self._place.type, enabled=self.precision == "fp16")
        self._held = [p for group in self._optimizer.param_groups for p in group["params"]]
        self.state = State(self.model, None) if self.after is None else self.after
        self.state.total_steps = self.total_steps()
        parts = self.state, self._optimizer, self._scheduler, self._scaler, Draws(self._first)
        self._keeping = Keeping(
            self.folder, self.keep, self.accelerator, *parts, self._belongs(), begin=self.begin
        )

    def total_steps(self) -> int | None:
        """The number of updates of the whole training; None where the loader has no length."""
        if self.steps is not None or self.epochs is None:
            return self.steps
        per_epoch = self.updates_per_epoch()
        return None if per_epoch is None else per_epoch * self.epochs

    def updates_per_epoch(self) -> int | None:
        """The number of updates of one epoch, its last smaller one included."""
        if not isinstance(self._first, Sized):
            return self.epoch_steps
        updates = math.ceil(len(self._first) / self.accumulation)
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
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._held, self.clip)
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        overflown = self._scaler.get_scale() < scale  # the optimizer made no step
        if self._scheduler is not None and self.scheduler_every == "step" and not overflown:
            self._scheduler.step()
        state.step, state.position, state.loss = state.step + 1, state.position + 1, loss

    def _updates(self) -> Iterator[list[Any]]:
        """The batches of each update that is left of this epoch.

        Those before are drawn again, from where the epoch had been drawn from, and passed over.
        """
        done, keeping, now = self.state.position, self._keeping, random_state()
        if done:
            set_random_state(keeping.drawn_from["global"])
        begun = random_state()  # to make a loader may draw, too
        loader = self._loader_of(self.state.epoch)
        keeping.draws = Draws(loader)
        if done:
            keeping.draws.set_own(keeping.drawn_from["own"])
        keeping.drawn_from = {**keeping.draws.state(), "global": begun}
        if isinstance(sampler := _sampler(loader), DistributedSampler):
            sampler.set_epoch(self.state.epoch)
        batches = iter(loader)
        updates = iter(lambda: list(itertools.islice(batches, self.accumulation)), [])
        updates = itertools.islice(updates, self.epoch_steps)
        if done:
            deque(itertools.islice(updates, done), maxlen=0)
            set_random_state(now)
        yield from updates

    def _loader_of(self, epoch: int) -> Iterable[Any]:
        return self.loader(epoch) if callable(self.loader) else self.loader

    def _end_epoch(self) -> None:
        state = self.state
        if not state.position:
            raise ValueError(f"epoch {state.epoch} of the loader is empty; pass one that can be read again")
        state.epoch, state.position = state.epoch + 1, 0
        if self._scheduler is not None and self.scheduler_every == "epoch":
            self._scheduler.step()
        self._keeping.check_finite()
        self._call("on_epoch")
        if self.checkpoint_every is None:
            self._save()

    def _save(self) -> None:
        if self._keeping.save():
            self._call("on_checkpoint")

    def _belongs(self) -> dict[str, Any]:
        """What a checkpoint must agree in with the training that goes on from it."""
        return {
            "updates per epoch": self.updates_per_epoch(),
            "accumulation": self.accumulation,
            "scheduler": None if self._scheduler is None else type(self._scheduler).__name__,
            "ranks": self.accelerator.num_processes,
        }

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

            if isinstance(_sampler(self._first), (RandomSampler, SequentialSampler)):
                raise ValueError(
                    f"all {accelerator.num_processes} ranks would read the same data; give the loader a "
                    "DistributedSampler"
                )
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
            self._called = accelerator.prepare_model(self._called)
        self._keeping.resume()
        self.model.train()

    def _check(self) -> None:
        loader: Any = self._first
        if not isinstance(loader, Iterable):
            raise TypeError(f"the loader gives batches, got {type(loader).__name__}; pass a DataLoader or a list")
        check_callbacks(self.callbacks, Callback)
        check_folder(self.folder)
        if self.device is not None:
            check_device(self.device)
        for name, known in (("precision", AUTOCAST), ("scheduler_every", ("step", "epoch"))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"train for epochs or for steps, got epochs={self.epochs} and steps={self.steps}")
        for name in ("epochs", "steps", "epoch_steps", "accumulation", "checkpoint_every", "keep"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None for no clipping, got {self.clip!r}")
        if isinstance(self._first, Sized) and not len(self._first):
            raise ValueError("the loader is empty; check its data set and drop_last")
        own = set(self.model.parameters())
        strange = sum(p not in own for group in self._optimizer.param_groups for p in group["params"])
        if strange:
            raise ValueError(
                f"{strange} parameters of the optimizer are in no part of the model; pass one that holds them all"
            )
        check_held(self.model, self._optimizer)

    def _sync(self, last: bool) -> Any:
        """Synchronise gradients between ranks in the last micro-batch of an update only."""
        return nullcontext() if last else self.accelerator.no_sync(self._called)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self._place.type, dtype=dtype, enabled=dtype is not None)

    def _placed(self, batch: Any) -> Any:
        batch = batch if self.prepare is None else self.prepare(batch)
        if not self.place:
            return batch
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
    if isinstance(loss, Output):
        raise TypeError("a step returns its loss, a tensor with one number, got a Distiller's output; add .loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"a step returns its loss, a tensor with one number, got {got}; take the mean")
    if not loss.requires_grad:
        raise ValueError(
            "the loss of a step depends on nothing that trains; compute it with the model, undetached"
        )
    return loss.reshape(())


def _sampler(loader: Any) -> Any:
    return loader.sampler if isinstance(loader, DataLoader) else None
