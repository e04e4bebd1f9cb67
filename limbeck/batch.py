"""Batches: how examples travel, whatever the loader made of them.

Shape legend: B examples, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from limbeck.types import (
    EXAMPLE_ID,
    IGNORE_INDEX,
    INPUTS,
    LABELS,
    LOGITS,
    STUDENT,
    TASK,
    TEACHER,
    TEACHER_CACHE,
    Batch,
    Sparse,
)

ATTENTION_MASK = "attention_mask"
DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
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

    A part is a batch of its own, a dict or a tuple; of a tuple the last entry is the labels, unless these stand
    beside the parts.

    Args:
        batch: A batch, of which parts may be batches of their own: ``{"student": {...}, "teacher": {...}}``.
        side: The model's name.

    Raises:
        ValueError: parts with different numbers of examples, or nothing for this model.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.ones(2, 5)
        >>> both = {"student": {"input_ids": x}, "teacher": {"input_ids": y}, "labels": torch.zeros(2)}
        >>> {key: tuple(value.shape) for key, value in view(both, "teacher").items()}
        {'labels': (2,), 'input_ids': (2, 5)}
    """
    parts = parts_of(batch, side)
    if not parts:
        return batch
    _check_parts(batch, parts)
    # Parts under other names are those of several teachers, which look for them in the teacher's view.
    kept = parts - PARTS if side == TEACHER and TEACHER not in batch else set()
    common = {key: value for key, value in batch.items() if key not in parts or key in kept}
    own = {**common, **_part(batch[side], LABELS in common)} if side in batch else common
    if own.keys() <= {LABELS, EXAMPLE_ID, TASK}:
        raise ValueError(
            f"the batch has inputs under {', '.join(map(repr, sorted(parts)))} and none for the {side}; "
            f"add a part {side!r}, or put what all models read beside the parts"
        )
    return own


def parts_of(batch: Batch, side: str = STUDENT) -> set[str]:
    """The entries of a batch that are batches of their own, each for some of the models; see `view`.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> parts_of({"x": x}), sorted(parts_of({"student": (x,), "teacher": (x,), "labels": x}))
        (set(), ['student', 'teacher'])
    """
    known = PARTS & batch.keys()
    if not known and not isinstance(batch.get(side), Mapping):
        return set()
    return known | {key for key, value in batch.items() if isinstance(value, Mapping)}


def as_call(inputs: Sequence[Any], named: Batch, side: str) -> tuple[Sequence[Any], Batch]:
    """The arguments of a call as one model is given them: those of its part, where a whole batch is passed.

    Example:
        >>> both = {"student": (torch.zeros(2, 3), torch.zeros(2)), "teacher": (torch.zeros(2, 5),)}
        >>> inputs, named = as_call([], both, "student")
        >>> [tuple(entry.shape) for entry in inputs], sorted(named)
        ([(2, 3)], ['labels'])
    """
    whole = inputs[0] if len(inputs) == 1 and not named else named
    if not isinstance(whole, Mapping) or not parts_of(whole, side):
        return inputs, named
    own = view(whole, side)
    placed = positional(own)
    return placed, {key: value for key, value in own.items() if not (placed and key == INPUTS)}


def _part(part: Any, labels_are_outside: bool) -> Batch:
    if labels_are_outside and isinstance(part, (tuple, list)):
        return {INPUTS: tuple(part)}
    return as_batch(part)


def _check_parts(batch: Batch, parts: set[str]) -> None:
    """Refuse parts that cannot be of the same examples."""
    first, wanted = "", None
    for key in dict.fromkeys((LABELS, STUDENT, TEACHER, *sorted(parts))):
        size = next(_sizes(batch.get(key)), None)
        if wanted is None:
            first, wanted = key, size
        elif size is not None and size != wanted:
            raise ValueError(
                f"the batch has {wanted} examples under {first!r} and {size} under {key!r}; "
                "give each part the same examples, in the same order"
            )


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
    size = next(_sizes(batch), None)
    if size is None:
        raise ValueError(f"a batch with {sorted(batch)} holds no tensor of examples")
    return size


def _sizes(value: Any) -> Iterator[int]:
    """How many examples every entry of a batch holds, those for all models first."""
    if isinstance(value, (Tensor, Sparse)):
        if value.ndim:
            yield value.shape[0]
    elif is_texts(value):
        yield len(value)
    elif isinstance(value, Mapping):
        for inner in sorted(value.values(), key=lambda v: isinstance(v, Mapping)):
            yield from _sizes(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _sizes(inner)


def map_tensors(
    batch: Batch, change: Callable[[Tensor], Tensor], texts: Callable[[list[str]], list[str]] = list
) -> dict[str, Any]:
    """Apply a function to every tensor of examples in a batch and its parts, and another one to lists of texts."""

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if is_texts(value):
            return texts(value)
        if is_dataclass(value) and not isinstance(value, type):  # a `Sparse`, or the output of a model
            return replace(value, **{f.name: visit(getattr(value, f.name)) for f in fields(value) if f.init})
        if isinstance(value, tuple) and type(value) is not tuple:  # a named tuple
            return type(value)(*map(visit, value))
        if isinstance(value, (tuple, list)):
            return tuple(visit(v) for v in value)
        if isinstance(value, Mapping):
            return map_tensors(value, change, texts)
        return value

    return {key: visit(value) for key, value in batch.items()}


PAD = "make them tensors of one shape, or pass limbeck.Examples(data, collate=...) or a DataLoader that pads"


def collated(examples: list[Any]) -> Any:
    """Make a batch of examples as PyTorch does, also of sparse targets and of what transformers models return.

    Example:
        >>> batch = collated([{"x": torch.tensor(1.0), "teacher_cache": {"logits": torch.zeros(3)}}] * 2)
        >>> batch["teacher_cache"]["logits"].shape
        torch.Size([2, 3])

    Raises:
        ValueError: entries that are plain lists of numbers, as a tokenizer's, or differ in shape.
    """
    first = examples[0] if examples else None
    for name, value in first.items() if isinstance(first, Mapping) else ():
        if isinstance(value, list) and value and isinstance(value[0], (int, float)):
            raise ValueError(f"{name!r} of the examples is a list of numbers, which no batch is made of; {PAD}")
    try:
        return collate(examples, collate_fn_map={**default_collate_fn_map, Sparse: _sparse, Mapping: _mappings})
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        raise ValueError(f"examples of one batch differ in shape ({error}); {PAD}") from None


def _sparse(examples: Sequence[Sparse], **_: Any) -> Sparse:
    first = examples[0]
    names = [f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)]
    columns: dict[str, Any] = {name: torch.stack([getattr(one, name) for one in examples]) for name in names}
    return replace(first, **columns)


def _mappings(examples: Sequence[Batch], **options: Any) -> dict[str, Any]:
    """A plain dict, of whatever kind of mapping: those of transformers cannot be filled."""
    return {key: collate([one[key] for one in examples], **options) for key in examples[0]}


def rows(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    """Cut examples out of a batch.

    Example:
        >>> rows({"x": torch.arange(4)}, 1, 3)["x"]
        tensor([1, 2])
    """
    return take(batch, range(start, stop))


def take(batch: Batch, places: Sequence[int]) -> dict[str, Any]:
    """Some examples of a batch and its parts: of its tensors, and of its lists of texts.

    Example:
        >>> take({"x": torch.arange(3), "text": ["a", "b", "c"]}, [2, 0])
        {'x': tensor([2, 0]), 'text': ['c', 'a']}
    """
    _check_parts(batch, parts_of(batch))
    size = batch_size(batch)
    chosen = [range(size)[place] for place in places if place < size]
    together = not chosen or chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    index = slice(chosen[0], chosen[0] + len(chosen)) if chosen and together else chosen
    return map_tensors(
        batch,
        lambda t: t[index] if t.ndim and t.shape[0] == size else t,
        lambda texts: [texts[i] for i in chosen],
    )


def is_texts(value: Any) -> bool:
    """Whether an entry of a batch is a text for each example."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Move a batch, without waiting for the copy."""
    return map_tensors(batch, lambda t: t.to(device, non_blocking=True))


def device_of(batch: Batch) -> torch.device | None:
    """Where a batch is, by the first tensor in it or in its parts; None where it holds none.

    Example:
        >>> device_of({"teacher": {"bert": {"x": torch.zeros(2, 3)}}}), device_of({"text": ["a", "b"]})
        (device(type='cpu'), None)
    """
    found: list[torch.device] = []
    map_tensors(batch, lambda tensor: found.append(tensor.device) or tensor)  # type: ignore[func-returns-value]
    return found[0] if found else None


def labels_entry(tap: str) -> str | None:
    """The entry of a batch that a tap reads as labels; None of a tap that reads a model.

    Example:
        >>> labels_entry("labels"), labels_entry("labels.start_positions"), labels_entry("logits")
        ('labels', 'start_positions', None)
    """
    name, _, entry = tap.partition(".")
    return (entry or LABELS) if name == LABELS else None


def next_tokens(batch: Batch, entries: Iterable[str] = (LABELS,)) -> Batch:
    """The batch with the labels of each position's *next* token: all moved left by one, and -100 at the end.

    Args:
        batch: The batch.
        entries: Those that are read as labels, (..., L); others than ``labels`` may also be (B,), labels of whole
            examples, and stay.

    Raises:
        ValueError: ``labels`` without positions, or labels that are no whole numbers.

    Example:
        >>> next_tokens({"labels": torch.tensor([[5, 6, 7]])})["labels"]
        tensor([[   6,    7, -100]])
    """
    moved: dict[str, Tensor] = {}
    for key in entries:
        labels = batch.get(key)
        if not isinstance(labels, Tensor) or (labels.ndim == 1 and key != LABELS):
            continue
        if labels.ndim < 2 or labels.is_floating_point():
            raise ValueError(
                f"causal=True moves the labels of tokens (B, L), whole numbers, and the batch's {key!r} are "
                f"{labels.dtype} of shape {tuple(labels.shape)}; leave causal out"
            )
        moved[key] = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    return {**batch, **moved}


def valid_positions(batch: Batch, key: str) -> Tensor | None:
    """The mask of a batch that is called `key`: (B,) or (B, L), True where a position counts.

    Args:
        batch: The batch.
        key: ``"labels"`` for the positions that carry a label, ``"labels.entry"`` for those where another entry
            is read as labels, else the name of an entry that is a mask.

    Returns:
        The mask, or None where there is none (all count). Numbers to predict, one for each example, count but for
        NaN, which is no label; other floating labels have no mask.

    Example:
        >>> valid_positions({"labels": torch.tensor([1, -100])}, "labels")
        tensor([ True, False])
        >>> valid_positions({"labels": torch.tensor([2.5, float("nan")])}, "labels")
        tensor([ True, False])
    """
    entry = labels_entry(key)
    value = batch.get(key if entry is None else entry)
    if value is None:
        return None
    if entry is not None and torch.is_floating_point(value):
        return ~value.isnan() if value.ndim == 1 else None
    valid: Tensor = value != (0 if entry is None else IGNORE_INDEX)
    return valid


def mask_key(shape: Size, batch: Batch, tap: str = "") -> str | None:
    """Which mask belongs to a tensor of this shape, if one fits: the attention mask, or of logits the labels' own.

    What a decoder says beside an encoder has the decoder's mask, or the labels'.

    Args:
        shape: (B, L, ...) or, between tokens, (B, heads, L, L).
        batch: The batch.
        tap: Where the tensor was read.

    Example:
        >>> batch = {"attention_mask": torch.ones(2, 5), "labels": torch.zeros(2)}
        >>> mask_key(torch.Size([2, 5, 8]), batch), mask_key(torch.Size([2, 3]), batch)
        ('attention_mask', None)
    """
    keys: tuple[str, ...] = (LABELS, ATTENTION_MASK) if tap == LOGITS else (ATTENTION_MASK,)
    if DECODER_IDS in batch:
        keys = _masks_beside_a_decoder(tap)
    positions: Size | None = Size(shape[:2]) if len(shape) == 3 else None
    if len(shape) == 4 and shape[2] == shape[3]:  # attention maps (B, heads, L, L)
        positions = Size([shape[0], shape[2]])
    fitting = (k for k in keys if isinstance(batch.get(k), Tensor) and batch[k].shape == positions)
    return next(fitting, None)


def _masks_beside_a_decoder(tap: str) -> tuple[str, ...]:
    """The masks that a tensor of an encoder-decoder model may have, the likeliest first."""
    if tap == LOGITS:
        return LABELS, DECODER_MASK
    if tap.startswith("cross_attentions"):  # between the tokens of two sequences
        return ()
    side = next((part for part in tap.split(".") if part in ("encoder", "decoder")), tap)
    return (DECODER_MASK, LABELS) if side.startswith("decoder") else (ATTENTION_MASK,)
