"""The student into a distillation model, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from limbeck.compat.modelopt.config import ConfigError, ExportStudentConfig, KDLossConfig, LayerwiseKDConfig
from limbeck.compat.modelopt.distillation_model import DistillationModel
from limbeck.registry import nearest, refuse_unknown

Config = KDLossConfig | LayerwiseKDConfig | ExportStudentConfig
Mode = str | Mapping[str, Any] | Sequence[str | tuple[str, Any]]

MODES: Mapping[str, type[Config]] = {
    "kd_loss": KDLossConfig,
    "layerwise_kd": LayerwiseKDConfig,
    "export_student": ExportStudentConfig,
}


def convert(model: nn.Module, mode: Mode) -> Any:
    """Make a student a model that distils.

    Args:
        model: The student.
        mode: ``[("kd_loss", {...})]``, ``[("layerwise_kd", {...})]`` or ``"export_student"``; also as a mapping of
            mode to configuration. The keys are those of `KDLossConfig`.

    Returns:
        A `DistillationModel`, or the student where it was exported. The model that was given is not changed.

    Raises:
        ConfigError: an unknown mode, or a configuration that cannot work.
        TypeError: an unknown key, or something else than a model, modes and dicts.

    Example:
        >>> config = {"teacher_model": nn.Linear(2, 3), "criterion": nn.MSELoss()}
        >>> model = convert(nn.Linear(2, 3), mode=[("kd_loss", config)])
        >>> isinstance(model, DistillationModel), isinstance(model, nn.Linear)
        (True, True)
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        raise TypeError(f"the student is a module, got {given!r}")
    model = unwrapped(model)
    for name, config in _modes(mode):
        if isinstance(config, ExportStudentConfig):
            model = export(model)
        elif isinstance(model, DistillationModel):
            raise ConfigError(
                f"the model is converted already, and {name!r} would be a second time; export it first"
            )
        else:
            model = DistillationModel(model, config)
    return model


def export(model: nn.Module) -> nn.Module:
    """Give back the student alone.

    Args:
        model: What `convert` returned, or that in a DataParallel or DistributedDataParallel.

    Example:
        >>> student = nn.Linear(2, 3)
        >>> config = {"teacher_model": nn.Linear(2, 3), "criterion": nn.MSELoss()}
        >>> export(convert(student, mode=[("kd_loss", config)])) is student
        True
    """
    model = unwrapped(model)
    if not isinstance(model, DistillationModel):
        warnings.warn("Export of model failed: the model is no `DistillationModel`", stacklevel=2)
        return model
    return model.export()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within a DataParallel or DistributedDataParallel."""
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner: Any = model.module if parallel else model
    return inner  # type: ignore[no-any-return]


def _modes(mode: Mode) -> list[tuple[str, Config]]:
    listed: Any = [mode] if isinstance(mode, str) else mode.items() if isinstance(mode, Mapping) else mode
    if isinstance(mode, tuple) and len(mode) == 2 and isinstance(mode[0], str) and not isinstance(mode[1], tuple):
        listed = [mode]  # one mode without its list
    if not isinstance(listed, Iterable):
        raise TypeError(f"mode is [('kd_loss', {{...}})], got {mode!r}")
    return [_mode(*_with_config(entry)) for entry in listed]


def _with_config(entry: Any) -> tuple[str, Any]:
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, (tuple, list)) or len(entry) != 2:
        raise TypeError(f"a mode is its name, or ('kd_loss', {{...}}), got {entry!r}")
    return entry[0], entry[1]


def _mode(name: str, config: Any) -> tuple[str, Config]:
    if name not in MODES:
        raise ConfigError(f"unknown mode {name!r}; {nearest(name, MODES)}")
    kind = MODES[name]
    if isinstance(config, kind):
        return name, config
    if not isinstance(config, Mapping):
        raise TypeError(f"the configuration of mode {name!r} is a dict, got {config!r}")
    refuse_unknown(config, [field.name for field in fields(kind)], f"mode {name!r}")
    return name, kind(**config)
