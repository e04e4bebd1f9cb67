"""Checkpoints, under the names of ``modelopt.torch.opt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from limbeck.compat.modelopt.config import ConfigError
from limbeck.compat.modelopt.distillation import unwrapped
from limbeck.compat.modelopt.distillation_model import LOSS_MODULES, TEACHER_MODEL, DistillationModel
from limbeck.train.checkpoint import read_weights, save_weights


def save(model: nn.Module, f: str | Path) -> None:
    """Save a model's weights, and those of its losses where it is converted, as safetensors whatever the suffix.

    Raises:
        OSError: the file cannot be written.
    """
    save_weights(unwrapped(model), Path(f))


def restore(model: Any, f: str | Path) -> nn.Module:
    """Load what `save` saved.

    Args:
        model: The student, a function or ``(class, args, kwargs)`` that makes it, or a converted model, whose
            losses are restored too.
        f: The file.

    Returns:
        The model. A student is not converted: the file holds no teacher and no losses, only weights.

    Raises:
        ConfigError: the file belongs to another model, or is one of ModelOpt's own, which are pickles.

    Example:
        >>> import tempfile
        >>> student, path = nn.Linear(2, 3), tempfile.mkdtemp() + "/student.pt"
        >>> save(student, path)
        >>> bool((restore((nn.Linear, (2, 3)), path).weight == student.weight).all())
        True
    """
    made: nn.Module = model if isinstance(model, nn.Module) else _made(model)
    try:
        state = read_weights(Path(f))
    except SafetensorError as error:
        raise ConfigError(f"{f} is no file of limbeck's ({error}); pickles are not loaded, save it anew") from None
    if not isinstance(made, DistillationModel):
        state = {
            key: value for key, value in state.items() if key.split(".")[0] not in (LOSS_MODULES, TEACHER_MODEL)
        }
    try:
        made.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{f} belongs to another model: {str(error).splitlines()[1].strip()}") from None
    return made


class ModeloptStateManager:
    """Says whether a model is converted, which is all the state that there is.

    Example:
        >>> ModeloptStateManager(nn.Linear(2, 3)).has_state
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)

    @property
    def has_state(self) -> bool:
        """Whether the model is a converted one."""
        return self.is_converted(self.model)

    @staticmethod
    def is_converted(model: nn.Module) -> bool:
        """Whether a model is a converted one."""
        return isinstance(unwrapped(model), DistillationModel)


def enable_huggingface_checkpointing() -> None:
    """Nothing needs to be enabled: a converted model is saved by ``save_pretrained`` as the student that it is."""


def _made(source: Any) -> nn.Module:
    parts: list[Any] = list(source) if isinstance(source, tuple) else [source]
    make, args, kwargs = parts + [(), {}][len(parts) - 1 :]
    made: nn.Module = make(*args, **kwargs)
    return made
