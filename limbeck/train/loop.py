"""The training loop, on accelerate: one process or many, any precision, exact resume."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.balance import interference
from limbeck.batch import to_device
from limbeck.distiller import Distiller
from limbeck.train.averages import TOTAL, Averages, StepTotals
from limbeck.train.callbacks import Callback, State, TrackerLog
from limbeck.train.data import Batches, Step
from limbeck.train.mixing import MixedBatches, train_batches
from limbeck.train.ranks import Interrupts, global_counts, place, share_signals, start_accelerator
from limbeck.train.refusals import check_callbacks, check_folder, check_kinds, check_trains
from limbeck.train.saving import Checkpointer, identity
from limbeck.train.scoring import MetricLike, Scoring
from limbeck.train.settings import Settings

SEEN_TWICE = 2
"""How often all examples were seen when those of a teacher that is remembered must have come again."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FitResult:
    """What a training did.

    Attributes:
        steps: Updates done.
        seconds: Wall time, evaluations and checkpoints included.
        teacher_seconds: The part of it that the teacher's forward passes took.
        examples: Examples seen.
        teacher_examples: Those for which the teacher was run; None where it runs for all.
        history: ``(step, main metric)`` of each evaluation.
        best_score: The best of them.
        stopped: Why it ended.
        scores: The last evaluation's metrics, of several tasks each with its own.
    """

    steps: int
    seconds: float
    teacher_seconds: float
    examples: int = 0
    teacher_examples: int | None = None
    history: list[tuple[int, float]] = field(default_factory=list)
    best_score: float | None = None
    stopped: str = "done"
    scores: dict[str, float] = field(default_factory=dict)


def fit(
    distiller: Distiller,
    train_data: Any,
    eval_data: Any = None,
    settings: Settings | None = None,
    *,
    metric: MetricLike | Mapping[str, MetricLike] = "accuracy",
    callbacks: Sequence[Callback] = (),
    folder: Path | str | None = None,
) -> FitResult:
    """Train the student of a Distiller.

    Args:
        distiller: Student, teacher and terms. Its student is trained in place.
        train_data: A data set with a length and an index, a DataLoader, or `Examples`; of several tasks, `Mixed`.
        eval_data: The same, for evaluations on the way; of several tasks as ``{task: data}``. None for none.
        settings: How to train.
        metric: What evaluations measure; with its direction it chooses the best model. Of several tasks one for
            all, or ``{task: metric}``; the mean chooses.
        callbacks: What watches.
        folder: Where checkpoints go. If it holds one, training goes on from there; the result is bit for bit that
            of a training that was never interrupted. One that had stopped is not trained on. None for no
            checkpoints.

    Returns:
        What was done. The trained student is ``distiller.export()``.

    Raises:
        FloatingPointError: a term, the weights or the logits became NaN; the message says which, and names the
            last good checkpoint.
        KeyboardInterrupt: Ctrl-C, on every rank, after a checkpoint was written.
        OSError: the disk is full; the last checkpoint stays.
        TypeError: arguments of another kind.
        ValueError: whatever the preflight finds wrong with models, terms or data, a folder that holds another
            training, or settings that choose by evaluations where there are none.

    Example:
        >>> from torch import nn
        >>> from limbeck import Term
        >>> data = [{"input": torch.eye(2)[i % 2], "labels": torch.tensor(i % 2)} for i in range(64)]
        >>> distiller = Distiller(nn.Linear(2, 2), None, [Term("labels", loss="cross_entropy")])
        >>> fit(distiller, data, data, Settings(epochs=8, learning_rate=0.1)).history[-1]
        (16, 1.0)
    """
    settings = Settings() if settings is None else settings
    check_kinds(distiller, settings)
    if isinstance(eval_data, Settings):
        raise TypeError("Settings stand where data for evaluations do; write fit(distiller, data, settings=...)")
    check_callbacks(callbacks, Callback)
    check_folder(folder)
    if eval_data is None and (settings.best or settings.patience is not None):
        raise ValueError("best and patience choose by evaluations; pass eval_data, or leave them out")
    scoring = None if eval_data is None else Scoring(eval_data, metric)
    training = _Training(distiller, settings, scoring, folder)
    return training.run(train_data, callbacks)


class _Training:
    """The variables of one `fit`, and its steps as methods."""

    def __init__(
        self,
        distiller: Distiller,
        settings: Settings,
        scoring: Scoring | None,
        folder: Path | str | None,
    ) -> None:
        self.distiller = distiller
        self.settings = settings
        self.scoring = scoring
        self.folder = None if folder is None else Path(folder)
        self.accelerator = start_accelerator(settings, self.folder)
        device = self.accelerator.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=settings.precision == "fp16")
        self.averages = Averages()
        self.interrupts = Interrupts()
        self.stopped = self.interrupted = False
        self.started = time.perf_counter()

    def run(self, train_data: Any, callbacks: Sequence[Callback]) -> FitResult:
        """The loop, from top to bottom."""
        batches = self._prepare(train_data)
        self.files.resume()
        self.started -= self.state.seconds
        self.callbacks = [*callbacks, *self._trackers()] if self.accelerator.is_main_process else []
        self._call("on_start")
        self._agree()

        with self.interrupts.noted():
            for step in self._steps(batches):
                self._train_step(step)
                if not self._after_step(len(batches)):
                    break
        return self._end()

    def _prepare(self, train_data: Any) -> Batches:
        """Check everything, and set up what a step needs."""
        settings, accelerator = self.settings, self.accelerator
        seed_everything(settings.seed)
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = train_batches(train_data, settings, rank, world, self.distiller.objective.tasks)
        tasks, mixture = (batches.tasks, batches.described()) if isinstance(batches, MixedBatches) else ((), {})
        if self.scoring is not None:
            self.scoring.check(self.distiller, tasks)
        self.distiller.to(accelerator.device)
        samples = [to_device(sample, accelerator.device) for sample in batches.samples()]
        with self._autocast():  # a teacher that is remembered is not asked again
            for sample in samples:
                self.distiller.preflight(sample)
        check_trains(self.distiller)
        self.placement = place(self.distiller, settings, accelerator, samples)
        self.distiller, self.optimizer = self.placement.distiller, self.placement.optimizer
        total = settings.total_steps(len(batches))
        self.state = State(self.distiller, total)
        self.files = Checkpointer(
            accelerator,
            self.placement,
            self.scaler,
            self.state,
            self.averages,
            settings,
            identity(settings, self.distiller, len(batches), total, world) | mixture,
            self.folder,
        )
        seed_everything(settings.seed + rank)
        self.placement.model.train()
        return batches

    def _steps(self, batches: Batches) -> Iterator[Step]:
        """The steps that are left, over as many epochs as it takes; none if the training had stopped before."""
        state = self.state
        first_whole = state.epoch + (state.position > 0)  # what was before, this process may not remember
        while state.step < state.total_steps and not self.stopped:
            before, skip = state.step, state.position
            for step in batches.epoch(state.epoch, skip):
                yield step
                if state.step >= state.total_steps:
                    return
            if state.step == before and not skip:
                raise ValueError(
                    f"epoch {state.epoch} of the training data is empty; pass data that can be read again"
                )
            state.epoch, state.position = state.epoch + 1, 0
            share_signals(self.accelerator, self.distiller)
            if batches.cycle is not None and state.epoch - first_whole == SEEN_TWICE * batches.cycle:
                self.distiller.forget_in_vain(1 / self.accelerator.num_processes)

    def _train_step(self, step: Step) -> None:
        """One update from the micro-batches of this rank."""
        settings, accelerator, state = self.settings, self.accelerator, self.state
        factor = settings.rate(state.step, state.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        counts, progress = self._counts(step), state.step / max(1, state.total_steps - 1)
        measures, observed = self._measures(), StepTotals()
        for number, batch in enumerate(step.micro_batches, start=1):
            placed = to_device(batch, accelerator.device)
            with self.placement.part(last=number == len(step.micro_batches)):
                with self._autocast():
                    output = self.placement.model(
                        **placed, counts=counts, progress=progress, measure=measures and number == 1
                    )
                self.placement.backward(self.scaler.scale(output.loss * step.share))
            self.averages.add({**output.terms, TOTAL: output.loss.detach()}, step.share)
            observed.add(output, step.share)
        state.weights = output.weights
        self.placement.step(self.scaler, settings.clip)

        state.step += 1
        state.position += 1
        state.learning_rate = settings.learning_rate * factor
        state.examples += step.examples
        self.averages.end_step((*output.terms, TOTAL))
        self._observe(observed)

    def _measures(self) -> bool:
        """Whether this step measures the terms' gradients, for the log or for the balance."""
        wishes = (self.settings.gradients_every, self.distiller.objective.balance.every)
        return any(every is not None and self.state.step % every == 0 for every in wishes)

    def _observe(self, totals: StepTotals) -> None:
        """Let the balance and the log know what this step was, over all micro-batches and ranks."""
        balance, step = self.distiller.objective.balance, self.state.step - 1
        if not balance.observes and totals.products is None:
            return
        values, products = totals.everywhere(self.accelerator)
        its_turn = balance.every is not None and step % balance.every == 0
        self.distiller.objective.observe(values, products if its_turn else None)
        every = self.settings.gradients_every
        if products is not None and every is not None and step % every == 0:
            weights = [float(self.state.weights[name]) for name in values]
            shares, cosines = interference(products, weights)
            self.state.gradients = {
                "share": dict(zip(values, shares, strict=True)),
                "cosine": dict(zip(values, cosines, strict=True)),
            }
            self._call("on_gradients")

    def _after_step(self, epoch_steps: int) -> bool:
        """Log, evaluate, save and decide whether to go on.

        What happens, and in what order, depends on the number of the step and on what the ranks agreed on. An
        interruption adds a checkpoint and leaves nothing out, so that the next start finds all as it would be.
        """
        settings, state = self.settings, self.state
        last = state.step >= state.total_steps
        self._clock(last)
        if state.step % settings.log_every == 0 or last:
            self._log()
        self._call("on_step")
        self._agree()
        due = state.step % (settings.evaluate_every or epoch_steps) == 0 or last or self.stopped
        save = due if settings.checkpoint_every is None else state.step % settings.checkpoint_every == 0 or last
        if due or save or self.interrupted:
            self._term_means()
            self._check_weights()
        if due and self.scoring is not None:
            self._evaluate(self.scoring)
            self._agree()
        if save or self.stopped or self.interrupted:
            self._save()
        if self.interrupted:
            raise KeyboardInterrupt(self._how_to_go_on())
        return not self.stopped

    def _save(self) -> None:
        if self.folder is not None:
            self.files.save()
            self._call("on_checkpoint")

    def _counts(self, step: Step) -> dict[str, float]:
        accelerator = self.accelerator
        return global_counts(self.distiller, step, accelerator.num_processes, accelerator.device)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.settings.precision]
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=dtype is not None)

    def _agree(self) -> None:
        """Let all ranks know of a stop or an interruption, since they must part after the same step.

        Rank 0 alone has callbacks and watches the clock, and its word on stopping counts; a signal to any counts.
        """
        accelerator, state = self.accelerator, self.state
        stop, interrupted = bool(state.stop), self.interrupts.asked or state.pause
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            own = [float(stop and accelerator.is_main_process), float(interrupted)]
            stop, interrupted = map(
                bool, accelerator.reduce(torch.tensor(own, device=accelerator.device)).tolist()
            )
            state.stop = broadcast_object_list([state.stop])[0] if stop else ""
        self.stopped, self.interrupted = stop, interrupted

    def _log(self) -> None:
        """Report the mean of each term over the steps since the last time."""
        state = self.state
        state.terms = self._term_means()
        state.loss = state.terms.pop(TOTAL, 0.0)
        state.weights = {name: float(weight) for name, weight in state.weights.items()}
        state.teacher_seconds = self.distiller.teacher_seconds
        self.averages.reset()
        self._call("on_log")

    def _term_means(self) -> dict[str, float]:
        """Bring the terms to this process and check them.

        Raises:
            FloatingPointError: a term is not finite.
        """
        means = self.averages.means(self.accelerator)
        for name, value in means.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"term {name!r} became {value} at or before step {self.state.step}; lower the learning rate "
                    f"or its weight. {self.files.last_good()}"
                )
        return means

    def _evaluate(self, scoring: Scoring) -> None:
        state = self.state
        state.scores = self._scores(scoring)
        score = state.scores[scoring.name]
        state.history.append((state.step, score))
        if scoring.better(score, state.best_score):
            state.best_score, state.best_step, state.stale = score, state.step, 0
            self.files.keep_best()
        else:
            state.stale += 1
        if self.settings.patience is not None and state.stale >= self.settings.patience:
            state.stop = state.stop or f"no better score in {state.stale} evaluations"
        self._call("on_evaluate")

    def _scores(self, scoring: Scoring) -> dict[str, float]:
        """All metrics; rank 0's on every rank, for the last bit of a logit may differ between them."""
        try:
            size, device = self.settings.batch_size, self.accelerator.device
            scores = scoring.scores(self.distiller, size, device, self.placement.evaluated)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error} in the evaluation at step {self.state.step}; lower the learning rate or set clip. "
                f"{self.files.last_good()}"
            ) from None
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            scores = broadcast_object_list([scores])[0]
        return scores

    def _check_weights(self) -> None:
        """A gradient can spoil the weights after a loss that was still finite; keep such weights out."""
        name = self.placement.spoiled()
        if name is not None:
            raise FloatingPointError(
                f"the weights of {name} are no longer finite at step {self.state.step}; lower the learning rate "
                f"or set clip. {self.files.last_good()}"
            )

    def _end(self) -> FitResult:
        state = self.state
        self.files.load_best()
        self._clock()
        state.teacher_seconds = self.distiller.teacher_seconds
        state.distiller = self.distiller = self.placement.finish()
        self._call("on_end")
        self.distiller.eval()
        return FitResult(
            state.step,
            state.seconds,
            state.teacher_seconds,
            state.examples,
            self.distiller.teacher_examples,
            state.history,
            state.best_score,
            state.stop or "done",
            state.scores,
        )

    def _trackers(self) -> list[Callback]:
        if not self.settings.trackers:
            return []
        self.accelerator.init_trackers("limbeck")
        return [TrackerLog(self.accelerator)]

    def _clock(self, last: bool = True) -> None:
        state, limit = self.state, self.settings.time_limit
        state.seconds = time.perf_counter() - self.started
        if limit is not None and state.seconds >= limit and not last:
            state.stop = state.stop or "time limit"

    def _call(self, name: str) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self.state)

    def _how_to_go_on(self) -> str:
        if self.state.checkpoint is None:
            return "interrupted; nothing was kept, since no folder was given"
        return f"interrupted at step {self.state.step}; what was trained is kept in {self.state.checkpoint}"


def seed_everything(seed: int) -> None:
    """Seed every random generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
