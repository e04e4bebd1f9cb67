"""How TextBrewer's distillers train: `limbeck.train.plain`, with its saved students, callbacks and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import Self

from limbeck.atomic import replacing
from limbeck.compat.textbrewer.configurations import TrainingConfig
from limbeck.compat.textbrewer.distiller_utils import logger
from limbeck.train import plain
from limbeck.train.data import seeded


def core(model: nn.Module) -> nn.Module:
    """A model without the wrapping of several GPUs."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = model.module
        return inner
    return model


class Saving(plain.Callback):
    """Saves the student's state dict and calls the user's callback, as often as the configuration says."""

    def __init__(self, student: nn.Module, config: TrainingConfig, callback: Callable[..., Any] | None) -> None:
        self.student, self.config, self.callback = student, config, callback
        self.loop: plain.Loop

    def on_step(self, state: plain.State) -> None:
        """After an update that is due, of a training whose length is known."""
        if self._is_due(state):
            self._save(state.step)

    def on_epoch(self, state: plain.State) -> None:
        """After an epoch, where nobody knows how long it is."""
        if state.total_steps is None:
            self._save(state.step)

    def _is_due(self, state: plain.State) -> bool:
        config, loop, per_epoch = self.config, self.loop, self.loop.updates_per_epoch()
        if loop.steps is not None:
            return state.step == loop.steps or (
                config.ckpt_steps is not None and state.step % config.ckpt_steps == 0
            )
        if per_epoch is None:
            return False
        places = {int(per_epoch * part / config.ckpt_frequency) for part in range(config.ckpt_frequency)}
        epoch = state.epoch + 1
        wanted = epoch % config.ckpt_epoch_frequency == 0 or epoch == loop.epochs
        return wanted and state.position % per_epoch in places

    def _save(self, step: int) -> None:
        accelerator = self.loop.accelerator
        if accelerator.is_main_process:
            path = Path(self.config.output_dir) / f"gs{step}.pkl"
            logger.info("Saving at global step %d: %s", step, path)
            with replacing(path) as partial:
                torch.save(core(self.student).state_dict(), partial)
        accelerator.wait_for_everyone()
        if self.callback is not None:
            self.callback(model=self.student, step=step)
            self.student.train()


class Scalars:
    """Writes losses to TensorBoard, if there is a place for them."""

    def __init__(self, log_dir: Path | str | None) -> None:
        self.writer, self.place = None, 0
        if log_dir is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("log_dir needs TensorBoard; pip install limbeck[tensorboard]") from error
        self.writer = SummaryWriter(str(log_dir))

    def write(self, total: Any, parts: Mapping[str, Any]) -> None:
        """Write the losses of one batch."""
        if self.writer is not None:
            for name, value in {"total_loss": total, **parts}.items():
                value = value.item() if isinstance(value, torch.Tensor) else value
                self.writer.add_scalar(f"scalar/{name}", value, self.place)
        self.place += 1

    def close(self) -> None:
        """Bring all to disk."""
        if self.writer is not None:
            self.writer.close()


class Trains:
    """What can train a student: distillers, and the plain trainer.

    ``with distiller:`` puts the teachers in eval mode and the student in training mode, and both back.
    """

    t_config: TrainingConfig
    model_S: Any  # noqa: N815
    model_T: Any  # noqa: N815

    def __init__(self) -> None:
        self._modes: list[dict[nn.Module, bool]] = []

    def __enter__(self) -> Self:
        teachers = models_of(self.model_T)
        modules = (module for model in (*teachers, self.model_S) for module in model.modules())
        self._modes.append({module: module.training for module in modules})
        for teacher in teachers:
            teacher.eval()
        self.model_S.train()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, is_training in self._modes.pop().items():
            module.training = is_training

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        dataloader: Iterable[Any],
        num_epochs: float | None = None,
        scheduler_class: Callable[..., Any] | None = None,
        scheduler_args: Mapping[str, Any] | None = None,
        scheduler: Any = None,
        max_grad_norm: float = -1.0,
        num_steps: int | None = None,
        callback: Callable[..., Any] | None = None,
        batch_postprocessor: Callable[[Any], Any] | None = None,
        **args: Any,
    ) -> None:
        """Train the student.

        Args:
            optimizer: Holds the student's parameters; projections are added to it.
            dataloader: Gives batches, dicts or tuples, or ``{"student": ..., "teacher": ...}`` of such.
            num_epochs: Passes over the data.
            scheduler_class: Makes a scheduler of the optimizer when it is whole.
            scheduler_args: Its other arguments.
            scheduler: One that is made already; with projections it must be `scheduler_class`.
            max_grad_norm: Largest norm of the gradient, projections included; up to 0 for no clipping.
            num_steps: Number of updates, instead of epochs.
            callback: ``callback(model=student, step=step)`` after each saved student.
            batch_postprocessor: Done to each batch first.
            **args: What the models are called with beside the batch.

        Raises:
            TypeError: data that cannot be read, as a scheduler in its place.
            ValueError: neither epochs nor steps, nothing to learn, or a scheduler older than the projections.
        """
        given: Any = dataloader  # TextBrewer had the scheduler here once
        if not isinstance(given, Iterable):
            raise TypeError(
                f"the second argument of train() is the data, got {type(given).__name__}; pass a scheduler by "
                "scheduler_class= and scheduler_args="
            )
        steps = None if num_steps is None else int(num_steps)
        loop = {
            "epochs": None if num_epochs is None or steps is not None else int(num_epochs),
            "steps": steps,
            "checkpoint_every": None if steps is None else self.t_config.ckpt_steps,
            "clip": max_grad_norm if max_grad_norm > 0 else None,
            "prepare": batch_postprocessor,
        }
        self._optimizer_with_projections(optimizer, scheduler if scheduler_class is None else None)
        if scheduler_class is not None:
            scheduler = scheduler_class(optimizer=optimizer, **(scheduler_args or {}))
        self._run_loop(optimizer, dataloader, callback, args, scheduler=scheduler, **loop)

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> Any:
        """The loss of a batch; of distillers, with what it is made of."""
        raise NotImplementedError

    def _at(self, progress: float | None) -> None:
        """Before each batch, at a progress from 0 to 1."""

    def _groups(self) -> list[tuple[nn.Module, Mapping[str, Any]]]:
        """What trains beside the student, each with options of the optimizer."""
        return []

    def _optimizer_with_projections(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for module, options in self._groups():
            new = [p for p in module.parameters() if p not in held]
            if new and scheduler is not None:
                raise ValueError("projections are added to the optimizer after scheduler=; use scheduler_class=")
            if new:
                optimizer.add_param_group({"params": new, **options})

    def _run_loop(
        self,
        optimizer: torch.optim.Optimizer,
        loader: Iterable[Any],
        callback: Callable[..., Any] | None,
        args: Mapping[str, Any],
        **options: Any,
    ) -> None:
        config, bare = self.t_config, (self.model_S, self.model_T)

        def step(batch: Any, state: plain.State) -> Any:
            self._at(None if state.total_steps is None else state.step / state.total_steps)
            found = self.train_on_batch(batch, args)
            total, parts = found if isinstance(found, tuple) else (found, {})
            if not isinstance(total, torch.Tensor):
                raise ValueError("the adaptors gave nothing to learn: no logits, no losses, nothing to match")
            scalars.write(total, parts)
            return total

        saving = Saving(bare[0], config, callback)
        saving.loop = plain.Loop(
            step,
            nn.ModuleList([core(bare[0]), *(module for module, _ in self._groups())]),
            loader,
            optimizer,
            accumulation=config.gradient_accumulation_steps,
            precision="fp16" if config.fp16 and config.fp16_opt_level != "O0" else "fp32",
            device=config.device if config.local_rank == -1 else None,
            callbacks=[saving],
            folder=Path(config.output_dir) / "resume" if config.resume else None,
            **options,
        )
        scalars = Scalars(config.log_dir if saving.loop.accelerator.is_main_process else None)
        for teacher in models_of(self.model_T):
            teacher.to(config.device)
        if config.data_parallel and torch.cuda.device_count() > 1:
            self.model_S, self.model_T = spread_over_gpus(self.model_S), spread_over_gpus(self.model_T)
        try:
            with self:
                saving.loop.run()
        finally:
            self.model_S, self.model_T = bare
            scalars.close()


def models_of(models: Any) -> list[nn.Module]:
    """The modules of one, a list or a dict of them."""
    if isinstance(models, nn.Module):
        return [models]
    return list(models.values() if isinstance(models, Mapping) else models)


def spread_over_gpus(models: Any) -> Any:
    """The same in `torch.nn.DataParallel`."""
    if isinstance(models, nn.Module):
        return nn.DataParallel(models)
    if isinstance(models, Mapping):
        return {name: nn.DataParallel(model) for name, model in models.items()}
    return [nn.DataParallel(model) for model in models]


class TaskBatches:
    """Batches of several tasks in random order, each with its task's name, without end.

    Args:
        loaders: One for each task.
        tau: A task is drawn in proportion to its number of batches to this power; where a number is not known, all
            tasks alike.
        count: How many batches the training will take; they are all drawn at the beginning, by NumPy's global
            generator.
        prepare: What is done to each task's batches first.
    """

    def __init__(
        self,
        loaders: Mapping[str, Any],
        tau: float,
        count: int,
        prepare: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        self.loaders, self.count, self.prepare = loaders, count, prepare
        self.shares = None
        try:
            sizes = np.array([float(len(loader)) for loader in loaders.values()])
        except TypeError:
            logger.info("The sizes of some loaders are not known; tasks are drawn alike")
        else:
            self.shares = sizes**tau / (sizes**tau).sum()

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        names = list(self.loaders)
        drawn = np.random.choice(len(names), self.count, p=self.shares)
        seed = int(np.random.randint(2**31))
        passes = {name: self._over_and_over(name, seed, number) for number, name in enumerate(names)}
        for number in drawn:
            batch = next(passes[names[number]])
            yield (batch if self.prepare is None else self.prepare[names[number]](batch)), names[number]

    def _over_and_over(self, name: str, seed: int, number: int) -> Iterator[Any]:
        """One task's batches; how each pass is shuffled follows from the seed, so that a resume repeats it."""
        loader, turn = self.loaders[name], 0
        own = loader.generator if isinstance(loader, DataLoader) else None
        while True:
            with seeded(seed, number, turn, own=own):
                batches = iter(loader)
                first = next(batches, None)
            if first is None:
                raise ValueError(f"the loader of task {name!r} is empty")
            yield first
            yield from batches
            turn += 1
