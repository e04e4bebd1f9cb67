"""A teacher that runs once for each example: what it said is kept, and found again by the example's content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from limbeck.batch import ATTENTION_MASK, batch_size, take
from limbeck.cache import Store, cut, example_keys, join, kind_of
from limbeck.teachers.base import Teacher
from limbeck.types import Batch, Signal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Cached:
    """Remembers a teacher's signals by the content of the examples, and runs the teacher for the others alone.

    What is returned is what is kept, also on the first time: with half precision in the store the student sees
    rounded values from the beginning, and a training does not depend on what was kept before.

    Args:
        teacher: The teacher; None where all that will be asked for is kept.
        store: Where to keep its signals.
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``, in which floating values are kept.

    Attributes:
        asked: Examples asked for.
        computed: Examples that the teacher was run for.

    Raises:
        ValueError: an unknown dtype.

    Example:
        >>> from torch import nn
        >>> from limbeck.teachers import ModuleTeacher
        >>> teacher = Cached(ModuleTeacher(nn.Linear(2, 3)), Store({}))
        >>> batch = {"input": torch.ones(4, 2)}
        >>> same = [teacher.signal(batch, ["logits"])["logits"] for _ in range(2)]
        >>> torch.equal(*same), teacher.asked, teacher.computed
        (True, 8, 1)
    """

    def __init__(self, teacher: Teacher | None, store: Store, dtype: str = "fp32") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r} for kept signals; known: {', '.join(DTYPES)}")
        self.teacher = teacher
        self.store = store
        self.dtype = DTYPES[dtype]
        self.asked = self.computed = 0

    def offers(self, tap: str) -> bool:
        """Whether the teacher has this tap, or, without one, the store."""
        return tap in self.store.taps() if self.teacher is None else self.teacher.offers(tap)

    def names(self) -> Iterable[str]:
        """What the teacher, or the store, has."""
        return self.store.taps() if self.teacher is None else self.teacher.names()

    def parts(self) -> Mapping[str, Teacher]:
        """The teacher, if there is one."""
        return {} if self.teacher is None else {"": self.teacher}

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Find the batch's signals, and let the teacher compute those that are not kept yet.

        Raises:
            ValueError: there is no teacher, and some examples are not kept.
        """
        mask = batch.get(ATTENTION_MASK)
        mask = mask.detach().cpu() if isinstance(mask, Tensor) else None
        keys = [key.tobytes() for key in example_keys(batch)]
        missing = self._missing(keys, wants)
        self.asked += len(keys)
        if missing:
            self._compute(batch, keys, missing, wants, mask)
        device = _device(batch)
        return Signal({tap: self._joined(keys, tap, mask).to(device, non_blocking=True) for tap in wants})

    def learn(self, batch: Batch, wants: Sequence[str]) -> None:
        """Let the teacher compute what is not kept yet of a batch, and read nothing."""
        mask = batch.get(ATTENTION_MASK)
        mask = mask.detach().cpu() if isinstance(mask, Tensor) else None
        keys = [key.tobytes() for key in example_keys(batch)]
        missing = self._missing(keys, wants)
        self.asked += len(keys)
        if missing:
            self._compute(batch, keys, missing, wants, mask)

    def _missing(self, keys: Sequence[bytes], wants: Sequence[str]) -> list[int]:
        """The places of examples that are not kept, each content once."""
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        return sorted(p for key, p in first.items() if not all(self.store.holds(key, tap) for tap in wants))

    def _compute(
        self, batch: Batch, keys: Sequence[bytes], places: list[int], wants: Sequence[str], mask: Tensor | None
    ) -> None:
        if self.teacher is None:
            raise ValueError(
                f"{len(places)} of {len(keys)} examples of a batch are not in the cache, and there is no teacher "
                "to ask; build the cache from the same data, tokenizer and settings, or name the teacher"
            )
        self.computed += len(places)
        part = batch if len(places) == batch_size(batch) else take(batch, places)
        signal = self.teacher.signal(part, wants)
        own_mask = None if mask is None else mask[places]
        kinds = {tap: kind_of(signal[tap].shape, own_mask) for tap in wants}
        values = {tap: cut(self._rounded(signal[tap]), kinds[tap], own_mask) for tap in wants}
        self.store.put([keys[place] for place in places], kinds, values)

    def _rounded(self, values: Tensor) -> Tensor:
        return values.detach().cpu().to(self.dtype if values.is_floating_point() else values.dtype)

    def _joined(self, keys: Sequence[bytes], tap: str, mask: Tensor | None) -> Tensor:
        pieces = [self.store.get(key, tap) for key in keys]
        return join(pieces, self.store.kind(tap), mask)


def _device(batch: Batch) -> torch.device:
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    tensors += [value for given in batch.values() if isinstance(given, tuple) for value in given]
    return next((t.device for t in tensors), torch.device("cpu"))
