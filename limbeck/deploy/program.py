"""From a module to a graph with a free batch size and length: what both ONNX and ``.pt2`` files are made of.

Shape legend: B examples, L tokens, C classes.
"""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.atomic import replacing
from limbeck.pretrained import first_line
from limbeck.taps import read_output
from limbeck.teachers import ModuleInputs
from limbeck.train import Examples

LOGITS = "logits"
BATCH, LENGTH = "batch", "length"
FREE = torch.export.Dim.DYNAMIC
TENSORS = ("weight_", "tensor_")
"""How an archive calls its weights and constants; what else stands there would have to be unpickled."""


class Traced(nn.Module):
    """A model as a graph sees it: named inputs in a fixed order, and the logits alone.

    Args:
        model: The model.
        names: The names of its inputs, in the order of the graph.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The logits (B, C)."""
        output = self.model(**dict(zip(self.names, inputs, strict=True)))
        logits = read_output(output)[LOGITS]
        assert isinstance(logits, Tensor)
        return logits


def graph_inputs(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """What a model is given of two examples, by name; they show the tracer what a batch looks like.

    Raises:
        ValueError: there are no examples, or the model takes an input that is no tensor.

    Example:
        >>> sorted(graph_inputs(nn.Linear(2, 3), Examples([{"input": torch.zeros(2), "labels": torch.tensor(0)}])))
        ['input']
    """
    if not len(examples):
        raise ValueError("there are no examples to check the export with; check the data")
    longest = sorted(range(len(examples)), key=lambda i: -(examples.lengths or [0] * len(examples))[i])
    batch = examples.batch([*longest, longest[0]][:2])
    inputs = dict(sorted(ModuleInputs(model).select(batch).items()))  # a batch has them in no order
    wrong = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    if wrong or not inputs:
        what = f"{wrong[0]!r} is no tensor" if wrong else f"{sorted(batch)} holds nothing that it takes"
        raise ValueError(f"{type(model).__name__} cannot be exported: its inputs must be tensors, and {what}")
    return inputs


def trace(model: nn.Module, inputs: Mapping[str, Tensor], with_lengths: bool) -> torch.export.ExportedProgram:
    """Trace a model in eval mode into a graph whose batch size, and for texts the length, are free.

    Args:
        model: The model; its mode and its place stay as they are.
        inputs: Example inputs by name, (B, ...) or (B, L), B and L of 2 at least.
        with_lengths: Whether the second dimension of inputs is a length.

    Raises:
        ValueError: the model does something that cannot be traced, or that fixes a size.

    Example:
        >>> program = trace(nn.Linear(2, 3), {"input": torch.zeros(2, 2)}, with_lengths=False)
        >>> program.module()(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """
    traced = Traced(model, list(inputs))
    free = {0: FREE, 1: FREE} if with_lengths else {0: FREE}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(
                traced, tuple(inputs.values()), dynamic_shapes=((dict(free),) * len(inputs),), strict=False
            )
    except Exception as error:  # a tracer raises whatever the model's own code raises
        raise ValueError(
            f"{type(model).__name__} cannot be exported: {first_line(error)}; a model must not read the values of "
            "its inputs to decide what to compute"
        ) from None
    finally:
        model.train(was_training)


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Let a transformers model compute attention in plain steps inside the block.

    The fused call that it prefers in PyTorch becomes more nodes in ONNX, and slower ones.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings off the screen: they are about their own code, and parity is what counts."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers = list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers  # a warning to the root logger gives it one, where it has none


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph as a ``.pt2`` file, whole or not at all."""
    with replacing(path) as temporary, quiet(), temporary.open("wb") as file:
        torch.export.save(program, file)


def read_program(path: Path) -> torch.export.ExportedProgram:
    """Read a ``.pt2`` file, of which nothing is unpickled but plain tensors.

    Raises:
        ValueError: it cannot be read, or holds objects that are no tensors.
    """
    try:
        _refuse_objects(path)
        with quiet():
            return torch.export.load(path)
    except (OSError, RuntimeError, KeyError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from None


def _refuse_objects(path: Path) -> None:
    """Refuse an archive whose loading would run code: torch.export.load falls back to unpickling anything."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            folder, _, file = name.rpartition("/")
            if folder.endswith(("data/weights", "data/constants")):
                _refuse_unless(file.endswith("_config.json") or file.startswith(TENSORS), path, name)
                if file.endswith("_config.json"):
                    entries = json.loads(archive.read(name))["config"].values()
                    _refuse_unless(not any(entry.get("use_pickle") for entry in entries), path, name)
                    _refuse_unless(all(e["path_name"].startswith(TENSORS) for e in entries), path, name)
            elif folder.endswith("data/sample_inputs"):
                try:
                    with archive.open(name) as inputs:
                        torch.load(inputs, weights_only=True)
                except Exception:  # whatever a broken or hostile pickle makes it raise
                    _refuse_unless(False, path, name)


def _refuse_unless(fine: bool, path: Path, name: str) -> None:
    if not fine:
        raise ValueError(f"{path} holds something that is no tensor ({name}), which is not loaded")
