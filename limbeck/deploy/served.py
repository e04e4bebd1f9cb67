"""Exported models as modules, so that what scores and times a PyTorch model does the same for them.

Shape legend: B examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.deploy.onnx_files import need_onnx, session_options
from limbeck.deploy.program import LOGITS, read_program
from limbeck.pretrained import first_line


class Served(nn.Module):
    """An exported model: named inputs in, logits out. It has no parameters, and does not train.

    Args:
        run: What computes the logits (B, C) of the inputs, in their order.
        names: The names of the inputs.
        what: What it is, in an error message.

    Example:
        >>> model = Served(lambda left, right: left - right, ["left", "right"], "a difference")
        >>> model(right=torch.ones(1, 2), left=torch.zeros(1, 2), labels=torch.zeros(1))
        tensor([[-1., -1.]])
    """

    def __init__(self, run: Callable[..., Tensor], names: Sequence[str], what: str) -> None:
        super().__init__()
        self.run = (run,)  # in a tuple, since a graph refuses the change of mode that reaches every submodule
        self.names = tuple(names)
        self.what = what

    def forward(self, **inputs: Any) -> Tensor:
        """The logits (B, C); entries that it does not take are left aside.

        Raises:
            ValueError: an input is missing.
        """
        missing = [name for name in self.names if name not in inputs]
        if missing:
            raise ValueError(f"{self.what} takes {missing[0]!r}, and the batch has {sorted(inputs)}")
        return self.run[0](*(inputs[name] for name in self.names))


def open_onnx(path: Path, threads: int | None = None) -> Served:
    """Open an ONNX file on the CPU.

    Args:
        path: The file.
        threads: Threads of one call; by default as many as PyTorch has.

    Raises:
        ValueError: onnxruntime cannot read it, or is not installed.
    """
    need_onnx()
    import onnxruntime

    options = session_options(threads or torch.get_num_threads())
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common but this
        raise ValueError(f"onnxruntime cannot read {path}: {first_line(error)}") from None
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run([LOGITS], fed)[0])

    return Served(run, names, str(path))


def open_program(path: Path, names: Sequence[str]) -> Served:
    """Open a ``.pt2`` file.

    Args:
        path: The file.
        names: The names of its inputs, in order.

    Raises:
        ValueError: it cannot be read.
    """
    module: Any = read_program(path).module()
    return Served(module, names, str(path))
