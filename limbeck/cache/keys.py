"""What kept signals belong to: a fingerprint of the teacher, and a key for the content of each example."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.batch import ATTENTION_MASK, batch_size, positional
from limbeck.types import EXAMPLE_ID, INPUTS, LABELS, TASK, Batch

KEY_BYTES = 16
ORIGIN = ("_name_or_path", "transformers_version", "dtype")


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw content of a tensor of any dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_digest(module: nn.Module) -> str:
    """A digest of all that a module computes with: names, dtypes, shapes and values of parameters and buffers.

    Example:
        >>> torch.manual_seed(0) is not None
        True
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> weights_digest(one) == weights_digest(one), weights_digest(one) == weights_digest(two)
        (True, False)
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor) if tensor.numel() else b"")
    return digest.hexdigest()


def module_identity(module: nn.Module) -> dict[str, str]:
    """What determines what a module computes: its weights, its class and its configuration.

    Example:
        >>> sorted(module_identity(nn.Linear(2, 3)))
        ['architecture', 'teacher']
    """
    config: Any = getattr(module, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else repr(module)
    if isinstance(described, dict):  # without where it was loaded from, and by what
        described = {key: value for key, value in described.items() if key not in ORIGIN}
    architecture = {"class": type(module).__name__, "config": described}
    return {"teacher": weights_digest(module), "architecture": json_digest(architecture)}


def json_digest(content: Any) -> str:
    """A digest of anything that JSON can hold, or that prints the same wherever it is."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()


def example_keys(batch: Batch) -> np.ndarray[Any, np.dtype[np.void]]:
    """One key for each example of a batch: a digest of what a teacher is given of it.

    Labels and example numbers do not count, and neither does padding: of entries (B, L) only the positions that
    the attention mask keeps. The batch's task does, for one teacher may say different things for different tasks.

    Returns:
        (B,), 16 bytes each.

    Example:
        >>> short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
        >>> padded = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> bool(example_keys(short)[0] == example_keys(padded)[0])
        True
    """
    mask = batch.get(ATTENTION_MASK)
    valid = mask.detach().cpu().bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    entries = dict(_inputs(batch))
    start = f"{TASK} {batch[TASK]};".encode() if isinstance(batch.get(TASK), str) else b""
    digests = [hashlib.blake2b(start, digest_size=KEY_BYTES) for _ in range(batch_size(batch))]
    for name in sorted(entries):
        tensor = entries[name].detach().cpu()
        trimmed = valid is not None and tensor.shape[:2] == valid.shape
        for row, digest in enumerate(digests):
            part = tensor[row][valid[row]] if trimmed and valid is not None else tensor[row]
            digest.update(f"{name} {part.dtype} {tuple(part.shape)};".encode())
            digest.update(tensor_bytes(part))
    return np.frombuffer(b"".join(d.digest() for d in digests), dtype=f"V{KEY_BYTES}")


def _inputs(batch: Batch) -> Mapping[str, Tensor]:
    """The tensors of examples that a teacher may read."""
    size = batch_size(batch)
    named = {key: value for key, value in batch.items() if key not in (LABELS, EXAMPLE_ID, INPUTS)}
    placed = {f"{INPUTS} {i}": value for i, value in enumerate(positional(batch))}
    own = batch.get(INPUTS)
    if isinstance(own, Tensor):  # an input that a model calls by this very name
        named[INPUTS] = own
    tensors = {k: v for k, v in {**named, **placed}.items() if isinstance(v, Tensor) and v.ndim}
    return {key: tensor for key, tensor in tensors.items() if tensor.shape[0] == size}


def first_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Name the first field in which two fingerprints differ, with both sides; empty where they agree.

    Example:
        >>> first_difference({"teacher": "a", "dtype": "fp16"}, {"teacher": "a", "dtype": "fp32"})
        "dtype: 'fp32' there, 'fp16' here"
    """
    for field in dict.fromkeys([*expected, *found]):
        if expected.get(field) != found.get(field):
            return f"{field}: {found.get(field)!r} there, {expected.get(field)!r} here"
    return ""
