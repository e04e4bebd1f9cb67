"""What an adaptor gives: entries by name.

``logits`` (N, C) or (B, L, C), ``logits_mask`` (B, L), ``labels`` (N,) or (B, L) and ``losses`` are one or a list.
``inputs_mask`` (B, L) says which positions count where layers are compared. Any other entry is a list of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Entries = Mapping[str, Any]
"""What an adaptor gives."""

LISTED = ("logits", "logits_mask", "losses", "labels")
"""What may be given once or in a list."""


def entries_of(given: Any) -> dict[str, Any]:
    """What an adaptor gave, with lists where there may be several, and without what is None.

    Raises:
        TypeError: the adaptor returned no dict, or None for its logits or losses.

    Example:
        >>> entries_of({"losses": 1.0, "hidden": None})
        {'losses': [1.0]}
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"an adaptor returns a dict, got {type(given).__name__}")
    for name in ("logits", "losses"):
        if given.get(name, ()) is None:
            raise TypeError(f"an adaptor gave None for {name!r}; leave {name!r} out where there is none")
    there = {k: v for k, v in given.items() if v is not None}  # hidden states that a model was not asked for
    return {k: [v] if k in LISTED and not isinstance(v, (list, tuple)) else v for k, v in there.items()}


def select_by_masks(values: Sequence[Tensor], masks: Sequence[Tensor], dims: int = 3) -> list[Tensor]:
    """The positions that masks keep, (N, C) of (B, L, C); what has another number of dimensions stays as it is.

    Args:
        values: Logits (B, L, C) or (B, C), or labels (B, L) or (B,).
        masks: As many masks (B, L), or one for all; 0 where a position does not count.
        dims: How many dimensions those have that are selected from: 3, or of labels 2.

    Raises:
        ValueError: another number of masks, or one of another shape.

    Example:
        >>> both, masks = [torch.zeros(1, 2, 3), torch.ones(1, 2, 3)], [torch.tensor([[1, 0]])]
        >>> [logits.shape[0] for logits in select_by_masks(both, masks)]
        [1, 1]
    """
    masks = list(masks) * len(values) if len(masks) == 1 else masks
    _check_number("logits_mask", masks, values)
    return [_selected(*pair, dims) for pair in zip(values, masks, strict=True)]


def _selected(values: Tensor, mask: Tensor, dims: int) -> Tensor:
    if values.ndim != dims:
        return values
    if mask.shape != values.shape[:2]:
        raise ValueError(f"a logits_mask {tuple(mask.shape)} does not fit {tuple(values.shape)}; give (B, L)")
    return values[mask != 0]


def _check_number(what: str, given: Sequence[Any], logits: Sequence[Any]) -> None:
    if len(given) != len(logits):
        raise ValueError(f"an adaptor gave {len(given)} {what} for {len(logits)} logits; give one for each")


def paired_logits(student: Entries, teacher: Entries) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """What counts of both models' logits, pair by pair, and the labels of it where there are some.

    A mask of one model alone serves both.

    Args:
        student: Has ``logits``, perhaps ``logits_mask`` and ``labels``.
        teacher: Has ``logits``, perhaps ``logits_mask``.

    Raises:
        ValueError: different numbers of logits, or masks that keep different positions.

    Example:
        >>> student = entries_of({"logits": torch.zeros(1, 2, 3), "logits_mask": torch.tensor([[1, 0]])})
        >>> [(ours, theirs, labels)] = paired_logits(student, entries_of({"logits": torch.ones(1, 2, 3)}))
        >>> ours, theirs, labels
        (tensor([[0., 0., 0.]]), tensor([[1., 1., 1.]]), None)
    """
    ours, theirs, labels = student["logits"], teacher["logits"], student.get("labels")
    _check_number("logits of the teacher", theirs, ours)
    if labels is not None:
        _check_number("labels", labels, ours)
    masks = [entries["logits_mask"] for entries in (student, teacher) if "logits_mask" in entries]
    if masks:
        labels = None if labels is None else select_by_masks(labels, masks[0], dims=2)
        ours, theirs = select_by_masks(ours, masks[0]), select_by_masks(theirs, masks[-1])
    for own, other in zip(ours, theirs, strict=True):
        if own.shape[:-1] != other.shape[:-1]:
            raise ValueError(f"logits {tuple(own.shape)} of the student meet {tuple(other.shape)} of the teacher")
    return list(zip(ours, theirs, [None] * len(ours) if labels is None else labels, strict=True))


def total_of(losses: Sequence[Any]) -> Any:
    """The sum of an adaptor's losses, each its mean.

    Raises:
        TypeError: one that is no tensor, from which nothing can be learned.

    Example:
        >>> total_of([torch.tensor([1.0, 3.0]), torch.tensor(4.0)])
        tensor(6.)
    """
    for loss in losses:
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the losses of an adaptor are tensors, got {loss!r}; is the student given its labels?"
            )
    return sum(loss.mean() for loss in losses)


def mean_of_teachers(entries: Sequence[Entries]) -> dict[str, Any]:
    """Several teachers as one, by the mean of their logits; all else is the first one's.

    Raises:
        ValueError: a teacher without logits.

    Example:
        >>> mean_of_teachers([entries_of({"logits": torch.tensor([n])}) for n in (1.0, 3.0)])
        {'logits': [tensor([2.])]}
    """
    if any("logits" not in one for one in entries):
        raise ValueError("several teachers teach by their logits, and an adaptor gave none")
    each = zip(*(one["logits"] for one in entries), strict=True)
    return {**entries[0], "logits": [torch.stack(logits).mean(dim=0) for logits in each]}
