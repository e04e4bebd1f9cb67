"""Shards: files of kept signals that are never changed, named after their content.

A shard is a safetensors file. It holds the key of each example, and for each tap the examples' values one behind
the other, with offsets where examples differ in length. Its name ends with a digest of all its bytes, so that any
flipped byte is found; and it is written under another name and renamed, so that what has the name is whole. A
folder of shards therefore needs no list of them, and several processes may add to it without a lock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.atomic import write_bytes
from limbeck.cache.keys import KEY_BYTES
from limbeck.cache.layout import Kind

SUFFIX = ".safetensors"
KEY, OFFSETS, KINDS = "key", "offsets:", "kinds"
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Columns:
    """The values of some examples, by tap, one list entry for each example."""

    kinds: Mapping[str, Kind]
    values: Mapping[str, Sequence[Tensor]]


def write_shard(folder: Path, writer: str, number: int, keys: Sequence[bytes], columns: Columns) -> Path:
    """Write a shard, whole or not at all.

    Args:
        folder: Where shards lie.
        writer: Who writes, unlike any other that writes here.
        number: How many it wrote before.
        keys: One for each example.
        columns: Their values.

    Returns:
        The file.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    from safetensors.torch import save

    tensors = {KEY: torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)}
    for tap, kind in columns.kinds.items():
        pieces = columns.values[tap]
        if kind == "row":
            tensors[tap] = torch.stack(tuple(pieces))
            continue
        flat = [piece.flatten(0, 1) if kind == "pairs" else piece for piece in pieces]
        tensors[tap] = torch.cat(flat)
        tensors[OFFSETS + tap] = torch.tensor([0, *np.cumsum([len(piece) for piece in flat])])
    data = save(tensors, {KINDS: json.dumps(dict(columns.kinds))})
    path = folder / f"{writer}-{number:06d}-{digest_of(data)}{SUFFIX}"
    write_bytes(path, data)
    return path


def digest_of(data: bytes) -> str:
    """The digest that a shard's name ends with."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def is_whole(path: Path) -> bool:
    """Whether a shard's content is what its name says."""
    return path.stem.rpartition("-")[2] == digest_of(path.read_bytes())


@dataclass
class Shard:
    """A shard on disk, seen through a memory map.

    Attributes:
        path: The file.
        keys: The key of each example.
        kinds: The taps and how their examples are kept.
    """

    path: Path
    keys: list[bytes]
    kinds: dict[str, Kind]
    _tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the keys of a shard; its values are mapped and checked when they are first wanted.

        Raises:
            ValueError: it is no shard.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                kinds = json.loads((file.metadata() or {})[KINDS])
                raw = file.get_tensor(KEY).numpy().tobytes()
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}); limbeck cache prune removes it") from None
        return cls(path, [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)], kinds)

    def get(self, tap: str, row: int) -> Tensor:
        """The values of one example, a view of the file."""
        tensors = self._mapped()
        kind = self.kinds[tap]
        if kind == "row":
            return tensors[tap][row]
        start, end = tensors[OFFSETS + tap][row : row + 2].tolist()
        piece = tensors[tap][start:end]
        return piece if kind == "tokens" else piece.view(round(len(piece) ** 0.5), -1, *piece.shape[1:])

    def _mapped(self) -> dict[str, Tensor]:
        """The tensors, mapped, after one look at all bytes.

        Raises:
            ValueError: a byte is not what it was.
        """
        if not self._tensors:
            from safetensors.torch import load_file

            if not is_whole(self.path):
                raise ValueError(f"{self.path} is damaged; limbeck cache prune removes it")
            self._tensors = load_file(self.path)
        return self._tensors

    def nbytes(self) -> int:
        """Its size on disk."""
        return self.path.stat().st_size


def describe(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of a shard's tensors, from its header alone."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
