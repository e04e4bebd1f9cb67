"""A student of several tasks: a model for each, and one body that they share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.pretrained import backbone_name, load_with_head
from limbeck.registry import nearest


class Heads(nn.Module):
    """Models of several tasks that share one part, the body; what each has beside it is its head.

    A call runs the model of one task, ``student(task="rte", **inputs)``, and returns what it returns. Taps are
    ``"body.encoder.layer.3"`` for all tasks and ``"models.rte.classifier"`` for a term of one.

    Args:
        models: A model for each task, which are put together here: the first one's body becomes that of all.
        body: Path of the shared part in each of the models; ``"bert"``, or ``"0"`` of an `nn.Sequential`.

    Raises:
        ValueError: no model, a name that no module can have, or a model without such a part or with one of another
            build.

    Example:
        >>> import torch
        >>> def model(classes):
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))
        >>> student = Heads({"rte": model(2), "mnli": model(3)}, body="0")
        >>> student(torch.ones(5, 4), task="mnli").shape
        torch.Size([5, 3])
        >>> sum(p.numel() for p in student.parameters()) == 4 * 8 + 8 + (8 * 2 + 2) + (8 * 3 + 3)
        True
        >>> student.export_task("rte")[2]
        Linear(in_features=8, out_features=2, bias=True)
    """

    def __init__(self, models: Mapping[str, nn.Module], body: str) -> None:
        super().__init__()
        if not models:
            raise ValueError("a student of several tasks needs a model for each; pass {task: model}")
        for task, model in models.items():
            _check_name(task)
            _check_part(task, model, body)
        first = next(iter(models))
        # Before the models, so that the shared modules have their paths here.
        self.body = models[first].get_submodule(body)
        for task, model in models.items():
            _check_same_build(first, self.body, task, model.get_submodule(body))
            model.set_submodule(body, self.body)
        self.models = nn.ModuleDict(models)
        self._takes = {task: _Takes(model) for task, model in models.items()}

    @classmethod
    def from_pretrained(cls, source: str | Path, tasks: Mapping[str, Sequence[str]]) -> Heads:
        """Make a student of a pretrained transformers encoder, with a classifier for each task.

        Args:
            source: A folder or hub id.
            tasks: The labels of each task; none where a number is to be predicted.

        Raises:
            ValueError: nothing can be loaded, or there is no task.

        Example:
            >>> Heads.from_pretrained("no/such/folder/here", {"rte": ["yes", "no"]})
            Traceback (most recent call last):
            ValueError: cannot load a text model from 'no/such/folder/here': there is no such folder
        """
        from transformers import AutoModelForSequenceClassification

        models: dict[str, Any] = {}
        body, shared = "", None
        for task, labels in tasks.items():
            model, _ = load_with_head(
                AutoModelForSequenceClassification, source, labels, "a text model", new_head=True
            )
            body = backbone_name(model)
            shared = model.get_submodule(body) if shared is None else shared
            model.set_submodule(body, shared)  # at once, so that never more than two bodies are in memory
            models[task] = model
        return cls(models, body)

    def forward(self, *inputs: Any, task: str | None = None, **named: Any) -> Any:
        """Run the model of a task.

        Args:
            *inputs: Its inputs in order.
            task: The task.
            **named: Its inputs by name; what its forward does not take is left out.

        Raises:
            ValueError: there is no such task.
        """
        return self.model_of(task)(*inputs, **self._takes[str(task)].of(named))

    def model_of(self, task: str | None) -> nn.Module:
        """The model of a task, which shares its body with the others.

        Raises:
            ValueError: there is no such task.
        """
        if task is None:
            raise ValueError(f"the student has to know the task, one of {', '.join(self.models)}; pass task=")
        if task not in self.models:
            raise ValueError(f"the student has no task {task!r}; {nearest(task, self.models)}")
        return self.models[task]

    def export_task(self, task: str) -> nn.Module:
        """Give a copy of one task's model, of the class that went in, which shares nothing with the others.

        A transformers model is then saved as always, with ``save_pretrained``.

        Raises:
            ValueError: there is no such task.
        """
        return copy.deepcopy(self.model_of(task))


class _Takes:
    """Which entries of a batch a model can be given."""

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        self.is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    def of(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Those entries; where a model takes anything beside its inputs, also flags, such as what to return."""
        if self.is_open and not self.named:
            return dict(named)
        return {k: v for k, v in named.items() if k in self.named or (self.is_open and isinstance(v, bool))}


def _check_name(task: str) -> None:
    if not isinstance(task, str) or not task or "." in task or task in dir(nn.ModuleDict):
        raise ValueError(f"a student's task cannot be called {task!r}, which no module can be; name it otherwise")


def _check_part(task: str, model: nn.Module, body: str) -> None:
    paths = [name for name, _ in model.named_modules() if name]
    if body not in paths:
        raise ValueError(f"the model of task {task!r} has no part {body!r} to share; {nearest(body, paths)}")


def _check_same_build(first: str, ours: nn.Module, task: str, theirs: nn.Module) -> None:
    shapes = [{k: tuple(v.shape) for k, v in part.state_dict().items()} for part in (ours, theirs)]
    different = next((k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k)), None)
    if different is not None:
        sides = [shape.get(different, "absent") for shape in shapes]
        raise ValueError(
            f"the bodies of tasks {first!r} and {task!r} differ: {different} is {sides[0]} and {sides[1]}; "
            "build both models alike"
        )
