"""``ModuleInterface``: a model with its data, optimizers, steps and callbacks, for a script to subclass."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from limbeck.distiller import Distiller


class Stage(enum.Enum):
    """What a step is for."""

    TRAIN = 1
    VAL = 2
    TEST = 3


class DataProcessor(ABC):
    """One task of preparing data; override `process`.

    Example:
        >>> class Doubled(DataProcessor):
        ...     def process(self, numbers):
        ...         return [2 * n for n in numbers]
        >>> Doubled().process_data([1, 2])
        [2, 4]
    """

    @abstractmethod
    def process(self, *args: Any) -> Any:
        """Prepare the data."""

    def analyze(self) -> Any:
        """Look at what was prepared; called after `process`."""
        return None

    def process_data(self, *args: Any) -> Any:
        """Call `process`, then `analyze`, and give back what was prepared."""
        found = self.process(*args)
        self.analyze()
        return found

    def multi_process_data(self, *args: Any, process_count: int = 1) -> Any:
        """Not here.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "multi_process_data is not supported; call process_data, or process in a pool of your own"
        )


class DataInterface(ABC):
    """Hands out the data sets; they are asked for in every epoch, so prepare them before.

    Example:
        >>> class Numbers(DataInterface):
        ...     def get_train_dataset(self):
        ...         return [1, 2]
        ...     def get_val_dataset(self):
        ...         return [3]
        >>> Numbers().get_train_dataset()
        [1, 2]
    """

    def setup_datasets(self) -> None:  # noqa: B027  (there may be nothing to prepare)
        """Prepare the data sets."""

    @abstractmethod
    def get_train_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """The data to train on."""

    @abstractmethod
    def get_val_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """The data to validate on."""


class CallbackInterface:
    """What a trainer calls on the way. Steps are counted from 1; outputs are collected and on the CPU."""

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Before each epoch, counted from 0."""

    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """After each update, with what `train_step` gave for its parts."""

    def on_end_backward(self, global_step: int, loss_tensor: Tensor) -> None:
        """After each backward pass, with the loss that it began from, as a part of its update."""

    def on_end_train_epoch(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """After each epoch and its validation, with all that `train_step` gave."""

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """After the validation on one loader, with all that `val_step` gave."""

    def on_end_train(self, global_step: int) -> None:
        """At the end."""


class ModuleInterface(nn.Module, CallbackInterface, ABC):
    """All that a `Trainer` needs to know of a scenario.

    What is assigned to ``self.teacher`` stays outside of the module tree: it is moved with the rest, and it is in
    no checkpoint, no optimizer over ``self.parameters()`` and no clipping. A trainer freezes it.

    Example:
        >>> class Frozen(ModuleInterface):
        ...     def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs): ...
        ...     def get_train_dataloader(self, sampler, batch_size): ...
        ...     def get_val_dataloaders(self, sampler, batch_size): ...
        ...     def train_step(self, global_step, batch, device): ...
        ...     def val_step(self, global_step, batch, device): ...
        >>> module = Frozen()
        >>> module.teacher = nn.Linear(2, 2)
        >>> len(module.state_dict()), module.teacher.weight.shape
        (0, torch.Size([2, 2]))
    """

    teacher: nn.Module | None = None
    distiller: Distiller | None = None

    @abstractmethod
    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int, epochs: int
    ) -> tuple[Iterable[Any], Iterable[Any]]:
        """A list of optimizers and a list of schedulers, whose steps follow each update."""

    @abstractmethod
    def get_train_dataloader(self, sampler: Callable[..., Any], batch_size: int) -> Any:
        """The loader of an epoch, called before each: ``DataLoader(data, batch_size, sampler=sampler(data))``."""

    @abstractmethod
    def get_val_dataloaders(self, sampler: Callable[..., Any], batch_size: int) -> Any:
        """The loader to validate on, or a dict of them by a key of their own."""

    def get_test_dataloaders(self, sampler: Callable[..., Any], batch_size: int) -> Any:
        """The loaders to test on."""
        return None

    @abstractmethod
    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """The loss of a batch, which is to be moved to the device; or the loss and whatever is to be collected."""

    @abstractmethod
    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """What is to be collected for a batch."""

    def test_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """What is to be collected for a batch of a test."""
        return None

    def forward(self, stage: Stage, global_step: int, batch: Any, device: Any) -> Any:
        """The step of a stage."""
        steps = {Stage.TRAIN: self.train_step, Stage.VAL: self.val_step, Stage.TEST: self.test_step}
        return steps[Stage(stage)](batch=batch, device=device, global_step=global_step)

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this module; it is not called, and a trainer refuses another one."""
        return self.state_dict()

    def prepare_training(self) -> None:
        """Called by a trainer on the device, before it asks for the optimizers, and before each epoch."""
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()

    def _inputs_to_device(self, batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
        """A batch by name on a device, without what is None."""
        return {name: value.to(device) for name, value in batch.items() if value is not None}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("teacher", "distiller"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """PyTorch moves and converts modules by this; the teacher goes along."""
        if self.teacher is not None:
            self.teacher._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
