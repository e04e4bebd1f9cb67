"""The training loop, on accelerate: one process or many, any precision, exact resume."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from limbeck.batch import batch_size, to_device
from limbeck.distiller import Distiller
from limbeck.metrics import Metric, get_metric
from limbeck.train import checkpoint as files
from limbeck.train.callbacks import Callback, State, TrackerLog
from limbeck.train.data import Batches, as_batches
from limbeck.train.predict import predict
from limbeck.train.settings import Settings
from limbeck.types import Batch, Output

if TYPE_CHECKING:
    from accelerate import Accelerator

INTERRUPTED = "interrupted"
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FitResult:
    """What a training did.

    Attributes:
        steps: Updates done.
        seconds: Wall time, evaluations and checkpoints included.
        teacher_seconds: The part of it that the teacher's forward passes took.
        history: ``(step, main metric)`` of each evaluation.
        best_score: The best of them.
        stopped: Why it ended.
    """

    steps: int
    seconds: float
    teacher_seconds: float
    history: list[tuple[int, float]] = field(default_factory=list)
    best_score: float | None = None
    stopped: str = "done"


def fit(
    distiller: Distiller,
    train_data: Any,
    eval_data: Any = None,
    settings: Settings | None = None,
    *,
    metric: str | Metric = "accuracy",
    callbacks: Sequence[Callback] = (),
    folder: Path | str | None = None,
) -> FitResult:
    """Train the student of a Distiller.

    Args:
        distiller: Student, teacher and terms. Its student is trained in place.
        train_data: A data set with a length and an index, a DataLoader, or `Examples`.
        eval_data: The same, for evaluations on the way; None for none.
        settings: How to train.
        metric: What evaluations measure; with its direction it chooses the best model.
        callbacks: What watches.
        folder: Where checkpoints go. If it holds one, training goes on from there; the result is bit for bit that
            of a training that was never interrupted. None for no checkpoints.

    Returns:
        What was done. The trained student is ``distiller.export()``.

    Raises:
        FloatingPointError: a term became NaN or infinite; the message names it and the last good checkpoint.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
        ValueError: whatever the preflight finds wrong with models, terms or data.

    Example:
        >>> from torch import nn
        >>> from limbeck import Term
        >>> data = [{"input": torch.eye(2)[i % 2], "labels": torch.tensor(i % 2)} for i in range(64)]
        >>> distiller = Distiller(nn.Linear(2, 2), None, [Term("labels", loss="cross_entropy")])
        >>> fit(distiller, data, data, Settings(epochs=8, learning_rate=0.1)).history[-1]
        (16, 1.0)
    """
    training = _Training(distiller, settings or Settings(), get_metric(metric), eval_data, folder)
    return training.run(train_data, callbacks)


class _Training:
    """The variables of one `fit`, and its steps as methods."""

    def __init__(
        self,
        distiller: Distiller,
        settings: Settings,
        metric: Metric,
        eval_data: Any,
        folder: Path | str | None,
    ) -> None:
        self.distiller = distiller
        self.settings = settings
        self.metric = metric
        self.eval_data = eval_data
        self.folder = None if folder is None else Path(folder)
        self.accelerator = _accelerator(settings, self.folder)
        device = self.accelerator.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=settings.precision == "fp16")
        self.best: dict[str, Tensor] | None = None
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        self.started = time.perf_counter()

    def run(self, train_data: Any, callbacks: Sequence[Callback]) -> FitResult:
        """The loop, from top to bottom."""
        settings, accelerator = self.settings, self.accelerator
        seed_everything(settings.seed)
        batches = as_batches(train_data, settings, accelerator.process_index, accelerator.num_processes)
        self.distiller.to(accelerator.device)
        self.distiller.preflight(to_device(batches.sample(), accelerator.device))
        if settings.compile:
            self.distiller.compile_student()
        self._prepare_ranks(batches)
        optimizer = settings.build_optimizer(self.distiller.student, self.distiller.projections)
        self.model, self.optimizer = accelerator.prepare(self.distiller, optimizer)
        self.state = state = State(self.distiller, settings.total_steps(len(batches)))
        state.weights = {t.name: t.weight for t in self.distiller.terms}
        seed_everything(settings.seed + accelerator.process_index)
        self._resume()
        self.callbacks = [*callbacks, *self._trackers()] if accelerator.is_main_process else []
        self._call("on_start")
        self.model.train()

        with _interrupts(state):
            for step in self._steps(batches):
                self._train_step(step)
                self._after_step(len(batches))
                if state.stop:
                    break
        return self._end()

    def _steps(self, batches: Batches) -> Iterator[list[Batch]]:
        """The steps that are left, over as many epochs as it takes."""
        state = self.state
        while state.step < state.total_steps and not state.stop:
            for step in batches.epoch(state.epoch, skip=state.position):
                yield step
                if state.step >= state.total_steps:
                    return
            state.epoch, state.position = state.epoch + 1, 0

    def _train_step(self, micro_batches: list[Batch]) -> None:
        """One update from the micro-batches of this rank."""
        settings, accelerator, state = self.settings, self.accelerator, self.state
        factor = settings.rate(state.step, state.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        counts = self._global_counts(micro_batches)
        for number, batch in enumerate(micro_batches, start=1):
            with self._sync(last=number == len(micro_batches)):
                with self._autocast():
                    output = self.model(**to_device(batch, accelerator.device), counts=counts)
                accelerator.backward(self.scaler.scale(output.loss))
            self._add_up(output)
        if settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            accelerator.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        state.step += 1
        state.position += 1
        state.learning_rate = settings.learning_rate * factor
        state.examples += sum(batch_size(b) for b in micro_batches) * accelerator.num_processes
        self.summed += 1

    def _after_step(self, epoch_steps: int) -> None:
        """Log, evaluate, save and decide whether to go on."""
        settings, state = self.settings, self.state
        self._clock()
        last = state.step >= state.total_steps
        if settings.time_limit is not None and state.seconds >= settings.time_limit and not last:
            state.stop = "time limit"
        self._agree_to_stop()
        due = state.step % (settings.evaluate_every or epoch_steps) == 0 or last or bool(state.stop)
        save = due if settings.checkpoint_every is None else state.step % settings.checkpoint_every == 0 or last
        if state.step % settings.log_every == 0 or last:
            self._log()
        elif due or save or state.stop:
            self._term_means()
        self._call("on_step")
        if due and self.eval_data is not None and state.stop != INTERRUPTED:
            self._evaluate()
        if self.folder is not None and (save or state.stop):
            self._save()
        if state.stop == INTERRUPTED:
            raise KeyboardInterrupt(self._how_to_go_on())

    def _global_counts(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Valid positions of the whole step. DDP averages gradients over ranks, hence the division."""
        totals: dict[str, float] = {}
        for batch in micro_batches:
            for key, count in self.distiller.count(batch).items():
                totals[key] = totals.get(key, 0.0) + count
        world = self.accelerator.num_processes
        if world > 1:
            local = torch.tensor([totals[k] for k in sorted(totals)], device=self.accelerator.device)
            everywhere = self.accelerator.reduce(local, "sum").tolist()
            totals = {key: count / world for key, count in zip(sorted(totals), everywhere, strict=True)}
        return {key: max(count, 1.0 / world) for key, count in totals.items()}

    @contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        """Synchronise gradients between ranks in the last micro-batch of a step only."""
        with ExitStack() as stack:
            if not last:
                stack.enter_context(self.accelerator.no_sync(self.model))
            yield

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.settings.precision]
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=dtype is not None)

    def _prepare_ranks(self, batches: Batches) -> None:
        """Tell DDP whether some of the student's parameters get no gradient: it waits for those otherwise."""
        if self.accelerator.num_processes == 1:
            return
        from accelerate import DistributedDataParallelKwargs

        batch = to_device(batches.sample(), self.accelerator.device)
        trained = [p for p in self.distiller.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(self.distiller.distil(batch).loss, trained, allow_unused=True)
        unused = any(g is None for g in gradients)
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)

    def _agree_to_stop(self) -> None:
        """Ranks have clocks and signals of their own, and must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return
        wish = torch.tensor(float(bool(self.state.stop)), device=self.accelerator.device)
        if self.accelerator.reduce(wish, "sum").item() and not self.state.stop:
            self.state.stop = "another rank stopped"

    def _add_up(self, output: Output) -> None:
        for name, value in output.terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _log(self) -> None:
        """Report the mean of each term over the steps since the last time."""
        state = self.state
        state.terms = self._term_means()
        state.loss = sum(state.weights[n] * v for n, v in state.terms.items())
        self.sums, self.summed = {}, 0
        self._call("on_log")

    def _term_means(self) -> dict[str, float]:
        """Bring the terms to this process and check them; the one place that waits for the device.

        Raises:
            FloatingPointError: a term is not finite.
        """
        names = list(self.sums)
        if not names:
            return {}
        values = torch.stack([self.sums[n].float() for n in names]) / self.summed
        means = dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        for name, value in means.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"term {name!r} became {value} at or before step {self.state.step}; lower the learning rate "
                    f"or its weight. {self._kept()}"
                )
        return means

    def _evaluate(self) -> None:
        state = self.state
        predictions = predict(
            self.distiller.student,
            self.eval_data,
            batch_size=self.settings.batch_size,
            read=self.distiller.read,
            device=self.accelerator.device,
        )
        score = self.metric(predictions.logits, predictions.labels)
        state.scores = {self.metric.name: score}
        state.history.append((state.step, score))
        if self.metric.better(score, state.best_score):
            state.best_score, state.best_step, state.stale = score, state.step, 0
            self._keep_best()
        else:
            state.stale += 1
        if self.settings.patience is not None and state.stale >= self.settings.patience:
            state.stop = state.stop or f"no better score in {state.stale} evaluations"
        self._call("on_evaluate")

    def _keep_best(self) -> None:
        if not self.settings.best:
            return
        if self.folder is None:
            self.best = {k: v.detach().clone() for k, v in self.distiller.state_dict().items()}
        elif self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.save_weights(self.distiller, self.folder / "best.safetensors")

    def _save(self) -> None:
        """Write a checkpoint: rank 0 the weights, each rank its random state."""
        assert self.folder is not None
        accelerator, state = self.accelerator, self.state
        partial = files.step_folder(self.folder, state.step).with_suffix(".partial")
        self._check_weights()
        if accelerator.is_main_process:
            files.begin(self.folder, state.step)
            files.save_weights(self.distiller, partial / files.WEIGHTS)
            files.write_tree(files.optimizer_state(self.optimizer), partial, "optimizer")
            kept = {"state": state.kept(), "scaler": self.scaler.state_dict()}
            files.write_tree(kept, partial, "state")
        accelerator.wait_for_everyone()
        files.write_tree(files.random_state(), partial, f"random-{accelerator.process_index}")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state.checkpoint = files.finish(partial, self.settings.keep)
        self._call("on_checkpoint")

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        newest = files.latest(self.folder)
        if newest is None:
            return
        accelerator, state = self.accelerator, self.state
        files.load_weights(self.distiller, newest / files.WEIGHTS)
        files.load_optimizer_state(self.optimizer, files.read_tree(newest, "optimizer"))
        kept = files.read_tree(newest, "state")
        for name, value in kept["state"].items():
            setattr(state, name, value)
        state.history = [(int(step), float(score)) for step, score in state.history]
        if kept["scaler"]:
            self.scaler.load_state_dict(kept["scaler"])
        files.set_random_state(files.read_tree(newest, f"random-{accelerator.process_index}"))
        state.checkpoint = newest
        self.started -= state.seconds
        self.distiller.teacher_seconds = state.teacher_seconds

    def _check_weights(self) -> None:
        """A gradient can spoil the weights after a loss that was still finite; keep such weights out."""
        for name, parameter in self.distiller.named_parameters():
            if not torch.isfinite(parameter).all():
                raise FloatingPointError(
                    f"the weights of {name} are no longer finite at step {self.state.step}; lower the learning "
                    f"rate or set clip. {self._kept()}"
                )

    def _end(self) -> FitResult:
        state = self.state
        self._load_best()
        self._clock()
        self._call("on_end")
        self.accelerator.unwrap_model(self.model)
        self.distiller.eval()
        return FitResult(
            state.step,
            state.seconds,
            state.teacher_seconds,
            state.history,
            state.best_score,
            state.stop or "done",
        )

    def _load_best(self) -> None:
        last_is_best = self.state.best_step == self.state.step or self.state.best_score is None
        if not self.settings.best or last_is_best:
            return
        if self.best is not None:
            self.distiller.load_state_dict(self.best)
        elif self.folder is not None:
            files.load_weights(self.distiller, self.folder / "best.safetensors")

    def _trackers(self) -> list[Callback]:
        if not self.settings.trackers:
            return []
        self.accelerator.init_trackers("limbeck")
        return [TrackerLog(self.accelerator)]

    def _clock(self) -> None:
        self.state.seconds = time.perf_counter() - self.started
        self.state.teacher_seconds = self.distiller.teacher_seconds

    def _call(self, name: str) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self.state)

    def _kept(self) -> str:
        kept = self.state.checkpoint
        return f"The last good checkpoint is {kept}." if kept else "No checkpoint was written before."

    def _how_to_go_on(self) -> str:
        if self.state.checkpoint is None:
            return "interrupted; nothing was kept, since no folder was given"
        return f"interrupted at step {self.state.step}; the same command goes on from {self.state.checkpoint}"


def seed_everything(seed: int) -> None:
    """Seed every random generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _accelerator(settings: Settings, folder: Path | None) -> Accelerator:
    from accelerate import Accelerator

    return Accelerator(log_with=settings.trackers or None, project_dir=folder)


@contextmanager
def _interrupts(state: State) -> Iterator[None]:
    """Let Ctrl-C (or a polite kill) end the training after the step at hand; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        state.stop = INTERRUPTED
        signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
