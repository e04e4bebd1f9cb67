"""``TrainerArguments``: how a `Trainer` trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from limbeck.compat.pymarlin.core.trainer_backend import build_trainer_backend
from limbeck.compat.pymarlin.utils import stats
from limbeck.compat.pymarlin.utils.arguments import arguments
from limbeck.compat.pymarlin.utils.checkpointer.checkpoint_utils import DefaultCheckpointerArguments
from limbeck.compat.pymarlin.utils.distributed import DistributedTrainingArguments
from limbeck.compat.pymarlin.utils.writer import WriterInitArguments


@arguments
@dataclass
class TrainerArguments:
    """How to train.

    Attributes:
        epochs: Passes over the data.
        use_gpu: Train on a GPU if there is one.
        train_batch_size: Examples of one update, over all ranks.
        gpu_batch_size_limit: How many of them fit a device at once; gradients are accumulated for the rest.
        val_batch_size: Examples of a batch of validation.
        max_train_steps_per_epoch: Updates after which an epoch ends.
        max_val_steps_per_epoch: Batches after which a validation ends.
        clip_grads: Whether gradients are clipped.
        max_grad_norm: The largest norm of the gradient of all that the optimizers hold.
        reset_optimizers_schedulers: Begin from a checkpoint's weights with new optimizers and schedulers.
        checkpointer_args: See `DefaultCheckpointerArguments`.
        distributed_training_args: What the script states of its ranks; the launcher decides.
        writers: Names or `Writer` objects.
        stats_args: When statistics are written.
        writer_args: Options of the writers.
        disable_tqdm: Accepted, and of no effect: there is no progress bar.
        log_level: Of the trainer's log.
        backend: A backend by name, where the trainer is given none.
        amp_backend_native: Half precision, as the backend ``"sp-amp"``.
        amp_backend_apex: Not supported.
        amp_level_apex: Not supported.
        differential_privacy_args: Not supported.

    Raises:
        ValueError: a size that is no positive number, or what is not supported.

    Example:
        >>> TrainerArguments(epochs=3).max_grad_norm
        1.0
    """

    epochs: int = 1
    use_gpu: bool = True
    train_batch_size: int = 1
    gpu_batch_size_limit: int = 512
    val_batch_size: int = 1
    max_train_steps_per_epoch: int | None = None
    max_val_steps_per_epoch: int | None = None
    clip_grads: bool = True
    max_grad_norm: float = 1.0
    reset_optimizers_schedulers: bool = False
    checkpointer_args: DefaultCheckpointerArguments = field(default_factory=DefaultCheckpointerArguments)
    distributed_training_args: DistributedTrainingArguments | None = None
    writers: list[Any] = field(default_factory=lambda: ["stdout"])
    stats_args: stats.StatInitArguments = field(default_factory=stats.StatInitArguments)
    writer_args: WriterInitArguments = field(default_factory=WriterInitArguments)
    disable_tqdm: bool = False
    log_level: str = "INFO"
    backend: str = "sp"
    amp_backend_native: bool = False
    amp_backend_apex: bool = False
    amp_level_apex: str = "O1"
    differential_privacy_args: Any = None

    def __post_init__(self) -> None:
        sizes = ("epochs", "train_batch_size", "gpu_batch_size_limit", "val_batch_size")
        for name in (*sizes, "max_train_steps_per_epoch", "max_val_steps_per_epoch"):
            value = getattr(self, name)
            if not ((isinstance(value, int) and value > 0) or (value is None and name not in sizes)):
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
        if self.amp_backend_apex:
            build_trainer_backend("sp-amp-apex")
        if self.differential_privacy_args is not None:
            build_trainer_backend("sp-dp")
