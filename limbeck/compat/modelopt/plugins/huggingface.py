"""ModelOpt's trainer for language models, on `limbeck.train.hf.DistillationTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from limbeck.compat.modelopt.config import ConfigError
from limbeck.compat.modelopt.distillation_model import DistillationModel
from limbeck.compat.modelopt.losses import LMLogitsLoss, LogitsDistillationLoss
from limbeck.losses import LOSSES
from limbeck.reduce import masked_mean
from limbeck.registry import nearest, refuse_unknown
from limbeck.terms import Term
from limbeck.train.hf import DistillationTrainer
from limbeck.types import IGNORE_INDEX, LABELS

__all__ = ["IGNORE_INDEX", "DistillArgsWithTeacherModel", "DistillArguments", "KDTrainer", "LMLogitsLoss"]

CRITERIA = ("logits_loss",)


@dataclass
class DistillArguments:
    """What a script reads from the command line, by transformers' ``HfArgumentParser``.

    Args:
        distill: Whether to distil at all; for the script.
        teacher_model: The teacher's name or path; for the script.
        criterion: ``"logits_loss"``.
        temperature: T, softens both sides; the loss carries T².
        liger_jsd_beta: 0 for forward KL, 1 for reverse KL, and between them the Jensen-Shannon divergence.
        kd_loss_weight: The share of the distillation loss, above 0 and up to 1; the rest is the labels'.
    """

    distill: bool = False
    teacher_model: str | None = None
    criterion: str = "logits_loss"
    temperature: float = 1.0
    liger_jsd_beta: float = 0.0
    kd_loss_weight: float = 1.0


@dataclass
class DistillArgsWithTeacherModel:
    """The same with the teacher itself, for `KDTrainer`."""

    distill: bool = False
    teacher_model: nn.Module | None = None
    criterion: str = "logits_loss"
    temperature: float = 1.0
    liger_jsd_beta: float = 0.0
    kd_loss_weight: float = 1.0

    def terms(self) -> list[Term]:
        """What is learned.

        Raises:
            ConfigError: no teacher, an unknown criterion or a weight that is no share.
        """
        if self.teacher_model is None:
            raise ConfigError("distill_args holds no teacher_model; load the teacher and add it")
        if self.criterion not in CRITERIA:
            raise ConfigError(f"unknown criterion {self.criterion!r}; {nearest(self.criterion, CRITERIA)}")
        share = self.kd_loss_weight
        if not 0 < share <= 1:
            raise ConfigError(f"kd_loss_weight is a share above 0 and up to 1, got {share!r}")
        beta = self.liger_jsd_beta
        options: dict[str, Any] = {"loss": "js_divergence", "beta": beta} if beta else {"loss": "forward_kl"}
        kd = Term("logits", name="kd", weight=share, temperature=self.temperature, **options)
        return [kd] if share == 1 else [kd, Term(LABELS, loss="cross_entropy", name=LABELS, weight=1 - share)]


class KDTrainer(DistillationTrainer):
    """transformers' Trainer that teaches a causal language model another one's next tokens.

    Evaluations report the distillation loss as ``eval_loss``, for which the teacher runs, and the labels' as
    ``eval_ce_loss``.

    Args:
        model: The student; or, as in older scripts, a converted one with a loss between outputs; it is exported.
        *args: As Trainer's.
        distill_args: `DistillArgsWithTeacherModel`, or the same as a dict; not beside a converted model.
        **kwargs: As Trainer's.

    Raises:
        ConfigError: no ``distill_args``, or such that cannot work.
        TypeError: an unknown key among them.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *args: Any,
        distill_args: DistillArgsWithTeacherModel | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, DistillationModel) and distill_args is None:
            distill_args, model = _of_converted(model), model.export()
        if distill_args is None:
            raise ConfigError("distill_args say what to distil, and there are none; add {'teacher_model': ...}")
        if isinstance(distill_args, Mapping):
            known = [field.name for field in fields(DistillArgsWithTeacherModel)]
            refuse_unknown(distill_args, known, "distill_args")
            distill_args = DistillArgsWithTeacherModel(**distill_args)
        self._of_labels: list[Tensor] = []
        terms = distill_args.terms()
        super().__init__(model, *args, teacher=distill_args.teacher_model, terms=terms, causal=True, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective; of the student alone, as in evaluations, it is computed here."""
        if self.accelerator.unwrap_model(model) is self.distiller:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output = self.distiller.distil(inputs)
        if not model.training and output.logits is not None and LABELS in inputs:
            self._of_labels.append(_sums(output.logits, inputs[LABELS]))
        return (output.loss, CausalLMOutput(output.loss, output.logits)) if return_outputs else output.loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """An evaluation, with the labels' loss beside the other."""
        self._of_labels.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._of_labels:
            total, count = self.accelerator.reduce(torch.stack(self._of_labels).sum(dim=0)).tolist()
            output.metrics[f"{metric_key_prefix}_ce_loss"] = total / max(count, 1.0)
        return output


def _of_converted(model: DistillationModel) -> DistillArgsWithTeacherModel:
    """What a converted model says of teacher and loss."""
    found = model.losses_by_pair()
    losses = [loss for pair, loss in found if pair == ("", "") and isinstance(loss, LogitsDistillationLoss)]
    if len(losses) != 1 or len(found) != 1:
        raise ConfigError(
            "KDTrainer takes a converted model with one LogitsDistillationLoss between outputs; for other losses, "
            "write a Trainer whose compute_loss calls compute_kd_loss"
        )
    return DistillArgsWithTeacherModel(teacher_model=model.teacher_model, temperature=losses[0].temperature)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of the next tokens, summed, and their number."""
    known = labels[..., 1:] != IGNORE_INDEX
    values = LOSSES.get("cross_entropy")(logits[..., :-1, :], labels[..., 1:])
    return torch.stack([masked_mean(values, known, 1.0), known.sum().to(values.dtype)])
