"""How TextBrewer's distillers train: the arguments of `train`, and `limbeck.train.plain` behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from limbeck.adapted import also_train, each, teaching
from limbeck.adapted.models import bare
from limbeck.atomic import replacing
from limbeck.compat.textbrewer.configurations import TrainingConfig
from limbeck.compat.textbrewer.distiller_utils import logger
from limbeck.train import plain
from limbeck.train.scalars import Scalars
from limbeck.train.snapshots import Snapshots


def in_either_order(train: Callable[..., None]) -> Callable[..., None]:
    """Let a method `train` have the scheduler before the data too, as in TextBrewer's tutorial."""

    @functools.wraps(train)
    def in_order(self: Any, optimizer: torch.optim.Optimizer, *rest: Any, **named: Any) -> None:
        if len(rest) > 1 and not isinstance(rest[0], Iterable):
            named["scheduler"], *rest = rest  # type: ignore[assignment]
        train(self, optimizer, *rest, **named)

    return in_order


class Trains:
    """What can train a student: distillers, and the plain trainer.

    ``with distiller:`` puts the teachers in eval mode and the student in training mode, and both back.

    Args:
        train_config: How to train.
        model_T: The teacher, or a list or a dict of teachers; an empty one for none.
        model_S: The student.
    """

    def __init__(self, train_config: TrainingConfig, model_T: Any, model_S: Any) -> None:
        self.t_config, self.model_T, self.model_S = train_config, model_T, model_S
        self._modes: list[AbstractContextManager[None]] = []

    def __enter__(self) -> Self:
        self._modes.append(teaching(self.model_S, self.model_T))
        self._modes[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.pop().__exit__(*error)

    @in_either_order
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
            ValueError: neither epochs nor steps, nothing to learn, or a scheduler older than the projections.
        """
        config = self.t_config
        also_train(optimizer, self._groups(), scheduler if scheduler_class is None else None)
        if scheduler_class is not None:
            scheduler = scheduler_class(optimizer=optimizer, **(scheduler_args or {}))
        saving = Snapshots(
            lambda step: self._save(step, callback, saving.loop),
            per_epoch=config.ckpt_frequency,
            epochs=config.ckpt_epoch_frequency,
            every=config.ckpt_steps,
        )
        with self, Scalars(config.log_dir) as scalars:
            saving.loop = plain.Loop(
                lambda batch, state: self._learn_from(batch, args, state, scalars),
                nn.ModuleList([bare(self.model_S), *(module for module, _ in self._groups())]),
                dataloader,
                optimizer,
                epochs=None if num_epochs is None or num_steps is not None else int(num_epochs),
                steps=None if num_steps is None else int(num_steps),
                scheduler=scheduler,
                accumulation=config.gradient_accumulation_steps,
                clip=max_grad_norm if max_grad_norm > 0 else None,
                precision="fp16" if config.fp16 and config.fp16_opt_level != "O0" else "fp32",
                device=config.device if config.local_rank == -1 else None,
                callbacks=[saving],
                folder=Path(config.output_dir) / "resume" if config.resume else None,
                checkpoint_every=None if num_steps is None else config.ckpt_steps,
                prepare=batch_postprocessor,
            )
            each(self.model_T, lambda teacher: teacher.to(config.device))
            self._run(saving.loop)

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> Any:
        """The loss of a batch; of distillers, with what it is made of."""
        raise NotImplementedError

    def _at(self, progress: float | None) -> None:
        """Before each batch, at a progress from 0 to 1."""

    def _groups(self) -> list[tuple[nn.Module, Mapping[str, Any]]]:
        """What trains beside the student, each with options of the optimizer."""
        return []

    def _learn_from(self, batch: Any, args: Mapping[str, Any], state: plain.State, scalars: Scalars) -> Any:
        self._at(None if state.total_steps is None else state.step / state.total_steps)
        found = self.train_on_batch(batch, args)
        total, parts = found if isinstance(found, tuple) else (found, {})
        if not isinstance(total, torch.Tensor):
            raise ValueError("the adaptors gave nothing to learn: no logits, no losses, nothing to match")
        scalars.write({f"scalar/{name}": value for name, value in {"total_loss": total, **parts}.items()})
        return total

    def _save(self, step: int, callback: Callable[..., Any] | None, loop: plain.Loop) -> None:
        """Write ``gs{step}.pkl``, a state dict, and call the user's callback."""
        if loop.accelerator.is_main_process:
            path = Path(self.t_config.output_dir) / f"gs{step}.pkl"
            logger.info("Saving at global step %d: %s", step, path)
            with replacing(path) as partial:
                torch.save(bare(self.model_S).state_dict(), partial)
        loop.accelerator.wait_for_everyone()
        if callback is not None:
            callback(model=self._student, step=step)
            self._student.train()

    def _run(self, loop: plain.Loop) -> None:
        """Run the loop, on all GPUs of this process where the configuration says so."""
        single = self.model_S, self.model_T
        self._student = self.model_S
        if self.t_config.data_parallel and torch.cuda.device_count() > 1:
            self.model_S, self.model_T = (each(models, nn.DataParallel) for models in single)
        try:
            loop.run()
        finally:
            self.model_S, self.model_T = single
