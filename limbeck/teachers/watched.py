"""A model in a loop of one's own, of which the outputs of some modules are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from limbeck.taps import Recorder, resolve
from limbeck.teachers.module import record


class Watched:
    """Calls a model, and keeps the outputs of some of its modules.

    Args:
        model: The model; it is not changed.
        modules: Some of its modules, or taps.

    Attributes:
        seen: What they gave in the last call, in this order; with gradient where the call had one.

    Raises:
        ValueError: a module that is no part of the model, or a path that it does not have.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> watched = Watched(model, [model[0]])
        >>> output = watched(torch.ones(1, 2))
        >>> torch.equal(output, watched.seen[0].relu())
        True
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module | str]) -> None:
        names: dict[nn.Module | str, str] = {module: name for name, module in model.named_modules()}
        strange = next((m for m in modules if isinstance(m, nn.Module) and not names.get(m)), None)
        if strange is not None:
            raise ValueError(
                f"a {type(strange).__name__} to watch is no part of the {type(model).__name__}; pass one of its "
                "modules, or a path"
            )
        self.model = model
        self.seen: list[Tensor] = []
        self._paths = [names.get(module, str(module)) for module in modules]
        self._recorder = Recorder(model, resolve(model, self._paths))

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the model."""
        output, found = record(self._recorder, lambda **more: self.model(*inputs, **named, **more))
        self.seen = [found[path] for path in self._paths]
        return output
