"""A teacher that has spoken already: each batch brings along what it said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from limbeck.taps import Read, parse, pick, read_output
from limbeck.types import TEACHER_CACHE, Batch, Signal


class Given:
    """Reads the teacher's outputs from the batch, where they stand under ``teacher_cache``.

    A Distiller does so by itself wherever a batch has that entry; this class stands where there is no other
    teacher.

    Args:
        read: Names the outputs where they have no names.

    Example:
        >>> import torch
        >>> batch = {"input": torch.ones(2, 4), "teacher_cache": {"logits": torch.zeros(2, 3)}}
        >>> Given().signal(batch, ["logits"])["logits"].shape
        torch.Size([2, 3])
    """

    def __init__(self, read: Read | None = None) -> None:
        self.read = read

    def offers(self, tap: str) -> bool:
        """Anything; what a batch lacks is an error when it comes."""
        return True

    def names(self) -> Iterable[str]:
        """Nothing to suggest before there is a batch."""
        return ()

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Find the wanted taps in what the batch brings along: by their full names, or as outputs of a model.

        Raises:
            ValueError: the batch brings nothing along, or not this tap.
        """
        if TEACHER_CACHE not in batch:
            raise ValueError(
                f"the batch has no {TEACHER_CACHE!r}, only {sorted(batch)}; add it, or name a teacher"
            )
        found = read_output(batch[TEACHER_CACHE], self.read)
        return Signal({tap: found[tap] if tap in found else self._output(found, tap) for tap in wants})

    def _output(self, found: Mapping[str, Any], tap: str) -> Any:
        parsed = parse(tap, (), any_output=True)
        if parsed.name not in found:
            raise ValueError(
                f"{TEACHER_CACHE} has no {tap!r}; it holds {', '.join(map(repr, found)) or 'nothing'}"
            )
        return pick(found[parsed.name], parsed.part, tap)
