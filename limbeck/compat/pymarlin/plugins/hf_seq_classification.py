"""``HfSeqClassificationPlugin``: texts and pairs of texts, classes or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.compat.pymarlin.core.data_interface import DataInterface
from limbeck.compat.pymarlin.plugins.base import Plugin
from limbeck.compat.pymarlin.plugins.hf_task import TextModule, read_table
from limbeck.compat.pymarlin.utils.arguments import arguments
from limbeck.compat.pymarlin.utils.stats import global_stats
from limbeck.metrics import get_metric
from limbeck.registry import nearest

METRICS: Mapping[str, Mapping[str, str]] = {
    "acc": {"acc": "accuracy"},
    "acc_and_f1": {"acc": "accuracy", "f1": "macro_f1"},
    "mcc": {"mcc": "matthews"},
    "pcc_and_scc": {"pearson": "pearson", "spearmanr": "spearman", "corr": "pearson_and_spearman"},
}
"""What each of PyMarlin's metrics notes, and limbeck's name of it."""


@arguments
@dataclass
class DataArguments:
    """The data.

    Attributes:
        train_filepath: The table to train on.
        val_filepath: The table to validate on.
        labels_list: The classes in their order; of one entry, numbers are learned.
        file_format: ``"tsv"``, ``"csv"`` or ``"json"``, one record a line.
        header: The line with the columns' names; None for columns by number.
        text_a_col: The column of the text.
        text_b_col: That of a second text.
        label_col: That of the label.

    Example:
        >>> DataArguments(labels_list=["no", "yes"]).file_format
        'tsv'
    """

    train_filepath: str | None = None
    val_filepath: str | None = None
    labels_list: Sequence[Any] = ()
    file_format: str = "tsv"
    header: int | None = None
    text_a_col: Any = None
    text_b_col: Any = None
    label_col: Any = None


class HfSeqClassificationDataInterface(DataInterface):
    """Two tables; an example is ``(text, second text or None, label)``."""

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

    def get_labels(self) -> list[Any]:
        """The classes."""
        return list(self.args.labels_list)

    def _read(self, path: str | None) -> list[Any]:
        if path is None:
            return []
        table, args = read_table(path, self.args.file_format, self.args.header), self.args
        by_number = args.file_format != "json" and args.header is None
        columns = [args.text_a_col, args.text_b_col, args.label_col]
        text, second, label = (int(c) if by_number and c is not None else c for c in columns)
        texts = table[text].astype(str)
        seconds = [None] * len(table) if second is None else table[second].astype(str)
        return list(zip(texts, seconds, map(self._label, table[label]), strict=True))

    def _label(self, value: Any) -> float | int:
        known = self.get_labels()
        if len(known) < 2:
            return float(value)
        if value not in known:
            raise ValueError(f"label {value!r} is not in labels_list; {nearest(str(value), map(str, known))}")
        return known.index(value)


class HfSeqClassificationModule(TextModule):
    """A model that classifies texts."""

    AUTO_CLASS = "AutoModelForSequenceClassification"

    def collate_fun(self, batch: list[Any]) -> Any:
        """Encode texts, padded to the longest."""
        texts, seconds, labels = zip(*batch, strict=True)
        pairs = None if seconds[0] is None else list(seconds)
        tokens = self.tokenizer(
            list(texts),
            pairs,
            max_length=self.args.max_seq_len,
            truncation=True,
            padding=True,
            return_tensors="pt",
        )
        return {**tokens, "labels": torch.tensor(labels)}

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Note the mean loss and the metric."""
        super().on_end_val_epoch(global_step, *val_step_collated_outputs, key=key)
        if self.args.metric not in METRICS:
            raise ValueError(f"unknown metric {self.args.metric!r}; {nearest(self.args.metric, METRICS)}")
        if self.args.has_labels and len(val_step_collated_outputs) == 3:
            _, logits, labels = val_step_collated_outputs
            for name, metric in METRICS[self.args.metric].items():
                score = get_metric(metric)(logits.float().numpy(), labels.numpy())
                global_stats.update(f"{key}/val_{name}", score)


class HfSeqClassificationPlugin(Plugin):
    """Text classification: ``plugin = HfSeqClassificationPlugin(); plugin.setup(); plugin.trainer.train()``."""

    data_arguments = DataArguments
    data_class = HfSeqClassificationDataInterface
    module_class = HfSeqClassificationModule
