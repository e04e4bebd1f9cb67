"""PyMarlin's names, all of them in this one module; docs/coming-from.md says what differs and what was corrected.

A script that uses a module of PyMarlin by its name imports this one under it:
``from limbeck.compat import pymarlin as trainer``.
"""

from __future__ import annotations

from typing import Any

from limbeck.compat.pymarlin import distill_utils
from limbeck.compat.pymarlin.arguments import (
    CustomArgParser,
    DefaultCheckpointerArguments,
    DistillationArguments,
    DistributedTrainingArguments,
    ModelArguments,
    ModuleInterfaceArguments,
    StatInitArguments,
    TrainerArguments,
    WriterInitArguments,
)
from limbeck.compat.pymarlin.distill_utils import extract_layers, logits_loss, representations_loss
from limbeck.compat.pymarlin.module import CallbackInterface, DataInterface, DataProcessor, ModuleInterface, Stage
from limbeck.compat.pymarlin.plugins import HfNERPlugin, HfSeqClassificationPlugin
from limbeck.compat.pymarlin.recipe import DistillRecipe, Recipe, build_distill_module
from limbeck.compat.pymarlin.stats import global_stats
from limbeck.compat.pymarlin.trainer import (
    DDPTrainerBackend,
    SingleProcess,
    SingleProcessAmp,
    Trainer,
    build_trainer_backend,
)

__all__ = [
    "CallbackInterface",
    "CustomArgParser",
    "DDPTrainerBackend",
    "DataInterface",
    "DataProcessor",
    "DefaultCheckpointerArguments",
    "DistillRecipe",
    "DistillationArguments",
    "DistributedTrainingArguments",
    "HfNERPlugin",
    "HfSeqClassificationPlugin",
    "ModelArguments",
    "ModuleInterface",
    "ModuleInterfaceArguments",
    "Recipe",
    "SingleProcess",
    "SingleProcessAmp",
    "Stage",
    "StatInitArguments",
    "Trainer",
    "TrainerArguments",
    "WriterInitArguments",
    "build_distill_module",
    "build_trainer_backend",
    "distill_utils",
    "extract_layers",
    "global_stats",
    "logits_loss",
    "representations_loss",
]

GONE = {
    "SingleProcessApexAmp": "use SingleProcessAmp, PyTorch does what apex did",
    "SingleProcessDpSgd": "training with differential privacy (Opacus) is not supported; use SingleProcess",
    "DefaultCheckpointer": "pass DefaultCheckpointerArguments to TrainerArguments",
    "AbstractCheckpointer": "checkpointers of a script's own are not supported; use DefaultCheckpointerArguments",
    "OutputCollector": "use limbeck.train.collecting.Collected",
    "SequentialDistributedSampler": "use limbeck.train.collecting.RankShare",
    "rank_zero_only": "use accelerate.PartialState().on_main_process",
    "getlogger": "use logging.getLogger",
    "core": "import its names from limbeck.compat.pymarlin",
    "utils": "import its names from limbeck.compat.pymarlin",
}


def __getattr__(name: str) -> Any:
    if name in GONE:
        raise ImportError(f"limbeck.compat.pymarlin has no {name}; {GONE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
