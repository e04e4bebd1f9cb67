"""The hub of models: whether a name can be found there at all, said before its client has tried five times."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 5.0
"""Seconds for the hub to answer."""


def check_findable(source: str | Path, what: str = "a model") -> None:
    """Refuse a hub id that is no folder, was never downloaded, and cannot be asked for.

    Args:
        source: A folder or hub id.
        what: What is looked for, in the error message.

    Raises:
        ValueError: it is nowhere to be found.

    Example:
        >>> check_findable(Path("."))
        >>> import unittest.mock
        >>> with unittest.mock.patch("limbeck.hub.answers", lambda: False):
        ...     check_findable("nowhere")
        Traceback (most recent call last):
        ValueError: cannot load a model from 'nowhere': there is no such folder here, none of that name was ...
    """
    if Path(source).is_dir() or _downloaded(str(source)) or answers():
        return
    raise ValueError(
        f"cannot load {what} from {str(source)!r}: there is no such folder here, none of that name was downloaded "
        "before, and the hub cannot be reached; correct the name, or go online"
    )


@cache
def answers() -> bool:
    """Whether the hub can be reached. Asked once in a process; behind a proxy nobody knows, so it is assumed."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    if address.scheme in proxies or "all" in proxies:
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def _downloaded(name: str) -> bool:
    """Whether the hub's client keeps something of a model, or has to say itself what is wrong with its name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return True
