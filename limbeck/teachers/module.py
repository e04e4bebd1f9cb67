"""A teacher that is a module in this process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from limbeck.batch import positional
from limbeck.cache import module_identity
from limbeck.taps import OUTPUT_NAMES, Read, Recorder, Tap, requested_outputs, resolve
from limbeck.types import EXAMPLE_ID, INPUTS, LABELS, TASK, Batch, Signal


class ModuleInputs:
    """Calls a model with what it takes from a batch.

    A batch holds more than one model wants: labels, example numbers, inputs of the other model. Only the
    parameters that the model's ``forward`` names are passed; a forward that takes ``**kwargs`` alone, or beside
    ``task``, gets all.

    Args:
        model: The model to call.

    Example:
        >>> call = ModuleInputs(nn.Linear(2, 3))
        >>> call({"input": torch.zeros(4, 2), "labels": torch.zeros(4)}).shape
        torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters.values()
        self.named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        self.is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def select(self, batch: Batch) -> dict[str, Any]:
        """The entries of the batch that the model takes by name."""
        takes_all = self.is_open and not self.named - {TASK}
        reserved = {EXAMPLE_ID, LABELS} | ({INPUTS} if positional(batch) else set())
        return {k: v for k, v in batch.items() if k not in reserved and (takes_all or k in self.named)}

    def __call__(self, batch: Batch, **extra: Any) -> Any:
        """Call the model; of `extra`, it gets what its forward can take."""
        inputs, given = self.select(batch), positional(batch)
        if not inputs and not given:
            raise ValueError(
                f"{type(self.model).__name__} takes {sorted(self.named)}, and the batch has {sorted(batch)}; "
                "rename the batch's entries to the model's"
            )
        extra = {key: value for key, value in extra.items() if self.is_open or key in self.named}
        return self.model(*given, **inputs, **extra)

    def alone(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Call the model as its user would, with labels if it takes them, and without what it cannot take."""
        if LABELS not in named and len(inputs) > max(1, self.places):
            inputs = inputs[:-1]
        unknown = {EXAMPLE_ID, LABELS, TASK} - self.named
        known = {k: v for k, v in named.items() if k in self.named or (self.is_open and k not in unknown)}
        return self.model(*inputs, **known)


class ModuleTeacher:
    """A frozen module as a teacher: always in eval mode, no gradient, on the device of the batch.

    Args:
        module: The trained model. It is frozen (``requires_grad`` off) and put into eval mode.
        read: Names the module's outputs where they have no names.

    Example:
        >>> teacher = ModuleTeacher(nn.Linear(2, 3))
        >>> teacher.offers("logits"), teacher.offers("lgits")
        (True, False)
        >>> teacher.signal({"input": torch.zeros(4, 2)}, ["logits"])["logits"].shape
        torch.Size([4, 3])
    """

    def __init__(self, module: nn.Module, read: Read | None = None) -> None:
        self.module = module.eval().requires_grad_(False)
        self.read = read
        self._call = ModuleInputs(module)
        self._recorders: dict[tuple[str, ...], Recorder] = {}

    def offers(self, tap: str) -> bool:
        """Whether the module has this tap."""
        try:
            self._resolve([tap])
        except ValueError:
            return False
        return True

    def names(self) -> Iterable[str]:
        """The module's paths and the known output names."""
        return [*(name for name, _ in self.module.named_modules()), *OUTPUT_NAMES]

    @torch.no_grad()
    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Run the module on the batch and read the wanted taps."""
        recorder = self._recorder(tuple(wants))
        self._follow(batch)
        self.module.eval()
        _, values = record(recorder, lambda **extra: self._call(batch, **extra))
        return Signal({tap: tensor.detach() for tap, tensor in values.items()})

    def identity(self) -> Mapping[str, Any]:
        """Its weights, class and configuration."""
        return module_identity(self.module)

    def _resolve(self, taps: Iterable[str]) -> dict[str, Tap]:
        return resolve(self.module, taps, any_output=self.read is not None)

    def _recorder(self, wants: tuple[str, ...]) -> Recorder:
        if wants not in self._recorders:
            self._recorders[wants] = Recorder(self.module, self._resolve(wants), self.read)
        return self._recorders[wants]

    def _follow(self, batch: Batch) -> None:
        """Move to where the batch is; the Distiller moves the student only."""
        tensors = [*positional(batch), *batch.values()]
        device = next((t.device for t in tensors if isinstance(t, torch.Tensor)), None)
        here = next(self.module.parameters(), None)
        if device is not None and here is not None and here.device != device:
            self.module.to(device)


def record(recorder: Recorder, run: Callable[..., Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run a model under a recorder; return its output and what the taps saw.

    A tapped tensor that a later in-place operation overwrote is cloned, and the model is run once more: this
    happens on the first batch only.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> _, seen = record(Recorder(model, resolve(model, ["0"])), lambda: model(torch.ones(1, 2)))
        >>> bool((seen["0"] == model[0](torch.ones(1, 2))).all())
        True
    """
    extra: Mapping[str, Any] = requested_outputs(recorder.taps.values())
    with recorder.armed():
        output = run(**extra)
    if recorder.overwritten():
        with recorder.armed():
            output = run(**extra)
    return output, recorder.collect(output)
