"""The names of ``pymarlin.plugins.hfdistill_utils``."""

from limbeck.compat.pymarlin.distill_utils import (
    concat_layers,
    extract_layers,
    logits_loss,
    prepare_inputs,
    representations_loss,
)
from limbeck.compat.pymarlin.distillation import DistillationArguments, build_distill_module

__all__ = [
    "DistillationArguments",
    "build_distill_module",
    "concat_layers",
    "extract_layers",
    "logits_loss",
    "prepare_inputs",
    "representations_loss",
]
