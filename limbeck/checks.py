"""What a Distiller refuses: models, terms and batches that cannot belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.batch import ATTENTION_MASK
from limbeck.pretrained import check_same_labels
from limbeck.registry import nearest
from limbeck.taps import Tap
from limbeck.teachers import ModuleTeacher, Teacher, within
from limbeck.teachers.cached import OVER_POSITIONS
from limbeck.teachers.members import check_students
from limbeck.terms import Term, in_term, where
from limbeck.types import IGNORE_INDEX, Batch, Signal


def live_modules(teacher: Teacher | None) -> dict[str, ModuleTeacher]:
    """The modules behind a teacher, in this process, by what stands before their taps."""
    return {prefix: inner for prefix, inner in within(teacher) if isinstance(inner, ModuleTeacher)}


def check_apart(student: nn.Module, teacher: Any) -> None:
    """A teacher is frozen, and a student that shares weights with it would be, too.

    Args:
        student: The student.
        teacher: A teacher, or what one is made of; a module is best asked before it is made one, and frozen.

    Raises:
        ValueError: they share weights.
    """
    if isinstance(teacher, nn.Module):
        modules = [teacher]
    elif isinstance(teacher, Mapping):
        modules = [part for part in teacher.values() if isinstance(part, nn.Module)]
    else:
        modules = [live.module for live in live_modules(teacher).values()] if isinstance(teacher, Teacher) else []
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(p) in own for module in modules for p in module.parameters()):
        raise ValueError("student and teacher share weights; pass copy.deepcopy(teacher) as the teacher")
    if isinstance(teacher, Teacher):
        check_students(student, teacher)


def check_learns(student: nn.Module, loss: Tensor, stage: str | None) -> None:
    """Refuse a loss that nothing can be learned from.

    Args:
        student: The student.
        loss: Of a training step.
        stage: The stage that it belongs to, as text, if there are stages.

    Raises:
        ValueError: it depends on nothing that trains.
    """
    if loss.requires_grad:
        return
    if stage is not None:
        raise ValueError(f"{stage} trains nothing that its terms depend on")
    trained = sum(parameter.requires_grad for parameter in student.parameters())
    raise ValueError(
        f"the terms depend on nothing that trains: {trained} of the student's parameters have requires_grad; "
        "set it for what is to learn"
    )


def check_offers(terms: Sequence[Term], teacher_of: Callable[[str | None], Teacher | None]) -> None:
    """Refuse terms that read what their teacher does not have.

    Args:
        terms: The terms.
        teacher_of: The teacher of a task.

    Raises:
        ValueError: there is no such place, or no teacher at all.
    """
    for term in terms:
        if term.reads_labels:
            continue
        with in_term(term):
            teacher = teacher_of(term.task)
        if teacher is None:
            raise ValueError(f"{where(term)} needs a teacher, and there is none; name one, or drop the term")
        missing = next((tap for tap in term.teacher_taps if not teacher.offers(tap)), None)
        if missing is not None:
            hint = nearest(missing, teacher.names())
            raise ValueError(f"{where(term)}: the teacher has no {missing!r}; {hint}")


def check_classes(terms: Sequence[Term], student: nn.Module, teacher: Teacher | None) -> None:
    """Refuse teachers of other classes than the student's, or in another order, where logits are read.

    Raises:
        ValueError: the names of the classes differ.
    """
    read = {tap for term in terms for tap in term.teacher_taps}
    for prefix, live in live_modules(teacher).items():
        if {"logits", f"{prefix}logits"} & read:
            check_same_labels(student, live.module)


def check_causal(terms: Sequence[Term], student: nn.Module, is_encoder_decoder: bool) -> None:
    """Refuse to move labels to the next token where they must stay.

    Raises:
        ValueError: the student has an encoder, or a term has a mark of its own for what does not count.
    """
    if is_encoder_decoder:
        raise ValueError(
            f"causal=True moves labels to the next token, and in a {type(student).__name__} they stand where its "
            "decoder says them; leave causal out"
        )
    for term in terms:
        index = term.comparison.options.get("ignore_index", IGNORE_INDEX)
        if term.reads_labels and index != IGNORE_INDEX:
            raise ValueError(
                f"{where(term)}: causal=True marks what has no next token with {IGNORE_INDEX}, and the term "
                f"ignores {index}; put {IGNORE_INDEX} into the labels and leave ignore_index out"
            )


def check_gradients(taps: Mapping[str, Tap], student: nn.Module, seen: Signal) -> None:
    """Refuse a tap that silently gives no gradient, as reentrant activation checkpointing does.

    Raises:
        ValueError: the tapped module trains, and what it gave carries no gradient.
    """
    modules = dict(student.named_modules())
    for text, tap in taps.items():
        trains = any(p.requires_grad for p in modules[tap.module or ""].parameters())
        if trains and text != "logits" and not seen[text].requires_grad:
            raise ValueError(
                f"tap {text!r} carries no gradient, although its module trains; "
                "under activation checkpointing set use_reentrant=False"
            )


def check_same_tokens(terms: Sequence[Term], student: Signal, teacher: Signal, own: Batch, theirs: Batch) -> None:
    """Refuse to compare token by token what two models were given in different tokens.

    Args:
        terms: The terms.
        student: What was read of the student.
        teacher: What was read of the teacher.
        own: The batch as the student is given it; with that of the teacher, it tells by the attention masks.
        theirs: The batch as the teacher is given it.

    Raises:
        ValueError: a term reads both models by token, and the masks differ. (Of masks of one shape an accelerator
            is not asked, since it would have to wait.)
    """
    ours, its = own.get(ATTENTION_MASK), theirs.get(ATTENTION_MASK)
    if not (isinstance(ours, Tensor) and isinstance(its, Tensor) and ours.ndim == its.ndim == 2):
        return
    if ours.shape == its.shape and (ours.device.type != "cpu" or torch.equal(ours, its)):
        return
    for term in terms:
        reads_tokens = not term.reads_labels and any(_by_token(tap, student[tap], ours) for tap in term.taps)
        if reads_tokens and any(_by_token(tap, teacher[tap], its) for tap in term.teacher_taps):
            raise ValueError(
                f"{where(term)} compares token by token, and the two models are given different tokens (up to "
                f"{ours.shape[1]} and {its.shape[1]} here), as two tokenizers make them of one text; compare the "
                "logits or one vector of each text (the input of the last layer, say), or take a student with the "
                "teacher's tokenizer"
            )


def _by_token(tap: str, value: Any, mask: Tensor) -> bool:
    """Whether a value has the positions of a mask (B, L): (B, L, ...) or, between tokens, (B, heads, L, L)."""
    shape = tuple(value.shape)
    if tap.endswith(OVER_POSITIONS):
        return True
    between = len(shape) == 4 and shape[2] == shape[3] == mask.shape[1]
    return between or (len(shape) > 2 and shape[:2] == tuple(mask.shape))
