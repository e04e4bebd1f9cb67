"""Tasks from a YAML file alone: ``HfSeqClassificationPlugin`` and ``HfNERPlugin``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from limbeck.compat.pymarlin.arguments import (
    CustomArgParser,
    DefaultCheckpointerArguments,
    DistillationArguments,
    ModelArguments,
    ModuleInterfaceArguments,
    Options,
    StatInitArguments,
    TrainerArguments,
    WriterInitArguments,
)
from limbeck.compat.pymarlin.module import DataInterface
from limbeck.compat.pymarlin.recipe import Recipe, build_distill_module
from limbeck.compat.pymarlin.stats import global_stats
from limbeck.compat.pymarlin.trainer import Trainer
from limbeck.metrics import get_metric
from limbeck.pretrained import load_tokenizer, load_with_head
from limbeck.registry import refuse_unknown
from limbeck.tasks.tables import class_numbers, column, read_table
from limbeck.tasks.text import encode_texts
from limbeck.tasks.words import encode_words, read_words, word_scores
from limbeck.train import Examples
from limbeck.types import EXAMPLE_ID

METRICS: Mapping[str, Mapping[str, str]] = {
    "acc": {"acc": "accuracy"},
    "acc_and_f1": {"acc": "accuracy", "f1": "macro_f1"},
    "mcc": {"mcc": "matthews"},
    "pcc_and_scc": {"pearson": "pearson", "spearmanr": "spearman", "corr": "pearson_and_spearman"},
}
"""What each of PyMarlin's metrics notes, and limbeck's name of it."""


class DataArguments(Options):
    """The data: two tables.

    Attributes:
        train_filepath: The table to train on.
        val_filepath: The table to validate on.
        labels_list: The labels in their order; of one entry, numbers are learned.
        has_labels: Accepted, and of no effect.
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
    has_labels: bool = True
    file_format: Literal["tsv", "csv", "json"] = "tsv"
    header: int | None = None
    text_a_col: Any = None
    text_b_col: Any = None
    label_col: Any = None


class TextData(DataInterface):
    """Two tables of texts; an example is a tuple of one or two texts, and its label."""

    def __init__(self, args: DataArguments) -> None:
        self.args = args

    def setup_datasets(self) -> None:
        """Read the tables."""
        paths = self.args.train_filepath, self.args.val_filepath
        suffix = {"json": ".jsonl"}.get(self.args.file_format, f".{self.args.file_format}")
        self.train, self.val = ([] if path is None else self._read(Path(path), suffix) for path in paths)

    def get_train_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """The examples to train on."""
        return self.train

    def get_val_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """The examples to validate on."""
        return self.val

    def get_labels(self) -> list[Any]:
        """The labels."""
        return list(self.args.labels_list)

    def _read(self, path: Path, suffix: str) -> list[Any]:
        table = read_table(path, suffix=suffix, header=self.args.header)
        names = self.args.text_a_col, self.args.text_b_col, self.args.label_col
        *texts, labels = (column(table, str(name), str(path)) for name in names if name is not None)
        known = self.get_labels()
        numbers = class_numbers(labels, known) if len(known) > 1 else [float(str(label)) for label in labels]
        return list(zip(zip(*(map(str, each) for each in texts), strict=True), numbers, strict=True))


class WordData(TextData):
    """Two tables with the columns ``Sentence`` and ``Slot``; an example is ``(words, labels)``."""

    def _read(self, path: Path, suffix: str) -> list[Any]:
        return read_words(path, "Sentence", "Slot", self.get_labels(), suffix=suffix, header=self.args.header or 0)


class TextModule(Recipe):
    """A model that classifies texts, with its tokenizer.

    Args:
        args: How it trains.
        data: Has ``get_labels()`` beside the data sets.
    """

    AUTO_CLASS: ClassVar[str] = "AutoModelForSequenceClassification"

    def __init__(self, args: ModuleInterfaceArguments, data: Any) -> None:
        super().__init__(args, data)
        self.tokenizer = load_tokenizer(args.model_args.tokenizer_path or args.model_args.source)
        self.labels = [str(label) for label in data.get_labels()]
        self.setup_models()

    def setup_models(self) -> Any:
        """Load the model, with a new head where it has none."""
        import transformers

        kind, source = getattr(transformers, self.AUTO_CLASS), self.args.model_args.source
        self.model, _ = load_with_head(kind, source, self.labels if len(self.labels) > 1 else [], "a model")
        return self.model

    def collate_fun(self, batch: list[Any]) -> Any:
        """Encode examples, and put them into one batch."""
        examples = self.encode(batch)
        made = examples.batch(range(len(batch)))
        return {name: value for name, value in made.items() if name != EXAMPLE_ID}

    def encode(self, batch: list[Any]) -> Examples:
        """Encode texts, padded to the longest."""
        texts, labels = zip(*batch, strict=True)
        regression = len(self.labels) < 2
        return encode_texts(texts, labels, self.tokenizer, self.args.max_seq_len, regression)

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Note the mean loss and the scores."""
        super().on_end_val_epoch(global_step, *val_step_collated_outputs, key=key)
        if self.args.has_labels and len(val_step_collated_outputs) == 3:
            _, logits, labels = val_step_collated_outputs
            for name, score in self.scores(logits.float(), labels).items():
                global_stats.update(f"{key}/val_{name}", score)

    def scores(self, logits: Any, labels: Any) -> dict[str, float]:
        """The scores by name."""
        metrics = METRICS[self.args.metric].items()
        return {name: get_metric(metric)(logits.numpy(), labels.numpy()) for name, metric in metrics}

    def save_model(self, folder: str | Path) -> None:
        """Save model and tokenizer."""
        super().save_model(folder)
        self.tokenizer.save_pretrained(folder)


class WordModule(TextModule):
    """A model that labels words."""

    AUTO_CLASS = "AutoModelForTokenClassification"

    def encode(self, batch: list[Any]) -> Examples:
        """Encode words, all to one length, for validation puts the logits of all batches behind one another."""
        ignored, every = self.args.pad_label_id, self.args.label_all_tokens
        most = self.args.max_seq_len
        return encode_words(batch, self.tokenizer, most, ignored=ignored, every=every, longest=False)

    def scores(self, logits: Any, labels: Any) -> dict[str, float]:
        """How well whole entities are found."""
        return word_scores(logits, labels, self.labels, ignored=self.args.pad_label_id)


SECTIONS: Mapping[str, type[Options]] = {
    "data": DataArguments,
    "model": ModelArguments,
    "module": ModuleInterfaceArguments,
    "distill": DistillationArguments,
    "trainer": TrainerArguments,
    "ckpt": DefaultCheckpointerArguments,
    "stats": StatInitArguments,
    "wrts": WriterInitArguments,
}


class HfSeqClassificationPlugin:
    """Text classification: ``plugin = HfSeqClassificationPlugin(); plugin.setup(); plugin.trainer.train()``.

    Args:
        config: The sections ``data``, ``model``, ``module``, ``distill``, ``trainer``, ``ckpt``, ``stats`` and
            ``wrts``; by default from the YAML file of ``--config_path`` and the command line.

    Raises:
        ValueError: an unknown section, or an unknown key in one.
        TypeError: an unknown section.
    """

    data_class: ClassVar[type[TextData]] = TextData
    module_class: ClassVar[type[TextModule]] = TextModule

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = CustomArgParser().parse() if config is None else config
        refuse_unknown(config, SECTIONS, "the config")
        made: dict[str, Any] = {name: kind(**(config.get(name) or {})) for name, kind in SECTIONS.items()}
        self.data_args, self.module_args = made["data"], made["module"]
        self.distill_args, self.trainer_args = made["distill"], made["trainer"]
        self.module_args.model_args = made["model"]
        self.trainer_args.checkpointer_args = made["ckpt"]
        self.trainer_args.stats_args, self.trainer_args.writer_args = made["stats"], made["wrts"]

    def setup_datainterface(self) -> None:
        """Read the data."""
        self.datainterface = self.data_class(self.data_args)
        self.datainterface.setup_datasets()

    def setup_module(self) -> None:
        """Load the models; with ``distill.enable`` a teacher and its student."""
        if self.distill_args.enable:
            made: Any = build_distill_module(self.module_class)
            self.moduleinterface = made(self.distill_args, self.module_args, self.datainterface)
        else:
            self.moduleinterface = self.module_class(self.module_args, self.datainterface)

    def setup_trainer(self) -> None:
        """Make the trainer."""
        self.trainer = Trainer(module=self.moduleinterface, args=self.trainer_args)

    def setup(self, **kwargs: Any) -> Trainer:
        """All three; ``plugin.setup().train()``."""
        self.setup_datainterface()
        self.setup_module()
        self.setup_trainer()
        return self.trainer


class HfNERPlugin(HfSeqClassificationPlugin):
    """Token classification: ``plugin = HfNERPlugin(); plugin.setup(); plugin.trainer.train()``."""

    data_class = WordData
    module_class = WordModule
