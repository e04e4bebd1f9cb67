"""From data to the micro-batches of each step, the same for any number of ranks and any accumulation.

A step has one *global* batch. It is cut first into a share for each rank and then into micro-batches, in order, so
that the examples of a step depend on the seed and the batch size alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from limbeck.batch import as_batch, batch_size, rows
from limbeck.train.settings import Settings
from limbeck.types import Batch

BUCKET_BATCHES = 50
"""Batches that are sorted by length together: large enough to save padding, small enough to stay random."""


@dataclass(frozen=True)
class Examples:
    """Data that limbeck batches itself.

    Args:
        items: Anything with a length that gives an example for an index.
        collate: Makes a batch of a list of examples.
        lengths: Length of each example, to batch like with like; None where all are equally long.

    Example:
        >>> Examples([{"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}]).batch([0, 1])
        {'x': tensor([1., 2.])}
    """

    items: Sequence[Any]
    collate: Callable[[list[Any]], Any] = default_collate
    lengths: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Collate some examples."""
        return as_batch(self.collate([self.items[i] for i in indices]))


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut a range into parts that differ by one at most.

    Example:
        >>> cut(7, 3)
        [(0, 3), (3, 5), (5, 7)]
    """
    edges = np.cumsum([0] + [count // parts + (i < count % parts) for i in range(parts)])
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def shares(count: int, rank: int, world: int, accumulation: int) -> list[tuple[int, int]]:
    """The ranges of a global batch that one rank computes, one for each micro-batch.

    All ranks get equally many micro-batches.

    Raises:
        ValueError: there are fewer examples than ranks.

    Example:
        >>> shares(8, rank=1, world=2, accumulation=2)
        [(4, 6), (6, 8)]
    """
    parts = min(accumulation, count // world)
    if parts == 0:
        raise ValueError(f"a batch of {count} examples is too small for {world} ranks; set drop_last")
    start, stop = cut(count, world)[rank]
    return [(start + a, start + b) for a, b in cut(stop - start, parts)]


class Batches(Protocol):
    """The steps of an epoch, each a list of this rank's micro-batches."""

    def __len__(self) -> int:
        """Steps per epoch."""
        ...

    def epoch(self, number: int, skip: int = 0) -> Iterator[list[Batch]]:
        """The steps of one epoch, from the one numbered `skip` on."""
        ...

    def sample(self) -> Batch:
        """A small batch to check models on."""
        ...


class ExampleBatches:
    """Batches drawn from `Examples`: shuffled by seed and epoch, texts of like length together.

    Raises:
        ValueError: there are no examples.
    """

    def __init__(self, data: Examples, settings: Settings, rank: int = 0, world: int = 1) -> None:
        if not len(data):
            raise ValueError("the training data is empty; check the split and the file")
        self.data = data
        self.settings = settings
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        whole, rest = divmod(len(self.data), self.settings.batch_size)
        return whole + (rest >= self.world)

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
        batches = [b for b in batches if len(b) >= self.world]
        generator.shuffle(batches)
        return batches

    def epoch(self, number: int, skip: int = 0) -> Iterator[list[Batch]]:
        """See `Batches`."""
        for indices in self.order(number)[skip:]:
            ranges = shares(len(indices), self.rank, self.world, self.settings.accumulation)
            yield [self.data.batch(indices[a:b]) for a, b in ranges]

    def sample(self) -> Batch:
        """See `Batches`."""
        return self.data.batch(range(min(2, len(self.data))))


class LoaderBatches:
    """Batches of a user's own loader; each of its batches is the global batch of a step.

    The loader's own shuffling repeats on resume if it draws from PyTorch's default generator, as DataLoader does.
    """

    def __init__(self, loader: Any, settings: Settings, rank: int = 0, world: int = 1) -> None:
        self.loader = loader
        self.settings = settings
        self.rank, self.world = rank, world
        if not len(loader):
            raise ValueError("the training loader is empty; check its data set and drop_last")

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, number: int, skip: int = 0) -> Iterator[list[Batch]]:
        """See `Batches`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 100_003 + number)
            batches = iter(self.loader)
            # The sampler draws its seed with the first batch, so that one is loaded here, and those to skip.
            head = list(itertools.islice(batches, skip + 1))[skip:]
        for batch in itertools.chain(head, batches):
            named = as_batch(batch)
            ranges = shares(batch_size(named), self.rank, self.world, self.settings.accumulation)
            yield [rows(named, a, b) for a, b in ranges]

    def sample(self) -> Batch:
        """See `Batches`."""
        with torch.random.fork_rng(devices=[]):
            return rows(as_batch(next(iter(self.loader))), 0, 2)


def as_batches(data: Any, settings: Settings, rank: int = 0, world: int = 1) -> Batches:
    """Make batches of `Examples`, a DataLoader, or a data set (a list too) with a length and an index.

    Raises:
        TypeError: none of these.
        ValueError: there are no examples.
    """
    if isinstance(data, Examples):
        return ExampleBatches(data, settings, rank, world)
    if isinstance(data, DataLoader):
        return LoaderBatches(data, settings, rank, world)
    if callable(getattr(data, "__len__", None)) and callable(getattr(data, "__getitem__", None)):
        return ExampleBatches(Examples(data), settings, rank, world)
    raise TypeError(
        f"cannot batch a {type(data).__name__}; pass a data set with a length and an index, "
        "a DataLoader or limbeck.Examples"
    )
