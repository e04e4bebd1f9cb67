"""ModelOpt's registries of classes that it makes, which are empty: a student keeps its class, and none is made."""

from __future__ import annotations

from torch import nn


class Registry(dict[type[nn.Module], type[nn.Module]]):
    """What was made of which class.

    Example:
        >>> nn.Linear in DistillationDMRegistry, DistillationDMRegistry.prefix
        (False, 'Distill')
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix


DistillationDMRegistry = Registry("Distill")
LayerwiseDistillationDMRegistry = Registry("LayerwiseDistill")
