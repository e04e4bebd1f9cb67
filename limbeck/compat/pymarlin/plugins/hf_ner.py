"""``HfNERPlugin``: a label for each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.compat.pymarlin.core.data_interface import DataInterface
from limbeck.compat.pymarlin.plugins.base import Plugin
from limbeck.compat.pymarlin.plugins.hf_task import TextModule, read_table
from limbeck.compat.pymarlin.utils.arguments import arguments
from limbeck.compat.pymarlin.utils.stats import global_stats
from limbeck.metrics import entity_scores
from limbeck.registry import nearest


@arguments
@dataclass
class DataArguments:
    """The data: tables with the columns ``Sentence`` and ``Slot``, words and labels between blanks.

    Attributes:
        train_filepath: The table to train on.
        val_filepath: The table to validate on.
        labels_list: The labels in their order, such as ``[B-PER, I-PER, O]``.
        has_labels: Whether the tables have labels.
        file_format: ``"tsv"`` or ``"csv"``.

    Example:
        >>> DataArguments(labels_list=["B-PER", "I-PER", "O"]).file_format
        'tsv'
    """

    train_filepath: str | None = None
    val_filepath: str | None = None
    labels_list: Sequence[str] = ()
    has_labels: bool = True
    file_format: str = "tsv"


class NERDataInterface(DataInterface):
    """Two tables; an example is ``(words, labels)``."""

    def __init__(self, args: DataArguments) -> None:
        self.args = args
        self.train_dataset: list[Any] = []
        self.val_dataset: list[Any] = []

    def setup_datasets(self) -> None:
        """Read the tables."""
        self.train_dataset, self.val_dataset = map(self._read, (self.args.train_filepath, self.args.val_filepath))

    def get_train_dataset(self) -> list[Any]:
        """The examples to train on."""
        return self.train_dataset

    def get_val_dataset(self) -> list[Any]:
        """The examples to validate on."""
        return self.val_dataset

    def get_labels(self) -> list[str]:
        """The labels."""
        return list(self.args.labels_list)

    def _read(self, path: str | None) -> list[Any]:
        if path is None:
            return []
        table = read_table(path, self.args.file_format, header=0).dropna()
        number = {label: i for i, label in enumerate(self.args.labels_list)}
        found = []
        for line, (sentence, slot) in enumerate(zip(table["Sentence"], table["Slot"], strict=True), start=1):
            words, labels = sentence.split(" "), slot.split(" ")
            if len(words) != len(labels):
                raise ValueError(f"{path}, record {line}: {len(words)} words and {len(labels)} labels")
            strange = next((label for label in labels if label not in number), None)
            if strange is not None:
                raise ValueError(f"{path}, record {line}: label {strange!r}; {nearest(strange, number)}")
            found.append((words, [number[label] for label in labels]))
        return found


class NERModule(TextModule):
    """A model that labels words."""

    AUTO_CLASS = "AutoModelForTokenClassification"

    def collate_fun(self, batch: list[Any]) -> Any:
        """Encode words; tokens that do not count have the label ``pad_label_id``."""
        words, labels = zip(*batch, strict=True)
        tokens = self.tokenizer(
            [list(each) for each in words],
            is_split_into_words=True,
            max_length=self.args.max_seq_len,
            truncation=True,
            padding="max_length",  # validation puts the logits of all batches behind one another
            return_tensors="pt",
        )
        rows = [self._labelled(tokens.word_ids(i), own) for i, own in enumerate(labels)]
        return {**tokens, "labels": torch.tensor(rows)}

    def _labelled(self, word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
        """The labels of a text's tokens."""
        found, before = [], None
        for word in word_ids:
            counts = word is not None and (word != before or self.args.label_all_tokens)
            found.append(labels[word] if counts and word is not None else self.args.pad_label_id)
            before = word
        return found

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Note the mean loss, and how well whole entities are found."""
        super().on_end_val_epoch(global_step, *val_step_collated_outputs, key=key)
        if self.args.has_labels and len(val_step_collated_outputs) == 3:
            _, logits, labels = val_step_collated_outputs
            names, counts = self.data.get_labels(), labels != self.args.pad_label_id
            tags = [
                [[names[i] for i in row[kept].tolist()] for row, kept in zip(side, counts, strict=True)]
                for side in (logits.argmax(dim=-1), labels)
            ]
            for name, score in entity_scores(*tags).items():
                global_stats.update(f"{key}/val_{name}", score)


class HfNERPlugin(Plugin):
    """Token classification: ``plugin = HfNERPlugin(); plugin.setup(); plugin.trainer.train()``."""

    data_arguments = DataArguments
    data_class = NERDataInterface
    module_class = NERModule
