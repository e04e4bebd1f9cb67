"""What kept signals belong to: a fingerprint of the teacher, and a key for the content of each example."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from limbeck.batch import ATTENTION_MASK, batch_size, is_texts, positional
from limbeck.cache.layout import raw
from limbeck.types import EXAMPLE_ID, INPUTS, LABELS, Batch

DIGEST_BYTES = 16
# 96 bits of an example's content: two of a billion examples share a key with a chance of 6e-12. Of the 16 bytes
# that a row may cost beside its values, this leaves 4 for everything else in a file.
KEY_BYTES = 12
DECODER = "decoder_"
ORIGIN = ("_name_or_path", "transformers_version", "dtype", "architectures")


def weights_digest(module: nn.Module) -> str:
    """A digest of what a module keeps: names, dtypes, shapes and values of its parameters and saved buffers.

    Example:
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> weights_digest(one) == weights_digest(one), weights_digest(one) == weights_digest(two)
        (True, False)
    """
    return tensors_digest(module.state_dict())


def tensors_digest(named: Mapping[str, Tensor]) -> str:
    """A digest of tensors: their names, dtypes, shapes and values."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(raw(tensor.detach().cpu().reshape(1, -1)).data)
    return digest.hexdigest()


def module_identity(module: nn.Module) -> dict[str, str]:
    """What determines what a module computes: its weights, its class and its configuration.

    Example:
        >>> sorted(module_identity(nn.Linear(2, 3)))
        ['architecture', 'teacher']
    """
    config: Any = getattr(module, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else repr(module)
    if isinstance(described, dict):  # without what loading and saving write into it
        described = {key: value for key, value in described.items() if key not in ORIGIN}
    architecture = {"class": type(module).__name__, "config": described}
    return {"teacher": weights_digest(module), "architecture": json_digest(architecture)}


def json_digest(content: Any) -> str:
    """A digest of anything that JSON can hold, or that prints the same wherever it is."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def example_keys(batch: Batch) -> np.ndarray[Any, np.dtype[np.void]]:
    """One key for each example of a batch: a digest of what a teacher is given of it.

    Labels and example numbers do not count, and neither does padding: of entries (B, L, ...) only the positions
    from the first to the last that the attention mask keeps. What is for the whole batch does, a text, a number or
    a tensor of another length: one teacher may say different things for different tasks.

    A model that counts positions from the first column, padding or not (GPT-2, BERT), says other things of texts
    that are padded on the left, unless the batch has their ``position_ids``: these count.

    Returns:
        (B,), 12 bytes each.

    Raises:
        ValueError: the batch holds no examples, or a second sequence for a decoder, which has padding of its own.

    Example:
        >>> import torch
        >>> short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
        >>> padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> bool(example_keys(short)[0] == example_keys(padded)[0])
        True
    """
    size = batch_size(batch)
    # SHA-256, since processors have instructions for it: twice as fast here as BLAKE2
    digests = [hashlib.sha256() for _ in range(size)]
    for before, own in _parts(batch):
        _check_one_sequence(own)
        mask = own.get(ATTENTION_MASK)
        spans = _spans(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else None
        for name, value in sorted(_inputs(own, size).items()):
            for digest, piece in zip(digests, _pieces(before + name, value, mask, spans, size), strict=True):
                for part in piece:
                    digest.update(part)
    return np.frombuffer(b"".join(d.digest()[:KEY_BYTES] for d in digests), dtype=f"V{KEY_BYTES}")


def _check_one_sequence(batch: Batch) -> None:
    decoded = next((name for name in batch if isinstance(name, str) and name.startswith(DECODER)), None)
    if decoded is not None and isinstance(batch.get(ATTENTION_MASK), Tensor):
        raise ValueError(
            f"the batch has {decoded!r} beside an attention mask, and signals are kept by the positions of one "
            "sequence; use this teacher without a cache"
        )


def _spans(mask: Tensor) -> list[tuple[int, int]]:
    """From the first to behind the last valid position of each example; what is masked between them counts."""
    valid = mask.detach().cpu().bool().numpy()
    starts = valid.argmax(axis=1)
    stops = np.where(valid.any(axis=1), valid.shape[1] - valid[:, ::-1].argmax(axis=1), starts)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _pieces(
    name: str, value: Any, mask: Any, spans: Sequence[tuple[int, int]] | None, size: int
) -> Iterator[tuple[Any, ...]]:
    """For each example what its digest takes in of one entry: what it is, and its content."""
    if not _of_examples(value, size):
        content = _bytes(value[None]) if isinstance(value, Tensor) else repr(value).encode()
        what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "for all"
        yield from [(_head(name, what, len(content)), content)] * size
    elif isinstance(value, list):
        yield from ((_head(name, "text", len(text)), text.encode()) for text in value)
    elif spans is not None and value.ndim > 1 and value.shape[:2] == mask.shape:
        rest, bytes_BLN = f"{value.dtype} {tuple(value.shape[2:])}", _bytes(value.flatten(0, 1))
        bytes_BLN = bytes_BLN.reshape(*mask.shape, -1)
        for row, (start, stop) in zip(bytes_BLN, spans, strict=True):
            yield _head(name, rest, stop - start), row[start:stop]
    else:
        head = _head(name, f"{value.dtype} {tuple(value.shape[1:])}", 1)
        yield from ((head, row) for row in _bytes(value))


def _head(name: str, what: str, count: int) -> bytes:
    return f"{name} {what} {count};".encode()


def _bytes(tensor: Tensor) -> Any:
    return raw(tensor.detach().cpu())


def _parts(batch: Batch, before: str = "") -> Iterator[tuple[str, Batch]]:
    """A batch, and the batches of several teachers in it, with what stands before their names."""
    yield before, batch
    for name, part in sorted(batch.items()):
        if isinstance(part, Mapping):
            yield from _parts(part, f"{before}{name}/")


def _inputs(batch: Batch, size: int) -> Mapping[str, Any]:
    """What a teacher may read: tensors of examples, lists of texts, and what is for the whole batch."""
    named = {key: value for key, value in batch.items() if key not in (LABELS, EXAMPLE_ID, INPUTS)}
    placed = {f"{INPUTS} {i}": value for i, value in enumerate(positional(batch))}
    own = batch.get(INPUTS)
    if not isinstance(own, tuple):  # an input that a model calls by this very name
        named[INPUTS] = own
    return dict(_flat({**named, **placed}))


def _flat(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries that hold something, those in lists and tuples one by one; parts come by themselves."""
    for name, value in named.items():
        if isinstance(value, (list, tuple)) and not is_texts(value):
            yield from _flat({f"{name} {place}": each for place, each in enumerate(value)})
        elif isinstance(value, (Tensor, str, int, float)) or is_texts(value):
            yield name, value


def _of_examples(value: Any, size: int) -> bool:
    return (isinstance(value, Tensor) and value.ndim > 0 and len(value) == size) or (
        is_texts(value) and len(value) == size
    )


def first_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Name the first field in which two fingerprints differ, with both sides; empty where they agree.

    Example:
        >>> first_difference({"teacher": "a", "dtype": "fp16"}, {"teacher": "a", "dtype": "fp32"})
        "dtype: 'fp32' there, 'fp16' here"
        >>> first_difference({"forms": {"logits": {"k": 8}}}, {"forms": {"logits": {"k": 4}}})
        'forms.logits.k: 4 there, 8 here'
    """
    for field in dict.fromkeys([*expected, *found]):
        here, there = expected.get(field), found.get(field)
        if here != there and isinstance(here, Mapping) and isinstance(there, Mapping):
            return f"{field}.{first_difference(here, there)}"
        if here != there:
            return f"{field}: {there!r} there, {here!r} here"
    return ""
