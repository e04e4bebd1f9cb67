"""TextBrewer's names: ``import limbeck.compat.textbrewer as textbrewer``, and the script stays as it is.

What is behind them is limbeck's: its losses, its loop (`limbeck.train.plain`), its memory of what a teacher said.
The values of the losses are TextBrewer's own, without the factor T², unless ``DistillationConfig(correct=True)``.
See docs/coming-from.md for what was corrected.
"""

from limbeck.compat.textbrewer import utils
from limbeck.compat.textbrewer.configurations import DistillationConfig, IntermediateMatch, TrainingConfig
from limbeck.compat.textbrewer.distiller_utils import CustomMatch
from limbeck.compat.textbrewer.distillers import (
    BasicDistiller,
    BasicTrainer,
    GeneralDistiller,
    MultiTaskDistiller,
    MultiTeacherDistiller,
)
from limbeck.compat.textbrewer.presets import (
    ADAPTOR_KEYS,
    FEATURES,
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
    register_new,
)

Distillers = {
    "Basic": BasicDistiller,
    "General": GeneralDistiller,
    "MultiTeacher": MultiTeacherDistiller,
    "MultiTask": MultiTaskDistiller,
    "Train": BasicTrainer,
}

__all__ = [
    "ADAPTOR_KEYS",
    "FEATURES",
    "KD_LOSS_MAP",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "TEMPERATURE_SCHEDULER",
    "WEIGHT_SCHEDULER",
    "BasicDistiller",
    "BasicTrainer",
    "CustomMatch",
    "DistillationConfig",
    "Distillers",
    "GeneralDistiller",
    "IntermediateMatch",
    "MultiTaskDistiller",
    "MultiTeacherDistiller",
    "TrainingConfig",
    "register_new",
    "utils",
]
