"""One at a time, where threads share what only one of them may use."""

from __future__ import annotations

import threading


class Turns:
    """Lets one thread at a time into its ``with`` blocks. A copy has turns of its own.

    Example:
        >>> import copy
        >>> with Turns() as turns, copy.deepcopy(turns):
        ...     print("in")
        in
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Turns:
        self._lock.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()  # a lock can be neither copied nor pickled
