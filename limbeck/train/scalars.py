"""Numbers of a loop of one's own, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class Scalars:
    """Writes numbers for TensorBoard, in the first process alone.

    Use it as a context; what was written is on the disk at its end. `fit` has its own: ``Settings(trackers=...)``.

    Args:
        folder: Where the files go; None writes nothing.

    Raises:
        ImportError: TensorBoard is not installed.

    Example:
        >>> with Scalars(None) as scalars:
        ...     scalars.write({"loss": 0.5})
    """

    def __init__(self, folder: Path | str | None) -> None:
        self._writer: Any = None
        self._written = 0
        if folder is None:
            return
        from accelerate import PartialState

        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard is not installed; pip install 'limbeck[tensorboard]'") from error
        if PartialState().is_main_process:
            self._writer = SummaryWriter(str(folder))

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, values: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Write some numbers by their names, of a step, or of as many as were written so far."""
        if self._writer is not None:
            for name, value in values.items():
                number = value.item() if isinstance(value, Tensor) else value
                self._writer.add_scalar(name, number, self._written if step is None else step)
        self._written += 1
