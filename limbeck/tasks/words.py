"""Labels for the words of a text, such as entities: encoding, batching, scores.

Shape legend: B examples, L tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from limbeck.metrics import entity_scores
from limbeck.tasks.tables import class_numbers, column, read_table
from limbeck.tasks.text import Padding, labels_of_tokens
from limbeck.train import Examples
from limbeck.types import EXAMPLE_ID, LABELS

__all__ = ["encode_words", "read_words", "word_scores"]

Sentence = tuple[list[str], list[int]]
"""Words, and the number of the label of each."""


def read_words(
    path: Path, words: str, labels: str, names: Sequence[str], *, suffix: str | None = None, header: int = 0
) -> list[Sentence]:
    r"""Read a table with a sentence and its words' labels in each row, both with spaces between.

    Rows without a value are left out.

    Args:
        path: The file.
        words: The column of the sentences.
        labels: The column of the labels.
        names: The labels in their order.
        suffix: The format, where the file's name does not tell it.
        header: Of CSV and TSV, the line with the columns' names.

    Raises:
        ValueError: a file that cannot be read, an unknown label, or not one label for each word.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train.tsv"
        >>> _ = path.write_text("Sentence\tSlot\nto Rome\tO B-LOC\n")
        >>> read_words(path, "Sentence", "Slot", ["O", "B-LOC"])
        [(['to', 'Rome'], [0, 1])]
    """
    table = read_table(path, suffix=suffix, header=header).dropna()
    columns = (column(table, name, str(path)) for name in (words, labels))
    found = []
    for sentence, tags in zip(*columns, strict=True):
        own = str(sentence).split(" "), class_numbers(str(tags).split(" "), names)
        if len(own[0]) != len(own[1]):
            raise ValueError(f"{sentence!r} has {len(own[0])} words and {len(own[1])} labels; give each one")
        found.append(own)
    return found


def encode_words(
    sentences: Sequence[Sentence],
    tokenizer: Any,
    max_length: int,
    *,
    ignored: int = -100,
    every: bool = False,
    longest: bool = True,
) -> Examples:
    """Tokenize sentences with a label for each word.

    Args:
        sentences: Words, and the number of the label of each.
        tokenizer: What cuts them; a fast one, which knows the words of tokens.
        max_length: Tokens after which a sentence is cut.
        ignored: The label of tokens that do not count.
        every: Whether all tokens of a word have its label, and not only the first.
        longest: Pad to the longest of a batch; False for `max_length`, so that batches can be put together.
    """
    words = [list(own) for own, _ in sentences]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, padding=False)
    keys = [key for key in encoded if key in ("input_ids", "token_type_ids", "attention_mask")]
    items: list[dict[str, Any]] = []
    for i, (_, labels) in enumerate(sentences):
        item: dict[str, Any] = {key: np.asarray(encoded[key][i], dtype=np.int64) for key in keys}
        item[LABELS] = labels_of_tokens(encoded.word_ids(i), labels, ignored=ignored, every=every)
        items.append(item | {EXAMPLE_ID: i})
    lengths = [len(item["input_ids"]) for item in items]
    length = None if longest else max_length
    return Examples(items, Padding(tokenizer.pad_token_id, ignored=ignored, length=length), lengths)


def word_scores(logits: Tensor, labels: Tensor, names: Sequence[str], *, ignored: int = -100) -> dict[str, float]:
    """How many entities are found exactly; see `limbeck.metrics.entity_scores`.

    Args:
        logits: (B, L, C).
        labels: (B, L), class numbers.
        names: The labels in their order.
        ignored: The label of tokens that do not count.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]])
        >>> word_scores(logits, torch.tensor([[1, 0, -100]]), ["O", "B-LOC"])["f1"]
        1.0
    """
    tags = [
        [[names[i] for i in row[kept].tolist()] for row, kept in zip(side, labels != ignored, strict=True)]
        for side in (logits.argmax(dim=-1), labels)
    ]
    return entity_scores(*tags)
