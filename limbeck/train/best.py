"""The best weights of a training, kept in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn


class BestWeights:
    """What a module held when its score was highest, in the CPU's memory.

    Args:
        module: The module; it goes on training.

    Example:
        >>> import torch
        >>> module = nn.Linear(1, 1, bias=False)
        >>> best = BestWeights(module)
        >>> for weight, score in ((1.0, 0.8), (2.0, 0.9), (3.0, 0.7)):
        ...     _ = torch.nn.init.constant_(module.weight, weight)
        ...     _ = best.offer(score)
        >>> best.restore(), module.weight.item()
        (0.9, 2.0)
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.score = -math.inf
        self._weights: dict[str, Tensor] = {}

    def offer(self, score: float) -> bool:
        """Keep the weights as they are if this score is higher than any before; of equal ones the first."""
        if not score > self.score:
            return False
        self.score = score
        self._weights = {name: tensor.detach().cpu().clone() for name, tensor in self.module.state_dict().items()}
        return True

    def offer_by(self, judge: Callable[[nn.Module], float]) -> bool:
        """The same by what a function says of the module, which it sees in eval mode."""
        modes = [(part, part.training) for part in self.module.modules()]
        try:
            return self.offer(float(judge(self.module.eval())))
        finally:
            for part, mode in modes:
                part.training = mode

    def restore(self) -> float:
        """Put the best weights back, if any were kept, and say their score."""
        if self._weights:
            self.module.load_state_dict(self._weights)
        return self.score
