"""limbeck: knowledge distillation. A trained teacher goes in; a smaller, faster student comes out.

The public names are listed here and loaded on first use, so that ``import limbeck`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.distiller import Distiller as Distiller
    from limbeck.encodings import paired as paired
    from limbeck.losses import LOSSES as LOSSES
    from limbeck.losses import loss as loss
    from limbeck.recipe import Recipe as Recipe
    from limbeck.report import Report as Report
    from limbeck.run import distill as distill
    from limbeck.students import take_layers as take_layers
    from limbeck.teachers import Cached as Cached
    from limbeck.teachers import Ensemble as Ensemble
    from limbeck.teachers import Remote as Remote
    from limbeck.teachers import Self as Self
    from limbeck.terms import Term as Term
    from limbeck.terms import layer_pairs as layer_pairs
    from limbeck.terms import self_distillation as self_distillation
    from limbeck.terms import spread as spread
    from limbeck.train import Callback as Callback
    from limbeck.train import Examples as Examples
    from limbeck.train import Mixed as Mixed
    from limbeck.train import Settings as Settings
    from limbeck.train import fit as fit
    from limbeck.types import Output as Output
    from limbeck.types import Signal as Signal
    from limbeck.types import TopK as TopK

__version__ = "0.1.0"

_HOMES = {
    "Distiller": "limbeck.distiller",
    "paired": "limbeck.encodings",
    "LOSSES": "limbeck.losses",
    "loss": "limbeck.losses",
    "Recipe": "limbeck.recipe",
    "Report": "limbeck.report",
    "distill": "limbeck.run",
    "take_layers": "limbeck.students",
    "Cached": "limbeck.teachers",
    "Ensemble": "limbeck.teachers",
    "Remote": "limbeck.teachers",
    "Self": "limbeck.teachers",
    "Term": "limbeck.terms",
    "layer_pairs": "limbeck.terms",
    "self_distillation": "limbeck.terms",
    "spread": "limbeck.terms",
    "Callback": "limbeck.train",
    "Examples": "limbeck.train",
    "Mixed": "limbeck.train",
    "Settings": "limbeck.train",
    "fit": "limbeck.train",
    "Output": "limbeck.types",
    "Signal": "limbeck.types",
    "TopK": "limbeck.types",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
