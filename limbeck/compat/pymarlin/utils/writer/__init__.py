"""The names of ``pymarlin.utils.writer``."""

from limbeck.compat.pymarlin.utils.writer.base import (
    Stdout,
    Tensorboard,
    Writer,
    WriterInitArguments,
    build_writer,
)

__all__ = ["Stdout", "Tensorboard", "Writer", "WriterInitArguments", "build_writer"]
