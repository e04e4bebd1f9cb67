"""Text classification and regression with transformers: encoding, batching, models with the right head.

Shape legend: B examples, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.metrics import check_metrics
from limbeck.tasks.base import Loaded, Rows
from limbeck.train import Examples
from limbeck.types import EXAMPLE_ID, LABELS

GENERIC = "LABEL_"
"""How transformers calls the classes of a head whose labels nobody named."""


@dataclass(frozen=True)
class TextTask:
    """Classes or numbers to predict from one text or a pair of texts; see `limbeck.tasks.Task`.

    Attributes:
        name: Its name.
        labels: Names of the classes; empty where a number is to be predicted.
        metrics: Names of the metrics, the main one first.
        splits: Tuples of texts with labels, by split.
        max_length: Tokens after which a text is cut.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, Rows]
    max_length: int = 128

    def __post_init__(self) -> None:
        check_metrics(self.metrics, len(self.labels))

    def load(self, source: str | Path) -> Loaded:
        """Load a sequence classifier and its tokenizer from a folder or the hub."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        with quiet_transformers():
            try:
                config = self._config(source)
                tokenizer = AutoTokenizer.from_pretrained(source)
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    source, config=config, output_loading_info=True, use_safetensors=True
                )
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot load a text model from {str(source)!r}: {first_line(error)}") from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        missing = [k for k in info["missing_keys"] if not k.startswith(model.base_model_prefix)]
        return Loaded(model, tokenizer, head_is_trained=not missing)

    def encode(self, rows: Rows, processor: Any) -> Examples:
        """Tokenize every example once; batches are padded to their own longest."""
        columns = list(zip(*rows.inputs, strict=True))
        encoded = processor(
            *[list(c) for c in columns], truncation=True, max_length=self.max_length, padding=False
        )
        keys = [k for k in encoded if k in ("input_ids", "token_type_ids", "attention_mask")]
        items: list[dict[str, Any]] = [
            {key: np.asarray(encoded[key][i], dtype=np.int64) for key in keys} | {LABELS: label, EXAMPLE_ID: i}
            for i, label in enumerate(rows.labels)
        ]
        lengths = [len(item["input_ids"]) for item in items]
        return Examples(items, Padding(processor.pad_token_id, regression=not self.labels), lengths)

    def _config(self, source: str | Path) -> Any:
        """The source's config with a head for this task.

        Raises:
            ValueError: the source has a head that was trained for other labels.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source)
        if any(a.endswith("ForSequenceClassification") for a in config.architectures or ()):
            check_labels(config, self.labels, str(source))
        names = self.labels or ("score",)
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = "single_label_classification" if self.labels else "regression"
        return config


def check_labels(config: Any, labels: Sequence[str], source: str) -> None:
    """Refuse a teacher whose head speaks of other classes than the task.

    Raises:
        ValueError: the number, the names or the order of the labels differ.
    """
    theirs = [str(config.id2label[i]) for i in sorted(config.id2label)]
    named = not all(name.startswith(GENERIC) for name in theirs)
    if len(theirs) != max(1, len(labels)) or (named and labels and list(labels) != theirs):
        raise ValueError(
            f"{source} was trained for the labels {theirs}, the task has {list(labels) or 'a number to predict'}; "
            "use another teacher, or the pretrained model it came from"
        )


class Padding:
    """Collates tokenized examples, padded to the longest of the batch.

    Args:
        pad: The padding token's number.
        regression: Whether labels are numbers and not classes.

    Example:
        >>> items = [{"input_ids": np.array([5, 6]), "labels": 1, "example_id": 0},
        ...          {"input_ids": np.array([7]), "labels": 0, "example_id": 1}]
        >>> Padding(0)(items)["input_ids"]
        tensor([[5, 6],
                [7, 0]])
    """

    def __init__(self, pad: int, regression: bool = False) -> None:
        self.pad = pad
        self.dtype = torch.float32 if regression else torch.int64

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch: token columns (B, L), labels and example numbers (B,)."""
        longest = max(len(item["input_ids"]) for item in items)
        batch = {}
        for key in items[0].keys() - {LABELS, EXAMPLE_ID}:
            padded = np.full((len(items), longest), self.pad if key == "input_ids" else 0, dtype=np.int64)
            for row, item in zip(padded, items, strict=True):
                row[: len(item[key])] = item[key]
            batch[key] = torch.from_numpy(padded)
        batch[LABELS] = torch.tensor([item[LABELS] for item in items], dtype=self.dtype)
        batch[EXAMPLE_ID] = torch.tensor([item[EXAMPLE_ID] for item in items])
        return batch


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class quiet_transformers:  # noqa: N801  (a context manager, used like a function)
    """Keep transformers' warnings and bars about new heads off the screen; the plan says what is new."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        from transformers.utils import logging

        level, bars = self._before
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
