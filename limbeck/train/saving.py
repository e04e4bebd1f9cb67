"""Keeping a training: checkpoints, going on from them, and the best weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.distiller import Distiller
from limbeck.stopwatch import Stopwatch
from limbeck.teachers.members import load_states, states
from limbeck.train import checkpoint as files
from limbeck.train.averages import Averages
from limbeck.train.callbacks import State
from limbeck.train.ranks import Placement
from limbeck.train.settings import Settings

BEST = "best.safetensors"
HARMLESS = {"checkpoint_every", "gradients_every", "keep", "log_every", "trackers"}
"""Settings that change no weight; a training may go on with others."""


def identity(
    settings: Settings, distiller: Distiller, batches: int, total_steps: int, world: int
) -> dict[str, Any]:
    """What a checkpoint belongs to, as flat JSON; two trainings that agree in it may go on from one another.

    Example:
        >>> from torch import nn
        >>> from limbeck.terms import Term
        >>> distiller = Distiller(nn.Linear(2, 2), None, [Term("labels", loss="cross_entropy")])
        >>> found = identity(Settings(), distiller, batches=10, total_steps=30, world=1)
        >>> found["term cross_entropy"], found["settings.batch_size"]
        ('Term(cross_entropy: logits -> labels, weight 1), project None, mask None', 32)
    """
    terms = {
        f"term {t.name}": _without_addresses(f"{t!r}, project {t.project}, mask {t.mask}") for t in distiller.terms
    }
    chosen = settings.model_dump(mode="json", exclude=HARMLESS)
    return {
        **{f"settings.{name}": value for name, value in chosen.items()},
        **terms,
        **distiller.described(),
        "balance": str(distiller.objective.balance_spec),
        "batches per epoch": batches,
        "steps": total_steps,
        "ranks": world,
    }


def _without_addresses(text: str) -> str:
    """Functions among a term's options print where they lie in memory, which no two processes share."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


@dataclass
class Checkpointer:
    """Saves one training and brings it back.

    Attributes:
        accelerator: The training's ranks.
        placement: What is trained, with its optimizer.
        scaler: Scales the loss in half precision; its scale is part of a checkpoint.
        state: Where the training stands.
        averages: Running means of the terms.
        settings: The training's.
        belongs: From `identity`.
        folder: For checkpoints and the best weights; None keeps the best in memory and saves nothing.
    """

    accelerator: Any
    placement: Placement
    scaler: torch.amp.GradScaler
    state: State
    averages: Averages
    settings: Settings
    belongs: dict[str, Any]
    folder: Path | None
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def distiller(self) -> Distiller:
        """What trains on this rank."""
        return self.placement.distiller

    def save(self) -> None:
        """Write a checkpoint: rank 0 the weights, each rank its random state and sums.

        Raises:
            OSError: the disk is full; what was written of this checkpoint is gone, and the last one stays.
        """
        if self.folder is None:
            return
        accelerator, state = self.accelerator, self.state
        state.teacher_seconds = self.distiller.teacher_seconds
        state.teacher_examples = self.distiller.teacher_examples
        with self._how_to_free():
            self.distiller.keep()
        partial = files.partial_folder(self.folder, state.step)
        weights, optimizer = self.placement.weights(), self.placement.optimizer_state()
        with self._removed_on_failure(partial):
            if accelerator.is_main_process:
                files.begin(self.folder, state.step)
                files.save_state(weights, partial / files.WEIGHTS)
                files.write_tree(files.with_text_keys(optimizer), partial, "optimizer")
                kept = {"state": state.kept(), "scaler": self.scaler.state_dict(), "belongs": self.belongs}
                files.write_tree(kept, partial, "state")
            accelerator.wait_for_everyone()
            # Of each rank its own: running statistics differ between them.
            teachers = states(self.distiller.teacher)
            own = {"random": files.random_state(), "averages": self.averages.kept(), "teachers": teachers}
            files.write_tree(own, partial, f"rank-{accelerator.process_index}")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                files.finish(partial, self.settings.keep)
            state.checkpoint = files.step_folder(self.folder, state.step)  # each rank says where to go on

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            ValueError: it belongs to another training or another model.
        """
        newest = files.latest(self.folder)
        if newest is None:
            return
        accelerator, state = self.accelerator, self.state
        kept = files.read_tree(newest, "state")
        check_belongs(newest, kept.get("belongs", {}), self.belongs)
        files.load_state(newest / files.WEIGHTS, self.placement.load_weights)
        optimizer = files.read_tree(newest, "optimizer")
        self.placement.load_optimizer_state(files.with_number_keys(optimizer))
        for name, value in kept["state"].items():
            setattr(state, name, value)
        state.history = [(int(step), float(score)) for step, score in state.history]
        if kept["scaler"]:
            self.scaler.load_state_dict(kept["scaler"])
        own = files.read_tree(newest, f"rank-{accelerator.process_index}")
        load_states(self.distiller.teacher, own.get("teachers", {}))
        files.set_random_state(own["random"])
        self.averages.restore(own["averages"], accelerator.device)
        state.checkpoint = newest
        self.distiller.teacher_watch = Stopwatch(state.teacher_seconds)
        self.distiller.teacher_examples = state.teacher_examples
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files.sweep(newest.parent)

    def keep_best(self) -> None:
        """Keep the weights as they are now, if the settings want the best."""
        if not self.settings.best:
            return
        weights = self.placement.weights()
        if self.folder is None:
            self.best = {k: v.detach().clone() for k, v in weights.items()}
        elif self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._how_to_free():
                files.save_state(weights, self.folder / BEST)

    def load_best(self) -> None:
        """End with the best weights, if the settings want them and they are not the last."""
        last_is_best = self.state.best_step == self.state.step or self.state.best_score is None
        if not self.settings.best or last_is_best:
            return
        if self.folder is None:
            self.placement.load_weights(self.best)
        else:
            self.accelerator.wait_for_everyone()
            files.load_state(self.folder / BEST, self.placement.load_weights)

    def last_good(self) -> str:
        """A sentence on what there is to go back to."""
        kept = self.state.checkpoint
        return f"The last good checkpoint is {kept}." if kept else "No checkpoint was written before."

    @contextmanager
    def _removed_on_failure(self, partial: Path) -> Iterator[None]:
        """Half a checkpoint is of no use, and on a full disk it takes the room of a whole one."""
        try:
            with self._how_to_free():
                yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    @contextmanager
    def _how_to_free(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = f" in writing {error.filename}" if error.filename else ""
            kept = self.state.checkpoint
            start = f"goes on from {kept}" if kept else "begins anew, since no checkpoint was written before"
            cure = f"{error.strerror} at step {self.state.step}{place}; make room, and the next start {start}"
            raise OSError(error.errno, cure) from error


def check_belongs(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another training.

    Raises:
        ValueError: something differs; the message says what, on both sides.

    Example:
        >>> check_belongs(Path("step-1"), {"ranks": 2}, {"ranks": 1})
        Traceback (most recent call last):
        ValueError: step-1 belongs to another training: ranks is 2 there and 1 here; give this ...
    """
    differing = [
        f"{name} is {theirs.get(name, 'absent')!r} there and {ours.get(name, 'absent')!r} here"
        for name in dict.fromkeys((*theirs, *ours))
        if theirs.get(name, "absent") != ours.get(name, "absent")
    ]
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise ValueError(
            f"{path} belongs to another training: {'; '.join(differing[:3])}{more}; "
            "give this training another folder, or delete that one"
        )
