"""A teacher that has spoken already: each batch brings along what it said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from limbeck.batch import batch_size, view
from limbeck.taps import Read, parse, pick, read_output
from limbeck.types import STUDENT, TEACHER_CACHE, Batch, Signal, Sparse


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
            ValueError: the batch brings nothing along, not this tap, or what was said of other examples.
        """
        if TEACHER_CACHE not in batch:
            raise ValueError(
                f"the batch has no {TEACHER_CACHE!r}, only {sorted(batch)}; add it, or name a teacher"
            )
        if batch[TEACHER_CACHE] is None:
            raise ValueError(
                f"the batch's {TEACHER_CACHE!r} is None; give it what the teacher said, or leave it out"
            )
        found = read_output(batch[TEACHER_CACHE], self.read)
        values = {tap: self._value(found, tap) for tap in wants}
        size = batch_size(view(batch, STUDENT))
        for tap, value in values.items():
            if value.ndim and value.shape[0] != size:
                raise ValueError(
                    f"{TEACHER_CACHE} has {tap!r} of {value.shape[0]} examples, and the batch has {size}; "
                    "give it one row for each example, in the same order"
                )
        return Signal(values)

    def _value(self, found: Mapping[str, Any], tap: str) -> Any:
        value = found.get(tap)
        if isinstance(value, Tensor):
            return value.detach()
        return value if isinstance(value, Sparse) else self._output(found, tap)

    def _output(self, found: Mapping[str, Any], tap: str) -> Any:
        parsed = parse(tap, (), any_output=True) if "#" not in tap else None
        if parsed is None or parsed.name not in found:
            raise ValueError(
                f"{TEACHER_CACHE} has no {tap!r}; it holds {', '.join(map(repr, found)) or 'nothing'}"
            )
        return pick(found[parsed.name], parsed.part, tap).detach()
