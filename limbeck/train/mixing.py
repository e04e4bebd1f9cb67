"""Training data of several tasks: which task each step is for, and which of its batches it gets.

Both are functions of the seed and the number of the step alone, so that all ranks draw the same, and a training
that was interrupted goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from limbeck.registry import nearest
from limbeck.train.data import Batches, Step, as_batches
from limbeck.train.settings import Settings
from limbeck.types import TASK, Batch

DRAWS = 2
"""Sets the random numbers that choose tasks apart from those of orders and augmentation."""


@dataclass(frozen=True)
class Mixed:
    """Data of several tasks for one student; each step trains on a batch of one of them.

    A step's task is drawn with a probability in proportion to size^tau, where the size is the number of the task's
    batches. Batches of a task follow each other in its own shuffled order, from one epoch into the next, and begin
    anew when all were used. An epoch has as many steps as all tasks have batches. Each batch names its task, under
    ``task``.

    Args:
        parts: The data of each task by its name: `Examples`, a data set with a length and an index, or a
            DataLoader, whose batches are then those of the steps.
        tau: 1 to draw tasks in proportion to their sizes, 0 to draw all as often; between, small tasks are drawn
            more often than their size says.

    Raises:
        TypeError: the parts are no mapping by name.
        ValueError: there are none, or tau is negative or no number.

    Example:
        >>> big, small = [{"x": i} for i in range(640)], [{"x": i} for i in range(160)]
        >>> batches = MixedBatches(Mixed({"big": big, "small": small}, tau=0.5), Settings(batch_size=16))
        >>> len(batches), [round(p, 3) for p in batches.probabilities]
        (50, [0.667, 0.333])

    Reference:
        Yang et al. 2020, TextBrewer, arXiv:2002.12620. Its MultiTaskDistiller draws in this way, but anew for each
        part of an accumulated update, and does not repeat its draws after an interruption.
    """

    parts: Mapping[str, Any]
    tau: float = 1.0

    def __post_init__(self) -> None:
        parts: Any = self.parts
        if not isinstance(parts, Mapping) or not all(isinstance(task, str) for task in parts):
            raise TypeError(f"the data of several tasks is {{task: data}}, got a {type(parts).__name__}")
        if not parts:
            raise ValueError("the data of several tasks is empty; pass {task: data}")
        tau: Any = self.tau
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not (math.isfinite(tau) and tau >= 0):
            raise ValueError(f"tau is a number from 0 (all tasks alike) to 1 (by size) or more, got {tau!r}")


class MixedBatches:
    """The steps of a training on several tasks; see `Mixed`.

    Args:
        data: The data of all tasks.
        settings: The training's; each task has a seed of its own made from its seed and the task's name.
        rank: The number of this process.
        world: The number of processes.

    Raises:
        TypeError: a task's data cannot be batched.
        ValueError: a task's data is empty.
    """

    def __init__(self, data: Mixed, settings: Settings, rank: int = 0, world: int = 1) -> None:
        self.data = data
        self.settings = settings
        self.cycle: int | None = None  # what is drawn may come late
        self.tasks = tuple(data.parts)
        self._streams = [_Stream(task, _batches(data, task, settings, rank, world)) for task in self.tasks]
        self.sizes = [len(stream.batches) for stream in self._streams]
        shares = np.asarray([float(size) ** data.tau for size in self.sizes])
        self.probabilities: list[float] = (shares / shares.sum()).tolist()
        self._used = [[0] * len(self.tasks)]

    def __len__(self) -> int:
        return sum(self.sizes)

    def draws(self, number: int) -> list[int]:
        """Which task each step of an epoch is for, as a place in `tasks`."""
        generator = np.random.default_rng((self.settings.seed, number, DRAWS))
        drawn: list[int] = generator.choice(len(self.tasks), size=len(self), p=self.probabilities).tolist()
        return drawn

    def epoch(self, number: int, skip: int = 0) -> Iterator[Step]:
        """See `Batches`."""
        drawn = self.draws(number)
        used = [before + drawn[:skip].count(place) for place, before in enumerate(self._used_before(number))]
        for place in drawn[skip:]:
            yield self._streams[place].step(used[place])
            used[place] += 1

    def samples(self) -> list[Batch]:
        """See `Batches`."""
        return [{**batch, TASK: s.task} for s in self._streams for batch in s.batches.samples()]

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of the mixture; the order of the tasks is part of it."""
        sizes = ", ".join(f"{task} ({size})" for task, size in zip(self.tasks, self.sizes, strict=True))
        return {"batches of tasks": sizes, "tau": float(self.data.tau)}

    def _used_before(self, number: int) -> list[int]:
        """How many batches of each task the epochs before this one used."""
        for epoch in range(len(self._used) - 1, number):
            drawn = self.draws(epoch)
            self._used.append([used + drawn.count(place) for place, used in enumerate(self._used[-1])])
        return self._used[number]


class _Stream:
    """The batches of one task, epoch after epoch of its own."""

    def __init__(self, task: str, batches: Batches) -> None:
        self.task = task
        self.batches = batches
        self._steps: Iterator[Step] = iter(())
        self._position = -1

    def step(self, position: int) -> Step:
        """The batch at a position, counted over all epochs; from one to the next nothing is skipped."""
        epoch, place = divmod(position, len(self.batches))
        if place == 0 or position != self._position:
            self._steps = self.batches.epoch(epoch, place)
        step = next(self._steps, None)
        if step is None:
            raise ValueError(f"the data of task {self.task!r} ended early; pass data that can be read again")
        self._position = position + 1
        return replace(step, micro_batches=[{**batch, TASK: self.task} for batch in step.micro_batches])


def _batches(data: Mixed, task: str, settings: Settings, rank: int, world: int) -> Batches:
    seed = int(np.random.SeedSequence((settings.seed, *task.encode())).generate_state(1)[0])
    try:
        return as_batches(data.parts[task], settings.model_copy(update={"seed": seed}), rank, world)
    except (TypeError, ValueError) as error:
        raise type(error)(f"task {task!r}: {error}") from None


def train_batches(
    data: Any, settings: Settings, rank: int = 0, world: int = 1, tasks: Iterable[str] = ()
) -> Batches:
    """The steps of a training, on one task (see `as_batches`) or on several.

    Args:
        data: The data; of several tasks, `Mixed`.
        settings: The training's.
        rank: The number of this process.
        world: The number of processes.
        tasks: Those that terms are for; each has to have data among several tasks'.

    Raises:
        TypeError: data that cannot be batched.
        ValueError: there are no examples, or none of a task.
    """
    if not isinstance(data, Mixed):
        return as_batches(data, settings, rank, world)
    without = next((task for task in tasks if task not in data.parts), None)
    if without is not None:
        raise ValueError(f"terms are for task {without!r}, which has no data; {nearest(without, data.parts)}")
    return MixedBatches(data, settings, rank, world)
