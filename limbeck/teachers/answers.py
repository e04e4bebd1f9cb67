"""What a teacher wrote, kept line by line, so that nothing is asked for twice."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

FILE = "answers.jsonl"


class Answers:
    """Texts by key, in memory and, with a folder, in a file of JSON lines that only grows.

    Each line is brought to the disk before it counts. A line that a crash left unfinished is passed over, and what
    it held is asked for again.

    Args:
        folder: Where to keep them, made if it is not there; None for memory alone.

    Raises:
        OSError: the folder cannot be written.
        ValueError: it is a file, or holds other things and no answers.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp())
        >>> Answers(place).keep("k", "an answer", {"prompt": "a question"})
        >>> Answers(place).found
        {'k': 'an answer'}
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.found: dict[str, str] = {}
        self._lock = threading.Lock()
        self._file = None if folder is None else folder / FILE
        if folder is not None:
            _check_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._read()

    def keep(self, key: str, answer: str, described: dict[str, Any]) -> None:
        """Add an answer; `described` stands beside it in the file, for a reader."""
        line = json.dumps({"key": key, **described, "answer": answer}, ensure_ascii=False) + "\n"
        with self._lock:
            if self._file is not None:
                self._append(line.encode("utf-8", "surrogatepass"))
            self.found[key] = answer

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        with self._file.open("a+b") as file:
            if file.tell() and not self._ends_a_line(file):
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _ends_a_line(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return bool(file.read(1) == b"\n")

    def _read(self) -> None:
        assert self._file is not None
        if not self._file.is_file():
            return
        for line in self._file.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                key, answer = entry["key"], entry["answer"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(key, str) and isinstance(answer, str):
                self.found[key] = answer


def _check_folder(folder: Path) -> None:
    """Leave a folder that is somebody else's alone."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file, and answers are kept in a folder; name another")
    other = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if other and FILE not in other:
        raise ValueError(f"{str(folder)!r} holds {other[0]!r} and no answers of a teacher; name another folder")
