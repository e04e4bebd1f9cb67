"""Callbacks: what watches a training. Each method receives the training's state and may set ``state.stop``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from limbeck.atomic import write_text
from limbeck.distiller import Distiller


@dataclass
class State:
    """Where a training stands; what callbacks read.

    Attributes:
        distiller: What is trained.
        total_steps: Updates of the whole training.
        step: Updates done.
        epoch: Epochs done.
        position: Updates done in this epoch.
        seconds: Wall time so far, over all interruptions.
        teacher_seconds: The part of it that the teacher's forward passes took, at the last log line or checkpoint.
        teacher_examples: Examples that this rank's teacher was run for, at the last checkpoint; None where it does
            not remember and runs for all.
        examples: Examples seen, by all ranks together.
        learning_rate: The last update's.
        loss: Weighted sum of the terms, the mean over the steps since the last line of the log.
        terms: Unweighted terms, likewise.
        weights: What each term is multiplied by now, schedules and balance included.
        gradients: Where they were measured: each term's share of the gradient and its cosine with all the others'.
        scores: The last evaluation's metrics, by name; of several tasks ``"rte/accuracy"``, and the ``"mean"``.
        best_score: The best main metric so far, or None.
        best_step: Where it was reached.
        stale: Evaluations since then.
        history: ``(step, main metric)`` of each evaluation.
        checkpoint: The newest checkpoint, or None.
        stop: Why to stop after this step; empty to go on. Set in `Callback.on_step`, the step is still evaluated
            and saved; set in `Callback.on_checkpoint`, it counts after the next step.
        pause: Whether to end after this step as Ctrl-C does: with a checkpoint from which the next start goes on
            as if nothing had been, and `KeyboardInterrupt`. Set in `Callback.on_step`.
    """

    distiller: Distiller
    total_steps: int
    step: int = 0
    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    teacher_examples: int | None = None
    examples: int = 0
    learning_rate: float = 0.0
    loss: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    best_score: float | None = None
    best_step: int = 0
    stale: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    checkpoint: Path | None = None
    stop: str = ""
    pause: bool = False

    KEPT: ClassVar[tuple[str, ...]] = (
        *("step", "epoch", "position", "seconds", "teacher_seconds", "examples"),
        "teacher_examples",
        *("scores", "best_score", "best_step", "stale", "history", "stop"),
    )

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of this."""
        return {name: getattr(self, name) for name in self.KEPT}


class Callback:
    """Watches a training. Override what you need; the rest does nothing.

    Example:
        >>> class StopAt(Callback):
        ...     def on_step(self, state):
        ...         if state.step >= 5:
        ...             state.stop = "five steps are enough"
    """

    def on_start(self, state: State) -> None:
        """Before the first step, or the first after a resume."""

    def on_step(self, state: State) -> None:
        """After each update."""

    def on_log(self, state: State) -> None:
        """After each `log_every` steps, when ``loss`` and ``terms`` are fresh."""

    def on_gradients(self, state: State) -> None:
        """After each measurement of the terms' gradients, when ``gradients`` are fresh."""

    def on_evaluate(self, state: State) -> None:
        """After each evaluation, when ``scores`` are fresh."""

    def on_checkpoint(self, state: State) -> None:
        """After each checkpoint was written."""

    def on_end(self, state: State) -> None:
        """After the last step."""


class JsonLog(Callback):
    """Writes one JSON line for each log entry and evaluation; a resumed run goes on where its checkpoint lies.

    Args:
        path: The file, shared by several trainings of one run.
        stage: Name of this training in each line.
    """

    def __init__(self, path: Path, stage: str = "train") -> None:
        self.path = path
        self.stage = stage

    def on_start(self, state: State) -> None:
        """Drop the lines of this stage that lie beyond the checkpoint."""
        lines = [line for line in read_log(self.path) if self._stays(line, state.step)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(self.path, text)

    def on_log(self, state: State) -> None:
        """Write the loss, each term and what it adds to the loss."""
        weighted = {name: state.weights[name] * value for name, value in state.terms.items()}
        self._write(
            state,
            loss=state.loss,
            terms=state.terms,
            weights=state.weights,
            weighted=weighted,
            learning_rate=state.learning_rate,
        )

    def on_gradients(self, state: State) -> None:
        """Write each term's share of the gradient and its cosine with the others'."""
        self._write(state, gradients=state.gradients)

    def on_evaluate(self, state: State) -> None:
        """Write the scores."""
        self._write(state, scores=state.scores)

    def _stays(self, line: dict[str, Any], step: int) -> bool:
        return line.get("stage") != self.stage or line.get("step", 0) <= step

    def _write(self, state: State, **entry: Any) -> None:
        place = {
            "stage": self.stage,
            "step": state.step,
            "epoch": state.epoch,
            "seconds": round(state.seconds, 3),
        }
        with self.path.open("a") as file:
            file.write(json.dumps({**place, **entry}) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log; a last line that a crash cut off is left out.

    Example:
        >>> read_log(Path("no-such-log.jsonl"))
        []
    """
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class TrackerLog(Callback):
    """Passes the log on to accelerate's trackers (TensorBoard and others).

    Args:
        accelerator: The accelerator whose trackers were started.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def on_log(self, state: State) -> None:
        """Log the loss, each term raw and weighted, and the learning rate."""
        values = {"train/loss": state.loss, "train/learning_rate": state.learning_rate}
        for name, value in state.terms.items():
            values[f"terms/{name}"] = value
            values[f"weighted/{name}"] = state.weights[name] * value
        self.accelerator.log(values, step=state.step)

    def on_gradients(self, state: State) -> None:
        """Log each term's share of the gradient and its cosine with the others'."""
        named = {f"gradients/{kind}/{n}": v for kind, of in state.gradients.items() for n, v in of.items()}
        self.accelerator.log(named, step=state.step)

    def on_evaluate(self, state: State) -> None:
        """Log the scores."""
        self.accelerator.log({f"eval/{n}": v for n, v in state.scores.items()}, step=state.step)

    def on_end(self, state: State) -> None:
        """Close the trackers."""
        self.accelerator.end_training()
