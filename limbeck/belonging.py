"""Whether a folder holds what belongs there, by what a file in it says it was made by."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from limbeck.cache import first_difference

MADE_BY = "made-by.json"


def holds_this(folder: Path, made_by: Mapping[str, Any], what: str, cure: str, own: Collection[str] = ()) -> bool:
    """Whether a folder was begun before; one that holds anything else is refused. Nothing is changed.

    Args:
        folder: The folder.
        made_by: What it belongs to, as JSON.
        what: What is kept there: ``"run"``.
        cure: What to do about one that holds another.
        own: Files that may lie there before it is begun.

    Raises:
        ValueError: it holds another one, or other files; the message names the difference.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> holds_this(folder, {"epochs": 3}, "run", "choose another folder")
        False
        >>> _ = (folder / MADE_BY).write_text('{"epochs": 2}')
        >>> holds_this(folder, {"epochs": 3}, "run", "choose another folder")
        Traceback (most recent call last):
        ValueError: ... holds another run (epochs: 2 there, 3 here); choose another folder
    """
    kept = folder / MADE_BY
    if not kept.is_file():
        if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - set(own)):
            raise ValueError(f"{folder} holds no {what} of limbeck; choose another or empty folder with --out")
        return False
    try:
        difference = first_difference(made_by, json.loads(kept.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{kept} is damaged ({error}); {cure}") from None
    if difference:
        raise ValueError(f"{folder} holds another {what} ({difference}); {cure}")
    return True
