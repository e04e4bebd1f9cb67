"""TextBrewer's distillers: a student, its teacher, and adaptors that name what the models return."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.compat.textbrewer.configurations import (
    CustomMatch,
    DistillationConfig,
    IntermediateMatch,
    TrainingConfig,
    several,
)
from limbeck.compat.textbrewer.distiller_utils import (
    auto_forward,
    check_projected,
    check_widths,
    get_outputs_from_batch,
    logits_of,
    move_to_device,
    post_adaptor,
    probability_shift_,
    refuse_other,
    said,
    sum_of,
)
from limbeck.compat.textbrewer.losses import CORRECT
from limbeck.compat.textbrewer.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, PROJ_MAP, find
from limbeck.compat.textbrewer.training import Trains, in_either_order
from limbeck.losses.base import full_precision
from limbeck.teachers.remembered import Remembered
from limbeck.teachers.watched import Watched
from limbeck.train.loaders import MixedLoaders
from limbeck.types import TEACHER_CACHE

Adaptor = Callable[[Any, Any], Mapping[str, Any]]
Results = Mapping[str, Any]
"""What an adaptor gives."""


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
        refuse_other(train_config, TrainingConfig, "first")
        refuse_other(distill_config, DistillationConfig, "second")
        super().__init__(train_config, model_T, model_S)
        self._check_teachers(model_T)
        self.d_config, self._given = copy.copy(distill_config), distill_config
        self.adaptor_T, self.adaptor_S = adaptor_T, adaptor_S
        self.kd_loss = self._as_configured(KD_LOSS_MAP[distill_config.kd_loss_type])
        self._matches: list[IntermediateMatch] = list(distill_config.intermediate_matches or ())
        if self._matches and not self.reads_layers:
            warnings.warn(f"{type(self).__name__} compares no layers; use GeneralDistiller", stacklevel=3)
            self._matches = []
        projections = [match.proj for match in self._matches]
        self.projs = [None if proj is None else PROJ_MAP[proj[0]](*proj[1:3]) for proj in projections]
        self.projs_group = [None if proj is None else proj[3] for proj in projections]
        self._memories: dict[str | None, Remembered] = {}

    def _check_teachers(self, model_T: Any) -> None:
        """Refuse what is not as many teachers as this distiller has; a user's own may have any."""

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss of a batch, and what it is made of.

        Args:
            batch: The batch.
            args: What the models are called with beside it.
        """
        return self._distil(batch, args, None, self.model_T, self.adaptor_T, self.adaptor_S)

    def compute_loss(self, results_S: Results, results_T: Results) -> tuple[Any, dict[str, Any]]:
        """The weighted sum of all losses, and each of them without its weight.

        Args:
            results_S: What the student's adaptor gave.
            results_T: What the teacher's adaptor gave.
        """
        total: Any = 0
        parts: dict[str, Any] = {}
        with torch.autocast(torch.device(self.t_config.device).type, enabled=False):
            for name, weight, value in self.match(results_S, results_T):
                parts[f"unweighted_{name}"] = value
                total = total + value * weight
        return total, parts

    def match(self, results_S: Results, results_T: Results) -> Iterator[tuple[str, float, Any]]:
        """Name, weight and value of each loss."""
        if "logits" in results_S and "logits" in results_T:
            value = sum(self._of_logits(*pair) for pair in logits_of(results_S, results_T))
            yield "kd_loss", self.d_config.kd_loss_weight, value
        for match, project in zip(self._matches, self.projs, strict=False):  # a user's own may have others
            layers = ("-".join(map(str, several(layer))) for layer in (match.layer_S, match.layer_T))
            name = f"{match.feature}_{match.loss}_{'_'.join(layers)}"
            yield name, match.weight, self._of_layers(match, project, results_S, results_T)
        if "losses" in results_S:
            yield "hard_label_loss", self.d_config.hard_label_weight, sum_of(results_S["losses"])
        elif (weight := self._given.hard_label_weight) > 0:
            warnings.warn(
                f"hard_label_weight is {weight}, and the student's adaptor gave no 'losses', "
                f"only {sorted(results_S)}: the labels teach nothing",
                stacklevel=2,
            )

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

    def _of_layers(
        self, match: IntermediateMatch, project: nn.Module | None, results_S: Results, results_T: Results
    ) -> Any:
        """The loss between one layer and one, or between two and two."""
        ours = _layers_of(results_S, match.layer_S, match, "student")
        theirs = _layers_of(results_T, match.layer_T, match, "teacher")
        check_projected(match, ours)
        if project is not None:
            ours = [project(full_precision(state)) for state in ours]
        check_widths(match, ours, theirs)
        sides = (ours, theirs) if isinstance(match.layer_S, Sequence) else (ours[0], theirs[0])
        return self._as_configured(MATCH_LOSS_MAP[match.loss])(*sides, mask=results_S.get("inputs_mask"))

    def _as_configured(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return CORRECT.get(loss, loss) if self._given.correct else loss

    def _distil(
        self, batch: Any, args: Mapping[str, Any], task: str | None, model_T: Any, adaptor_T: Any, adaptor_S: Any
    ) -> tuple[Any, dict[str, Any]]:
        brings_along = isinstance(batch, Mapping) and TEACHER_CACHE in batch
        remembers = self.d_config.is_caching_logits and not brings_along
        (batch_T, outputs_T), (batch_S, outputs_S) = self._outputs(batch, args, model_T, remembers)
        results_S = post_adaptor(adaptor_S(batch_S, outputs_S))
        if not remembers:
            return self.compute_loss(results_S, self._adapt(adaptor_T, batch_T, outputs_T))
        if task not in self._memories:
            self._memories[task] = Remembered(
                lambda own: self._flat(self._adapt(adaptor_T, own, auto_forward(model_T, own, args)))
            )
        return self.compute_loss(results_S, _nested(self._memories[task](batch_T)))

    def _flat(self, results: Results) -> dict[str, Tensor]:
        """What is learned of a teacher's results, by names such as ``"logits.0"`` and ``"hidden.4"``."""
        places = [("logits", place) for place in range(len(results.get("logits", ())))]
        places += [(match.feature, layer) for match in self._matches for layer in several(match.layer_T)]
        return {f"{kind}.{place}": results[kind][place] for kind, place in places}

    def _outputs(self, batch: Any, args: Mapping[str, Any], model_T: Any, without_teacher: bool) -> Any:
        return get_outputs_from_batch(batch, self.t_config.device, model_T, self.model_S, args, without_teacher)

    def _adapt(self, adaptor: Any, batch: Any, outputs: Any) -> dict[str, Any]:
        return post_adaptor(adaptor(batch, outputs))

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

    Raises:
        ValueError: a module to match that is no part of its model, or ``is_caching_logits`` with such matches.
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
        custom_matches: Sequence[CustomMatch | Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)
        given = custom_matches or ()
        self._custom = [m if isinstance(m, CustomMatch) else CustomMatch.from_dict(m) for m in given]
        if self._custom and distill_config.is_caching_logits:
            raise ValueError("custom_matches read the teacher's modules, which must run; drop is_caching_logits")
        self._watched = {
            "student": Watched(model_S, [match.module_S for match in self._custom]),
            "teacher": Watched(model_T, [match.module_T for match in self._custom]),
        }

    def _check_teachers(self, model_T: Any) -> None:
        if isinstance(model_T, (list, tuple, dict)):
            raise TypeError(
                f"{type(self).__name__} has one teacher, got a {type(model_T).__name__}; use "
                "MultiTeacherDistiller for a list, and MultiTaskDistiller for a dict"
            )

    def match(self, results_S: Results, results_T: Results) -> Iterator[tuple[str, float, Any]]:
        """Name, weight and value of each loss, those of custom matches last."""
        yield from super().match(results_S, results_T)
        masks = results_S.get("inputs_mask"), results_T.get("inputs_mask")
        for number, match in enumerate(self._custom):
            ours, theirs = (full_precision(side.seen[number]) for side in self._watched.values())
            ours = ours if match.proj_func is None else match.proj_func(ours)
            if isinstance(match.loss, str):
                value = find(match.loss, MATCH_LOSS_MAP, "match loss")(ours, theirs, mask=masks[0])
            else:
                value = match.loss(ours, theirs, *masks)
            yield f"custom_{number}", match.weight, value

    def _outputs(self, batch: Any, args: Mapping[str, Any], model_T: Any, without_teacher: bool) -> Any:
        if not self._custom:
            return super()._outputs(batch, args, model_T, without_teacher)
        student, teacher = self._watched.values()
        return get_outputs_from_batch(batch, self.t_config.device, teacher, student, args)

    def _groups(self) -> list[tuple[nn.Module, Mapping[str, Any]]]:
        own = [(m.proj_func, m.proj_group or {}) for m in self._custom if isinstance(m.proj_func, nn.Module)]
        return [*super()._groups(), *own]


class MultiTeacherDistiller(AbstractDistiller):
    """Several teachers of one task, by the mean of their logits; `adaptor_T` may be a list with one for each."""

    def _check_teachers(self, model_T: Any) -> None:
        if not isinstance(model_T, (list, tuple)) or not model_T:
            raise TypeError(f"MultiTeacherDistiller has a list of teachers, got {said(model_T)}")

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

    def _check_teachers(self, model_T: Any) -> None:
        if not isinstance(model_T, Mapping):
            raise TypeError(f"MultiTaskDistiller has a dict of teachers by task, got {said(model_T)}")

    @in_either_order
    def train(  # its second argument is the data of all tasks
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
            ValueError: tasks with data that lack a teacher or an adaptor.
        """
        for name, given in (
            ("dataloaders", dataloaders),
            ("adaptor_T", self.adaptor_T),
            ("adaptor_S", self.adaptor_S),
        ):
            if not isinstance(given, Mapping):
                raise TypeError(f"{name} of several tasks is a dict by their names, got {said(given)}")
        for name in ("model_T", "adaptor_T", "adaptor_S"):
            if not set(dataloaders) <= set(getattr(self, name)):
                has, data = sorted(getattr(self, name)), sorted(dataloaders)
                raise ValueError(f"{name} has the tasks {has}, and there is data for {data}")
        count = int(num_steps) * self.t_config.gradient_accumulation_steps
        super().train(
            optimizer,
            MixedLoaders(dataloaders, tau, count, batch_postprocessors),
            scheduler_class=scheduler_class,
            scheduler_args=scheduler_args,
            scheduler=scheduler,
            max_grad_norm=max_grad_norm,
            num_steps=num_steps,
            callback=callback,
            **args,
        )

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss of ``(batch, task)``, and what it is made of."""
        batch, task = batch
        return self._distil(batch, args, task, self.model_T[task], self.adaptor_T[task], self.adaptor_S[task])


class BasicTrainer(Trains):
    """Plain training, of a teacher for example, by the ``losses`` of an adaptor.

    Args:
        train_config: How to train.
        model: The model.
        adaptor: Names what it returns.
    """

    def __init__(self, train_config: TrainingConfig, model: nn.Module, adaptor: Adaptor) -> None:
        super().__init__(train_config, [], model)
        self.model, self.adaptor = model, adaptor

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> Any:
        """The loss of a batch.

        Raises:
            ValueError: the adaptor gives no ``losses``.
        """
        batch = move_to_device(batch, self.t_config.device)
        results = post_adaptor(self.adaptor(batch, auto_forward(self.model_S, batch, args)))
        if "losses" not in results:
            raise ValueError(f"the adaptor gave no 'losses', only {sorted(results)}; there is nothing to train by")
        return sum_of(results["losses"])


def _nested(flat: Mapping[str, Tensor]) -> Results:
    """Put what `AbstractDistiller._flat` took apart together again; layers are found by their numbers."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, value in flat.items():
        kind, place = name.split(".")
        found.setdefault(kind, {})[int(place)] = value
    return {kind: list(values.values()) if kind == "logits" else values for kind, values in found.items()}


def _layers_of(results: Results, layers: Any, match: IntermediateMatch, model: str) -> list[Tensor]:
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
