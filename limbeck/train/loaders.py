"""Several tasks' loaders as one, for a loop of one's own; `fit` has `limbeck.train.mixing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from limbeck.train.data import seeded


class MixedLoaders:
    """Batches of several tasks in random order, each with the name of its task.

    The order, and how each loader shuffles, follow from NumPy's global generator as it stands when the batches
    begin: a `limbeck.train.plain.Loop` that goes on from a checkpoint reads the same ones again.

    Args:
        loaders: One for each task; each is read over and over.
        tau: A task is drawn in proportion to its number of batches to this power; where a number is not known, all
            tasks alike.
        count: How many batches there are in all.
        prepare: What is done to each task's batches first.

    Example:
        >>> batches = list(MixedLoaders({"a": [1, 2], "b": [3]}, tau=1.0, count=6))
        >>> len(batches), {batch for batch, task in batches if task == "b"} <= {3}
        (6, True)
    """

    def __init__(
        self,
        loaders: Mapping[str, Any],
        tau: float,
        count: int,
        prepare: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        self.loaders, self.count, self.prepare = loaders, count, prepare or {}
        try:
            sizes = np.array([float(len(loader)) for loader in loaders.values()]) ** tau
        except TypeError:
            sizes = np.ones(len(loaders))
        self.shares = sizes / sizes.sum()

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        names = list(self.loaders)
        drawn = np.random.choice(len(names), self.count, p=self.shares)
        seed = int(np.random.randint(2**31))
        passes = [self._over_and_over(name, seed, number) for number, name in enumerate(names)]
        for number in drawn:
            batch, name = next(passes[number]), names[number]
            yield (self.prepare[name](batch) if name in self.prepare else batch), name

    def _over_and_over(self, name: str, seed: int, number: int) -> Iterator[Any]:
        """One task's batches; how each pass is shuffled follows from the seed."""
        loader, turn = self.loaders[name], 0
        own = loader.generator if isinstance(loader, DataLoader) else None
        while True:
            with seeded(seed, number, turn, own=own):
                batches = iter(loader)
                first = next(batches, None)
            if first is None:
                raise ValueError(f"the loader of task {name!r} is empty; check its data set and drop_last")
            yield first
            yield from batches
            turn += 1
