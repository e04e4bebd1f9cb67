"""``Trainer`` and the backends: PyMarlin's options for `limbeck.train.plain.Loop`, which does the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from limbeck.compat.pymarlin.arguments import TrainerArguments
from limbeck.compat.pymarlin.module import ModuleInterface, Stage
from limbeck.compat.pymarlin.stats import noting, writers_of
from limbeck.registry import nearest
from limbeck.train.checkpoint import new_training, newest_within, save_weights
from limbeck.train.collecting import Collecting, RankShare, collect
from limbeck.train.notes import Notes
from limbeck.train.plain import Callback, Loop, State, recall
from limbeck.train.ranks import cut_batch, start_accelerator
from limbeck.train.refusals import check_held
from limbeck.train.scalars import Scalars
from limbeck.train.settings import Settings


@dataclass(frozen=True)
class TrainerBackend:
    """How a training runs.

    Attributes:
        precision: That of the forward pass.
        distributed: Whether it may run on several ranks, as ``accelerate launch`` or ``torchrun`` start them.

    Example:
        >>> build_trainer_backend("ddp-amp")
        TrainerBackend(precision='fp16', distributed=True)
    """

    precision: Literal["fp32", "fp16"] = "fp32"
    distributed: bool = False


def SingleProcess() -> TrainerBackend:  # noqa: N802
    """One process, full precision.

    Example:
        >>> SingleProcess().precision
        'fp32'
    """
    return TrainerBackend()


def SingleProcessAmp(enable_amp: bool = True) -> TrainerBackend:  # noqa: N802
    """One process, half precision with a scaled loss.

    Example:
        >>> SingleProcessAmp().precision
        'fp16'
    """
    return TrainerBackend("fp16" if enable_amp else "fp32")


def DDPTrainerBackend(  # noqa: N802
    trainer_backend: TrainerBackend, gather_frequency: int | None = None
) -> TrainerBackend:
    """Several processes; outputs are gathered over all of them, whatever `gather_frequency` says.

    Example:
        >>> DDPTrainerBackend(SingleProcess()).distributed
        True
    """
    return replace(trainer_backend, distributed=True)


BACKENDS = {
    "sp": SingleProcess(),
    "sp-amp": SingleProcessAmp(),
    "ddp": DDPTrainerBackend(SingleProcess()),
    "ddp-amp": DDPTrainerBackend(SingleProcessAmp()),
}


def build_trainer_backend(trainer_backend_name: str) -> TrainerBackend:
    """Make a backend by name.

    Raises:
        ValueError: an unknown name, or a backend that is not supported here.

    Example:
        >>> build_trainer_backend("ddp-amp").precision
        'fp16'
    """
    if trainer_backend_name.endswith(("-apex", "-dp")):
        raise ValueError(
            f"backend {trainer_backend_name!r} is not supported: neither apex nor Opacus is used here; known: "
            f"{', '.join(BACKENDS)}"
        )
    if trainer_backend_name not in BACKENDS:
        raise ValueError(f"unknown backend {trainer_backend_name!r}; {nearest(trainer_backend_name, BACKENDS)}")
    return BACKENDS[trainer_backend_name]


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
        >>> from limbeck.compat.pymarlin import DefaultCheckpointerArguments
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
        self.trainer_backend = build_trainer_backend(args.backend) if trainer_backend is None else trainer_backend
        self.accelerator = start_accelerator(Settings(), None)
        self._refuse(self.trainer_backend, checkpointer)
        parts = cut_batch(
            args.train_batch_size, ranks=self.accelerator.num_processes, most=args.gpu_batch_size_limit
        )
        self.train_step_batch_size, self.gradient_accumulation = parts
        self.scalars = Scalars(args.writer_args.tb_log_dir if "tensorboard" in args.writers else None)
        self.stats = Notes(writers_of(args.writers, self.scalars.write), args.stats_args.log_steps)
        self._begin = self._found()
        self._folder: Path | None = None
        module.to(self.device)
        module.prepare_training()
        self.state = State(module, None) if self._begin is None else recall(module, self._begin)
        epochs = args.epochs - self.state.epoch if args.reset_optimizers_schedulers else args.epochs
        steps = self.estimated_global_steps_per_epoch
        optimizers, schedulers = module.get_optimizers_schedulers(steps, max(1, epochs))
        self.optimizers, self.schedulers = list(optimizers), list(schedulers or ())
        check_held(module, *self.optimizers)

    def train(self) -> None:
        """Train and validate, from the checkpoint of ``load_dir`` where there is one."""
        args, kept, hooks = self.args, self.args.checkpointer_args, Hooks(self)
        if kept.checkpoint and self._folder is None:
            place, replace = Path(kept.save_dir), kept.delete_existing_checkpoints
            self._folder = new_training(place, kept.file_prefix, replace=replace)
        loop = Loop(
            hooks.collecting,
            self.module,
            lambda epoch: self._loader(DistributedSampler if self.is_distributed else RandomSampler),
            self.optimizers,
            epochs=args.epochs,
            epoch_steps=args.max_train_steps_per_epoch,
            scheduler=self.schedulers or None,
            accumulation=self.gradient_accumulation,
            clip=args.max_grad_norm if args.clip_grads else None,
            precision=self._precision,
            device=self.device,
            callbacks=[hooks, self.stats],
            folder=self._folder,
            begin=None if args.reset_optimizers_schedulers else self._begin,
            after=self.state,
            keep=args.epochs,
            place=False,
        )
        with self.scalars, noting(self.stats):
            loop.run()

    def validate(self) -> list[Any] | None:
        """Validate on every loader.

        Returns:
            What the steps on the last loader gave, all batches behind one another; None where there is no loader.
        """
        sampler = RankShare if self.is_distributed else SequentialSampler
        found = self.module.get_val_dataloaders(batch_size=self.val_step_batch_size, sampler=sampler)
        loaders = found if isinstance(found, dict) else {} if found is None else {"default": found}
        outputs, most = None, self.args.max_val_steps_per_epoch
        self.module.eval()
        with noting(self.stats):
            for key, loader in loaders.items():
                outputs = collect(
                    self._step(Stage.VAL), loader, limit=most, precision=self._precision, device=self.device
                )
                self.module.on_end_val_epoch(self.state.step, *outputs, key=key)
            self.stats.write_epoch(self.state.step)
        return outputs

    @property
    def device(self) -> torch.device:
        """Where this rank trains."""
        place: torch.device = self.accelerator.device
        return place if self.args.use_gpu else torch.device("cpu")

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
        return self.train_step_batch_size * self.gradient_accumulation

    @property
    def val_step_batch_size(self) -> int:
        """Examples of a batch of validation."""
        return self.args.val_batch_size

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
        loader = self._loader(SequentialSampler)
        if loader is None:
            return 0
        steps = len(loader) // (self.accelerator.num_processes * self.gradient_accumulation) + 1
        return int(min(steps, self.args.max_train_steps_per_epoch or steps))

    @property
    def _precision(self) -> Literal["fp32", "fp16"]:
        return "fp16" if self.args.amp_backend_native else self.trainer_backend.precision

    def _loader(self, sampler: Callable[..., Any]) -> Any:
        return self.module.get_train_dataloader(batch_size=self.train_step_batch_size, sampler=sampler)

    def _step(self, stage: Stage) -> Callable[..., Any]:
        """The module's step of a stage, which in training counts from 1."""
        ahead = int(stage is Stage.TRAIN)
        return lambda batch, state=None: self.module(
            stage=stage, global_step=self.state.step + ahead, batch=batch, device=self.device
        )

    def _refuse(self, backend: Any, checkpointer: Any) -> None:
        """Refuse what this trainer has not: parts of a script's own, and ranks that were not started."""
        if not isinstance(backend, TrainerBackend):
            kind = type(backend).__name__
            raise TypeError(f"trainer_backend is {kind}, and own ones are not supported; use SingleProcess()")
        if checkpointer is not None:
            raise TypeError("checkpointers of a script's own are not supported; use args.checkpointer_args")
        if type(self.module).get_state is not ModuleInterface.get_state:
            raise TypeError("get_state is not called here; keep tensors as buffers, which checkpoints hold")
        world, stated = self.accelerator.num_processes, self.args.distributed_training_args
        if world > 1 and not backend.distributed:
            raise ValueError(
                f"there are {world} ranks, and the backend is for one; use 'ddp' or DDPTrainerBackend"
            )
        if stated is not None and stated.world_size != world:
            raise ValueError(
                f"distributed_training_args says {stated.world_size} ranks, and there are {world}; start as many "
                "with accelerate launch or torchrun"
            )

    def _found(self) -> Path | None:
        """The checkpoint to begin from."""
        args = self.args.checkpointer_args
        if not args.load_dir:
            return None
        place = Path(args.load_dir)
        if args.delete_existing_checkpoints and place.resolve().is_relative_to(Path(args.save_dir).resolve()):
            raise ValueError(
                f"delete_existing_checkpoints=True would delete what load_dir={args.load_dir!r} holds"
            )
        return newest_within(place, args.load_filename)


class Hooks(Callback):
    """The loop's callbacks, as those of a trainer's module."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.module = trainer, trainer.module
        self.collecting = Collecting(trainer._step(Stage.TRAIN))

    def on_epoch_start(self, state: State) -> None:
        """The module says how it begins, and trains with a teacher that does not."""
        self.module.on_begin_train_epoch(state.step, state.epoch)
        self.module.prepare_training()
        self.module.train()

    def on_backward(self, state: State) -> None:
        """The loss as a part of its update."""
        assert state.loss is not None
        self.module.on_end_backward(state.step, state.loss / self.trainer.gradient_accumulation)

    def on_step(self, state: State) -> None:
        """What the update's parts gave."""
        self.module.on_end_train_step(state.step, *self.collecting.take_update())

    def on_epoch(self, state: State) -> None:
        """Validation, and what the whole epoch gave."""
        outputs = self.collecting.take_epoch()
        self.trainer.validate()
        self.module.on_end_train_epoch(state.step, *outputs)

    def on_end(self, state: State) -> None:
        """The module's state alone."""
        args = self.trainer.args.checkpointer_args
        if args.checkpoint and args.model_state_save_dir and self.trainer.is_main_process:
            name = f"{args.file_prefix}_model_{self.trainer.last_epoch}.safetensors"
            place = Path(args.model_state_save_dir)
            place.mkdir(parents=True, exist_ok=True)
            save_weights(self.module, place / name)
        self.module.on_end_train(state.step)
