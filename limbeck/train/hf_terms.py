"""What a transformers student learns where nobody says: its teacher's answers, and the labels of its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.terms import Term
from limbeck.types import LABELS

REGRESSION, MULTI_LABEL, SPANS = "regression", "multi_label_classification", "spans"
START, END = "start_logits", "end_logits"
ENDS = {"start": START, "end": END}
KNOWN = {REGRESSION: "label_mse", MULTI_LABEL: "binary_cross_entropy"}
"""Losses of labels that are no single classes."""
LABELS_IN_PLACE = ("XLMWithLMHeadModel", "FlaubertWithLMHeadModel", "XLNetLMHeadModel")
KD, TEMPERATURE, SHARE_OF_LABELS = "kd", 2.0, 0.5


def default_terms(
    student: nn.Module, smoothing: float = 0.0, labels: Callable[[], Tensor | None] = lambda: None
) -> list[Term]:
    """The terms that suit the task of a transformers model.

    - classes, one for each example, token or next token: forward KL at temperature 2, and cross-entropy;
    - classes of which several may hold: the same of each class on its own;
    - numbers: the mean squared error of both;
    - where an answer begins and ends: as classes, for each of the two.

    Args:
        student: A transformers model, whose class and config name the task.
        smoothing: Label smoothing of the labels' cross-entropy, from 0 to 1.
        labels: Gives some labels of the data; asked only where the config leaves open what they mean.

    Returns:
        Terms called ``"kd"``, of weight 1, and ``"labels"``, of weight 0.5.

    Raises:
        TypeError: the model has no config that would name its task.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
        >>> default_terms(BertForSequenceClassification(config))
        [Term(mse: logits -> logits, weight 1), Term(label_mse: logits -> labels, weight 0.5)]
    """
    kind = _problem(student, labels)
    return [*_teacher_terms(kind), *_label_terms(kind, smoothing, SHARE_OF_LABELS, LABELS)]


def label_terms(
    student: nn.Module,
    smoothing: float = 0.0,
    labels: Callable[[], Tensor | None] = lambda: None,
    *,
    weight: float = 1.0,
    name: str = LABELS,
) -> list[Term]:
    """A transformers model's own loss, as terms: those of `default_terms` that read labels.

    Args:
        student: As of `default_terms`.
        smoothing: Likewise.
        labels: Likewise.
        weight: Of the loss.
        name: Of the term; where an answer begins and ends, two have it as the start of theirs.

    Raises:
        TypeError: the model has no config that would name its task.

    Example:
        >>> from transformers import BertConfig, BertForQuestionAnswering
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> [term.name for term in label_terms(BertForQuestionAnswering(config), name="own")]
        ['own.start', 'own.end']
    """
    return _label_terms(_problem(student, labels), smoothing, weight, name)


def read_spans(logits: Tensor) -> dict[str, Tensor]:
    """Of a teacher's logits of where answers begin and end, (B, 2, L), both: a ``teacher_read`` for what is given.

    Example:
        >>> sorted(read_spans(torch.zeros(3, 2, 7)))
        ['end_logits', 'start_logits']
    """
    return {START: logits[:, 0], END: logits[:, 1]}


def predicts_next(student: nn.Module) -> bool:
    """Whether a model's labels stand at their own tokens, and each position predicts the next one.

    So it is of all models that generate without an encoder beside, those that also see pictures too; but for
    three old families, whose labels stand where they are predicted.

    Example:
        >>> predicts_next(nn.Linear(2, 3))
        False
    """
    from transformers import GenerationMixin

    decodes_beside = getattr(getattr(student, "config", None), "is_encoder_decoder", False)
    in_place = type(student).__name__ in LABELS_IN_PLACE
    return isinstance(student, GenerationMixin) and not decodes_beside and not in_place


def _problem(student: nn.Module, labels: Callable[[], Tensor | None]) -> str:
    """What the labels mean; transformers, too, decides by them where the config does not."""
    name, config = type(student).__name__, getattr(student, "config", None)
    if config is None:
        raise TypeError(f"a {name} has no config that names its task; say with terms=[...] what to learn")
    if "QuestionAnswering" in name:
        return SPANS
    if not name.endswith("ForSequenceClassification") and not name.endswith("ForImageClassification"):
        return ""
    if config.problem_type is not None:
        return str(config.problem_type)
    if config.num_labels == 1:
        return REGRESSION
    found = labels()
    return MULTI_LABEL if found is not None and torch.is_floating_point(found) else ""


def _teacher_terms(kind: str) -> list[Term]:
    if kind == REGRESSION:
        return [Term("logits", loss="mse", name=KD)]
    if kind == MULTI_LABEL:
        return [Term("logits", loss="binary_kl", temperature=TEMPERATURE, classes="mean", name=KD)]
    if kind == SPANS:
        return [
            Term(tap, loss="forward_kl", temperature=TEMPERATURE, weight=0.5, name=f"{KD}.{side}")
            for side, tap in ENDS.items()
        ]
    return [Term("logits", loss="forward_kl", temperature=TEMPERATURE, name=KD)]


def _label_terms(kind: str, smoothing: float, weight: float, name: str) -> list[Term]:
    if kind in KNOWN:
        return [Term(LABELS, loss=KNOWN[kind], weight=weight, name=name)]
    options: dict[str, Any] = {"loss": "cross_entropy", **({"label_smoothing": smoothing} if smoothing else {})}
    if kind == SPANS:
        return [
            Term(tap, f"{LABELS}.{side}_positions", weight=0.5 * weight, name=f"{name}.{side}", **options)
            for side, tap in ENDS.items()
        ]
    return [Term(LABELS, weight=weight, name=name, **options)]
