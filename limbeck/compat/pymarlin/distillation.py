"""``DistillRecipe``, and ``build_distill_module`` for modules of a script's own: `limbeck.Distiller` does it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import SequentialSampler

from limbeck.compat.pymarlin.core.module_interface import ModuleInterface
from limbeck.compat.pymarlin.distill_utils import layer_distance
from limbeck.compat.pymarlin.recipe import Recipe
from limbeck.compat.pymarlin.utils.arguments import arguments
from limbeck.compat.pymarlin.utils.config_parser.custom_arg_parser import as_list
from limbeck.compat.pymarlin.utils.stats import global_stats
from limbeck.distiller import Distiller
from limbeck.pairing import expose_attention
from limbeck.pretrained import load_pretrained
from limbeck.registry import nearest
from limbeck.students import narrower_sizes, shrink, take_layers
from limbeck.students.depth import count_layers
from limbeck.terms import Term, layer_pairs, spread
from limbeck.types import Output

LOSS_TYPES = ("logits", "labels", "hidden_states", "attentions")


@arguments
@dataclass
class DistillationArguments:
    """What is distilled into what; the section ``distill`` of a YAML file.

    Lists may be written as text, ``"[0-6-11]"``.

    Attributes:
        enable: Whether a plugin distils.
        student_model_path: The folder of a student; by default it is made of the teacher's layers.
        student_layers: Which of the teacher's layers the student is made of and learns from, counted from 0; none
            for all. A student with a folder of its own learns from so many layers as it has.
        loss_types: Any of ``"logits"``, ``"labels"``, ``"hidden_states"``, ``"attentions"``.
        loss_weights: One for each.
        temperature: Of the logits.
        scale_loss_by_temp: Multiply the loss of the logits by the temperature squared.
        width_shrinkage: The share of the width (heads, hidden size, feed-forward units) that a student lacks.
            The least important by their weights go; attention maps are then no loss, since heads go too.
        student_model_config_path: Accepted where it is `student_model_path`.
        student_model_config_file: Accepted, and of no effect.
        student_model_file: Accepted, and of no effect.

    Raises:
        ValueError: an unknown loss, not one weight for each, or a temperature that is not positive.

    Example:
        >>> DistillationArguments(student_layers="[0-2]", loss_types=["logits", "labels"], loss_weights="1-0.5")
        DistillationArguments(...student_layers=[0, 2], ...loss_weights=[1.0, 0.5], ...)
    """

    enable: bool = False
    student_model_config_path: str | None = None
    student_model_config_file: str | None = None
    student_model_path: str | None = None
    student_model_file: str | None = None
    student_layers: Any = field(default_factory=lambda: [0, 6, 11])
    loss_types: Any = field(default_factory=lambda: ["logits"])
    loss_weights: Any = field(default_factory=lambda: [1.0])
    temperature: float = 1.0
    scale_loss_by_temp: bool = False
    width_shrinkage: float = 0.0

    def __post_init__(self) -> None:
        self.student_layers = [int(layer) for layer in _listed(self.student_layers)]
        self.loss_types = [str(kind) for kind in _listed(self.loss_types)]
        self.loss_weights = [float(weight) for weight in _listed(self.loss_weights)]
        for kind in self.loss_types:
            if kind not in LOSS_TYPES:
                raise ValueError(f"unknown loss type {kind!r}; {nearest(kind, LOSS_TYPES)}")
        if not 0 <= self.width_shrinkage < 1:
            raise ValueError(f"width_shrinkage must be at least 0 and less than 1, got {self.width_shrinkage!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature!r}")
        if len(self.loss_types) != len(self.loss_weights) or not self.loss_types:
            raise ValueError(
                f"there are {len(self.loss_types)} loss_types and {len(self.loss_weights)} loss_weights; give one "
                "weight for each"
            )

    def terms(self, student: Any, teacher: Any) -> list[Term]:
        """The objective, for two transformers models.

        Raises:
            ValueError: layers that are not there, or not one for each of the student's.
        """
        pairs = self._pairs(count_layers(student), count_layers(teacher))
        wider = student.config.hidden_size != teacher.config.hidden_size
        heads = [model.config.num_attention_heads for model in (student, teacher)]
        if "attentions" in self.loss_types and heads[0] != heads[1]:
            raise ValueError(
                f"the student has {heads[0]} attention heads and the teacher {heads[1]}, which cannot be "
                "compared one by one; drop attentions from loss_types"
            )
        numbers = student.config.num_labels == 1
        found: list[Term] = []
        for kind, weight in zip(self.loss_types, self.loss_weights, strict=True):
            if kind == "logits":
                found += [self._of_logits(weight, numbers)]
            elif kind == "labels":
                loss = "label_mse" if numbers else "cross_entropy"
                found += [Term(kind, loss=loss, weight=weight, name=kind)]
            else:  # the embeddings stand before the hidden states of layer 0
                shift = 1 if kind == "hidden_states" else 0
                own = [(i + shift, j + shift) for i, j in pairs]
                project = "linear" if wider and shift else None
                tap = f"{kind}.{{}}"
                found += spread(tap, tap, own, name=kind, weight=weight, loss=layer_distance, project=project)
        return found

    def _of_logits(self, weight: float, numbers: bool) -> Term:
        if numbers:  # a distribution over one class is always the same
            return Term("logits", loss="mse", weight=weight, name="logits")
        scale = 1.0 if self.scale_loss_by_temp else self.temperature**2
        return Term(
            "logits", loss="forward_kl", temperature=float(self.temperature), weight=weight / scale, name="logits"
        )

    def _pairs(self, student: int, teacher: int) -> list[tuple[int, int]]:
        if not self.student_layers:
            return layer_pairs("uniform", student, teacher)
        if len(self.student_layers) != student:
            raise ValueError(
                f"the student has {student} layers and student_layers names {len(self.student_layers)} of the "
                "teacher's; name one for each, or none"
            )
        return layer_pairs([(i, j % teacher) for i, j in enumerate(self.student_layers)], student, teacher)


def _listed(value: Any) -> list[Any]:
    return as_list(value) if isinstance(value, str) else list(value)


class Distilling(ModuleInterface):
    """What turns a module into one that distils; mixed into another one, before it.

    The trained model becomes ``self.teacher``, which is frozen and outside of the module tree; ``self.model`` is
    the student. What trains with it, such as projections, is ``self.objective``.
    """

    OUTSIDE: ClassVar[tuple[str, ...]] = ("teacher", "distiller")

    args: Any
    model: Any
    distill_args: DistillationArguments
    distiller: Distiller | None = None
    given: tuple[Any, Any] = (None, None)
    _noted: tuple[int | None, dict[str, list[torch.Tensor]]] = (None, {})

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
        expose_attention(self.distill_args.terms(self.model, self.teacher), self.model, self.teacher)
        return self.model, self.teacher

    def _made_of(self, teacher: Any) -> Any:
        layers, share = self.distill_args.student_layers, self.distill_args.width_shrinkage
        student = take_layers(teacher, layers) if layers else copy.deepcopy(teacher)
        return shrink(student, **narrower_sizes(student, share)) if share else student

    def prepare_training(self) -> None:
        """Make the Distiller and check everything on two examples, before the optimizers are made."""
        super().prepare_training()
        self.distiller = Distiller(self.model, self.teacher, self.distill_args.terms(self.model, self.teacher))
        loader = self.get_train_dataloader(sampler=SequentialSampler, batch_size=2)
        if loader is not None:
            device = next(self.model.parameters()).device
            self.distiller.preflight(self._inputs_to_device(next(iter(loader)), device))
        self.objective = self.distiller.objective

    def must_train(self) -> Iterable[nn.Parameter]:
        """The projections."""
        return [] if self.distiller is None else self.distiller.objective.parameters()

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """The weighted sum of all terms."""
        if self.distiller is None:
            self.prepare_training()
        assert self.distiller is not None
        output = self.distiller.distil(self._inputs_to_device(batch, device))
        self._note(global_step, output)
        return output.loss

    def _note(self, global_step: int, output: Output) -> None:
        """Log each term, the mean over the parts of its update."""
        step, parts = self._noted
        if step != global_step:
            parts = {name: [] for name in output.terms}
        for name, value in output.terms.items():
            parts[name].append(value)
            global_stats.update(f"loss/{name}", float(torch.stack(parts[name]).mean()), frequent=True)
        self._noted = (global_step, parts)


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
