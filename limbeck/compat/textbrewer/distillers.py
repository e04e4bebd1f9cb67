"""TextBrewer's distillers: `limbeck.adapted` with their arguments, and with the parts that users override."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from limbeck.adapted import AdaptedObjective, Entries, Match, Memory, call, entries_of, read_both, total_of
from limbeck.adapted.matches import listed
from limbeck.adapted.models import Adaptor, read_teacher
from limbeck.compat.textbrewer.configurations import (
    CustomMatch,
    DistillationConfig,
    IntermediateMatch,
    TrainingConfig,
)
from limbeck.compat.textbrewer.distiller_utils import move_to_device, probability_shift_
from limbeck.compat.textbrewer.losses import CORRECT
from limbeck.compat.textbrewer.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, PROJ_MAP, find
from limbeck.compat.textbrewer.training import Trains, in_either_order
from limbeck.teachers.watched import Watched
from limbeck.train.loaders import MixedLoaders

WATCHED = "custom"
"""The entry in which the outputs of watched modules are."""


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

    kinds: Sequence[Any] = (object,)
    """What its teachers may be: one model or several."""

    words = ""
    """The same in words."""

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Any,
        model_S: nn.Module,
        adaptor_T: Any,
        adaptor_S: Any,
    ) -> None:
        for config, kind, place in (
            (train_config, TrainingConfig, "first"),
            (distill_config, DistillationConfig, "second"),
        ):
            if not isinstance(config, kind):
                raise TypeError(f"the {place} argument of a distiller is a {kind.__name__}, got {_said(config)}")
        if not isinstance(model_T, tuple(self.kinds)) or model_T == []:
            raise TypeError(
                f"{type(self).__name__} has {self.words}, got {_said(model_T)}; MultiTeacherDistiller has a list, "
                "MultiTaskDistiller a dict, and all others have one"
            )
        super().__init__(train_config, model_T, model_S)
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
        self._memories: dict[str, Memory] = {}

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss of a batch, and what it is made of.

        Args:
            batch: The batch.
            args: What the models are called with beside it.
        """
        models, adaptors = (self.model_S, self.model_T), (self.adaptor_S, self.adaptor_T)
        return self.compute_loss(*self._read(batch, args, models, adaptors))

    def compute_loss(self, results_S: Entries, results_T: Entries) -> tuple[Any, dict[str, Any]]:
        """The weighted sum of all losses, and each of them without its weight.

        Args:
            results_S: What the student's adaptor gave.
            results_T: What the teacher's adaptor gave.
        """
        config, weights = self.d_config, {}
        if "logits" in results_S and "logits" in results_T:
            weights["logits"] = config.kd_loss_weight
        if "losses" in results_S:
            weights["losses"] = config.hard_label_weight
        elif (weight := self._given.hard_label_weight) > 0:
            warnings.warn(
                f"hard_label_weight is {weight}, and the student's adaptor gave no 'losses', "
                f"only {sorted(results_S)}: the labels teach nothing",
                stacklevel=2,
            )
        objective = AdaptedObjective(weights, self._of_logits, self._layers(), self.t_config.device)
        total, parts = objective(results_S, results_T)
        names = {"logits": "kd_loss", "losses": "hard_label_loss"}
        return total, {f"unweighted_{names.get(name, name)}": value for name, value in parts.items()}

    def _of_logits(self, logits_S: Tensor, logits_T: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of one pair of logits (N, C)."""
        config = self.d_config
        if config.probability_shift:
            if labels is None:
                raise ValueError("probability_shift needs 'labels' from the student's adaptor")
            logits_T = probability_shift_(logits_T, labels)
        temperature = config.temperature
        if config.temperature_scheduler is not None:
            temperature = config.temperature_scheduler(logits_S, logits_T, config.temperature)
        loss: Tensor = self.kd_loss(logits_S, logits_T, temperature)
        return loss

    def _layers(self) -> list[Match]:
        """The matches of the configuration; a user's own distiller may have other projections."""
        return [self._layer(*both) for both in zip(self._matches, self.projs, strict=False)]

    def _layer(self, match: IntermediateMatch, project: nn.Module | None) -> Match:
        loss = self._as_configured(MATCH_LOSS_MAP[match.loss])

        def projected(state: Tensor) -> Tensor:
            match.check_projected(state)
            return state if project is None else project(state)

        def compare(ours: Any, theirs: Any, mask: Tensor | None, _: Any) -> Any:
            match.check_widths(ours, theirs)
            return loss(ours, theirs, mask=mask)

        layers = match.feature, match.layer_S, match.layer_T
        return Match(*layers, compare, match.weight, projected, match.loss)

    def _as_configured(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        return CORRECT.get(loss, loss) if self._given.correct else loss

    def _read(
        self, batch: Any, args: Mapping[str, Any], models: Sequence[Any], adaptors: Sequence[Any], task: str = ""
    ) -> tuple[Entries, Entries]:
        """What both adaptors give of a batch."""
        if self.d_config.is_caching_logits and task not in self._memories:
            several = isinstance(models[1], (list, tuple))
            self._memories[task] = Memory(
                lambda own: read_teacher(adaptors[1], own, call(models[1], own, args), several),
                [(match.feature, layer) for match in self._matches for layer in listed(match.layer_T)],
            )
        how = {"named": args, "memory": self._memories.get(task), "device": self.t_config.device}
        return read_both(batch, *models, *adaptors, **how)

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
    kinds, words = (Callable,), "one teacher"

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
        self._watched = (
            Watched(model_S, [match.module_S for match in self._custom]),
            Watched(model_T, [match.module_T for match in self._custom]),
        )

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss of a batch, and what it is made of."""
        if not self._custom:
            return super().train_on_batch(batch, args)
        both = self._read(batch, args, self._watched, (self.adaptor_S, self.adaptor_T))
        sides = zip(both, self._watched, strict=True)
        return self.compute_loss(*({**results, WATCHED: side.seen} for results, side in sides))

    def _layers(self) -> list[Match]:
        return [*super()._layers(), *map(_custom_layer, range(len(self._custom)), self._custom)]

    def _groups(self) -> list[tuple[nn.Module, Mapping[str, Any]]]:
        own = [(m.proj_func, m.proj_group or {}) for m in self._custom if isinstance(m.proj_func, nn.Module)]
        return [*super()._groups(), *own]


class MultiTeacherDistiller(AbstractDistiller):
    """Several teachers of one task, by the mean of their logits; `adaptor_T` may be a list with one for each."""

    kinds, words = (list, tuple), "a list of teachers"


class MultiTaskDistiller(AbstractDistiller):
    """Several tasks, each with a teacher and adaptors of its own: dicts by the tasks' names."""

    reads_layers = True
    kinds, words = (Mapping,), "a dict of teachers by task"

    @in_either_order
    def train(  # its second argument is the data of all tasks
        self,
        optimizer: Any,
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
        for name in ("dataloaders", "model_T", "adaptor_T", "adaptor_S"):
            given = dataloaders if name == "dataloaders" else getattr(self, name)
            if not isinstance(given, Mapping):
                raise TypeError(f"{name} of several tasks is a dict by their names, got {_said(given)}")
            if not set(dataloaders) <= set(given):
                raise ValueError(
                    f"{name} has the tasks {sorted(given)}, and there is data for {sorted(dataloaders)}"
                )
        count = int(num_steps) * self.t_config.gradient_accumulation_steps
        data = MixedLoaders(dataloaders, tau, count, batch_postprocessors)
        schedule = scheduler_class, scheduler_args, scheduler, max_grad_norm, num_steps, callback
        super().train(optimizer, data, None, *schedule, **args)

    def train_on_batch(self, batch: Any, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The loss of ``(batch, task)``, and what it is made of."""
        batch, task = batch
        models, adaptors = (self.model_S, self.model_T[task]), (self.adaptor_S[task], self.adaptor_T[task])
        return self.compute_loss(*self._read(batch, args, models, adaptors, task))


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
        results = entries_of(self.adaptor(batch, call(self.model_S, batch, args)))
        if "losses" not in results:
            raise ValueError(f"the adaptor gave no 'losses', only {sorted(results)}; there is nothing to train by")
        return total_of(results["losses"])


def _custom_layer(number: int, match: CustomMatch) -> Match:
    loss = match.loss
    if isinstance(loss, str):
        named = find(loss, MATCH_LOSS_MAP, "match loss")
        loss = lambda ours, theirs, mask, _: named(ours, theirs, mask=mask)  # noqa: E731
    return Match(WATCHED, number, number, loss, match.weight, match.proj_func)


def _said(given: Any) -> str:
    """What was given, in few words."""
    return f"a {type(given).__name__}" if given or not isinstance(given, (list, tuple, dict)) else f"{given!r}"
