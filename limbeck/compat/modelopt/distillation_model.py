"""The model that `convert` returns: the student, and a teacher that sees what it sees."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from limbeck.compat.modelopt.config import ConfigError, KDLossConfig, LayerwiseKDConfig, Loss
from limbeck.compat.modelopt.loss_balancers import STUDENT_LOSS_KEY
from limbeck.compat.modelopt.losses import logits_of
from limbeck.registry import nearest
from limbeck.standin import StandIn
from limbeck.teachers import ModuleTeacher, as_teacher
from limbeck.witness import Witness

LOSS_MODULES, TEACHER = "_loss_modules", "_teacher_model"

NOT_USED = "what the {} returned for the last batch was not used; call compute_kd_loss after each call"

NO_INPUTS = (
    "the teacher has no intermediate input stored, so that the student's modules get their own; run the teacher "
    "before, in only_teacher_forward"
)


class DistillationModel(StandIn):
    """A student that is taken for itself, a teacher, and losses between them; made by `convert`.

    Args:
        student: The student.
        config: The teacher and the losses.

    Raises:
        ConfigError: a module that one of the two does not have.
    """

    def __init__(self, student: nn.Module, config: KDLossConfig | LayerwiseKDConfig) -> None:
        super().__init__(student)
        losses = config.losses()
        teacher = as_teacher(config.teacher_model)
        if not isinstance(teacher, ModuleTeacher):
            raise TypeError(f"the teacher of a converted model is a module, got {type(teacher).__name__}")
        for place, (model, side) in enumerate(((student, "student"), (teacher.module, "teacher"))):
            _check_paths(model, side, [pair[place] for pair, _ in losses])
        self._losses = [loss for _, loss in losses]
        self._loss_modules = nn.ModuleList(_with_state(self._losses))
        self._loss_balancer = config.loss_balancer
        if not config.expose_minimal_state_dict:
            self._teacher_model = teacher.module
        layerwise = isinstance(config, LayerwiseKDConfig)
        self._witness = Witness(student, teacher.module, [pair for pair, _ in losses], layerwise)
        self._trained = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
        self._only: str | None = None
        self._hidden = False
        self._replica = 0
        if layerwise:
            student.requires_grad_(False)
            for (path, _), _ in losses:
                student.get_submodule(path).requires_grad_(True)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the teacher and the student in training mode, the student alone in eval mode."""
        witness, replica = self._witness, self._replica
        if self._only == "teacher":
            return witness.ask(args, kwargs, replica=replica)
        if self._only == "student":
            if witness.layerwise and not witness.saw(replica, "teacher"):
                warnings.warn(NO_INPUTS, stacklevel=2)
            return witness.learn(self.student, args, kwargs, replica=replica)
        for side in ("student", "teacher"):
            if self.training and witness.saw(replica, side):
                warnings.warn(NOT_USED.format(side), stacklevel=2)
        return witness.call(self.student, args, kwargs, replica=replica, later=not self.training)

    def compute_kd_loss(
        self,
        student_loss: Tensor | None = None,
        loss_reduction_fn: Callable[[Tensor], Tensor] | None = None,
        skip_balancer: bool = False,
        **loss_fn_kwargs: Any,
    ) -> Any:
        """The loss of the last batch; in eval mode, it is now that the teacher is run.

        Args:
            student_loss: The student's own loss.
            loss_reduction_fn: Reduces each distillation loss before they are balanced.
            skip_balancer: Return the losses by name, as a balancer is given them.
            **loss_fn_kwargs: What else the losses take; each is given what it has a parameter for.

        Raises:
            ConfigError: a loss of the student's own, and no balancer that would weigh it.
            TypeError: an argument that no loss takes.
            ValueError: the model was not called.
        """
        if student_loss is not None and self._loss_balancer is None:
            raise ConfigError("student_loss was given without using Loss Balancer; add one to the configuration")
        _refuse_unused(self._losses, loss_fn_kwargs)
        found: dict[str, Any] = {} if student_loss is None else {STUDENT_LOSS_KEY: student_loss}
        for place, (loss, sides) in enumerate(zip(self._losses, self._witness.take(), strict=True)):
            ours, theirs = map(logits_of, sides) if _of_torch(loss) else sides
            value = loss(ours, theirs, **_taken(loss, loss_fn_kwargs))
            name = getattr(loss, "__name__", type(loss).__name__)
            found[f"{name}_{place}"] = value if loss_reduction_fn is None else loss_reduction_fn(value)
        if skip_balancer:
            return found
        return next(iter(found.values())) if self._loss_balancer is None else self._loss_balancer(found)

    @property
    def teacher_model(self) -> nn.Module:
        """The teacher."""
        return nn.Module() if self._hidden else self._witness.teacher.module

    @property
    def loss_modules(self) -> nn.ModuleList:
        """The losses that have weights, in the order of the criterion."""
        found: nn.ModuleList = self._loss_modules
        return found

    @property
    def loss_balancer(self) -> nn.Module | None:
        """What makes one loss of several."""
        return self._loss_balancer

    def losses_by_pair(self) -> list[tuple[tuple[str, str], Loss]]:
        """The losses, each with the paths of the modules that it compares."""
        return list(zip(self._witness.pairs, self._losses, strict=True))

    @property
    def original_cls(self) -> type[nn.Module]:
        """The student's class."""
        return type(self.student)

    @contextmanager
    def hide_teacher_model(self, enable: bool = True) -> Iterator[None]:
        """Hide the teacher from the module tree for a while."""
        before, self._hidden = self._hidden, self._hidden or enable
        try:
            with self._without(TEACHER, enable):
                yield
        finally:
            self._hidden = before

    @contextmanager
    def hide_loss_modules(self, enable: bool = True) -> Iterator[None]:
        """Hide the losses that have weights from the module tree for a while."""
        with self._without(LOSS_MODULES, enable):
            yield

    @contextmanager
    def only_teacher_forward(self, enable: bool = True) -> Iterator[None]:
        """Run the teacher alone for a while, and return its output."""
        with self._running("teacher" if enable else self._only):
            yield

    @contextmanager
    def only_student_forward(self, enable: bool = True) -> Iterator[None]:
        """Run the student alone for a while."""
        with self._running("student" if enable else self._only):
            yield

    def train(self, mode: bool = True) -> Any:
        """Set the mode; what was kept of the other mode is forgotten."""
        if mode != self.training:
            self._witness.forget()
        super().train(mode)
        self._witness.teacher.module.eval()
        return self

    def export(self) -> nn.Module:
        """Give the student back: the object that went in, without hooks, with what was to be trained before."""
        self._witness.end()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(self._trained.get(name, parameter.requires_grad))
        return self.student

    @contextmanager
    def _running(self, only: str | None) -> Iterator[None]:
        before, self._only = self._only, only
        try:
            yield
        finally:
            self._only = before

    @contextmanager
    def _without(self, name: str, enable: bool) -> Iterator[None]:
        there = self._modules.get(name)
        if enable and there is not None:
            self._modules[name] = nn.ModuleList()
        try:
            yield
        finally:
            if there is not None:
                self._modules[name] = there

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What moves or converts the model does so to the teacher, too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if TEACHER not in self._modules:
            self._witness.teacher.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._witness.teacher.changed()
        return self

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._replica = self._witness.replicate()
        return replica


LayerwiseDistillationModel = DistillationModel


def _check_paths(model: nn.Module, side: str, paths: list[str]) -> None:
    known = dict(model.named_modules())
    for path in paths:
        if path not in known:
            raise ConfigError(f"the {side} has no module {path!r}; {nearest(path, set(known) - {''})}")


def _with_state(losses: list[Loss]) -> list[nn.Module]:
    """The losses that have weights or buffers, each once, in order."""
    modules = {id(loss): loss for loss in losses if isinstance(loss, nn.Module) and loss.state_dict()}
    return list(modules.values())


def _of_torch(loss: Loss) -> bool:
    """Whether a loss is one of PyTorch's own, which takes tensors; a user's takes whatever a model returns."""
    return type(loss).__module__ == "torch.nn.modules.loss"


def _taken(loss: Loss, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a loss has parameters for."""
    parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in arguments.items() if is_open or name in parameters}


def _refuse_unused(losses: list[Loss], arguments: Mapping[str, Any]) -> None:
    unused = set(arguments).difference(*(_taken(loss, arguments) for loss in losses))
    if unused:
        raise TypeError(f"none of the losses takes {min(unused)!r}; leave it out of compute_kd_loss")
