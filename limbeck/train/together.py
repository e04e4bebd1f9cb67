"""Several optimizers, or several schedulers, that make their steps together and stand where one is expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Optimizers(torch.optim.Optimizer):
    """Several optimizers as one; each keeps its own kind, its groups and its schedulers.

    Args:
        optimizers: At least one; no parameter stands in two of them.

    Raises:
        ValueError: there is none, or two hold the same parameter.

    Example:
        >>> body, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        >>> both = Optimizers([torch.optim.SGD(body.parameters(), lr=0.1), torch.optim.Adam(head.parameters())])
        >>> [group["lr"] for group in both.param_groups]
        [0.1, 0.001]
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not optimizers:
            raise ValueError("there is no optimizer; pass at least one")
        self.optimizers = list(optimizers)
        super().__init__([group for each in optimizers for group in each.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each; a closure would be evaluated by each of them at another point, and is refused.

        Raises:
            ValueError: a closure was given.
        """
        if closure is not None:
            raise ValueError("several optimizers take no closure; call backward before the step")
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all, their parameters numbered through."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            state |= {first + number: value for number, value in own["state"].items()}
            groups += [{**group, "params": [first + n for n in group["params"]]} for group in own["param_groups"]]
            first += _parameters(optimizer)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, into as many optimizers of the same kinds.

        Raises:
            ValueError: it is of other groups.
        """
        groups, first = list(state_dict["param_groups"]), 0
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the state has {len(groups)} groups of parameters, these optimizers {len(self.param_groups)}"
            )
        for optimizer in self.optimizers:
            count, own = _parameters(optimizer), groups[: len(optimizer.param_groups)]
            groups = groups[len(own) :]
            state = {n - first: v for n, v in state_dict["state"].items() if first <= n < first + count}
            numbered = [{**group, "params": [n - first for n in group["params"]]} for group in own]
            optimizer.load_state_dict({"state": state, "param_groups": numbered})
            first += count
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]


def as_one(optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """One optimizer as it is, or several as one.

    Example:
        >>> one = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> as_one([one]) is one, as_one(one) is one
        (True, True)
    """
    if not isinstance(optimizers, Sequence):
        return optimizers
    return optimizers[0] if len(optimizers) == 1 else Optimizers(optimizers)


class Schedulers:
    """Several schedulers as one.

    Args:
        schedulers: Anything with ``step()`` and a state dict.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> both = Schedulers([torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)])
        >>> optimizer.step(), both.step(), optimizer.param_groups[0]["lr"]
        (None, None, 0.5)
    """

    def __init__(self, schedulers: Sequence[Any]) -> None:
        self.schedulers = list(schedulers)

    def step(self) -> None:
        """One step of each."""
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all by their place."""
        return {str(place): scheduler.state_dict() for place, scheduler in enumerate(self.schedulers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for place, scheduler in enumerate(self.schedulers):
            scheduler.load_state_dict(state_dict[str(place)])


def _parameters(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
