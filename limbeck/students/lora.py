"""A student that is the teacher with small adapters, of which alone it learns (peft's LoRA)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from limbeck.registry import refuse_unknown


def with_lora(model: nn.Module, **options: Any) -> Any:
    """Make a copy of a model with low-rank adapters; only these train.

    The adapters begin as zero, so the student begins as the model that it was made from. As a teacher of the same
    weights, `limbeck.teachers.WithoutAdapter` of the student costs no second model in memory.
    ``save_pretrained`` keeps the adapters alone, for peft to load; `merged` makes a plain model of both.

    Args:
        model: The model to adapt; it is left as it is.
        **options: Those of ``peft.LoraConfig``: ``r=8``, ``lora_alpha=16``, ``target_modules=["query", "value"]``
            (which peft knows itself for well-known models), ``modules_to_save=["classifier"]`` for parts that
            train whole.

    Returns:
        A ``peft.PeftModel``.

    Raises:
        ModuleNotFoundError: peft is not there.
        TypeError: an option that LoRA does not have.
        ValueError: the model has no such modules.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> student = with_lora(model, r=2, target_modules=["0"])
        >>> sorted(name for name, p in student.named_parameters() if p.requires_grad)
        ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight']

    Reference:
        Hu et al. 2021, LoRA, arXiv:2106.09685.
    """
    peft = _peft()
    known = peft.LoraConfig.__dataclass_fields__
    refuse_unknown(options, known, "LoRA")
    student: Any = copy.deepcopy(model)  # peft puts its layers into the very model that it is given
    return peft.get_peft_model(student, peft.LoraConfig(**options))


def merged(student: nn.Module) -> Any:
    """Make a plain model of a student with adapters: the same function, no adapters, the class it had before.

    Args:
        student: What `with_lora` or peft returned; it is left as it is.

    Returns:
        A model that saves and loads with ``from_pretrained`` if the adapted one did; all of its weights can train.

    Raises:
        ModuleNotFoundError: peft is not there.
        TypeError: the student has no adapters.

    Example:
        >>> import torch
        >>> student = with_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), r=2, target_modules=["0"])
        >>> merged(student)
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    if not isinstance(student, _peft().PeftModel):
        raise TypeError(f"a {type(student).__name__} has no adapters to merge; pass what with_lora returned")
    plain: Any = copy.deepcopy(student)
    return plain.merge_and_unload().requires_grad_(True)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        raise ModuleNotFoundError("adapters need peft; pip install 'limbeck[lora]'") from None
    return peft
