"""Batches: how examples travel, whatever the loader made of them.

Shape legend: B examples, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.types import IGNORE_INDEX, INPUTS, LABELS, STUDENT, TASK, TEACHER, TEACHER_CACHE, Batch, Sparse

ATTENTION_MASK = "attention_mask"
PARTS = {STUDENT, TEACHER, TEACHER_CACHE}


def as_batch(batch: Any) -> Batch:
    """Name the entries of a batch.

    Args:
        batch: A mapping, which is returned as it is; or a tuple or list of inputs with the labels last (a single
            entry is an input without labels).

    Raises:
        TypeError: none of these.

    Example:
        >>> sorted(as_batch((torch.zeros(2, 3), torch.zeros(2))))
        ['inputs', 'labels']
    """
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, Tensor):
        return {INPUTS: (batch,)}
    if isinstance(batch, (tuple, list)) and batch:
        *inputs, last = batch
        return {INPUTS: tuple(inputs), LABELS: last} if inputs else {INPUTS: (last,)}
    raise TypeError(f"a batch is a dict, a tuple or a tensor, got {type(batch).__name__}")


def from_call(inputs: Sequence[Any], named: Batch) -> Batch:
    """Name the arguments of a call ``model(*inputs, **named)``; the last input is the labels if none are named.

    A call with nothing but a mapping or a tuple is one with a whole batch.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.zeros(2)
        >>> sorted(from_call([x, y], {})), sorted(from_call([(x, y)], {})), sorted(from_call([{"pixels": x}], {}))
        (['inputs', 'labels'], ['inputs', 'labels'], ['pixels'])
    """
    if not inputs:
        return named
    if len(inputs) == 1 and not named:
        return as_batch(inputs[0])
    if LABELS in named or len(inputs) == 1:
        return {INPUTS: tuple(inputs), **named}
    return {**as_batch(tuple(inputs)), **named}


def view(batch: Batch, side: str) -> Batch:
    """A batch as one model is given it: the entries for all, and those that stand under its name.

    Args:
        batch: A batch, of which parts may be batches of their own: ``{"student": {...}, "teacher": {...}}``.
        side: The model's name.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.ones(2, 5)
        >>> both = {"student": {"input_ids": x}, "teacher": {"input_ids": y}, "labels": torch.zeros(2)}
        >>> {key: tuple(value.shape) for key, value in view(both, "teacher").items()}
        {'labels': (2,), 'input_ids': (2, 5)}
    """
    parts = {key for key, value in batch.items() if isinstance(value, Mapping)} | PARTS & batch.keys()
    if not parts:
        return batch
    common = {key: value for key, value in batch.items() if key not in parts}
    return {**common, **as_batch(batch[side])} if side in batch else common


def task_of(batch: Batch) -> str:
    """The task that a batch belongs to.

    Raises:
        ValueError: it names none, or not one for the whole batch.

    Example:
        >>> task_of({"input": torch.zeros(2, 3), "task": "rte"})
        'rte'
    """
    if TASK not in batch:
        raise ValueError(
            f"the batch has no {TASK!r}, only {sorted(batch)}; add the task's name, or use limbeck.Mixed"
        )
    task = batch[TASK]
    if not isinstance(task, str):
        raise ValueError(f"the {TASK!r} of a batch is one name for all its examples, got {task!r}")
    return task


def positional(batch: Batch) -> tuple[Any, ...]:
    """The positional inputs of a batch; a model may also call an input of its own ``inputs``."""
    inputs = batch.get(INPUTS, ())
    return inputs if isinstance(inputs, tuple) else ()


def batch_size(batch: Batch) -> int:
    """The number of examples in a batch.

    Raises:
        ValueError: the batch holds no tensor.

    Example:
        >>> batch_size({"input_ids": torch.zeros(4, 7)})
        4
    """
    for tensor in _tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError(f"a batch with {sorted(batch)} holds no tensor of examples")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, those for all models first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in sorted(value.values(), key=lambda v: isinstance(v, Mapping)):
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Apply a function to every tensor of examples in a batch and its parts."""

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Sparse):
            return value.map(change)
        if isinstance(value, (tuple, list)) and not is_texts(value):
            return tuple(visit(v) for v in value)
        if isinstance(value, Mapping):
            return map_tensors(value, change)
        return value

    return {key: visit(value) for key, value in batch.items()}


def rows(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    """Cut examples out of a batch.

    Example:
        >>> rows({"x": torch.arange(4)}, 1, 3)["x"]
        tensor([1, 2])
    """
    return take(batch, range(start, stop))


def take(batch: Batch, places: Sequence[int]) -> dict[str, Any]:
    """Some examples of a batch: of its tensors, and of its lists of texts.

    Example:
        >>> take({"x": torch.arange(3), "text": ["a", "b", "c"]}, [2, 0])
        {'x': tensor([2, 0]), 'text': ['c', 'a']}
    """
    size = batch_size(batch)
    chosen = [range(size)[place] for place in places if place < size]
    together = not chosen or chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    index = slice(chosen[0], chosen[0] + len(chosen)) if chosen and together else chosen
    taken = map_tensors(batch, lambda t: t[index] if t.ndim and t.shape[0] == size else t)
    return taken | {key: [value[i] for i in chosen] for key, value in batch.items() if is_texts(value)}


def is_texts(value: Any) -> bool:
    """Whether an entry of a batch is a text for each example."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Move a batch, without waiting for the copy."""
    return map_tensors(batch, lambda t: t.to(device, non_blocking=True))


def valid_positions(batch: Batch, key: str) -> Tensor | None:
    """The mask of a batch that is called `key`: (B,) or (B, L), True where a position counts.

    Args:
        batch: The batch.
        key: ``"labels"`` for the positions that carry a label, else the name of an entry that is a mask.

    Returns:
        The mask, or None where there is none (all count). Labels that are numbers to predict have none.
    """
    value = batch.get(key)
    if value is None or (key == LABELS and torch.is_floating_point(value)):
        return None
    valid: Tensor = value != (IGNORE_INDEX if key == LABELS else 0)
    return valid


def mask_key(shape: torch.Size, batch: Batch, of_logits: bool = False) -> str | None:
    """Which mask belongs to a tensor of this shape, if one fits: the attention mask, or of logits the labels' own.

    Example:
        >>> batch = {"attention_mask": torch.ones(2, 5), "labels": torch.zeros(2)}
        >>> mask_key(torch.Size([2, 5, 8]), batch), mask_key(torch.Size([2, 3]), batch)
        ('attention_mask', None)
    """
    for key in (LABELS, ATTENTION_MASK) if of_logits else (ATTENTION_MASK,):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2 and len(shape) == 3 and mask.shape == shape[:2]:
            return key
    mask = batch.get(ATTENTION_MASK)  # attention maps (B, heads, L, L)
    if (
        isinstance(mask, Tensor)
        and len(shape) == 4
        and shape[2] == shape[3]
        and mask.shape == (shape[0], shape[2])
    ):
        return ATTENTION_MASK
    return None
