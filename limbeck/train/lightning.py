"""Training a Distiller by Lightning: a module, its data, and a callback that keeps the best student.

An update is what `limbeck.fit` makes of the same examples: the loss is divided by the number of valid positions of
the whole step, over micro-batches and ranks. Lightning hands over batches one by one and its own accumulation
divides by their number; so the module does the updates itself (Lightning's manual optimization), and accumulation
and clipping are settings of the module, not of the Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from limbeck.batch import as_batch, batch_size, to_device, view
from limbeck.distiller import Distiller
from limbeck.metrics import Metric, get_metric
from limbeck.taps import read_output
from limbeck.teachers import ModuleInputs
from limbeck.teachers.members import load_states, states
from limbeck.train.averages import StepTotals
from limbeck.train.checkpoint import random_state, save_weights, set_random_state
from limbeck.train.data import Step
from limbeck.train.loop import seed_everything
from limbeck.train.ranks import global_counts
from limbeck.train.refusals import check_kinds, check_trains
from limbeck.train.settings import FUSED, Settings
from limbeck.types import LABELS, STUDENT, Batch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("limbeck.train.lightning needs Lightning; pip install limbeck[lightning]") from error

from limbeck.train.lightning_data import DistillationData, Steps

__all__ = ["DistillationData", "DistillationModule", "SaveStudent", "Steps"]

OF_THE_TRAINER = {
    "epochs": "max_epochs",
    "steps": "max_steps",
    "time_limit": "max_time",
    "precision": "precision, such as 'bf16-mixed'",
    "evaluate_every": "val_check_interval",
    "checkpoint_every": "callbacks: ModelCheckpoint(every_n_train_steps=)",
    "keep": "callbacks: ModelCheckpoint(save_top_k=)",
    "best": "callbacks: SaveStudent(folder)",
    "patience": "callbacks: EarlyStopping(patience=)",
    "log_every": "log_every_n_steps",
    "trackers": "logger",
    "gradients_every": "nothing: gradients are measured by limbeck.fit alone",
}
"""Settings that Lightning's Trainer has, and where."""


class DistillationModule(LightningModule):  # type: ignore[misc]  # Lightning is optional, and unknown to the checker
    """A Distiller as a `LightningModule`.

    The state dict, and so a checkpoint, holds the student, the projections and what the balance learned, and no
    teacher. Evaluation runs the student alone. Each term is logged under ``terms/NAME``, the loss as ``loss``, the
    score as ``val/METRIC``.

    One batch of a loader is one update, or ``settings.accumulation`` batches are; over all ranks and with the
    last, smaller one, the update is that of all their examples together. For other optimizers and rates override
    ``configure_optimizers`` as in any `LightningModule`.

    Under ``strategy="ddp"``, where some parameters get no gradient, say ``ddp_find_unused_parameters_true``.

    Args:
        distiller: What is trained.
        settings: Optimizer, rates, clipping, accumulation and seed. What the Trainer decides (epochs, precision
            and so on) is refused here.
        metric: What validation measures, by name; None for nothing.

    Raises:
        ValueError: a setting that is the Trainer's, or an unknown metric.
        TypeError: what trains is no Distiller, or settings are no `Settings`.

    Example:
        >>> from torch import nn
        >>> from limbeck import Term
        >>> distiller = Distiller(nn.Linear(4, 3), nn.Linear(4, 3), [Term("logits", loss="forward_kl")])
        >>> module = DistillationModule(distiller, Settings(learning_rate=1e-3, clip=1.0))
        >>> sorted(module.state_dict())
        ['distiller.student.bias', 'distiller.student.weight']
        >>> module.export() is distiller.student
        True
    """

    def __init__(
        self, distiller: Distiller, settings: Settings | None = None, metric: str | Metric | None = "accuracy"
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.distiller = distiller
        self.settings = Settings() if settings is None else settings
        check_kinds(distiller, self.settings)
        for name in sorted(self.settings.model_fields_set & OF_THE_TRAINER.keys()):
            raise ValueError(
                f"{name} is not a setting of a module in Lightning; pass Trainer({OF_THE_TRAINER[name]})"
                if name != "gradients_every"
                else "gradients_every is measured by limbeck.fit alone; leave it out"
            )
        self.metric = None if metric is None else get_metric(metric)
        self._waiting: list[Batch] = []
        self._predicted: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._resumed: Mapping[str, Any] | None = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The Distiller's: in eval mode, the student's."""
        return self.distiller(*inputs, **named)

    def export(self) -> torch.nn.Module:
        """The student, as `Distiller.export` gives it."""
        return self.distiller.export()

    def setup(self, stage: str) -> None:
        """Check everything on a small batch, which also gives projections their sizes, before an optimizer."""
        if stage != "fit":
            return
        seed_everything(self.settings.seed)
        self.distiller.to(self.trainer.strategy.root_device)
        self.trainer.fit_loop.setup_data()
        for sample in _samples(self.trainer.train_dataloader):
            self.distiller.preflight(to_device(sample, self.trainer.strategy.root_device))
        check_trains(self.distiller)
        if self.settings.compile:
            self.distiller.compile_student()

    def configure_optimizers(self) -> Any:
        """The optimizer and the rates of the settings, step by step as `limbeck.fit` has them."""
        settings = self.settings
        if (
            settings.optimizer in FUSED and self.trainer.precision == "16-mixed"
        ):  # it would hide the gradient's scale
            settings = settings.model_copy(
                update={"optimizer_options": {"fused": False, **settings.optimizer_options}}
            )
        optimizer = settings.build_optimizer(self.distiller.student, self.distiller.objective)
        total = self.total_steps
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    @property
    def total_steps(self) -> int:
        """The updates of the whole training.

        Raises:
            ValueError: the Trainer was told neither epochs nor steps.
        """
        trainer = self.trainer
        steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        if trainer.max_epochs not in (None, -1):
            steps = min(
                steps, trainer.max_epochs * math.ceil(trainer.num_training_batches / self._batches_per_step())
            )
        if math.isinf(steps):
            raise ValueError("schedules need an end; pass Trainer(max_epochs=...) or Trainer(max_steps=...)")
        return max(1, int(steps))

    def on_train_start(self) -> None:
        """Seed what training draws, each rank for itself; or go on with what a checkpoint had drawn."""
        seed_everything(self.settings.seed + self.global_rank)
        if self._resumed is not None:
            load_states(self.distiller.teacher, self._resumed["teachers"])
            if len(self._resumed["random"]) == self.trainer.world_size:
                set_random_state(self._resumed["random"][self.global_rank])
            self._resumed = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take a batch in, and update as soon as all batches of an update are there."""
        if isinstance(batch, Step):
            self._update(batch)
            return
        self._waiting.append(as_batch(batch))
        ends = self.trainer.is_last_batch or batch_idx + 1 >= self.trainer.num_training_batches
        if len(self._waiting) >= self._batches_per_step() or ends:
            step = Step(self._waiting, sum(batch_size(one) for one in self._waiting))
            self._waiting = []
            self._update(step)

    def on_train_epoch_start(self) -> None:
        """Drop what an epoch that was cut short left over."""
        self._waiting = []

    def on_train_epoch_end(self) -> None:
        """Move on what the user's own schedulers count in epochs."""
        self._move_rates("epoch", self.current_epoch + 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip; here the gradients of half precision have their true scale."""
        if self.settings.clip is not None:
            # In the order of the model, as elsewhere: sums of floats depend on it.
            torch.nn.utils.clip_grad_norm_(self.distiller.parameters(), self.settings.clip)

    def _update(self, step: Step) -> None:
        """One update from the micro-batches of this rank."""
        optimizer: Any = self.optimizers()
        counts = global_counts(self.distiller, step, self.trainer.world_size, self.device)
        done, balance = self.trainer.global_step, self.distiller.objective.balance
        progress = done / max(1, self.total_steps - 1)
        measures = balance.every is not None and done % balance.every == 0
        totals, loss = StepTotals(), torch.zeros((), device=self.device)
        for number, batch in enumerate(step.micro_batches, start=1):
            with optimizer.toggle_model(sync_grad=number == len(step.micro_batches)):
                output = self.distiller(
                    **batch, counts=counts, progress=progress, measure=measures and number == 1
                )
                self.manual_backward(output.loss * step.share)
            totals.add(output, step.share)
            loss += output.loss.detach() * step.share
        optimizer.step()
        optimizer.zero_grad()
        self._move_rates("step", done + 1)

        values, products = totals.everywhere(_Ranks(self.trainer))
        if balance.observes:
            self.distiller.objective.observe(values, products if measures else None)
        shown = {f"terms/{name}": value for name, value in values.items()}
        self.log("loss", _Ranks(self.trainer).reduce(loss, "mean"), prog_bar=True, batch_size=step.examples)
        self.log_dict(shown, batch_size=step.examples)

    def _batches_per_step(self) -> int:
        """Batches of the loader that make an update; `Steps` are cut already."""
        return 1 if isinstance(self.trainer.train_dataloader, Steps) else self.settings.accumulation

    def _move_rates(self, interval: str, count: int) -> None:
        """Move schedulers on that count in steps or in epochs; Lightning leaves that to manual optimization."""
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval or count % config.frequency:
                continue
            if config.reduce_on_plateau:
                config.scheduler.step(self.trainer.callback_metrics[config.monitor])
            else:
                config.scheduler.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Run the student alone."""
        own = view(as_batch(batch), STUDENT)
        output = ModuleInputs(self.distiller.student)(own)
        if self.metric is not None and LABELS in own:
            logits = read_output(output, self.distiller.read)["logits"]
            self._predicted.append((logits.double().cpu().numpy(), own[LABELS].cpu().numpy()))

    def on_validation_epoch_end(self) -> None:
        """Score what all ranks predicted; not in the check before training, which sees a few examples only."""
        predicted, self._predicted = self._predicted, []
        if self.metric is None or self.trainer.sanity_checking:
            return
        parts = [part for rank in _from_all_ranks(predicted, self.trainer.world_size) for part in rank]
        if parts:
            logits, labels = (np.concatenate(side) for side in zip(*parts, strict=True))
            self.log(f"val/{self.metric.name}", self.metric(logits, labels), prog_bar=True, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what each rank will draw next, and teachers that change; every rank takes part."""
        loader = self.trainer.train_dataloader
        checkpoint["limbeck"] = {
            "steps": loader.state_dict() if isinstance(loader, Steps) else None,
            "random": _from_all_ranks(random_state(), self.trainer.world_size),
            "teachers": states(self.distiller.teacher),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until the training starts."""
        self._resumed = checkpoint.get("limbeck")

    def on_fit_start(self) -> None:
        """Bring the data to where the checkpoint was; Lightning does so to loaders that are not set up."""
        loader = self.trainer.train_dataloader
        if self._resumed is not None and self._resumed["steps"] is not None and isinstance(loader, Steps):
            loader.load_state_dict(self._resumed["steps"])


@runtime_checkable
class SavesItself(Protocol):
    """A model, tokenizer or processor that writes itself to a folder, such as those of transformers."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write it."""
        ...


class SaveStudent(Callback):  # type: ignore[misc]
    """Keeps the best student of a training as a plain folder, that loads without limbeck and without Lightning.

    A model of transformers is saved by ``save_pretrained``; of any other the weights, as ``student.safetensors``.

    Args:
        folder: Where.
        monitor: The logged score that says which is best; by default the module's metric.
        mode: ``"max"`` or ``"min"``; by default the metric's own direction.
        beside: A tokenizer or processor to save in the same folder.

    Raises:
        ValueError: another mode, or a score of its own without one.

    Example:
        >>> SaveStudent("student", monitor="val/loss", mode="min").monitor
        'val/loss'
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str | None = None,
        mode: str | None = None,
        beside: SavesItself | None = None,
    ) -> None:
        if mode not in ({None} if monitor is None else {"max", "min"}):
            raise ValueError(f"mode is 'max' or 'min', and goes with monitor; got {mode!r} with {monitor!r}")
        self.folder, self.monitor, self.mode, self.beside = Path(folder), monitor, mode, beside
        self.best: float | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Save the student if it is better than any before."""
        if trainer.sanity_checking:
            return
        score = float(self._score(trainer, pl_module))
        if self._better(score, pl_module):
            self.best = score
            if trainer.is_global_zero:
                self._save(pl_module.export())

    def state_dict(self) -> dict[str, Any]:
        """The best score, for a training that is resumed."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with it."""
        self.best = state_dict["best"]

    def _score(self, trainer: Trainer, module: DistillationModule) -> Any:
        name = self.monitor or (f"val/{module.metric.name}" if module.metric else "")
        if name not in trainer.callback_metrics:
            raise ValueError(f"SaveStudent found no score {name!r}; logged are {sorted(trainer.callback_metrics)}")
        return trainer.callback_metrics[name]

    def _better(self, score: float, module: DistillationModule) -> bool:
        if self.mode is None:
            assert module.metric is not None
            return module.metric.better(score, self.best)
        return self.best is None or (score > self.best if self.mode == "max" else score < self.best)

    def _save(self, student: torch.nn.Module) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(student, SavesItself):
            student.save_pretrained(self.folder)
        else:
            save_weights(student, self.folder / "student.safetensors")
        if self.beside is not None:
            self.beside.save_pretrained(self.folder)


@dataclass(frozen=True)
class _Ranks:
    """A Trainer's ranks, called as accelerate's are."""

    trainer: Trainer

    @property
    def num_processes(self) -> int:
        return int(self.trainer.world_size)

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        reduced: torch.Tensor = self.trainer.strategy.reduce(tensor, reduce_op=how)
        return reduced


def _samples(loader: Any) -> list[Batch]:
    """Small batches to check a Distiller on."""
    if isinstance(loader, Steps):
        return loader.batches.samples()
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("the training loader is empty; check its data set and drop_last")
    return [as_batch(first)]


def _from_all_ranks(own: Any, world: int) -> list[Any]:
    """What each rank has, in their order; every rank takes part."""
    found: list[Any] = [own] * world
    if world > 1:
        torch.distributed.all_gather_object(found, own)
    return found
