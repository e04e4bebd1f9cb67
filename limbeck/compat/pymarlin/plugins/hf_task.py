"""What the plugins for texts share: tables as data, a model with a head, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from limbeck.compat.pymarlin.core.data_interface import DataInterface
from limbeck.compat.pymarlin.recipe import ModuleInterfaceArguments, Recipe
from limbeck.pretrained import load_tokenizer, load_with_head

SEPARATORS = {"tsv": "\t", "csv": ","}


def read_table(path: str, file_format: str, header: int | None) -> Any:
    """Read a table of ``"tsv"``, ``"csv"`` or ``"json"`` lines.

    Raises:
        ValueError: another format, or no such file.
    """
    if file_format not in (*SEPARATORS, "json"):
        raise ValueError(f"unknown file_format {file_format!r}; known: csv, json, tsv")
    if not Path(path).is_file():
        raise ValueError(f"there is no data file {path!r}")
    if file_format == "json":
        return pd.read_json(path, lines=True)
    return pd.read_csv(path, sep=SEPARATORS[file_format], header=header)


class TextModule(Recipe):
    """A model with a head for the labels of the data.

    Args:
        args: How it trains.
        data: Has ``get_labels()`` beside the data sets.
    """

    AUTO_CLASS: ClassVar[str]

    def __init__(self, args: ModuleInterfaceArguments, data: DataInterface) -> None:
        super().__init__(args, data)
        self.data: Any = data
        model_args = args.model_args
        self.tokenizer = load_tokenizer(model_args.tokenizer_path or model_args.source)
        self.setup_models()

    def setup_models(self) -> Any:
        """Load the model, with a new head where it has none."""
        import transformers

        labels = [str(label) for label in self.data.get_labels()]
        self.model, _ = load_with_head(
            getattr(transformers, self.AUTO_CLASS),
            self.args.model_args.source,
            labels if len(labels) > 1 else [],
            "a model",
        )
        return self.model

    def save_model(self, folder: str | Path) -> None:
        """Save model and tokenizer."""
        super().save_model(folder)
        self.tokenizer.save_pretrained(folder)
