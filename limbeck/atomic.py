"""Files that are whole or not there: written beside their place, brought to the disk, and renamed.

After a crash, a kill or a full disk at any moment, a path holds either what stood there before or all of the new.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".partial"
"""What stands behind the name of a file that is not whole yet; a stale one may be deleted."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move the file written there to `path` when the block ends well.

    Args:
        path: The file to write or to replace. Its folder must exist.

    Yields:
        The temporary path. Where the block fails, it is removed, and `path` stays as it was.

    Raises:
        OSError: the disk is full or the folder cannot be written, whichever library wrote the file.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("1 2 3")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('1 2 3', ['numbers.txt'])
    """
    temporary = path.with_name(path.name + SUFFIX)
    try:
        with disk_errors(path):
            yield temporary
            sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_chunks(path: Path, chunks: Iterable[Any]) -> None:
    """Write a file, whole or not at all, from pieces that share the memory of arrays; see `replacing`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)


def create_text(path: Path, text: str) -> bool:
    """Write a text file, UTF-8, whole or not at all, unless another process was first.

    Returns:
        Whether it was written; where it was there already, it stays as it is.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "name.txt"
        >>> create_text(target, "a"), create_text(target, "b"), target.read_text()
        (True, False, 'a')
    """
    temporary = path.with_name(f"{path.name}-{os.getpid()}{secrets.token_hex(4)}{SUFFIX}")
    try:
        with disk_errors(path):
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links, where the last one to come wins
            if path.exists():
                return False
            temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; see `replacing`."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors raises when the disk is full, which is no OSError, into the OSError that it was.

    A failed write does not say which file it was of: here it does.

    Example:
        >>> with disk_errors(Path("weights")):
        ...     raise SafetensorError("I/O error: No space left on device (os error 28)")
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device: 'weights'
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, from the cache to the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened, and renames are journaled
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
