"""A teacher that is asked once for each example, whatever batch it comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from limbeck.compat.textbrewer.configurations import IntermediateMatch
from limbeck.compat.textbrewer.presets import FEATURES
from limbeck.teachers import Cached
from limbeck.types import INPUTS, Batch, Signal


class Memory:
    """What a teacher said, found again by the content of the examples in whatever batch they come.

    Args:
        ask: Gives the adapted results of a teacher for a batch.
        matches: Which layers are read.
    """

    def __init__(self, ask: Callable[[Any], Mapping[str, Any]], matches: Sequence[IntermediateMatch]) -> None:
        self.ask, self.matches = ask, matches
        self.taps: list[tuple[str, int]] = []
        self.cached = Cached(self)

    def results(self, batch: Any) -> dict[str, Any]:
        """The teacher's results for a batch, as an adaptor gives them."""
        if not self.taps:
            with torch.no_grad():
                count = len(self.ask(batch).get("logits", ()))
            layers = [(match.feature, layer) for match in self.matches for layer in several(match.layer_T)]
            self.taps = [*(("logits", place) for place in range(count)), *dict.fromkeys(layers)]
        # By other names than limbeck's, so that padding counts: here an adaptor says what is padding.
        named = batch if isinstance(batch, Mapping) else {f"{INPUTS} {i}": part for i, part in enumerate(batch)}
        known = self.cached.signal({f"own {k}": v for k, v in named.items()}, [f"{k}.{i}" for k, i in self.taps])
        found: dict[str, Any] = {"logits": [known[f"{k}.{i}"] for k, i in self.taps if k == "logits"]}
        found |= {f: {i: known[f"{k}.{i}"] for k, i in self.taps if k == f} for f in FEATURES}
        return {key: value for key, value in found.items() if value}

    def offers(self, tap: str) -> bool:
        """Whatever the adaptor gives."""
        return True

    def names(self) -> Iterable[str]:
        """What was read so far."""
        return [f"{kind}.{place}" for kind, place in self.taps]

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Ask the teacher."""
        own: Any = {key.removeprefix("own "): value for key, value in batch.items()}
        if f"{INPUTS} 0" in own:
            own = tuple(own.values())
        with torch.no_grad():
            results = self.ask(own)
        return Signal({f"{kind}.{place}": results[kind][place].detach() for kind, place in self.taps})


def several(layers: int | Sequence[int]) -> Sequence[int]:
    """One layer or more as a list."""
    return layers if isinstance(layers, Sequence) else [layers]
