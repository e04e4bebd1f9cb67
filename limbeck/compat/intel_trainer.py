"""The trainers of the door of Intel Extension for Transformers, on limbeck's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from limbeck.compat import neural_compressor as inc
from limbeck.compat.intel_configs import (
    DistillationConfig,
    FlashDistillationConfig,
    Metric,
    check_metrics,
    score,
)
from limbeck.compat.intel_criteria import KnowledgeDistillationLossConfig
from limbeck.stages import Stage
from limbeck.teachers import Given
from limbeck.terms import Term
from limbeck.train.hf import DistillationTrainer, Seq2SeqDistillationTrainer
from limbeck.train.hf_best import KeepBest
from limbeck.train.hf_data import labels_of_first
from limbeck.train.hf_terms import END, START, label_terms
from limbeck.types import TEACHER_CACHE

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
        criterion, teacher, chosen = parts(distillation_config, teacher_model, self.metrics)
        judge, train = eval_func or self.eval_func, train_func or self.train_func
        if train is not None:
            config = inc.DistillationConfig(teacher, criterion)
            self.component = self.distiller = inc.Callbacks(self.model, config, judge)
            return trained_by(train, self.model, self.component)
        inner = self._trainer(criterion, teacher, evaluates=bool(chosen) and judge is None)
        self.distiller = inner.distiller
        if judge is not None:
            inner.add_callback(KeepBest(inner.model, judge=judge))
        elif chosen:
            check_metrics(chosen, inner.evaluate())
            inner.add_callback(KeepBest(inner.model, lambda found: score(chosen, found)))
        inner.train(resume_from_checkpoint=self.resuming_checkpoint)
        self.state, self.model_wrapped = inner.state, self.model
        self.save_model()
        student: nn.Module = self.model
        return student

    def _trainer(self, criterion: Any, teacher: Any, evaluates: bool) -> Any:
        """Our trainer of the same student, data and arguments."""
        args, data = copy.copy(self.args), self.train_dataset
        options: dict[str, Any] = {}
        if data is None:
            raise ValueError("there is no train_dataset; pass one, or train_func=")
        if evaluates and self.eval_dataset is None:
            raise ValueError("the best student is chosen by a metric, and there is no eval_dataset; pass one")
        if evaluates and args.eval_strategy == "no":
            args.eval_strategy = transformers.IntervalStrategy.EPOCH
        if isinstance(criterion, FlashDistillationConfig):
            terms, options["stages"], args.max_steps = _flash(self.model, criterion, args, data)
        else:
            terms = _terms(self.model, criterion, args.label_smoothing_factor, data)
        if isinstance(criterion, KnowledgeDistillationLossConfig) and TEACHER_LOGITS in next(iter(data)):
            if isinstance(data, IterableDataset):
                raise ValueError(f"{TEACHER_LOGITS} are read from data with a length, not from a stream; load it")
            data, teacher = _Cached(data), Given()
            options |= {"teacher_read": _spans} if terms[0].tap == START else {}
        inner = self.kind(
            self.model,
            args,
            data_collator=self.data_collator,
            train_dataset=data,
            eval_dataset=self.eval_dataset,
            processing_class=self.processing_class,
            compute_metrics=self.compute_metrics,
            preprocess_logits_for_metrics=self.preprocess_logits_for_metrics,
            optimizers=(self.optimizer, self.lr_scheduler),
            teacher=teacher,
            terms=terms,
            **options,
        )
        known = {type(callback) for callback in inner.callback_handler.callbacks}
        for callback in self.callback_handler.callbacks:
            if type(callback) not in known:
                inner.add_callback(callback)
        return inner


class NLPTrainer(_Distilling, transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer, which also distils; ``tokenizer=`` is its ``processing_class=``."""


class NLPSeq2SeqTrainer(_Distilling, transformers.Seq2SeqTrainer):  # type: ignore[misc]
    """transformers' Seq2SeqTrainer, which also distils."""

    kind = Seq2SeqDistillationTrainer


def trained_by(train: Callable[[nn.Module], Any], student: nn.Module, callbacks: inc.Callbacks) -> nn.Module:
    """Let a function train a student, and leave nothing in it, whatever happens."""
    try:
        train(student)
    finally:
        callbacks.on_train_end()
    return student


def parts(config: Any, teacher: Any, metrics: Any) -> tuple[Any, Any, list[Metric]]:
    """The criterion, the teacher and the metrics of any kind of config."""
    criterion: Any = config
    if isinstance(config, inc.DistillationConfig):
        criterion, teacher = config.criterion, config.teacher_model if teacher is None else teacher
    elif isinstance(config, DistillationConfig):
        assert config.criterion is not None
        criterion, metrics = config.criterion.config(), metrics if config.metrics is None else config.chosen()
    elif not isinstance(config, FlashDistillationConfig):
        raise TypeError(f"distillation_config is a DistillationConfig, got {config!r}")
    return criterion, teacher, [metrics] if isinstance(metrics, Metric) else list(metrics or ())


def _terms(student: nn.Module, criterion: Any, smoothing: float, data: Any) -> list[Term]:
    """The criterion's terms, and the student's own loss as terms of its labels."""
    knows = isinstance(criterion, KnowledgeDistillationLossConfig)
    spans = "QuestionAnswering" in type(student).__name__
    own, terms = criterion.terms((START, END)) if knows and spans else criterion.terms()
    if not own:
        return list(terms)
    return [*terms, *label_terms(student, smoothing, lambda: labels_of_first(data), weight=own)]


def _flash(
    student: nn.Module, config: FlashDistillationConfig, args: Any, data: Any
) -> tuple[list[Term], list[Stage], int]:
    """The terms of all stages, the stages, and the number of updates together."""
    terms, stages, done = [], [], 0
    criteria = config.criteria()
    total = sum(steps for _, _, steps in criteria)
    for i, (block, criterion, steps) in enumerate(criteria):
        own, found = criterion.terms(f"flash.{i}")
        if own:
            name = f"flash.{i}.labels"
            found += label_terms(
                student, args.label_smoothing_factor, lambda: labels_of_first(data), weight=own, name=name
            )
        done += steps
        stages.append(Stage(done / total, [t.name for t in found], [f"*{block}*"] if block else None))
        terms += found
    return terms, stages, total


@dataclass
class _Cached(Dataset):  # type: ignore[type-arg]
    """Examples whose `teacher_logits` stand where a Distiller looks for them."""

    examples: Any

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {TEACHER_CACHE if key == TEACHER_LOGITS else key: v for key, v in self.examples[index].items()}


def _spans(logits: Tensor) -> dict[str, Tensor]:
    """Of what the teacher said of answers' places, (B, 2, L), the starts and the ends."""
    return {START: logits[:, 0], END: logits[:, 1]}
