"""``Trainer`` and the backends: PyMarlin's options for `limbeck.train.plain.Loop`, which does the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from limbeck.compat.pymarlin.arguments import TrainerArguments
from limbeck.compat.pymarlin.module import ModuleInterface, Stage
from limbeck.compat.pymarlin.stats import Stats, writers_of
from limbeck.registry import nearest
from limbeck.train import checkpoint as files
from limbeck.train.collecting import Collected, RankShare, collect
from limbeck.train.plain import WEIGHTS, Callback, Loop, State
from limbeck.train.ranks import start_accelerator
from limbeck.train.settings import Settings
from limbeck.train.together import Optimizers, Schedulers


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
        self._refuse_own(self.trainer_backend, checkpointer)
        trackers = [name for name in args.writers if name == "tensorboard"]
        self.accelerator = start_accelerator(Settings(trackers=trackers), Path(args.writer_args.tb_log_dir))
        self._check_ranks()
        writers = writers_of(args.writers, self.accelerator.log) if self.is_main_process else []
        self.stats = Stats(args.stats_args.log_steps, writers)
        self.state, self._begin = State(module, None), self._found()
        self._folder: Path | None = None
        module.to(self.device)
        module.prepare_training()
        if self._begin is not None:
            files.load_weights(module, self._begin / WEIGHTS)
            kept = files.read_tree(self._begin, "state")["state"]
            self.state.step, self.state.epoch = kept["step"], kept["epoch"]
        epochs = args.epochs - self.state.epoch if args.reset_optimizers_schedulers else args.epochs
        steps = self.estimated_global_steps_per_epoch
        optimizers, schedulers = module.get_optimizers_schedulers(steps, max(1, epochs))
        self.optimizers, self.schedulers = list(optimizers), list(schedulers or ())
        self._check_projections()

    def train(self) -> None:
        """Train and validate, from the checkpoint of ``load_dir`` where there is one."""
        args, hooks = self.args, Hooks(self)
        self._folder = self._chosen_folder() if self._folder is None else self._folder
        loop = Loop(
            hooks.step,
            self.module,
            lambda epoch: self._loader(self._train_sampler),
            self.optimizers[0] if len(self.optimizers) == 1 else Optimizers(self.optimizers),
            epochs=args.epochs,
            epoch_steps=args.max_train_steps_per_epoch,
            scheduler=Schedulers(self.schedulers) if self.schedulers else None,
            accumulation=self.gradient_accumulation,
            clip=args.max_grad_norm if args.clip_grads else None,
            precision=self._precision,
            device=self.device,
            callbacks=[hooks],
            folder=self._folder,
            begin=None if args.reset_optimizers_schedulers else self._begin,
            keep=args.epochs,
            place=False,
        )
        loop.state.step, loop.state.epoch = self.state.step, self.state.epoch
        self.state = loop.state
        self.accelerator.init_trackers("pymarlin")
        with self.stats.current():
            loop.run()
            self._save_module()
            self.module.on_end_train(self.state.step)
            self.stats.log_long_stats(self.state.step)
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def validate(self) -> list[Any] | None:
        """Validate on every loader.

        Returns:
            What the steps on the last loader gave, all batches behind one another; None where there is no loader.
        """
        found = self.module.get_val_dataloaders(batch_size=self.val_step_batch_size, sampler=self._val_sampler)
        loaders = found if isinstance(found, dict) else {} if found is None else {"default": found}
        outputs, most = None, self.args.max_val_steps_per_epoch
        self.module.eval()
        with self.stats.current():
            for key, loader in loaders.items():
                outputs = collect(
                    self._val_step, loader, limit=most, precision=self._precision, device=self.device
                )
                self.module.on_end_val_epoch(self.state.step, *outputs, key=key)
            self.stats.log_long_stats(self.state.step)
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

    @property
    def _train_sampler(self) -> Callable[..., Any]:
        return DistributedSampler if self.is_distributed else RandomSampler

    @property
    def _val_sampler(self) -> Callable[..., Any]:
        return RankShare if self.is_distributed else SequentialSampler

    def _loader(self, sampler: Callable[..., Any]) -> Any:
        return self.module.get_train_dataloader(batch_size=self.train_step_batch_size, sampler=sampler)

    def _val_step(self, batch: Any) -> Any:
        return self.module(stage=Stage.VAL, global_step=self.state.step, batch=batch, device=self.device)

    def _refuse_own(self, backend: Any, checkpointer: Any) -> None:
        if not isinstance(backend, TrainerBackend):
            kind = type(backend).__name__
            raise TypeError(f"trainer_backend is {kind}, and own ones are not supported; use SingleProcess()")
        if checkpointer is not None:
            raise TypeError("checkpointers of a script's own are not supported; use args.checkpointer_args")
        if type(self.module).get_state is not ModuleInterface.get_state:
            raise TypeError("get_state is not called here; keep tensors as buffers, which checkpoints hold")

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

    def _check_projections(self) -> None:
        """Refuse what would stay as it was drawn."""
        held = {p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        distiller = self.module.distiller
        idle = 0 if distiller is None else sum(p not in held for p in distiller.objective.parameters())
        if idle:
            raise ValueError(
                f"{idle} parameters of projections are in no optimizer; build it of self.parameters() in "
                "get_optimizers_schedulers"
            )

    def _found(self) -> Path | None:
        """The checkpoint to begin from."""
        args = self.args.checkpointer_args
        if not args.load_dir:
            return None
        place, target = Path(args.load_dir), Path(args.save_dir).resolve()
        if args.delete_existing_checkpoints and place.resolve().is_relative_to(target):
            raise ValueError(
                f"delete_existing_checkpoints=True would delete what load_dir={args.load_dir!r} holds"
            )
        if not args.load_filename:
            return files.newest_within(place)
        if not (place / args.load_filename).is_dir():
            name = args.load_filename
            raise ValueError(
                f"there is no checkpoint {name!r} in {place}; it is a folder such as model/step-00000120"
            )
        return place / args.load_filename

    def _chosen_folder(self) -> Path | None:
        """Where this training's checkpoints go, chosen by the first rank."""
        args = self.args.checkpointer_args
        place = Path(args.save_dir)
        if args.delete_existing_checkpoints and self.is_main_process:
            files.remove_trainings(place, args.file_prefix)
        chosen = [files.unused_folder(place, args.file_prefix) if args.checkpoint else None]
        return broadcast_object_list(chosen)[0] if self.is_distributed else chosen[0]

    def _save_module(self) -> None:
        """The module's state alone, at the end."""
        args = self.args.checkpointer_args
        if args.checkpoint and args.model_state_save_dir and self.is_main_process:
            place = Path(args.model_state_save_dir)
            place.mkdir(parents=True, exist_ok=True)
            files.save_weights(self.module, place / f"{args.file_prefix}_model_{self.last_epoch}.safetensors")


class Hooks(Callback):
    """The loop's step and callbacks, as those of a trainer's module."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.module, self.stats = trainer, trainer.module, trainer.stats
        self.of_step, self.of_epoch = Collected(), Collected()
        self.loss = torch.zeros(())

    def step(self, batch: Any, state: State) -> Tensor:
        """The module's step, whose outputs are kept for its callbacks."""
        device, number = self.trainer.device, state.step + 1
        given = self.module(stage=Stage.TRAIN, global_step=number, batch=batch, device=device)
        outputs = [given] if isinstance(given, Tensor) else list(given)
        self.of_step.add(outputs)
        self.of_epoch.add(outputs)
        self.loss = outputs[0]
        return self.loss

    def on_epoch_start(self, state: State) -> None:
        """The module says how it begins, and trains with a teacher that does not."""
        self.module.on_begin_train_epoch(state.step, state.epoch)
        self.module.prepare_training()
        self.module.train()
        self.of_epoch = Collected()

    def on_backward(self, state: State) -> None:
        """The loss as a part of its update."""
        self.module.on_end_backward(state.step, self.loss / self.trainer.gradient_accumulation)
        self.loss = self.loss.detach()  # lets go of the graph

    def on_step(self, state: State) -> None:
        """What the update's parts gave, and numbers to log."""
        self.stats.update("loss", float(state.loss), frequent=True)  # type: ignore[arg-type]
        outputs, self.of_step = self.of_step.outputs(), Collected()
        self.module.on_end_train_step(state.step, *outputs)
        self.stats.log_stats(state.step)

    def on_epoch(self, state: State) -> None:
        """Validation, and what the whole epoch gave."""
        outputs = self.of_epoch.of_all_ranks()
        self.trainer.validate()
        self.module.on_end_train_epoch(state.step, *outputs)
        self.stats.log_long_stats(state.step)
