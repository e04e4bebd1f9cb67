"""``Recipe``: what PyMarlin's GLUE example calls so, a transformers model with its data, to be subclassed."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from limbeck.batch import collated
from limbeck.compat.pymarlin.core.module_interface import ModuleInterface
from limbeck.compat.pymarlin.utils.arguments import arguments
from limbeck.compat.pymarlin.utils.distributed import rank_zero_only
from limbeck.compat.pymarlin.utils.stats import global_stats
from limbeck.train.settings import Settings


@arguments
@dataclass
class ModelArguments:
    """Which model.

    Attributes:
        encoder_key: The attribute of the model that holds the encoder.
        hf_model: A hub id, where no folder is given.
        model_path: A folder with a model and its config, as ``save_pretrained`` writes it.
        model_wts_path: The same, by the name of the GLUE example.
        model_config_path: Accepted where it is the same folder.
        model_file: Accepted, and of no effect: transformers finds the file.
        model_config_file: The config's name.
        tokenizer_path: By default the model's folder.
        model_name: Accepted, and of no effect.
        num_labels: The number of classes; None for the config's.

    Example:
        >>> ModelArguments(model_path="runs/teacher").source
        'runs/teacher'
    """

    encoder_key: str = "bert"
    hf_model: str = "bert-base-uncased"
    model_path: str | None = None
    model_wts_path: str | None = None
    model_config_path: str | None = None
    model_file: str | None = None
    model_config_file: str = "config.json"
    tokenizer_path: str | None = None
    model_name: str | None = None
    num_labels: int | None = None

    @property
    def source(self) -> str:
        """Where the model is loaded from.

        Raises:
            ValueError: its config lies elsewhere.
        """
        folder = self.model_path or self.model_wts_path
        if folder and self.model_config_path and Path(folder) != Path(self.model_config_path):
            raise ValueError(
                f"the model lies in {folder!r} and its config in {self.model_config_path!r}; put them together"
            )
        return folder or self.hf_model


@arguments
@dataclass
class ModuleInterfaceArguments:
    """How a recipe trains.

    Attributes:
        max_lr: The largest learning rate.
        warmup_prop: The share of the steps in which it rises.
        metric: ``"acc"``, ``"acc_and_f1"``, ``"pcc_and_scc"`` or ``"mcc"``.
        has_labels: Whether the validation data has labels.
        max_seq_len: Tokens of a text.
        pad_label_id: The label of tokens that do not count.
        label_all_tokens: Whether all tokens of a word have its label, and not only the first.
        output_dir: Where the model goes at the end; None for nowhere.
        model_args: Which model.

    Example:
        >>> ModuleInterfaceArguments(max_lr=1e-4).warmup_prop
        0.1
    """

    max_lr: float = 4e-5
    warmup_prop: float = 0.1
    metric: str = "acc"
    has_labels: bool = True
    max_seq_len: int = 128
    pad_label_id: int = -100
    label_all_tokens: bool = False
    output_dir: str | None = None
    model_args: ModelArguments = field(default_factory=ModelArguments)


class Recipe(ModuleInterface):
    """A transformers model with data sets of ``{"input_ids": ..., "labels": ...}``; override what you need.

    Args:
        args: Its ``model_args``, ``max_lr`` and ``warmup_prop`` are read, and ``output_dir`` at the end.
        datamodule: Has ``get_train_dataset()`` and ``get_val_dataset()``.
        logger: By default this module's.

    Example:
        >>> from types import SimpleNamespace
        >>> class Mine(Recipe):
        ...     def setup_models(self):
        ...         self.model = nn.Linear(2, 2)
        >>> recipe = Mine(SimpleNamespace(max_lr=0.1, warmup_prop=0.5), datamodule=None)
        >>> recipe.setup_models()
        >>> _, (schedule,) = recipe.get_optimizers_schedulers(estimated_global_steps_per_epoch=2, epochs=2)
        >>> schedule.get_last_lr()
        [0.05]
    """

    model: Any

    def __init__(self, args: Any, datamodule: Any, logger: logging.Logger | None = None) -> None:
        super().__init__()
        self.args, self.datamodule = args, datamodule
        self.logger = logger or logging.getLogger(__name__)

    @abstractmethod
    def setup_models(self) -> Any:
        """Set ``self.model``, and ``self.teacher`` where there is one."""

    def _setup_configs(self) -> None:
        """Set ``self.model_config`` from ``model_config_path``; models made of it can give their attentions."""
        from transformers import AutoConfig

        model_args = self.args.model_args
        self.model_config = AutoConfig.from_pretrained(
            Path(model_args.model_config_path) / model_args.model_config_file, attn_implementation="eager"
        )
        if model_args.num_labels is not None:
            self.model_config.num_labels = model_args.num_labels

    def collate_fun(self, batch: list[Any]) -> Any:
        """Make a batch of examples."""
        return collated(batch)

    def get_train_dataloader(self, sampler: Callable[..., Any], batch_size: int) -> Any:
        """The loader of an epoch."""
        return self._loader(self.datamodule.get_train_dataset(), sampler, batch_size)

    def get_val_dataloaders(self, sampler: Callable[..., Any], batch_size: int) -> Any:
        """The loader to validate on."""
        return self._loader(self.datamodule.get_val_dataset(), sampler, batch_size)

    def _loader(self, data: Any, sampler: Callable[..., Any], batch_size: int) -> Any:
        if data is None or not len(data):
            return None
        return DataLoader(data, batch_size=batch_size, sampler=sampler(data), collate_fn=self.collate_fun)

    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int, epochs: int
    ) -> tuple[list[Any], list[Any]]:
        """Adam over all that trains, with a learning rate that rises and falls linearly."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.args.max_lr)
        steps = max(1, estimated_global_steps_per_epoch * epochs)
        rise = Settings(warmup=min(self.args.warmup_prop, 0.999))
        scheduler = LambdaLR(optimizer, lambda step: rise.rate(min(step, steps - 1), steps))
        return [optimizer], [scheduler]

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """The model's own loss."""
        return self.model(**self._inputs_to_device(batch, device)).loss

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """Loss, logits and labels; without labels the logits alone."""
        inputs = self._inputs_to_device(batch, device)
        outputs = self.model(**inputs)
        return outputs.logits if outputs.loss is None else (outputs.loss, outputs.logits, inputs["labels"])

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Note the mean loss."""
        if len(val_step_collated_outputs) == 3:
            global_stats.update(f"{key}/val_loss", float(val_step_collated_outputs[0].mean()))

    @rank_zero_only
    def on_end_train(self, global_step: int) -> None:
        """Save the model where ``args.output_dir`` says."""
        folder = getattr(self.args, "output_dir", None)  # a script's own arguments may have none
        if folder:
            self.save_model(folder)

    def save_model(self, folder: str | Path) -> None:
        """Save the model with a config that agrees with it, so that ``from_pretrained`` gives it back."""
        stack = dict(self.model.named_modules()).get(f"{self.args.model_args.encoder_key}.encoder.layer")
        if isinstance(stack, nn.ModuleList):  # it may have been exchanged by hand
            self.model.config.num_hidden_layers = len(stack)
        self.model.save_pretrained(folder)
