"""What a transformers student learns where nobody says: its teacher's answers, and the labels of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.terms import Term
from limbeck.types import LABELS

REGRESSION, MULTI_LABEL = "regression", "multi_label_classification"
START, END = "start_logits", "end_logits"
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
    name = type(student).__name__
    config = getattr(student, "config", None)
    if config is None:
        raise TypeError(f"a {name} has no config that names its task; say with terms=[...] what to learn")
    if "QuestionAnswering" in name:
        return _span_terms(smoothing)
    kind = _problem(name, config, labels)
    smoothed: Mapping[str, Any] = {"label_smoothing": smoothing} if smoothing else {}
    teacher, known = {
        REGRESSION: (Term("logits", loss="mse", name=KD), "label_mse"),
        MULTI_LABEL: (
            Term("logits", loss="binary_kl", temperature=TEMPERATURE, classes="mean", name=KD),
            "binary_cross_entropy",
        ),
    }.get(kind, (Term("logits", loss="forward_kl", temperature=TEMPERATURE, name=KD), "cross_entropy"))
    options = smoothed if known == "cross_entropy" else {}
    return [teacher, Term(LABELS, loss=known, weight=SHARE_OF_LABELS, name=LABELS, **options)]


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


def _problem(name: str, config: Any, labels: Callable[[], Tensor | None]) -> str:
    """What the labels mean; transformers, too, decides by them where the config does not."""
    if not name.endswith("ForSequenceClassification") and not name.endswith("ForImageClassification"):
        return ""
    if config.problem_type is not None:
        return str(config.problem_type)
    if config.num_labels == 1:
        return REGRESSION
    found = labels()
    return MULTI_LABEL if found is not None and torch.is_floating_point(found) else ""


def _span_terms(smoothing: float) -> list[Term]:
    smoothed: Mapping[str, Any] = {"label_smoothing": smoothing} if smoothing else {}
    terms = []
    for tap, entry in ((START, "start_positions"), (END, "end_positions")):
        side = tap.removesuffix("_logits")
        terms += [
            Term(tap, loss="forward_kl", temperature=TEMPERATURE, weight=0.5, name=f"{KD}.{side}"),
            Term(
                tap,
                f"{LABELS}.{entry}",
                loss="cross_entropy",
                weight=0.5 * SHARE_OF_LABELS,
                name=f"{LABELS}.{side}",
                **smoothed,
            ),
        ]
    return terms
