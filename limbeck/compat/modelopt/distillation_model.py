"""The model that `convert` returns: the student, and a teacher that sees what it sees."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.accompanied import Accompanied
from limbeck.compat.modelopt.config import ConfigError, KDLossConfig, LayerwiseKDConfig, Loss
from limbeck.compat.modelopt.layers import Layer, layers_of
from limbeck.compat.modelopt.loss_balancers import STUDENT_LOSS_KEY
from limbeck.compat.modelopt.losses import logits_of
from limbeck.teachers import ModuleTeacher, as_teacher

LOSS_MODULES, TEACHER_MODEL = "_loss_modules", "_teacher_model"


class DistillationModel(Accompanied):
    """A student that is taken for itself, a teacher, and losses between them; made by `convert`.

    Args:
        student: The student.
        config: The teacher and the losses.

    Raises:
        ConfigError: a module that one of the two does not have.
    """

    def __init__(self, student: nn.Module, config: KDLossConfig | LayerwiseKDConfig) -> None:
        losses = config.losses()
        teacher = as_teacher(config.teacher_model)
        if not isinstance(teacher, ModuleTeacher):
            raise TypeError(f"the teacher of a converted model is a module, got {type(teacher).__name__}")
        layerwise = isinstance(config, LayerwiseKDConfig)
        try:
            super().__init__(student, teacher.module, [pair for pair, _ in losses], layerwise)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._losses = [loss for _, loss in losses]
        self._loss_modules = nn.ModuleList(_with_state(self._losses))
        self._loss_balancer = config.loss_balancer
        if not config.expose_minimal_state_dict:
            self._teacher_model = teacher.module
        self._hidden = False

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
        for place, (loss, sides) in enumerate(zip(self._losses, self.take(), strict=True)):
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
    def _layers_to_loss(self) -> dict[tuple[Layer, Layer], Loss]:
        return {layers_of(self._witness, self.student, pair): loss for pair, loss in self.losses_by_pair()}

    @property
    def _only_teacher_fwd(self) -> bool:
        return self._alone == "teacher"

    @property
    def _only_student_fwd(self) -> bool:
        return self._alone == "student"

    @property
    def _hook_handles(self) -> list[RemovableHandle]:
        return [*self._witness.student.handles, *self._witness.teacher.watch.handles]

    @property
    def _intermediate_output(self) -> Any:
        return Layer(self.student, "", "student", self._witness)._intermediate_output

    @property
    def original_cls(self) -> type[nn.Module]:
        """The student's class."""
        return type(self.student)

    @contextmanager
    def hide_teacher_model(self, enable: bool = True) -> Iterator[None]:
        """Hide the teacher from the module tree for a while."""
        before, self._hidden = self._hidden, self._hidden or enable
        try:
            with self.without(TEACHER_MODEL, enable):
                yield
        finally:
            self._hidden = before

    def hide_loss_modules(self, enable: bool = True) -> AbstractContextManager[None]:
        """Hide the losses that have weights from the module tree for a while."""
        return self.without(LOSS_MODULES, enable)

    def only_teacher_forward(self, enable: bool = True) -> AbstractContextManager[None]:
        """Run the teacher alone for a while, and return its output."""
        return self.alone("teacher", enable)

    def only_student_forward(self, enable: bool = True) -> AbstractContextManager[None]:
        """Run the student alone for a while."""
        return self.alone("student", enable)


LayerwiseDistillationModel = DistillationModel


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
