"""``Recipe``, as PyMarlin's GLUE example calls it, and ``DistillRecipe``, for which `limbeck.Distiller` works."""

from __future__ import annotations

import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler

from limbeck.batch import collated
from limbeck.compat.pymarlin.arguments import DistillationArguments
from limbeck.compat.pymarlin.module import ModuleInterface
from limbeck.compat.pymarlin.stats import global_stats
from limbeck.distiller import Distiller
from limbeck.pairing import expose_attention
from limbeck.pretrained import load_pretrained
from limbeck.students import shrink, take_layers
from limbeck.students.depth import count_layers
from limbeck.terms import Term, layer_pairs, spread
from limbeck.train.settings import Settings


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

    def on_end_train(self, global_step: int) -> None:
        """Save the model where ``args.output_dir`` says."""
        folder = getattr(self.args, "output_dir", None)  # a script's own arguments may have none
        if folder and PartialState().is_main_process:
            self.save_model(folder)

    def save_model(self, folder: str | Path) -> None:
        """Save the model with a config that agrees with it, so that ``from_pretrained`` gives it back."""
        stack = dict(self.model.named_modules()).get(f"{self.args.model_args.encoder_key}.encoder.layer")
        if isinstance(stack, nn.ModuleList):  # it may have been exchanged by hand
            self.model.config.num_hidden_layers = len(stack)
        self.model.save_pretrained(folder)


def build_terms(distill: DistillationArguments, student: Any, teacher: Any) -> list[Term]:
    """The objective, for two transformers models.

    Raises:
        ValueError: layers that are not there, or not one for each of the student's.
    """
    pairs = layer_pairs(list(distill.student_layers) or "uniform", count_layers(student), count_layers(teacher))
    project = "linear" if student.config.hidden_size != teacher.config.hidden_size else None
    same = student.config.num_attention_heads == teacher.config.num_attention_heads
    heads = "each" if same else "mean"
    regression = student.config.num_labels == 1  # a distribution over one class is always the same
    scale = 1.0 if distill.scale_loss_by_temp else distill.temperature**2
    found: list[Term] = []
    for kind, weight in zip(distill.loss_types, distill.loss_weights, strict=True):
        tap = f"{kind}.{{}}"
        if kind == "labels":
            found += [Term(kind, loss="label_mse" if regression else "cross_entropy", weight=weight, name=kind)]
        elif kind == "logits" and regression:
            found += [Term(kind, loss="mse", weight=weight, name=kind)]
        elif kind == "logits":
            soft = distill.temperature
            found += [Term(kind, loss="forward_kl", temperature=soft, weight=weight / scale, name=kind)]
        elif kind == "attentions":
            found += spread(tap, tap, pairs, name=kind, weight=weight, loss="attention_pattern", heads=heads)
        else:  # the embeddings stand before the hidden states of layer 0
            outputs = [(i + 1, j + 1) for i, j in pairs]
            loss = "normalized_mse"
            found += spread(tap, tap, outputs, name=kind, weight=weight, loss=loss, project=project)
    return found


def narrowed(student: Any, share: float) -> Any:
    """A student that keeps a share of the width, as in PyMarlin's GLUE example; heads keep their size.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
        >>> teacher = BertModel(BertConfig(num_attention_heads=4, intermediate_size=10, **sizes))
        >>> config = narrowed(teacher, 0.3).config
        >>> config.num_attention_heads, config.hidden_size, config.intermediate_size
        (2, 4, 3)
    """
    config = student.config
    heads = math.ceil(share * config.num_attention_heads)
    hidden = heads * (config.hidden_size // config.num_attention_heads)
    return shrink(
        student, heads=heads, hidden_size=hidden, intermediate_size=int(share * config.intermediate_size)
    )


class Distilling(ModuleInterface):
    """What turns a module into one that distils; mixed into another one, before it.

    The trained model becomes ``self.teacher``, which is frozen and outside of the module tree; ``self.model`` is
    the student. What trains with it, such as projections, is ``self.objective``.
    """

    args: Any
    model: Any
    distill_args: DistillationArguments
    given: tuple[Any, Any] = (None, None)

    def setup_models(self) -> tuple[Any, Any]:
        """Load the teacher and make the student.

        Returns:
            Student and teacher.

        Raises:
            ValueError: no trained teacher is there, or its layers are not.
        """
        if "model" in self._modules:  # done when it was made
            return self.model, self.teacher
        student, teacher = self.given
        path = self.distill_args.student_model_path
        self.teacher = load_pretrained(self.args.model_args.source) if teacher is None else teacher
        if student is None:
            student = self._made_of(self.teacher) if path is None else load_pretrained(path)
        self.model = student
        expose_attention(build_terms(self.distill_args, self.model, self.teacher), self.model, self.teacher)
        return self.model, self.teacher

    def _made_of(self, teacher: Any) -> Any:
        layers, share = self.distill_args.student_layers, self.distill_args.width_shrinkage
        student = take_layers(teacher, layers) if layers else copy.deepcopy(teacher)
        made: nn.Module = narrowed(student, share) if share else student
        return made.requires_grad_(True)  # a teacher that has taught before is frozen

    def prepare_training(self) -> None:
        """Make the Distiller and check everything on two examples, before the optimizers are made."""
        super().prepare_training()
        if self.distiller is not None:
            return
        terms = build_terms(self.distill_args, self.model, self.teacher)
        self.distiller = Distiller(self.model, self.teacher, terms)
        loader = self.get_train_dataloader(sampler=SequentialSampler, batch_size=2)
        if loader is not None:
            device = next(self.model.parameters()).device
            self.distiller.preflight(self._inputs_to_device(next(iter(loader)), device))
        self.objective = self.distiller.objective

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """The weighted sum of all terms, each of which is logged."""
        self.prepare_training()
        assert self.distiller is not None
        output = self.distiller.distil(self._inputs_to_device(batch, device))
        for name, value in output.terms.items():
            global_stats.update(f"loss/{name}", float(value), frequent=True)
        return output.loss


class DistillRecipe(Distilling, Recipe):
    """A recipe that distils: a teacher, layers of it as the student, and data.

    Args:
        args: See `Recipe`.
        distill_args: What is distilled.
        datamodule: Has ``get_train_dataset()`` and ``get_val_dataset()``.
        teacher: A trained model; by default that of ``args.model_args``.
        student: By default made of the teacher, or loaded from ``student_model_path``.

    Example:
        >>> from types import SimpleNamespace
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
        >>> teacher = BertForSequenceClassification(BertConfig(num_hidden_layers=4, **sizes))
        >>> examples = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor(1)}] * 4
        >>> data = SimpleNamespace(get_train_dataset=lambda: examples, get_val_dataset=lambda: examples)
        >>> distill = DistillationArguments(student_layers=[0, 3])
        >>> recipe = DistillRecipe(SimpleNamespace(max_lr=1e-3), distill, data, teacher=teacher)
        >>> recipe.model.config.num_hidden_layers, recipe.train_step(1, recipe.collate_fun(examples), "cpu").shape
        (2, torch.Size([]))
    """

    def __init__(
        self,
        args: Any,
        distill_args: DistillationArguments,
        datamodule: Any,
        logger: Any = None,
        *,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
    ) -> None:
        super().__init__(args, datamodule, logger)
        self.distill_args = distill_args
        self.given = student, teacher
        self.setup_models()


def build_distill_module(base: type[ModuleInterface]) -> type[ModuleInterface]:
    """A module class that distils what another one trains: ``build_distill_module(Base)(distill_args, *args)``.

    Args:
        base: Has ``args.model_args``, loaders, optimizers and steps of its own; its ``setup_models`` gives way to
            that of `Distilling`.

    Example:
        >>> build_distill_module(Recipe).__mro__[1] is Distilling
        True
    """

    class DistillHfModule(Distilling, base):  # type: ignore[misc, valid-type]
        """The module of a task, distilling."""

        def __init__(self, distill_args: DistillationArguments, *module_args: Any) -> None:
            self.distill_args = distill_args  # first, since the task's own __init__ sets up the models
            super().__init__(*module_args)

    return DistillHfModule
