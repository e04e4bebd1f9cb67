"""TextBrewer's distillers: a student, its teacher, and adaptors that name what the models return."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.compat.textbrewer.configurations import DistillationConfig, IntermediateMatch, TrainingConfig
from limbeck.compat.textbrewer.distiller_utils import (
    CustomMatch,
    auto_forward,
    get_outputs_from_batch,
    logits_of,
    move_to_device,
    path_of,
    post_adaptor,
    probability_shift_,
)
from limbeck.compat.textbrewer.losses import CORRECT
from limbeck.compat.textbrewer.memory import Memory, several
from limbeck.compat.textbrewer.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, PROJ_MAP
from limbeck.compat.textbrewer.training import TaskBatches, Trains
from limbeck.losses.base import full_precision
from limbeck.taps import Recorder, resolve
from limbeck.teachers.module import record
from limbeck.types import TEACHER_CACHE

Adaptor = Callable[[Any, Any], Mapping[str, Any]]


class AbstractDistiller(Trains):
    """What all distillers have in common; a user's own may override `train_on_batch` and `compute_loss`.

    Args:
        train_config: How to train.
        distill_config: What to learn. It is copied, and never changed.
        model_T: The teacher, a list of them or, of several tasks, a dict.
        model_S: The student.
        adaptor_T: Names what the teacher returns: ``adaptor(batch, outputs) -> dict``.
        adaptor_S: The same for the student.
    """

    reads_layers = False
    """Whether it has a use for ``intermediate_matches``."""

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Any,
        model_S: nn.Module,
        adaptor_T: Any,
        adaptor_S: Any,
    ) -> None:
        super().__init__()
        self.t_config, self.d_config = train_config, copy.copy(distill_config)
        self.model_T, self.model_S = model_T, model_S
        self.adaptor_T, self.adaptor_S = adaptor_T, adaptor_S
        self.device: Any = train_config.device
        self.kd_loss = self._as_configured(KD_LOSS_MAP[distill_config.kd_loss_type])
        projections = [match.proj for match in self._matches()]
        self.projs = [None if proj is None else PROJ_MAP[proj[0]](*proj[1:3]) for proj in projections]
        self.projs_group = [None if proj is None else proj[3] for proj in projections]
        self._given = distill_config
        self._memories: dict[str | None, Memory] = {}
        if distill_config.intermediate_matches and not self.reads_layers:
            warnings.warn(f"{type(self).__name__} compares no layers; use GeneralDistiller", stacklevel=3)

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss of a batch, and what it is made of.

        Args:
            batch: The batch.
            args: What the models are called with beside it.
        """
        return self._learn(batch, args, None, self.model_T, self.adaptor_T, self.adaptor_S)

    def compute_loss(
        self, results_S: Mapping[str, Any], results_T: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The weighted sum of all losses, and each of them without its weight.

        Args:
            results_S: What the student's adaptor gave.
            results_T: What the teacher's adaptor gave.
        """
        total: Any = 0
        parts: dict[str, Any] = {}
        with torch.autocast(torch.device(self.device).type, enabled=False):
            if "logits" in results_S and "logits" in results_T:
                parts["unweighted_kd_loss"] = sum(self._of_logits(*own) for own in logits_of(results_S, results_T))
                total = total + parts["unweighted_kd_loss"] * self.d_config.kd_loss_weight
            for name, weight, value in self.match(results_S, results_T):
                parts[f"unweighted_{name}"] = value
                total = total + value * weight
            if "losses" in results_S:
                parts["unweighted_hard_label_loss"] = sum(loss.mean() for loss in results_S["losses"])
                total = total + parts["unweighted_hard_label_loss"] * self.d_config.hard_label_weight
        return total, parts

    def match(
        self, results_S: Mapping[str, Any], results_T: Mapping[str, Any]
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of each loss between layers."""
        for match, project in zip(self._matches(), self.projs, strict=False):  # a user's own may have others
            value = self._of_layers(match, project, results_S, results_T)
            names = ("-".join(map(str, several(layers))) for layers in (match.layer_S, match.layer_T))
            yield f"{match.feature}_{match.loss}_{'_'.join(names)}", match.weight, value

    def _of_layers(
        self,
        match: IntermediateMatch,
        project: nn.Module | None,
        results_S: Mapping[str, Any],
        results_T: Mapping[str, Any],
    ) -> Tensor:
        """The loss between one layer and one, or between two and two."""
        read = {"student": (results_S, match.layer_S), "teacher": (results_T, match.layer_T)}
        sides = {name: layers_of(*what, match, name) for name, what in read.items()}
        if project is not None:
            sides["student"] = [project(full_precision(state)) for state in sides["student"]]
        loss = self._as_configured(MATCH_LOSS_MAP[match.loss])
        is_one = not isinstance(match.layer_S, Sequence)
        value: Tensor = loss(
            *(side[0] if is_one else side for side in sides.values()), mask=results_S.get("inputs_mask")
        )
        return value

    def _of_logits(self, logits_S: Tensor, logits_T: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of one pair of logits (N, C)."""
        config = self.d_config
        if not logits_S.numel():
            return logits_S.sum()  # no token counts: nothing, with a gradient of nothing
        if config.probability_shift:
            if labels is None:
                raise ValueError("probability_shift needs 'labels' from the student's adaptor")
            logits_T = probability_shift_(logits_T, labels)
        temperature = config.temperature
        if config.temperature_scheduler is not None:
            temperature = config.temperature_scheduler(logits_S, logits_T, config.temperature)
        loss: Tensor = self.kd_loss(logits_S, logits_T, temperature)
        return loss

    def _as_configured(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return CORRECT.get(loss, loss) if self.d_config.correct else loss

    def _learn(
        self,
        batch: Any,
        args: Mapping[str, Any],
        task: str | None,
        model_T: Any,
        adaptor_T: Any,
        adaptor_S: Adaptor,
    ) -> tuple[Any, dict[str, Any]]:
        batch = move_to_device(batch, self.device)
        brings_along = isinstance(batch, Mapping) and TEACHER_CACHE in batch
        remembers = self.d_config.is_caching_logits and not brings_along
        (batch_T, outputs_T), (batch_S, outputs_S) = self._run(batch, args, model_T, no_teacher_forward=remembers)
        results_S = post_adaptor(adaptor_S(batch_S, outputs_S))
        if not remembers:
            return self.compute_loss(results_S, self._adapt(adaptor_T, batch_T, outputs_T))
        if task not in self._memories:
            self._memories[task] = Memory(
                lambda own: self._adapt(adaptor_T, own, auto_forward(model_T, own, args)), self._matches()
            )
        return self.compute_loss(results_S, self._memories[task].results(batch_T))

    def _run(self, batch: Any, args: Mapping[str, Any], model_T: Any, no_teacher_forward: bool) -> Any:
        return get_outputs_from_batch(batch, self.device, model_T, self.model_S, args, no_teacher_forward)

    def _adapt(self, adaptor: Any, batch: Any, outputs: Any) -> dict[str, Any]:
        return post_adaptor(adaptor(batch, outputs))

    def _matches(self) -> list[IntermediateMatch]:
        return self.d_config.intermediate_matches if self.reads_layers else []

    def _groups(self) -> list[tuple[nn.Module, Mapping[str, Any]]]:
        both = zip(self.projs, self.projs_group, strict=True)
        return [(module, options or {}) for module, options in both if module is not None]

    def _at(self, progress: float | None) -> None:
        """Set the weights of this distiller's own configuration."""
        for name in ("kd_loss_weight", "hard_label_weight"):
            schedule = getattr(self._given, f"{name}_scheduler")
            if schedule is not None:
                if progress is None:
                    raise ValueError(f"{name}_scheduler needs a loader with a length, or num_steps")
                setattr(self.d_config, name, getattr(self._given, name) * schedule(progress))


class BasicDistiller(AbstractDistiller):
    """One teacher, one task, logits and labels."""


class GeneralDistiller(AbstractDistiller):
    """One teacher, one task, and matches between layers.

    Args:
        train_config: How to train.
        distill_config: What to learn.
        model_T: The teacher.
        model_S: The student.
        adaptor_T: Names what the teacher returns.
        adaptor_S: Names what the student returns.
        custom_matches: Matches between modules, wherever they stand.
    """

    reads_layers = True

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Any,
        model_S: nn.Module,
        adaptor_T: Any,
        adaptor_S: Any,
        custom_matches: Sequence[CustomMatch | Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)
        given = custom_matches or ()
        self._custom = [m if isinstance(m, CustomMatch) else CustomMatch.from_dict(m) for m in given]
        self._paths = [(path_of(model_S, m.module_S), path_of(model_T, m.module_T)) for m in self._custom]
        self._recorders = [
            Recorder(model, resolve(model, [pair[side] for pair in self._paths]))
            for side, model in enumerate((model_S, model_T))
            if self._custom
        ]
        self._seen: list[Mapping[str, Tensor]] = []
        if self._custom and self.d_config.is_caching_logits:
            raise ValueError("custom_matches read the teacher's modules, which must run; drop is_caching_logits")

    def match(
        self, results_S: Mapping[str, Any], results_T: Mapping[str, Any]
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of each match, custom ones last."""
        yield from super().match(results_S, results_T)
        masks = results_S.get("inputs_mask"), results_T.get("inputs_mask")
        for number, (custom, (ours, theirs)) in enumerate(zip(self._custom, self._paths, strict=True)):
            read = full_precision(self._seen[0][ours]), full_precision(self._seen[1][theirs].detach())
            value = custom.value(*read, *masks)
            yield f"custom_{number}", custom.weight, value

    def _run(self, batch: Any, args: Mapping[str, Any], model_T: Any, no_teacher_forward: bool) -> Any:
        if not self._custom:
            return super()._run(batch, args, model_T, no_teacher_forward)
        seen: dict[int, Mapping[str, Tensor]] = {}

        def watched(side: int, model: Any) -> Callable[..., Any]:
            def call(*inputs: Any, **named: Any) -> Any:
                output, seen[side] = record(
                    self._recorders[side], lambda **extra: model(*inputs, **named, **extra)
                )
                return output

            return call

        run = get_outputs_from_batch(batch, self.device, watched(1, model_T), watched(0, self.model_S), args)
        self._seen = [seen[0], seen[1]]
        return run

    def _groups(self) -> list[tuple[nn.Module, Mapping[str, Any]]]:
        own = [(m.proj_func, m.proj_group or {}) for m in self._custom if isinstance(m.proj_func, nn.Module)]
        return [*super()._groups(), *own]


class MultiTeacherDistiller(AbstractDistiller):
    """Several teachers of one task, by the mean of their logits; `adaptor_T` may be a list with one for each."""

    def _adapt(self, adaptor: Any, batch: Any, outputs: Any) -> dict[str, Any]:
        adaptors = list(adaptor) if isinstance(adaptor, (list, tuple)) else [adaptor] * len(outputs)
        if len(adaptors) != len(outputs):
            raise ValueError(f"there are {len(outputs)} teachers and {len(adaptors)} adaptors")
        results = [post_adaptor(own(batch, output)) for own, output in zip(adaptors, outputs, strict=True)]
        if any("logits" not in result for result in results):
            raise ValueError("several teachers teach by their logits, and an adaptor gave none")
        means = [torch.stack(logits).mean(dim=0) for logits in zip(*(r["logits"] for r in results), strict=True)]
        return {**results[0], "logits": means}


class MultiTaskDistiller(AbstractDistiller):
    """Several tasks, each with a teacher and adaptors of its own: dicts by the tasks' names."""

    reads_layers = True

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Mapping[str, nn.Module],
        model_S: nn.Module,
        adaptor_T: Mapping[str, Adaptor],
        adaptor_S: Mapping[str, Adaptor],
    ) -> None:
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)
        for what, given in (("adaptor_T", adaptor_T), ("adaptor_S", adaptor_S)):
            if set(given) != set(model_T):
                raise ValueError(f"model_T has the tasks {sorted(model_T)} and {what} has {sorted(given)}")

    def train(  # type: ignore[override]  # its second argument is the data of all tasks
        self,
        optimizer: torch.optim.Optimizer,
        dataloaders: Mapping[str, Iterable[Any]],
        num_steps: int,
        scheduler_class: Callable[..., Any] | None = None,
        scheduler_args: Mapping[str, Any] | None = None,
        scheduler: Any = None,
        max_grad_norm: float = -1.0,
        tau: float = 1,
        callback: Callable[..., Any] | None = None,
        batch_postprocessors: Mapping[str, Callable[[Any], Any]] | None = None,
        **args: Any,
    ) -> None:
        """Train the student on batches of all tasks in random order.

        Args:
            optimizer: Holds the student's parameters.
            dataloaders: The data of each task.
            num_steps: Number of updates.
            scheduler_class: See `BasicDistiller.train`, also for the rest.
            scheduler_args: Its other arguments.
            scheduler: One that is made already.
            max_grad_norm: Up to 0 for no clipping.
            tau: A task is drawn in proportion to its number of batches to this power.
            callback: ``callback(model=student, step=step)``.
            batch_postprocessors: Done to the batches of each task first.
            **args: What the models are called with beside the batch.

        Raises:
            ValueError: data for other tasks than there are teachers.
        """
        if not set(dataloaders) <= set(self.model_T):
            raise ValueError(f"there are teachers for {sorted(self.model_T)} and data for {sorted(dataloaders)}")
        count = int(num_steps) * self.t_config.gradient_accumulation_steps
        loader = TaskBatches(dataloaders, tau, count, batch_postprocessors)
        super().train(
            optimizer,
            loader,
            None,
            scheduler_class,
            scheduler_args,
            scheduler,
            max_grad_norm,
            num_steps,
            callback,
            **args,
        )

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss of ``(batch, task)``, and what it is made of."""
        batch, task = batch
        return self._learn(batch, args, task, self.model_T[task], self.adaptor_T[task], self.adaptor_S[task])


class BasicTrainer(Trains):
    """Plain training, of a teacher for example, by the ``losses`` of an adaptor.

    Args:
        train_config: How to train.
        model: The model.
        adaptor: Names what it returns.
    """

    def __init__(self, train_config: TrainingConfig, model: nn.Module, adaptor: Adaptor) -> None:
        super().__init__()
        self.t_config, self.model, self.adaptor = train_config, model, adaptor
        self.model_S, self.model_T = model, ()

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> Any:
        """The loss of a batch.

        Raises:
            ValueError: the adaptor gives no ``losses``.
        """
        batch = move_to_device(batch, self.t_config.device)
        results = post_adaptor(self.adaptor(batch, auto_forward(self.model, batch, args)))
        if "losses" not in results:
            raise ValueError(f"the adaptor gave no 'losses', only {sorted(results)}; there is nothing to train by")
        return sum(loss.mean() for loss in results["losses"])


def layers_of(results: Mapping[str, Any], layers: Any, match: IntermediateMatch, model: str) -> list[Tensor]:
    """The layers of one model that a match reads.

    Raises:
        ValueError: the adaptor gave no such layer.
    """
    try:
        return [results[match.feature][layer] for layer in several(layers)]
    except (KeyError, IndexError):
        there = len(results.get(match.feature, ()))
        raise ValueError(
            f"{match.loss} reads {match.feature} {layers} of the {model}, and its adaptor gave {there} of them"
        ) from None
