"""A function of batches that is asked once for each example: for loops of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.teachers.cached import Cached
from limbeck.types import INPUTS, Batch, Signal

OWN = "own "
"""Before the names of a batch's entries: an ``attention_mask`` is then an input like any other."""


class Remembered:
    """Keeps what a function gave for each example, and finds it again in whatever batch the example comes.

    Examples are known by their whole content, padding too, since a function may look at it.

    Args:
        ask: Gives tensors (B, ...) by name for a batch, the same names each time. It runs without gradient.

    Example:
        >>> calls = []
        >>> double = Remembered(lambda batch: calls.append(len(batch["x"])) or {"y": 2 * batch["x"]})
        >>> first, again = (double({"x": torch.tensor(x)})["y"] for x in ([1, 2, 3], [3, 1]))
        >>> again
        tensor([6, 2])
    """

    def __init__(self, ask: Callable[[Any], Mapping[str, Tensor]]) -> None:
        self.ask = ask
        self._names: list[str] = []
        self._cached = Cached(self)

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """What the function gives for a batch, a dict or a tuple of tensors."""
        if not self._names:
            with torch.no_grad():
                self._names = list(self.ask(batch))
        named = batch if isinstance(batch, Mapping) else {f"{INPUTS} {i}": part for i, part in enumerate(batch)}
        known = self._cached.signal({f"{OWN}{key}": value for key, value in named.items()}, self._names)
        return {name: known[name] for name in self._names}

    def offers(self, tap: str) -> bool:
        """Whatever the function gives."""
        return True

    def names(self) -> Iterable[str]:
        """What it gave so far."""
        return self._names

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Ask the function."""
        own: Any = {key.removeprefix(OWN): value for key, value in batch.items()}
        if f"{INPUTS} 0" in own:
            own = tuple(own.values())
        with torch.no_grad():
            found = self.ask(own)
        return Signal({name: found[name].detach() for name in wants})
