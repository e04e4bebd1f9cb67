"""A teacher that runs once for each example: what it said is kept, and found again by the example's content."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.batch import ATTENTION_MASK, batch_size, device_of, take
from limbeck.cache import (
    MANIFEST,
    Dense,
    Form,
    Store,
    TopKForm,
    describe,
    example_keys,
    first_difference,
    kept_by,
    read_manifest,
)
from limbeck.cache.forms import DTYPES, SIZE
from limbeck.teachers.base import Identified, Teacher, within
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.module import ModuleTeacher
from limbeck.types import Batch, Signal, TopK

__all__ = ["DTYPES", "Cached"]

OVER_POSITIONS = ("start_logits", "end_logits")
"""Taps of logits over the positions of a text, at the end of their names."""

RARELY = 0.05
"""The share of examples that come again by chance alone, at most."""


class Cached:
    """Remembers a teacher's signals by the content of the examples, and runs the teacher for the others alone.

    What is returned is what is kept, also on the first time: with half precision in the store the student sees
    rounded values from the beginning, and a training does not depend on what was kept before.

    Args:
        teacher: Whatever `as_teacher` takes; None where all that will be asked for is kept.
        place: Where to keep its signals: a folder, a `Store`, or None for memory.
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``, in which floating values are kept that no form is named for.
        forms: By tap, in which form to keep it, for example ``{"logits": TopKForm(32, temperatures=(1.0, 2.0))}``.
        belongs: What the signals depend on beside the teacher, as flat JSON: the tokenizer, for example. Of a
            teacher that is not `Identified` it has to say all.

    Attributes:
        asked: Examples asked for.
        found: Those of them that were kept already.
        computed: Examples that the teacher was run for.

    Raises:
        ValueError: an unknown dtype; the folder holds signals of another teacher, or in another form; an ensemble
            whose signals do not follow from its inputs alone.
        TypeError: a folder, and a teacher that cannot say who it is.

    Example:
        >>> from torch import nn
        >>> teacher = Cached(nn.Linear(2, 3))
        >>> batch = {"input": torch.ones(4, 2)}
        >>> same = [teacher.signal(batch, ["logits"])["logits"] for _ in range(2)]
        >>> torch.equal(*same), teacher.asked, teacher.computed
        (True, 8, 1)
    """

    def __init__(
        self,
        teacher: Any,
        place: Store | Path | str | None = None,
        *,
        dtype: str = "fp32",
        forms: Mapping[str, Form] | None = None,
        belongs: Mapping[str, Any] | None = None,
    ) -> None:
        from limbeck.teachers import as_teacher  # which knows all kinds, this one too

        self.teacher: Teacher | None = None if teacher is None else as_teacher(teacher)
        _check_follows_from_inputs(self.teacher)
        self.default = Dense(dtype)
        self.forms = dict(forms or {})
        self.asked = self.computed = self.found = 0
        self._belongs = belongs
        self._keeping = True
        self._agreed: set[str] = set()
        self.store = self._into = self._open(place)
        weakref.finalize(self, _bring_to_disk, self.store)  # also at the end of the process

    def offers(self, tap: str) -> bool:
        """Whether the teacher has this tap, or, without one, the store."""
        return tap in self.store.taps() if self.teacher is None else self.teacher.offers(tap)

    def names(self) -> Iterable[str]:
        """What the teacher, or the store, has."""
        return self.store.taps() if self.teacher is None else self.teacher.names()

    def parts(self) -> Mapping[str, Teacher]:
        """The teacher, if there is one."""
        return {} if self.teacher is None else {"": self.teacher}

    def identity(self) -> Mapping[str, Any]:
        """What the teacher's signals depend on, and in which form they are kept.

        Raises:
            TypeError: the teacher cannot say who it is.
        """
        if self.teacher is None:
            return self.store.belongs
        if not isinstance(self.teacher, Identified) and self._belongs is None:
            raise TypeError(
                f"{type(self.teacher).__name__} has no identity(), and its kept signals could not be told from "
                "another teacher's; say with belongs={...} what they depend on"
            )
        own = self.teacher.identity() if isinstance(self.teacher, Identified) else {}
        named = {tap: describe(form) for tap, form in sorted(self.forms.items()) if form != self.default}
        return {**own, **(self._belongs or {}), "kept in": self.default.dtype, "forms": named}

    def forget(self) -> None:
        """Keep nothing from now on, and let go of what is in memory alone: the inputs are new each time.

        What is returned still comes in the forms in which it was kept, so that a training goes on as it began.
        """
        if self.teacher is not None:
            self._keeping = False
            self.store.drop()
            self._into = Store({})

    def is_in_vain(self, share: float = 1.0) -> bool:
        """Whether it keeps what is hardly ever asked for again, after the data was seen more than once.

        Args:
            share: Of the data that this process sees in an epoch, each time another one.
        """
        return self._keeping and self.teacher is not None and self.found < RARELY * share * self.asked

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Find the batch's signals, and let the teacher compute those that are not kept yet.

        Raises:
            ValueError: there is no teacher, and some examples are not kept; or a tap is kept in another form.
        """
        if not self._keeping and self.teacher is not None and self.default.dtype == "fp32" and not self.forms:
            self.asked += batch_size(batch)
            self.computed += batch_size(batch)
            return self.teacher.signal(batch, wants)
        keys, mask = self._ask(batch, wants)
        device = device_of(batch) or torch.device("cpu")
        found = self._into.read(keys, wants, mask)
        if not self._keeping:
            self._into.drop()
        return Signal({tap: value.to(device, non_blocking=True) for tap, value in found.items()})

    def learn(self, batch: Batch, wants: Sequence[str]) -> None:
        """Let the teacher compute what is not kept yet of a batch, and read nothing."""
        self._ask(batch, wants)

    def _ask(self, batch: Batch, wants: Sequence[str]) -> tuple[list[bytes], Tensor | None]:
        """See to it that all of a batch is kept; return its examples' keys, and where their positions are."""
        self._check_decoders(batch)
        mask = batch.get(ATTENTION_MASK)
        mask = mask.detach().cpu() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        told: Batch = batch
        if mask is not None and any(tap.endswith(OVER_POSITIONS) for tap in wants):
            told = {**batch, "padded to": mask.shape[1]}  # padding has logits as well
        keys = [key.tobytes() for key in example_keys(told)]
        self._agree(wants)
        missing = self._into.missing(keys, wants)
        self.asked += len(keys)
        self.found += len(keys) - len(missing)
        if missing:
            self._compute(batch, keys, missing, wants, mask)
        return keys, mask

    def _check_decoders(self, batch: Batch) -> None:
        """Refuse what a decoder would be given of the labels, which are no part of an example's key."""
        for _, inner in within(self.teacher):
            if isinstance(inner, ModuleTeacher) and inner.reads_labels_of(batch):
                raise ValueError(
                    "the teacher's decoder reads the batch's labels, and signals are kept by the positions of one "
                    "sequence; use this teacher without a cache"
                )

    def _compute(
        self, batch: Batch, keys: Sequence[bytes], places: list[int], wants: Sequence[str], mask: Tensor | None
    ) -> None:
        if self.teacher is None:
            raise ValueError(
                f"{len(places)} of {len(keys)} examples of a batch are not in the cache, and there is no teacher "
                "to ask; build the cache from the same data, tokenizer and settings, or name the teacher"
            )
        whole = len(places) == len(keys)
        try:
            signal = self.teacher.signal(batch if whole else take(batch, places), wants)
        except BaseException:  # a server that died, or an interrupt: what was paid for is not lost
            self._into.flush()
            raise
        self.computed += len(places)
        own_keys = [keys[place] for place in places]
        own_mask = mask if mask is None or whole else mask[places]
        self._into.put(own_keys, {tap: self._kept(tap, signal[tap], own_mask, own_keys) for tap in wants})

    def _kept(self, tap: str, values: Any, mask: Tensor | None, keys: Sequence[bytes]) -> Any:
        if tap in self.forms or not isinstance(values, TopK):
            return kept_by(self.forms.get(tap, self.default), values, mask, keys)
        own = TopKForm(values.ids.shape[-1], values.temperatures, self.default.dtype)
        return kept_by(own, values, mask, keys, given=True)

    def _agree(self, wants: Sequence[str]) -> None:
        """Check that taps which are kept already are in the forms that are asked for."""
        for tap in (set(wants) - self._agreed) & self.store.taps():
            kept = {key: value for key, value in self.store.form(tap).items() if key != SIZE}
            free = tap not in self.forms and (self.teacher is None or "given" in kept)
            difference = "" if free else first_difference(describe(self.forms.get(tap, self.default)), kept)
            if difference:
                raise ValueError(f"tap {tap!r} is kept in another form ({difference}); use another cache")
            self._agreed.add(tap)

    def _open(self, place: Store | Path | str | None) -> Store:
        if isinstance(place, Store):
            return place
        if place is None:
            return Store({})
        folder = Path(place).expanduser()
        if self.teacher is not None:
            return Store(self.identity(), folder)
        return Store(self._belongs if self._belongs is not None else read_manifest(folder), folder)


def _check_follows_from_inputs(teacher: Teacher | None) -> None:
    """Refuse teachers whose signals depend on more than the inputs, by which they would be kept.

    Raises:
        ValueError: an ensemble that reads labels, or draws.
    """
    for _, inner in within(teacher):
        if isinstance(inner, Ensemble):
            inner.check_follows_from_inputs()


def _bring_to_disk(store: Store) -> None:
    """Keep what a teacher said last, unless the folder has been deleted."""
    if store.folder is not None and (store.folder / MANIFEST).is_file():
        store.flush()
