"""The best student of a transformers Trainer, by a score of one's own, kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback

from limbeck.registry import nearest
from limbeck.train.best import BestWeights


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Ends a training with the student of the best evaluation, without a checkpoint for each.

    Trainer's own ``load_best_model_at_end`` goes by one metric, and needs a checkpoint at each evaluation. A
    training that is resumed knows only the evaluations since then.

    Args:
        student: ``trainer.model``.
        score: Makes a number of an evaluation's metrics; the highest is best. Or the weight of each metric in it,
            negative where lower is better: ``{"eval_f1": 0.3, "eval_loss": -0.7}``.
        judge: Makes one of the student itself, at the end of each epoch, in place of that.

    Raises:
        ValueError: neither or both of `score` and `judge`.

    Example:
        >>> student = nn.Linear(1, 1)
        >>> callback = KeepBest(student, {"eval_loss": -1.0})
        >>> callback.on_evaluate(None, None, None, metrics={"eval_loss": 0.25})
        >>> callback.best.score
        -0.25
    """

    def __init__(
        self,
        student: nn.Module,
        score: Callable[[Mapping[str, float]], float] | Mapping[str, float] | None = None,
        judge: Callable[[nn.Module], float] | None = None,
    ) -> None:
        if (score is None) == (judge is None):
            raise ValueError("the best student is found by a score of the metrics or by a judge; pass one of them")
        self.best = BestWeights(student)
        self.score, self.judge = score, judge

    def check(self, metrics: Mapping[str, float]) -> None:
        """Refuse weights of metrics that an evaluation, say one before the training, does not have.

        Raises:
            ValueError: there is no such metric.
        """
        for name in self.score if isinstance(self.score, Mapping) else ():
            if name not in metrics:
                raise ValueError(f"evaluations have no metric {name!r}; {nearest(name, metrics)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        """After an evaluation."""
        if isinstance(self.score, Mapping):
            if self.score.keys() <= metrics.keys():  # else it is one of other data
                self.best.offer(sum(weight * metrics[name] for name, weight in self.score.items()))
        elif self.score is not None:
            self.best.offer(self.score(metrics))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an epoch."""
        if self.judge is not None:
            self.best.offer_by(self.judge)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step."""
        self.best.restore()
