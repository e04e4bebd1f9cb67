"""From data to the micro-batches of each step, the same for any number of ranks and any accumulation.

A step has one *global* batch. It is cut first into a share for each rank and then into micro-batches, in order, so
that the examples of a step depend on the seed and the batch size alone. No batch is dropped: where one has fewer
examples than there are ranks, the ranks without any compute one that does not count.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader

from limbeck.batch import as_batch, batch_size, collated, rows, to_device
from limbeck.train.settings import Settings
from limbeck.types import Batch

BUCKET_BATCHES = 50
"""Batches that are sorted by length together: large enough to save padding, small enough to stay random."""

AUGMENTATION = 1
"""Sets the random numbers of augmentation apart from those of the order, which seed and epoch determine too."""


@runtime_checkable
class Indexed(Protocol):
    """A data set with a length and an index, as lists and PyTorch's map-style data sets are."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One example."""
        ...


@dataclass(frozen=True)
class Examples:
    """Data that limbeck batches itself.

    Args:
        items: Anything with a length that gives an example for an index.
        collate: Makes a batch of a list of examples.
        lengths: Length of each example, to batch like with like; None where all are equally long.
        augment: Changes an example for training, by what it draws from the generator.
        variants: How many times an example is drawn anew before the draws repeat, epoch by epoch and whatever the
            seed, so that what a teacher says of them can be remembered; None for never.

    Example:
        >>> Examples([{"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}]).batch([0, 1])
        {'x': tensor([1., 2.])}
    """

    items: Indexed
    collate: Callable[[list[Any]], Any] = collated
    lengths: Sequence[int] | None = None
    augment: Callable[[Any, np.random.Generator], Any] | None = None
    variants: int | None = None

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Sequence[int], training: tuple[int, int] | None = None) -> Batch:
        """Collate some examples.

        Args:
            indices: Their numbers.
            training: The seed and the epoch of a training, which sees the examples augmented. Each has a generator
                of its own, so that neither its batch nor its rank matters, and a resumed training draws the same.
        """
        return as_batch(self.collate([self._example(i, training) for i in indices]))

    def _example(self, index: int, training: tuple[int, int] | None) -> Any:
        item = self.items[index]
        if training is None or self.augment is None:
            return item
        seed, epoch = training
        drawn_by = (seed, epoch) if self.variants is None else (epoch % self.variants,)
        return self.augment(item, np.random.default_rng((*drawn_by, index, AUGMENTATION)))


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut a range into parts that differ by one at most.

    Example:
        >>> cut(7, 3)
        [(0, 3), (3, 5), (5, 7)]
    """
    edges = np.cumsum([0] + [count // parts + (i < count % parts) for i in range(parts)])
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Step:
    """One rank's part in one update.

    Attributes:
        micro_batches: What this rank computes; equally many on all ranks.
        examples: Number of examples in the global batch.
        share: 1.0; or 0.0 where the batch has no example for this rank, which then computes one that does not
            count, since ranks exchange gradients in every step.
    """

    micro_batches: Sequence[Batch]
    examples: int
    share: float = 1.0

    def to(self, device: torch.device) -> Step:
        """The same on a device."""
        return replace(self, micro_batches=[to_device(batch, device) for batch in self.micro_batches])


def shares(count: int, rank: int, world: int, accumulation: int) -> list[tuple[int, int]]:
    """The ranges of a global batch that one rank computes, one for each micro-batch.

    All ranks get equally many micro-batches; a rank for which there is no example gets an empty one.

    Example:
        >>> shares(8, rank=1, world=2, accumulation=2)
        [(4, 6), (6, 8)]
        >>> shares(1, rank=1, world=2, accumulation=2)
        [(1, 1)]
    """
    parts = max(1, min(accumulation, count // world))
    start, stop = cut(count, world)[rank]
    return [(start + a, start + b) for a, b in cut(stop - start, parts)]


class Batches(Protocol):
    """The steps of an epoch.

    Attributes:
        cycle: Epochs in which every example comes once; None where that is not known.
    """

    cycle: int | None

    def __len__(self) -> int:
        """Steps per epoch."""
        ...

    def epoch(self, number: int, skip: int = 0) -> Iterator[Step]:
        """The steps of one epoch, from the one numbered `skip` on."""
        ...

    def samples(self) -> list[Batch]:
        """Small batches to check models on: one of each task."""
        ...


class ExampleBatches:
    """Batches drawn from `Examples`: shuffled by seed and epoch, texts of like length together.

    The last batch of the order that is cut may be short; it stands anywhere in the epoch.

    Raises:
        ValueError: there are no examples.
    """

    def __init__(self, data: Examples, settings: Settings, rank: int = 0, world: int = 1) -> None:
        if not len(data):
            raise ValueError("the training data is empty; check the split and the file")
        self.data = data
        self.settings = settings
        self.rank, self.world = rank, world
        self.cycle: int | None = data.variants or 1 if data.augment else 1

    def __len__(self) -> int:
        return -(-len(self.data) // self.settings.batch_size)

    def order(self, number: int) -> list[list[int]]:
        """The example numbers of each global batch of an epoch; a function of seed and epoch alone."""
        generator = np.random.default_rng((self.settings.seed, number))
        order = generator.permutation(len(self.data))
        size = self.settings.batch_size
        if self.settings.bucket and self.data.lengths is not None:
            lengths = np.asarray(self.data.lengths)
            chunks = [order[i : i + size * BUCKET_BATCHES] for i in range(0, len(order), size * BUCKET_BATCHES)]
            order = np.concatenate([c[np.argsort(-lengths[c], kind="stable")] for c in chunks])
        batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        generator.shuffle(batches)
        return batches

    def epoch(self, number: int, skip: int = 0) -> Iterator[Step]:
        """See `Batches`."""
        for indices in self.order(number)[skip:]:
            ranges = shares(len(indices), self.rank, self.world, self.settings.accumulation)
            own = [indices[a:b] for a, b in ranges]
            share = float(bool(own[0]))
            training = self.settings.seed, number
            yield Step([self.data.batch(part or indices[:1], training) for part in own], len(indices), share)

    def samples(self) -> list[Batch]:
        """See `Batches`."""
        # drawn as in the first epoch: a cache has no others to show
        return [self.data.batch(range(min(2, len(self.data))), (self.settings.seed, 0))]


class LoaderBatches:
    """Batches of a user's own loader; each of its batches is the global batch of a step.

    Each batch is drawn under random generators that are seeded by the training's seed, the epoch and its place
    in it: Python's, NumPy's, PyTorch's for the CPU, and the loader's own ``generator``. So its shuffling and what
    its data set draws (augmentation) repeat on resume, on every rank, and do not disturb the training's own
    randomness. A sampler with a generator of its own, and workers that persist over epochs, are out of reach.
    """

    def __init__(self, loader: Any, settings: Settings, rank: int = 0, world: int = 1) -> None:
        self.loader = loader
        self.settings = settings
        self.rank, self.world = rank, world
        self.cycle: int | None = 1
        if not len(loader):
            raise ValueError("the training loader is empty; check its data set and drop_last")

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int, skip: int = 0) -> Iterator[Step]:
        """See `Batches`."""
        for position, batch in enumerate(self._draw(number)):
            if position < skip:
                continue
            count = batch_size(batch)
            ranges = shares(count, self.rank, self.world, self.settings.accumulation)
            share = float(ranges[0][1] > ranges[0][0])
            own = [rows(batch, a, b) if share else rows(batch, 0, 1) for a, b in ranges]
            yield Step(own, count, share)

    def samples(self) -> list[Batch]:
        """See `Batches`."""
        return [rows(next(self._draw(0)), 0, 2)]

    def _draw(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch; the training's generators are put back between them."""
        batches: Iterator[Any] | None = None
        own = self.loader.generator if isinstance(self.loader, DataLoader) else None
        for position in itertools.count():
            with seeded(self.settings.seed, epoch, position, own=own):
                batches = iter(self.loader) if batches is None else batches
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield as_batch(batch)


@contextmanager
def seeded(*entropy: int, own: torch.Generator | None = None) -> Iterator[None]:
    """Seed the CPU's random generators inside the block by some numbers, and put them back afterwards.

    Example:
        >>> with seeded(1, 2):
        ...     first = torch.rand(1)
        >>> with seeded(1, 2):
        ...     bool(torch.rand(1) == first)
        True
    """
    number = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    # PyTorch's own functions for this would seed the GPUs too.
    generators = [torch.default_generator, *([] if own is None else [own])]
    before = random.getstate(), np.random.get_state(), [g.get_state() for g in generators]
    random.seed(number)
    np.random.seed(number)
    for generator in generators:
        generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        for generator, state in zip(generators, before[2], strict=True):
            generator.set_state(state)


def as_batches(data: Any, settings: Settings, rank: int = 0, world: int = 1) -> Batches:
    """Make batches of `Examples`, a DataLoader, or a data set (a list too) with a length and an index.

    Raises:
        TypeError: none of these; also a dict of data sets, which is no list of examples.
        ValueError: there are no examples.
    """
    if isinstance(data, Examples):
        return ExampleBatches(data, settings, rank, world)
    if isinstance(data, DataLoader):
        return LoaderBatches(data, settings, rank, world)
    if isinstance(data, Mapping):
        raise TypeError(
            f"a {type(data).__name__} of {', '.join(map(repr, data))} is no training data; pass one of its parts, "
            "or for several tasks limbeck.Mixed({task: data})"
        )
    if isinstance(data, Indexed):
        return ExampleBatches(Examples(data), settings, rank, world)
    raise TypeError(
        f"cannot batch a {type(data).__name__}; pass a data set with a length and an index, "
        "a DataLoader or limbeck.Examples"
    )
