"""NVIDIA ModelOpt's distillation: ``import limbeck.compat.modelopt as mtd``; the same module is ``mto``.

See docs/coming-from.md for what is corrected and what differs.
"""

from limbeck.compat.modelopt.config import ConfigError, ExportStudentConfig, KDLossConfig, LayerwiseKDConfig
from limbeck.compat.modelopt.distillation import convert, export
from limbeck.compat.modelopt.distillation_model import DistillationModel, LayerwiseDistillationModel
from limbeck.compat.modelopt.loss_balancers import (
    STUDENT_LOSS_KEY,
    DistillationLossBalancer,
    StaticLossBalancer,
)
from limbeck.compat.modelopt.losses import LMLogitsLoss, LogitsDistillationLoss, MFTLoss, MGDLoss
from limbeck.compat.modelopt.opt import ModeloptStateManager, enable_huggingface_checkpointing, restore, save

__all__ = [
    "STUDENT_LOSS_KEY",
    "ConfigError",
    "DistillationLossBalancer",
    "DistillationModel",
    "ExportStudentConfig",
    "KDLossConfig",
    "LMLogitsLoss",
    "LayerwiseDistillationModel",
    "LayerwiseKDConfig",
    "LogitsDistillationLoss",
    "MFTLoss",
    "MGDLoss",
    "ModeloptStateManager",
    "StaticLossBalancer",
    "convert",
    "enable_huggingface_checkpointing",
    "export",
    "restore",
    "save",
]
