"""Whether a run remembers what its teacher says, and where."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.cache import Form, Store, describe, json_digest
from limbeck.keeping import LOGITS, forms_of, logit_bytes
from limbeck.objective import PlannedTerm
from limbeck.recipe import CacheSpec, Recipe
from limbeck.teachers import Cached, Teacher
from limbeck.teachers.cached import DTYPES
from limbeck.teaching import LiveTeacher
from limbeck.train import Examples

OFF, MEMORY = "off", "memory"
SIGNALS = "signals"
"""The folder of a run's own memory, which goes with the end of the run."""


@dataclass
class Memory:
    """What a run remembers of its teacher.

    Attributes:
        store: Where signals are kept; None where the teacher is run for every batch.
        note: What there is to say about it in the plan.
        dtype: In which floating values are kept.
        own: The run's own folder of it, to be deleted at the end.
        forms: The forms of taps that are not kept whole.
    """

    store: Store | None
    note: str
    dtype: str = "fp32"
    own: Path | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)

    def end(self) -> None:
        """Delete what was for this run alone."""
        if self.own is not None:
            shutil.rmtree(self.own, ignore_errors=True)

    def teacher(self, live: Teacher) -> Teacher:
        """The teacher of a training."""
        return live if self.store is None else Cached(live, self.store, dtype=self.dtype, forms=self.forms)


def recall(
    recipe: Recipe, teacher: LiveTeacher, train: Examples, terms: Sequence[PlannedTerm], folder: Path
) -> Memory:
    """Decide whether a run remembers its teacher, and open the store.

    It does not where examples are new in every epoch, where the signals fit neither the memory nor the disk, and
    where the recipe says ``cache: off``.

    Args:
        recipe: The recipe.
        teacher: The teacher that the student learns from, fine-tuned.
        train: The training examples.
        terms: The plan, for the size of what the terms read.
        folder: The run's.

    Raises:
        ValueError: the recipe names a folder that holds signals of another teacher.
    """
    cache = recipe.cache
    if cache.place == OFF:
        return Memory(None, "not remembered, by the recipe")
    if train.augment is not None and train.variants is None:
        return Memory(None, "not remembered: images are augmented anew in every epoch")
    needed, forms = bytes_needed(terms, train, cache), forms_of(cache, [planned.term for planned in terms])
    size, budget = f"about {needed / 2**20:,.1f} MiB", int(cache.gib * 2**30)
    own = folder / SIGNALS if cache.place == MEMORY else None
    place = own or Path(cache.place).expanduser()
    on_disk = own is None or needed > budget
    free = free_bytes(place)
    if on_disk and needed > free:
        return Memory(
            None, f"not remembered: {size} fit neither cache.gib={cache.gib:g} nor the {free:,} bytes free"
        )
    belongs = fingerprint(recipe, teacher, forms)
    store = Store(belongs, place, shard_bytes=shard_bytes(recipe) if on_disk else budget)
    where = f"in {place}" if own is None else "on the disk for this run" if on_disk else "for this run"
    return Memory(store, f"remembered {where}, {size}", cache.dtype, own, forms)


def shard_bytes(recipe: Recipe) -> int:
    """How much is gathered before it goes to the disk."""
    return int(recipe.cache.shard_mib * 2**20)


def free_bytes(place: Path) -> int:
    """What a folder that may not exist yet can still hold."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def bytes_needed(terms: Sequence[PlannedTerm], train: Examples, cache: CacheSpec) -> int:
    """The size of what the terms read of the teacher, for all training examples.

    The plan's two examples are the longest; of what is kept for each position, the mean length counts.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for planned in terms:
        if not planned.term.reads_labels:
            several = planned.term.places is not None
            found = planned.teacher_shape if several else (planned.teacher_shape,)
            shapes |= dict(zip(planned.term.teacher_taps, found, strict=True))
    longest = max(train.lengths) if train.lengths else 0
    mean = sum(train.lengths) / len(train.lengths) if train.lengths else 0.0
    total, item = 0.0, DTYPES[cache.dtype].itemsize
    form = forms_of(cache, [planned.term for planned in terms]).get(LOGITS)
    for tap, shape in shapes.items():
        cells: float = math.prod(shape[1:])
        if longest and len(shape) >= 3 and longest in shape[1:]:
            cells *= (mean / longest) ** shape[1:].count(longest)
        if tap == LOGITS and form is not None:
            total += cells / shape[-1] * logit_bytes(cache, shape[-1], form)
        else:
            total += cells * item
    return int(len(train) * (train.variants or 1) * (16 + total))


def fingerprint(recipe: Recipe, teacher: LiveTeacher, forms: Mapping[str, Form]) -> dict[str, Any]:
    """What a teacher's signals belong to."""
    return {
        **teacher.source().identity(),
        "tokenizer": json_digest(_vocabulary(teacher.processor)),
        "computed in": recipe.training.precision,
        "kept in": recipe.cache.dtype,
        "forms": {tap: describe(form) for tap, form in forms.items()},
    }


def _vocabulary(processor: Any) -> Any:
    return processor.get_vocab() if hasattr(processor, "get_vocab") else repr(processor)
