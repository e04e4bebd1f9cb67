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
from limbeck.pretrained import load_tokenizer, load_with_head
from limbeck.tasks.base import MOST_TEXTS, Loaded, Rows
from limbeck.train import Examples
from limbeck.types import EXAMPLE_ID, LABELS

__all__ = ["Padding", "TextTask"]


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
        from transformers import AutoModelForSequenceClassification

        model, trained = load_with_head(AutoModelForSequenceClassification, source, self.labels, "a text model")
        tokenizer = load_tokenizer(source)
        model.config.pad_token_id = tokenizer.pad_token_id
        return Loaded(model, tokenizer, head_is_trained=trained)

    def encode(self, rows: Rows, processor: Any) -> Examples:
        """Tokenize every example once; batches are padded to their own longest."""
        return encode_texts(rows.inputs, rows.labels, processor, self.max_length, regression=not self.labels)


def encode_texts(
    texts: Sequence[tuple[str, ...]],
    labels: Sequence[float] | None,
    tokenizer: Any,
    max_length: int,
    regression: bool = False,
) -> Examples:
    """Tokenize texts or pairs of texts once; batches are padded to their own longest.

    Args:
        texts: Tuples of one or two texts.
        labels: A class number or a number to predict for each; None where there are none.
        tokenizer: What cuts them.
        max_length: Tokens after which a text is cut.
        regression: Whether labels are numbers and not classes.

    Raises:
        ValueError: examples of more than two texts.
    """
    columns = list(zip(*texts, strict=True))
    if len(columns) > MOST_TEXTS:
        raise ValueError(f"a model reads one text or a pair of texts, and an example has {len(columns)}")
    encoded = tokenizer(*[list(c) for c in columns], truncation=True, max_length=max_length, padding=False)
    keys = [k for k in encoded if k in ("input_ids", "token_type_ids", "attention_mask")]
    items: list[dict[str, Any]] = [
        {key: np.asarray(encoded[key][i], dtype=np.int64) for key in keys} | {EXAMPLE_ID: i}
        for i in range(len(texts))
    ]
    for i, label in enumerate(() if labels is None else labels):
        items[i][LABELS] = label
    lengths = [len(item["input_ids"]) for item in items]
    return Examples(items, Padding(tokenizer.pad_token_id, regression), lengths)


def labels_of_tokens(
    words: Sequence[int | None], labels: Sequence[int], *, ignored: int = -100, every: bool = False
) -> list[int]:
    """The labels of a text's tokens from those of its words: that of a word goes to its first token.

    Args:
        words: Which word each token is of, None for none; ``BatchEncoding.word_ids`` gives them.
        labels: One for each word.
        ignored: The label of tokens that do not count.
        every: Whether all tokens of a word have its label.

    Example:
        >>> words = [None, 0, 1, 1, None]  # [CLS] fine fil ##ms [SEP]
        >>> labels_of_tokens(words, [0, 2]), labels_of_tokens(words, [0, 2], every=True)
        ([-100, 0, 2, -100, -100], [-100, 0, 2, 2, -100])
    """
    found, before = [], None
    for word in words:
        counts = word is not None and (word != before or every)
        found.append(labels[word] if counts and word is not None else ignored)
        before = word
    return found


class Padding:
    """Collates tokenized examples, padded to the longest of the batch.

    Args:
        pad: The padding token's number.
        regression: Whether labels are numbers and not classes.
        ignored: Pads labels, where each token has one.
        length: To which all is padded; None for the longest of the batch.

    Example:
        >>> items = [{"input_ids": np.array([5, 6]), "labels": 1, "example_id": 0},
        ...          {"input_ids": np.array([7]), "labels": 0, "example_id": 1}]
        >>> Padding(0)(items)["input_ids"]
        tensor([[5, 6],
                [7, 0]])
    """

    def __init__(
        self, pad: int, regression: bool = False, *, ignored: int = -100, length: int | None = None
    ) -> None:
        self.pad, self.ignored, self.length = pad, ignored, length
        self.dtype = torch.float32 if regression else torch.int64

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch: token columns (B, L), labels (B,) or (B, L) if there are any, and example numbers (B,)."""
        longest = self.length or max(len(item["input_ids"]) for item in items)
        batch = {}
        for key in items[0].keys() - {LABELS, EXAMPLE_ID}:
            padded = np.full((len(items), longest), self.pad if key == "input_ids" else 0, dtype=np.int64)
            for row, item in zip(padded, items, strict=True):
                row[: len(item[key])] = item[key]
            batch[key] = torch.from_numpy(padded)
        if LABELS in items[0]:
            labels = [item[LABELS] for item in items]
            if isinstance(labels[0], list):
                labels = [row + [self.ignored] * (longest - len(row)) for row in labels]
            batch[LABELS] = torch.tensor(labels, dtype=self.dtype)
        batch[EXAMPLE_ID] = torch.tensor([item[EXAMPLE_ID] for item in items])
        return batch
