"""Where a study is kept: a journal, which is a file, or a database; where it cannot be opened, one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from limbeck.pretrained import first_line

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "journal.log"
BEGIN = b'{"op_code"'
"""How a journal of Optuna's begins."""


def is_address(storage: str) -> bool:
    """Whether a storage is a database and not a journal's file.

    Example:
        >>> is_address("postgresql://host/limbeck"), is_address("runs/journal.log")
        (True, False)
    """
    return "://" in storage


def shown(storage: str) -> str:
    """A storage as it may be printed: without the password in it.

    Example:
        >>> shown("postgresql://me:secret@host/limbeck"), shown("runs/journal.log")
        ('postgresql://me:***@host/limbeck', 'runs/journal.log')
    """
    if not is_address(storage):
        return storage
    from sqlalchemy.engine import make_url

    return str(make_url(storage).render_as_string(hide_password=True))


def open_storage(storage: str) -> BaseStorage:
    """Open a journal or a database.

    Args:
        storage: The path of a journal, which may be new, or an address that SQLAlchemy knows.

    Raises:
        ValueError: it cannot be reached, its driver is not installed, or the journal is damaged.
    """
    return _open_database(storage) if is_address(storage) else _open_journal(Path(storage).expanduser())


def _open_database(address: str) -> BaseStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(address)
    except (SQLAlchemyError, ValueError) as error:
        raise ValueError(
            f"the storage cannot be read ({first_line(error)}); write it as sqlite:///study.db or "
            "postgresql://user@host/database"
        ) from None
    try:
        return RDBStorage(address)
    except ImportError as error:
        driver = getattr(error.__cause__ or error, "name", None)
        wanted = f"the driver {driver}" if driver else "a driver"
        raise ValueError(
            f"the storage {shown(address)} needs {wanted}, which is not installed; install it with "
            "pip, or name another one in the address"
        ) from None
    except (SQLAlchemyError, OSError, RuntimeError) as error:
        cause = error.__cause__
        said = first_line(cause if isinstance(cause, Exception) else error)
        raise ValueError(
            f"the storage {shown(address)} cannot be reached ({said}); check the address and that the server runs"
        ) from None


def _open_journal(path: Path) -> BaseStorage:
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    if path.is_dir():
        raise ValueError(f"the storage {path} is a folder; name a file in it, such as {path / JOURNAL}")
    if not path.parent.is_dir():
        raise ValueError(f"the storage {path} lies in no folder; make {path.parent}, or name another place")
    _check_is_journal(path)
    lock = JournalLock(path)
    lock.acquire()
    try:
        mend(path)
    finally:
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the journal {path} is damaged ({first_line(error)}); name another file") from None


def _check_is_journal(path: Path) -> None:
    """Leave other files as they are."""
    with path.open("rb") if path.is_file() else nullcontext() as file:
        begin = b"" if file is None else file.read(len(BEGIN))
    if begin and begin != BEGIN:
        raise ValueError(f"{path} is no journal of a search; name another file")


@contextmanager
def told_when_lost(storage: str | None) -> Iterator[None]:
    """Say in one line that a database went away while it was worked with.

    Args:
        storage: A journal's path or a database's address; None for the search's own journal.

    Raises:
        ValueError: it went away.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__
        said = first_line(cause if isinstance(cause, Exception) else error)
        raise ValueError(
            f"the storage {shown(storage or JOURNAL)} was lost ({said}); what was finished is kept, and the same "
            "command goes on when it is there again"
        ) from None


class JournalLock:
    """Lets one process at a time write into a journal; the system frees it when its holder dies.

    Optuna's own locks stay behind a killed process, and the next one waits half a minute.

    Args:
        path: The journal.
    """

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


def mend(path: Path) -> None:
    r"""Cut off a last line that a killed process did not finish, for all after it would be unreadable.

    Example:
        >>> import tempfile
        >>> journal = Path(tempfile.mkdtemp()) / "journal.log"
        >>> _ = journal.write_text('{"op": 1}' + chr(10) + '{"op"')
        >>> mend(journal)
        >>> journal.read_text()
        '{"op": 1}\n'
    """
    data = path.read_bytes() if path.is_file() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("rb+") as file:
            file.truncate(whole)


def quiet() -> Any:
    """Let Optuna say what goes wrong, and nothing else: what it tells of each trial is told here already."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
