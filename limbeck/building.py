"""Building a cache: a teacher is asked about all training examples once, by one process or by several."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.batch import to_device
from limbeck.cache import MANIFEST, WORK, Store
from limbeck.cache.folder import TEACHER
from limbeck.enlarging import Wanted
from limbeck.keeping import forms_of
from limbeck.models import TeacherStore
from limbeck.plan import Observer, Plan
from limbeck.recipe import Recipe
from limbeck.remember import bytes_needed, fingerprint, free_bytes, shard_bytes
from limbeck.run import Run, as_recipe
from limbeck.tasks import is_regression, make_task, reads_texts
from limbeck.teachers import Cached
from limbeck.teaching import LiveTeacher, check_repeats, claim_for, is_kept, keep_teacher, wanted
from limbeck.train import Examples
from limbeck.train.loop import AUTOCAST

FLUSH_SECONDS = 30
"""How long at most before what was computed is on the disk, for a slow teacher fills no shard for hours."""


@dataclass(frozen=True)
class Built:
    """What came of building.

    Attributes:
        examples: Training examples.
        computed: Those that the teacher was run for now, by all processes.
        bytes: Of all that is kept.
        is_main: Whether this process is the one that tells.
    """

    examples: int
    computed: int
    bytes: int
    is_main: bool


def build_cache(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    retrain: bool = False,
    observer: Observer | None = None,
) -> Built:
    """Ask a recipe's teacher about all training examples, and keep what its terms read.

    Started by ``accelerate launch``, each process asks about its share. What is there already is not asked for
    again, whether it comes from a process that was killed or from other data. The folder then stands for the
    teacher: ``teacher: cache:DIR``.

    Args:
        recipe: A Recipe, its content as a mapping, or the path of its YAML file.
        out: The folder, new or with signals of the same teacher.
        retrain: Fine-tune the teacher even if it is in the store.
        observer: What watches.

    Raises:
        ValueError: anything wrong with the recipe, the data or the models; signals of another teacher in the
            folder; too little room on the disk; several processes and a teacher that needs fine-tuning first.
    """
    recipe, out = as_recipe(recipe), Path(out)
    if is_kept(recipe.teacher.model):
        raise ValueError(
            f"the teacher {recipe.teacher.model} is a cache already; name the model that it came from"
        )
    _check_place(out)
    task = make_task(recipe.task)
    # Of each teacher its own folder: fine-tuning goes on where it is the same one, and else begins anew.
    store = TeacherStore(recipe, task)
    work = out / WORK / store.folder.name
    run = Run(recipe.resolved(is_regression(task), reads_texts(task)), task, work, Observer(), several=True)
    if run.ranks.is_main_process and observer is not None:
        run.observer = observer
    plan, result = run.teach(lambda tuned: _begin(run, out, store, tuned), retrain)
    assert isinstance(run.teacher, LiveTeacher)
    build = _Build(run, plan, run.teacher, out)
    built = build.execute()
    if run.ranks.is_main_process:
        wanted = Wanted.by(run.recipe, task, run.teacher.processor)
        if wanted is not None and run.extra is not None:
            wanted.keep(run.extra, out)
        keep_teacher(out, run.teacher, task, run.recipe, result.logits)
        shutil.rmtree(out / WORK, ignore_errors=True)
    run.ranks.wait_for_everyone()
    return built


def _check_place(out: Path) -> None:
    """Refuse a folder with other things in it, before anything is trained."""
    if out.is_file():
        raise ValueError(f"{out} is a file; name a folder")
    foreign = [p.name for p in out.iterdir() if p.name not in (WORK, TEACHER)] if out.is_dir() else []
    if foreign and not (out / MANIFEST).is_file():
        raise ValueError(f"{out} is no cache of limbeck, it holds {sorted(foreign)[0]!r}; choose another folder")


def _begin(run: Run, out: Path, store: TeacherStore, tuned: bool) -> None:
    """Open the folder for the teacher's fine-tuning, which is for one process alone."""
    if run.ranks.is_main_process:
        claim_for(out, store, tuned)
    if tuned:
        return
    if run.ranks.num_processes > 1:
        raise ValueError("the teacher has to be fine-tuned first; run this command once with one process")
    run.open_folder(overwrite=False)


@dataclass(frozen=True)
class _Build:
    """One process's share of the work."""

    run: Run
    plan: Plan
    teacher: LiveTeacher
    out: Path

    def execute(self) -> Built:
        """Ask about all that is not there, in an order that depends on the data alone."""
        from accelerate.utils import reduce

        recipe, data = self.run.recipe, self.run.data.asked
        check_repeats(data)
        self._check_room(data)
        forms = forms_of(recipe.cache, [planned.term for planned in self.plan.terms])
        store = Store(fingerprint(recipe, self.teacher, forms), self.out, shard_bytes=shard_bytes(recipe))
        cached = Cached(self.teacher.source(), store, dtype=recipe.cache.dtype, forms=forms)
        ask_about_all(self.run, cached, store, wanted(self.plan.terms))
        computed = reduce(torch.tensor(float(cached.computed), device=self.run.device), "sum").item()
        self.run.ranks.wait_for_everyone()
        store.refresh()
        return Built(len(data), int(computed), store.nbytes(), self.run.ranks.is_main_process)

    def _check_room(self, data: Examples) -> None:
        needed, free = bytes_needed(self.plan.terms, data, self.run.recipe.cache), free_bytes(self.out)
        there = sum(path.stat().st_size for path in self.out.glob("*")) if self.out.is_dir() else 0
        self.run.observer.on_note(f"what the teacher says takes about {needed / 2**20:,.1f} MiB")
        if needed - there > free:
            raise ValueError(
                f"{needed:,} bytes of signals do not fit the {free:,} free in {self.out}; make room, set "
                "cache.dtype=fp16, or drop terms"
            )


def ask_about_all(run: Run, cached: Cached, store: Store, wants: Sequence[str]) -> None:
    """Ask a run's teacher about all training examples that are not kept yet, each process about its share.

    Args:
        run: Whose teacher is ready.
        cached: The teacher, remembering.
        store: Where its signals go; on disk they are brought there from time to time.
        wants: The taps.
    """
    data, device, dtype = run.data.asked, run.device, AUTOCAST[run.recipe.training.precision]
    run.observer.on_stage("signals")
    done, total, flushed = 0, len(data) * (data.variants or 1), time.monotonic()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None), _kept_at_the_end(store):
        for batch in _shares(run, data):
            cached.learn(to_device(batch, device), wants)
            if time.monotonic() - flushed > FLUSH_SECONDS:
                store.flush()
                flushed = time.monotonic()
            done += run.recipe.training.batch_size * run.ranks.num_processes
            run.observer.on_count("signals", min(done, total), total)


def _shares(run: Run, data: Examples) -> Iterator[Any]:
    """This process's batches: every so manieth of all, the longest texts first."""
    rank, world = run.ranks.process_index, run.ranks.num_processes
    size, seed = run.recipe.training.batch_size, run.recipe.training.seed
    lengths = data.lengths or [0] * len(data)
    order = sorted(range(len(data)), key=lambda i: -lengths[i])
    for variant in range(data.variants or 1):
        for start in range(rank * size, len(order), world * size):
            yield data.batch(order[start : start + size], (seed, variant))


@contextmanager
def _kept_at_the_end(store: Store) -> Iterator[None]:
    """Bring to the disk what was computed, also where an interrupt or an error ends the work."""
    try:
        yield
    finally:
        store.flush()
