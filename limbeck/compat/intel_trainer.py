"""The trainers of the door of Intel Extension for Transformers, on limbeck's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

from limbeck.compat import neural_compressor as inc
from limbeck.compat.intel_configs import (
    DistillationConfig,
    FlashDistillationConfig,
    Metric,
    weights,
)
from limbeck.compat.intel_criteria import KnowledgeDistillationLossConfig
from limbeck.stages import Stage
from limbeck.teachers import Given
from limbeck.terms import Term
from limbeck.train.hf import DistillationTrainer, Seq2SeqDistillationTrainer
from limbeck.train.hf_best import KeepBest
from limbeck.train.hf_data import GivenIn, has_column, labels_of_first
from limbeck.train.hf_terms import END, START, label_terms, read_spans
from limbeck.types import LABELS

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

TEACHER_LOGITS = "teacher_logits"
"""The column of a data set with what the teacher said; it is then not run."""


class _Distilling(Base):  # type: ignore[misc]
    """What makes one of transformers' trainers one of theirs; it stands before it among the parents."""

    kind: type[DistillationTrainer] | type[Seq2SeqDistillationTrainer] = DistillationTrainer

    def __init__(self, *arguments: Any, tokenizer: Any = None, **options: Any) -> None:
        if tokenizer is not None:
            options["processing_class"] = tokenizer
        super().__init__(*arguments, **options)
        self.metrics: Metric | Sequence[Metric] | None = None
        self.eval_func: Callable[[nn.Module], float] | None = None
        self.train_func: Callable[[nn.Module], Any] | None = None
        self.resuming_checkpoint: str | bool | None = None
        self.component: inc.Callbacks | None = None
        self.distiller: Any = None

    def distill(
        self,
        distillation_config: DistillationConfig | inc.DistillationConfig | FlashDistillationConfig,
        teacher_model: Any = None,
        provider: str = "inc",
        eval_func: Callable[[nn.Module], float] | None = None,
        train_func: Callable[[nn.Module], Any] | None = None,
    ) -> nn.Module:
        """Train the student, and give back the best: the module that ``trainer.model`` is.

        Args:
            distillation_config: This door's, Neural Compressor's, which holds the teacher too, or a
                `FlashDistillationConfig`.
            teacher_model: Whatever a `limbeck.Distiller` takes; not run where the data have `teacher_logits`.
            provider: Not needed.
            eval_func: Scores the student at each epoch's end, the higher the better, in place of the metrics.
            train_func: Trains the student in place of the trainer; it calls ``trainer.distiller.on_...``.

        Raises:
            ValueError: a metric that evaluations do not have, or no data to evaluate.
        """
        criterion, teacher, best = parts(distillation_config, teacher_model, self.metrics)
        judge, train = eval_func or self.eval_func, train_func or self.train_func
        if train is not None:
            self.component = self.distiller = inc.Callbacks(
                self.model, inc.DistillationConfig(teacher, criterion), judge
            )
            return self.component.trained_by(train)
        inner = self._trainer(criterion, teacher, evaluates=bool(best) and judge is None)
        self.distiller = inner.distiller
        if judge is not None:
            inner.add_callback(KeepBest(inner.model, judge=judge))
        elif best:
            keep = KeepBest(inner.model, best)
            keep.check(inner.evaluate())
            inner.add_callback(keep)
        inner.train(resume_from_checkpoint=self.resuming_checkpoint)
        self.state, self.model_wrapped = inner.state, self.model
        self.save_model()
        student: nn.Module = self.model
        return student

    def _trainer(self, criterion: Any, teacher: Any, evaluates: bool) -> Any:
        """Our trainer of the same student, data and arguments."""
        args, data = copy.copy(self.args), self.train_dataset
        if data is None:
            raise ValueError("there is no train_dataset; pass one, or train_func=")
        if evaluates and self.eval_dataset is None:
            raise ValueError("the best student is chosen by a metric, and there is no eval_dataset; pass one")
        if evaluates and args.eval_strategy == "no":
            args.eval_strategy = transformers.IntervalStrategy.EPOCH
        options: dict[str, Any] = {"teacher": teacher, "args": args}
        if isinstance(criterion, FlashDistillationConfig):
            terms, options["stages"], args.max_steps = _flash(self, criterion)
        else:
            terms = _terms(self, criterion)
        if isinstance(criterion, KnowledgeDistillationLossConfig) and has_column(data, TEACHER_LOGITS):
            options |= {"train_dataset": GivenIn(data, TEACHER_LOGITS), "teacher": Given()}
            options |= {"teacher_read": read_spans} if terms[0].tap == START else {}
        return self.kind.like(self, terms=terms, **options)


class NLPTrainer(_Distilling, transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer, which also distils; ``tokenizer=`` is its ``processing_class=``."""


class NLPSeq2SeqTrainer(_Distilling, transformers.Seq2SeqTrainer):  # type: ignore[misc]
    """transformers' Seq2SeqTrainer, which also distils."""

    kind = Seq2SeqDistillationTrainer


def parts(config: Any, teacher: Any, metrics: Any) -> tuple[Any, Any, dict[str, float]]:
    """The criterion, the teacher and the weights of the metrics of any kind of config."""
    criterion: Any = config
    if isinstance(config, inc.DistillationConfig):
        criterion, teacher = config.criterion, config.teacher_model if teacher is None else teacher
    elif isinstance(config, DistillationConfig):
        assert config.criterion is not None
        criterion, metrics = config.criterion.config(), metrics if config.metrics is None else config.metrics
    elif not isinstance(config, FlashDistillationConfig):
        raise TypeError(f"distillation_config is a DistillationConfig, got {config!r}")
    return criterion, teacher, weights(metrics)


def _own(trainer: Any, weight: float, name: str = LABELS) -> list[Term]:
    """The student's own loss as terms of its labels; none without weight."""
    if not weight:
        return []
    smoothing, data = trainer.args.label_smoothing_factor, trainer.train_dataset
    return label_terms(trainer.model, smoothing, lambda: labels_of_first(data), weight=weight, name=name)


def _terms(trainer: Any, criterion: Any) -> list[Term]:
    """The criterion's terms and the own loss."""
    knows = isinstance(criterion, KnowledgeDistillationLossConfig)
    spans = "QuestionAnswering" in type(trainer.model).__name__
    own, terms = criterion.terms((START, END)) if knows and spans else criterion.terms()
    return [*terms, *_own(trainer, own)]


def _flash(trainer: Any, config: FlashDistillationConfig) -> tuple[list[Term], list[Stage], int]:
    """The terms of all stages, the stages, and the number of updates together."""
    terms, stages, done = [], [], 0
    criteria = config.criteria()
    total = sum(steps for _, _, steps in criteria)
    for i, (block, criterion, steps) in enumerate(criteria):
        own, found = criterion.terms(f"flash.{i}")
        found += _own(trainer, own, f"flash.{i}.labels")
        done += steps
        stages.append(Stage(done / total, [t.name for t in found], [f"*{block}*"] if block else None))
        terms += found
    return terms, stages, total
