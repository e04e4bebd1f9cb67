"""Where statistics go: the terminal, TensorBoard, or a writer of your own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from limbeck.compat.pymarlin.utils.arguments import arguments
from limbeck.registry import nearest

LOGGER = logging.getLogger(__name__)


@arguments
@dataclass
class WriterInitArguments:
    """Options of writers.

    Raises:
        ValueError: ``tb_logpath_parent_env``, since nothing here is configured by the environment.

    Example:
        >>> WriterInitArguments().tb_log_dir
        'logs'
    """

    tb_log_dir: str = "logs"
    tb_logpath_parent_env: str | None = None
    tb_log_multi: bool = False
    tb_log_hist_steps: int = 20000
    model_log_level: str = "INFO"

    def __post_init__(self) -> None:
        if self.tb_logpath_parent_env is not None:
            raise ValueError(
                f"tb_logpath_parent_env={self.tb_logpath_parent_env!r} would read an environment variable; set "
                "tb_log_dir to the whole path"
            )


class Writer:
    """Writes numbers by name; override what you need.

    Example:
        >>> class Kept(Writer):
        ...     def log_scalar(self, k, v, step):
        ...         print(k, v, step)
        >>> Kept().log_multi("loss", {"train": 0.5}, 3)
        loss/train 0.5 3
    """

    def log_scalar(self, k: str, v: float, step: int) -> None:
        """Write one number."""

    def log_multi(self, k: str, v: Mapping[str, float], step: int) -> None:
        """Write numbers that belong together; by default one by one."""
        for name, value in v.items():
            self.log_scalar(f"{k}/{name}", value, step)

    def finish(self) -> None:
        """Close whatever is open."""


class Stdout(Writer):
    """Prints each number on a line.

    Example:
        >>> Stdout().log_scalar("loss", 0.5, 3)
        step = 3, loss : 0.5
    """

    def log_scalar(self, k: str, v: float, step: int) -> None:
        """Write one number."""
        print(f"step = {step}, {k} : {v}", flush=True)


class Tensorboard(Writer):
    """Writes for TensorBoard, beside what the folder already holds.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, args: WriterInitArguments) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "writer 'tensorboard' is not installed; pip install 'limbeck[tensorboard]'"
            ) from None
        self.writer = SummaryWriter(str(Path(args.tb_log_dir)))

    def log_scalar(self, k: str, v: float, step: int) -> None:
        """Write one number."""
        self.writer.add_scalar(k, v, step)

    def finish(self) -> None:
        """Close the file."""
        self.writer.close()


def build_writer(writer: str | Writer, args: WriterInitArguments) -> Writer | None:
    """Make a writer by name; ``"aml"`` gives None and a line in the log, since Azure ML is not used here.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> build_writer("stdot", WriterInitArguments())
        Traceback (most recent call last):
        ValueError: unknown writer 'stdot'; did you mean 'stdout'?
    """
    if isinstance(writer, Writer):
        return writer
    if writer == "aml":
        LOGGER.warning("writer 'aml' writes nothing: Azure ML is not used here; pass a Writer of your own for it")
        return None
    if writer not in ("stdout", "tensorboard"):
        raise ValueError(f"unknown writer {writer!r}; {nearest(str(writer), ['stdout', 'tensorboard', 'aml'])}")
    return Stdout() if writer == "stdout" else Tensorboard(args)
