"""A student taken out of a training at equal parts of its epochs, or every so many steps."""

from __future__ import annotations

from collections.abc import Callable

from limbeck.train import plain


class Snapshots(plain.Callback):
    """Calls a function with the step after updates that are due, on every rank, and at the end.

    In a training by steps, `every` counts; in one by epochs, the other two. Where nobody knows how long an epoch
    is, it is called after each.

    Args:
        take: ``take(step)``.
        per_epoch: How often in an epoch.
        epochs: Every how many epochs; the last one counts in any case.
        every: Number of updates; None for the last one alone.

    Attributes:
        loop: The loop that this watches, to be set before it runs.

    Example:
        >>> import torch
        >>> taken, model = [], torch.nn.Linear(1, 1)
        >>> snapshots = Snapshots(taken.append, every=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = lambda batch, state: model(batch).mean()
        >>> snapshots.loop = plain.Loop(step, model, [torch.ones(1, 1)], optimizer, steps=5, callbacks=[snapshots])
        >>> taken if snapshots.loop.run() else None
        [2, 4, 5]
    """

    loop: plain.Loop

    def __init__(
        self, take: Callable[[int], None], *, per_epoch: int = 1, epochs: int = 1, every: int | None = None
    ) -> None:
        self.take, self.per_epoch, self.epochs, self.every = take, per_epoch, epochs, every

    def on_step(self, state: plain.State) -> None:
        """After an update, in a training whose length is known."""
        if self._is_due(state):
            self.take(state.step)

    def on_epoch(self, state: plain.State) -> None:
        """After an epoch, where nobody knows how long it is."""
        if state.total_steps is None:
            self.take(state.step)

    def _is_due(self, state: plain.State) -> bool:
        loop, per_epoch = self.loop, self.loop.updates_per_epoch()
        if loop.steps is not None:
            return state.step == loop.steps or bool(self.every and state.step % self.every == 0)
        if per_epoch is None:
            return False
        places = {int(per_epoch * part / self.per_epoch) for part in range(self.per_epoch)}
        epoch = state.epoch + 1
        wanted = epoch % self.epochs == 0 or epoch == loop.epochs
        return wanted and state.position % per_epoch in places
