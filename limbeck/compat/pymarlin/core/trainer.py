"""``Trainer`` and its arguments: PyMarlin's options for `limbeck.train.plain.Loop`, which does the training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from limbeck.compat.pymarlin.core.epochs import Boxed, Epochs, Hooks
from limbeck.compat.pymarlin.core.module_interface import ModuleInterface, Stage
from limbeck.compat.pymarlin.core.outputs import OutputCollector
from limbeck.compat.pymarlin.core.trainer_arguments import TrainerArguments
from limbeck.compat.pymarlin.core.trainer_backend import TrainerBackend, build_trainer_backend
from limbeck.compat.pymarlin.utils import stats
from limbeck.compat.pymarlin.utils.checkpointer.checkpoint_utils import (
    DefaultCheckpointerArguments,
    Kept,
    find_checkpoint,
    prepare_folder,
)
from limbeck.compat.pymarlin.utils.distributed import DistributedTrainingArguments
from limbeck.compat.pymarlin.utils.logger.logging_utils import getlogger
from limbeck.compat.pymarlin.utils.writer import WriterInitArguments, build_writer
from limbeck.train import checkpoint as files
from limbeck.train.loop import AUTOCAST
from limbeck.train.plain import WEIGHTS, Loop, State, size_of
from limbeck.train.ranks import start_accelerator
from limbeck.train.settings import Settings
from limbeck.train.together import Optimizers, Schedulers

__all__ = [
    "DefaultCheckpointerArguments",
    "DistributedTrainingArguments",
    "Trainer",
    "TrainerArguments",
    "WriterInitArguments",
    "stats",
]


class Trainer:
    """Trains and validates a module.

    Args:
        module: The scenario.
        args: How to train.
        trainer_backend: How it runs; by default ``args.backend``.

    Raises:
        TypeError: a backend or a checkpointer of the script's own.
        ValueError: several ranks without a distributed backend, or a batch that they cannot share.

    Example:
        >>> class Line(ModuleInterface):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(1, 1)
        ...     def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        ...         return [torch.optim.SGD(self.parameters(), lr=0.1)], []
        ...     def get_train_dataloader(self, sampler, batch_size):
        ...         return [torch.ones(batch_size, 1)] * 3
        ...     get_val_dataloaders = get_train_dataloader
        ...     def train_step(self, global_step, batch, device):
        ...         return (self.net(batch) - 2).square().mean()
        ...     def val_step(self, global_step, batch, device):
        ...         return self.net(batch)
        >>> checkpoints = DefaultCheckpointerArguments(checkpoint=False)
        >>> trainer = Trainer(Line(), TrainerArguments(epochs=9, writers=[], checkpointer_args=checkpoints))
        >>> trainer.train()
        >>> trainer.global_steps_finished, [round(y, 2) for y in trainer.validate()[0].flatten().tolist()]
        (27, [2.0, 2.0, 2.0])
    """

    def __init__(
        self,
        module: ModuleInterface,
        args: TrainerArguments,
        trainer_backend: TrainerBackend | None = None,
        checkpointer: None = None,
    ) -> None:
        self.module, self.args = module, args
        self.trainer_backend = self._backend(trainer_backend, checkpointer)
        self.logger = getlogger(__name__, args.log_level)
        self.accelerator = start_accelerator(Settings(), None)
        self._check_ranks()
        self.stats = stats.BasicStats(args.stats_args, self._writers())
        self._kept, self.state, self.hooks = Kept(module), State(module, None), Hooks(self)
        self._start = find_checkpoint(args.checkpointer_args)
        self._folder: Path | None = None
        module.to(self.device)
        module.prepare_training()
        if self._start is not None:
            self._load(self._start)
        epochs = args.epochs - self.state.epoch if args.reset_optimizers_schedulers else args.epochs
        optimizers, schedulers = module.get_optimizers_schedulers(
            self.estimated_global_steps_per_epoch, max(1, epochs)
        )
        self.optimizers, self.schedulers = list(optimizers), list(schedulers or ())
        self._check_trained()

    def train(self) -> None:
        """Train and validate, from the checkpoint of ``load_dir`` where there is one.

        Raises:
            ValueError: a checkpoint to go on from, and none to be written.
        """
        args = self.args
        self._folder = self._chosen_folder() if self._folder is None else self._folder
        loop = Loop(
            self._step,
            self._kept,
            Epochs(self),
            self.optimizers[0] if len(self.optimizers) == 1 else Optimizers(self.optimizers),
            epochs=args.epochs,
            epoch_steps=args.max_train_steps_per_epoch,
            scheduler=Schedulers(self.schedulers) if self.schedulers else None,
            accumulation=self.gradient_accumulation,
            clip=args.max_grad_norm if args.clip_grads else None,
            precision=self.precision,
            device=self.device,
            callbacks=[self.hooks],
            folder=self._folder,
            keep=args.epochs,
            weigh=lambda boxed: size_of(boxed.batch),
        )
        loop.state.step, loop.state.epoch = self.state.step, self.state.epoch
        self.state = loop.state
        with self.stats.current():
            loop.run()
            self._save_module()
            self.module.on_end_train(self.state.step)
            self.stats.log_long_stats(self.state.step)
        self.stats.finish()

    def validate(self) -> list[Any] | None:
        """Validate on every loader.

        Returns:
            What the steps on the last loader gave, all batches behind one another; None where there is no loader.
        """
        outputs = self.validated()
        self.stats.finish()
        return outputs

    def validated(self) -> list[Any] | None:
        """The same, with the writers left open for what follows."""
        found = self.module.get_val_dataloaders(batch_size=self.val_step_batch_size, sampler=self.val_sampler)
        loaders = found if isinstance(found, dict) else {} if found is None else {"default": found}
        outputs = None
        self.module.eval()
        with self.stats.current():
            for key, loader in loaders.items():
                outputs = self._validated(loader)
                self.module.on_end_val_epoch(self.state.step, *outputs, key=key)
            self.stats.log_long_stats(self.state.step)
        return outputs

    @property
    def device(self) -> torch.device:
        """Where this rank trains."""
        place: torch.device = self.accelerator.device
        return place if self.args.use_gpu else torch.device("cpu")

    @property
    def precision(self) -> Any:
        """That of the forward pass."""
        return "fp16" if self.args.amp_backend_native else self.trainer_backend.precision

    @property
    def is_distributed(self) -> bool:
        """Whether there are several ranks."""
        return bool(self.accelerator.num_processes > 1)

    @property
    def is_main_process(self) -> bool:
        """Whether this is the first rank."""
        return bool(self.accelerator.is_main_process)

    @property
    def pergpu_global_batch_size(self) -> int:
        """Examples of one update on this rank."""
        return int(self.args.train_batch_size // self.accelerator.num_processes)

    @property
    def train_step_batch_size(self) -> int:
        """Examples that are trained on at once: the largest part of the rank's that fits and divides them."""
        size: int = self.pergpu_global_batch_size
        return next(n for n in range(min(size, self.args.gpu_batch_size_limit), 0, -1) if size % n == 0)

    @property
    def gradient_accumulation(self) -> int:
        """Parts of one update."""
        return int(self.pergpu_global_batch_size // self.train_step_batch_size)

    @property
    def val_step_batch_size(self) -> int:
        """Examples of a batch of validation."""
        return int(self.args.val_batch_size)

    @property
    def train_sampler(self) -> Any:
        """What draws the training examples."""
        return replace(self.trainer_backend, distributed=self.is_distributed).train_sampler

    @property
    def val_sampler(self) -> Any:
        """What orders the validation examples."""
        return replace(self.trainer_backend, distributed=self.is_distributed).val_sampler

    @property
    def global_steps_finished(self) -> int:
        """Updates done."""
        return self.state.step

    @property
    def last_epoch(self) -> int:
        """The last epoch done, counted from 0; -1 before the first."""
        return self.state.epoch - 1

    @property
    def estimated_global_steps_per_epoch(self) -> int:
        """Updates of one epoch, rounded up, or one more; schedules are made of it. 0 without training data."""
        loader = self.module.get_train_dataloader(batch_size=self.train_step_batch_size, sampler=SequentialSampler)
        if loader is None:
            return 0
        steps = len(loader) // (self.accelerator.num_processes * self.gradient_accumulation) + 1
        return int(min(steps, self.args.max_train_steps_per_epoch or steps))

    def _step(self, boxed: Boxed, state: State) -> Tensor:
        given = self.module(stage=Stage.TRAIN, global_step=state.step + 1, batch=boxed.batch, device=self.device)
        outputs = [given] if isinstance(given, Tensor) else list(given)
        self.hooks.note(outputs)
        loss: Tensor = outputs[0]
        return loss

    @torch.no_grad()
    def _validated(self, loader: Iterable[Any]) -> list[Any]:
        collected, dtype = OutputCollector(), AUTOCAST[self.precision]
        for number, batch in enumerate(loader):
            if number == self.args.max_val_steps_per_epoch:
                break
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                collected.collect(
                    self.module(stage=Stage.VAL, global_step=self.state.step, batch=batch, device=self.device)
                )
        return collected.everywhere()

    def _backend(self, backend: Any, checkpointer: Any) -> TrainerBackend:
        if backend is None:
            backend = build_trainer_backend(self.args.backend)
        for name, given, known in (
            ("trainer_backend", backend, TrainerBackend),
            ("checkpointer", checkpointer, type(None)),
        ):
            if not isinstance(given, known):
                cure = (
                    "SingleProcess(), SingleProcessAmp() or DDPTrainerBackend(...)" if backend is given else "args"
                )
                raise TypeError(f"{name} is {type(given).__name__}, and own ones are not supported; use {cure}")
        found: TrainerBackend = backend
        return found

    def _check_ranks(self) -> None:
        world, stated = self.accelerator.num_processes, self.args.distributed_training_args
        if world > 1 and not self.trainer_backend.distributed:
            raise ValueError(
                f"there are {world} ranks, and the backend is for one; use 'ddp' or DDPTrainerBackend"
            )
        if stated is not None and stated.world_size != world:
            raise ValueError(
                f"distributed_training_args says {stated.world_size} ranks, and there are {world}; start as many "
                "with accelerate launch or torchrun"
            )
        if self.args.train_batch_size % world:
            raise ValueError(f"{world} ranks cannot share train_batch_size={self.args.train_batch_size}")

    def _check_trained(self) -> None:
        held = {p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        idle = sum(p not in held for p in self.module.must_train())
        if idle:
            raise ValueError(
                f"{idle} parameters of projections are in no optimizer; build it of self.parameters() in "
                "get_optimizers_schedulers"
            )

    def _writers(self) -> list[Any]:
        if not self.is_main_process:
            return []
        made = [build_writer(writer, self.args.writer_args) for writer in self.args.writers]
        return [writer for writer in made if writer is not None]

    def _load(self, checkpoint: Path) -> None:
        """The module's state and the counts, so that a validation, too, begins from there."""
        files.load_weights(self._kept, checkpoint / WEIGHTS)
        kept = files.read_tree(checkpoint, "state")["state"]
        self.state.step, self.state.epoch, self.state.checkpoint = kept["step"], kept["epoch"], checkpoint

    def _chosen_folder(self) -> Path | None:
        """Chosen by the first rank, known to all."""
        from accelerate.utils import broadcast_object_list

        args, whole = self.args.checkpointer_args, not self.args.reset_optimizers_schedulers
        if self._start is not None and whole and not args.checkpoint:
            raise ValueError(
                f"checkpoint=False leaves no place to go on from {self._start}; set it to True, or begin with its "
                "weights alone by reset_optimizers_schedulers=True"
            )
        chosen = [prepare_folder(args, self._start, copied=whole) if self.is_main_process else None]
        return broadcast_object_list(chosen)[0] if self.is_distributed else chosen[0]

    def _save_module(self) -> None:
        """The module's state alone, at the end."""
        args = self.args.checkpointer_args
        if args.checkpoint and args.model_state_save_dir and self.is_main_process:
            place = Path(args.model_state_save_dir)
            place.mkdir(parents=True, exist_ok=True)
            files.save_weights(self._kept, place / f"{args.file_prefix}_model_{self.last_epoch}.safetensors")
