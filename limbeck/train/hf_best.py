"""The best student of a transformers Trainer, by a score of one's own, kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback

from limbeck.train.best import BestWeights


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Ends a training with the student of the best evaluation, without a checkpoint for each.

    Trainer's own ``load_best_model_at_end`` goes by one metric, and needs a checkpoint at each evaluation. A
    training that is resumed knows only the evaluations since then.

    Args:
        student: ``trainer.model``.
        score: Makes a number of an evaluation's metrics; the highest is best.
        judge: Makes one of the student itself, at the end of each epoch, in place of that.

    Raises:
        ValueError: neither or both of `score` and `judge`.

    Example:
        >>> student = nn.Linear(1, 1)
        >>> callback = KeepBest(student, lambda metrics: -metrics["eval_loss"])
        >>> callback.on_evaluate(None, None, None, metrics={"eval_loss": 0.25})
        >>> callback.best.score
        -0.25
    """

    def __init__(
        self,
        student: nn.Module,
        score: Callable[[Mapping[str, float]], float] | None = None,
        judge: Callable[[nn.Module], float] | None = None,
    ) -> None:
        if (score is None) == (judge is None):
            raise ValueError("the best student is found by a score of the metrics or by a judge; pass one of them")
        self.best = BestWeights(student)
        self.score, self.judge = score, judge

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        """After an evaluation."""
        if self.score is not None:
            self.best.offer(self.score(metrics))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an epoch."""
        if self.judge is not None:
            self.best.offer_by(self.judge)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step."""
        self.best.restore()
