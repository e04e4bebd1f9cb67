"""What a distilling Trainer refuses before it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from limbeck.distiller import Distiller
from limbeck.teachers import Teacher, TeacherLike
from limbeck.terms import Term


def check_made(
    model: nn.Module | None,
    model_init: Callable[..., nn.Module] | None,
    teacher: Teacher | TeacherLike | None,
    terms: Sequence[Term] | None,
    options: Mapping[str, Any],
) -> None:
    """Refuse a Distiller and the parts of one, and no model at all."""
    if model is None and model_init is None:
        raise ValueError("there is no student; pass model= or model_init=")
    if not isinstance(model, Distiller):
        return
    given = [name for name, value in (("teacher", teacher), ("terms", terms)) if value is not None]
    given += list(options)
    if given:
        raise ValueError(f"the model is a Distiller already, and {given[0]} was given too; leave one of them out")


def check_arguments(args: Any) -> None:
    """Refuse a model where the TrainingArguments stand.

    Raises:
        TypeError: the second argument is a model or a path of one.
    """
    if isinstance(args, (nn.Module, str)):
        raise TypeError(
            f"after the student come TrainingArguments, got a {type(args).__name__}; pass the teacher as teacher="
        )


def check_covered(distiller: Distiller, optimizer: Any) -> None:
    """Refuse an optimizer of the user's own that leaves out what has to train."""
    there = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in distiller.named_parameters() if p.requires_grad and id(p) not in there]
    if missing:
        raise ValueError(
            f"the optimizer leaves out {missing[0]!r} and {len(missing) - 1} more of what trains; make it of "
            "trainer.distiller.parameters(), of a Distiller with sample=, or leave it to the trainer"
        )
