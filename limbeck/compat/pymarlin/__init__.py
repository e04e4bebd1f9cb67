"""PyMarlin's names: put ``limbeck.compat.pymarlin`` where your script says ``pymarlin``.

They are loaded on first use. What differs and what was corrected stands in docs/coming-from.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.compat.pymarlin import distill_utils as distill_utils
    from limbeck.compat.pymarlin.core.data_interface import DataInterface as DataInterface
    from limbeck.compat.pymarlin.core.data_interface import DataProcessor as DataProcessor
    from limbeck.compat.pymarlin.core.module_interface import CallbackInterface as CallbackInterface
    from limbeck.compat.pymarlin.core.module_interface import ModuleInterface as ModuleInterface
    from limbeck.compat.pymarlin.core.module_interface import Stage as Stage
    from limbeck.compat.pymarlin.core.trainer import Trainer as Trainer
    from limbeck.compat.pymarlin.core.trainer_arguments import TrainerArguments as TrainerArguments
    from limbeck.compat.pymarlin.core.trainer_backend import DDPTrainerBackend as DDPTrainerBackend
    from limbeck.compat.pymarlin.core.trainer_backend import SingleProcess as SingleProcess
    from limbeck.compat.pymarlin.core.trainer_backend import SingleProcessAmp as SingleProcessAmp
    from limbeck.compat.pymarlin.core.trainer_backend import SingleProcessApexAmp as SingleProcessApexAmp
    from limbeck.compat.pymarlin.distillation import DistillationArguments as DistillationArguments
    from limbeck.compat.pymarlin.distillation import DistillRecipe as DistillRecipe
    from limbeck.compat.pymarlin.distillation import build_distill_module as build_distill_module
    from limbeck.compat.pymarlin.recipe import ModelArguments as ModelArguments
    from limbeck.compat.pymarlin.recipe import ModuleInterfaceArguments as ModuleInterfaceArguments
    from limbeck.compat.pymarlin.recipe import Recipe as Recipe
    from limbeck.compat.pymarlin.utils.checkpointer.checkpoint_utils import (
        DefaultCheckpointerArguments as DefaultCheckpointerArguments,
    )
    from limbeck.compat.pymarlin.utils.config_parser.custom_arg_parser import CustomArgParser as CustomArgParser
    from limbeck.compat.pymarlin.utils.stats import BasicStats as BasicStats
    from limbeck.compat.pymarlin.utils.stats import StatInitArguments as StatInitArguments
    from limbeck.compat.pymarlin.utils.stats import global_stats as global_stats
    from limbeck.compat.pymarlin.utils.writer import WriterInitArguments as WriterInitArguments

_HERE = "limbeck.compat.pymarlin"
_HOMES = {
    "BasicStats": "utils.stats",
    "CallbackInterface": "core.module_interface",
    "CustomArgParser": "utils.config_parser.custom_arg_parser",
    "DDPTrainerBackend": "core.trainer_backend",
    "DataInterface": "core.data_interface",
    "DataProcessor": "core.data_interface",
    "DefaultCheckpointerArguments": "utils.checkpointer.checkpoint_utils",
    "DistillRecipe": "distillation",
    "DistillationArguments": "distillation",
    "ModelArguments": "recipe",
    "ModuleInterface": "core.module_interface",
    "ModuleInterfaceArguments": "recipe",
    "Recipe": "recipe",
    "SingleProcess": "core.trainer_backend",
    "SingleProcessAmp": "core.trainer_backend",
    "SingleProcessApexAmp": "core.trainer_backend",
    "Stage": "core.module_interface",
    "StatInitArguments": "utils.stats",
    "Trainer": "core.trainer",
    "TrainerArguments": "core.trainer_arguments",
    "WriterInitArguments": "utils.writer",
    "build_distill_module": "distillation",
    "global_stats": "utils.stats",
}

__all__ = [*_HOMES, "distill_utils"]


def __getattr__(name: str) -> Any:
    if name == "distill_utils":
        return importlib.import_module(f"{_HERE}.distill_utils")
    if name not in _HOMES:
        raise AttributeError(f"module {_HERE!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{_HERE}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
