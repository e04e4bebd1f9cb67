"""Running means of the terms between two lines of the log, kept on the device and over an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.types import Output

TOTAL = "the loss"
"""The key of the loss among the terms; none of them is called so."""


class StepTotals:
    """What the parts of one step add up to, for a balance that follows the steps."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.products: Tensor | None = None

    def add(self, output: Output, share: float) -> None:
        """Add a micro-batch; gradients are measured in the first of them."""
        for name, value in output.terms.items():
            self.values[name] = self.values[name] + value * share if name in self.values else value * share
        if self.products is None and output.gradients is not None:
            self.products = output.gradients * share

    def everywhere(self, accelerator: Any) -> tuple[dict[str, Tensor], Tensor | None]:
        """The same over all ranks: terms are summed as DDP does it, gradients are averaged."""
        if accelerator.num_processes == 1:
            return self.values, self.products
        mean = accelerator.reduce(torch.stack([v.float() for v in self.values.values()]), "mean")
        products = None if self.products is None else accelerator.reduce(self.products, "mean")
        return dict(zip(self.values, mean, strict=True)), products


class Averages:
    """Sums of each term over the steps since the last line of the log that had it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}

    def add(self, terms: Mapping[str, Tensor], share: float) -> None:
        """Add what one micro-batch gives to the terms of its step."""
        for name, value in terms.items():
            value = value * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def end_step(self, names: Iterable[str]) -> None:
        """Count a step with these terms; where there are several tasks, not every step has all."""
        for name in names:
            self.steps[name] = self.steps.get(name, 0) + 1

    def means(self, accelerator: Any) -> dict[str, float]:
        """The mean of each term over its steps and the ranks; this waits for the device."""
        if not self.sums:
            return {}
        values = torch.stack([value.float() for value in self.sums.values()])
        values = values / torch.tensor([self.steps[name] for name in self.sums], device=values.device)
        return dict(zip(self.sums, accelerator.reduce(values, "mean").tolist(), strict=True))

    def reset(self) -> None:
        """Begin anew, after a line was written."""
        self.sums, self.steps = {}, {}

    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds of this; each rank has sums of its own."""
        return {"sums": self.sums, "steps": self.steps}

    def restore(self, kept: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `kept` gave."""
        self.sums = {name: value.to(device) for name, value in kept["sums"].items()}
        self.steps = dict(kept["steps"])
