"""Blocks of kept signals: in memory, and as files that are never changed.

A file, called a shard, is a safetensors file. It holds the key of each example and the columns of each tap, with
the lengths of examples where they differ. Its header holds a checksum of every tensor, and its name a digest of
its header: any flipped byte is found, and what is read is checked before it is used. It is written under another
name and renamed, so that what has the name is whole. A folder of shards therefore needs no list of them, and
several processes may add to it without a lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.atomic import write_chunks
from limbeck.cache.keys import KEY_BYTES
from limbeck.cache.layout import Bytes, Column, Kept, Kind, Numbers, joined, keep

SUFFIX = ".safetensors"
KEY, LENGTHS, ABOUT = "key", "lengths", "limbeck"
DIGEST_BYTES = 16
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tap:
    """The values of one tap, of some examples.

    Attributes:
        kind: How the tap's tensor belongs to the examples.
        form: How its values are kept; see `limbeck.cache.forms.describe`.
        parts: The columns that the form made, by name.
    """

    kind: Kind
    form: Mapping[str, Any]
    parts: Mapping[str, Column]


@dataclass
class Block:
    """The kept signals of some examples.

    Attributes:
        keys: The key of each example.
        taps: The kind and the form of each tap, and the names of its parts.
        path: The file, if it is one.
    """

    keys: list[bytes]
    taps: dict[str, dict[str, Any]]
    path: Path | None = None
    _columns: dict[str, Kept] = field(default_factory=dict, repr=False)
    _unread: dict[str, Any] = field(default_factory=dict, repr=False)
    _lengths: dict[str, Numbers] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, keys: Sequence[bytes], taps: Mapping[str, Tap], places: Sequence[int] | None = None) -> Block:
        """Hold examples in memory, all or some of them."""
        chosen = list(keys) if places is None else [keys[place] for place in places]
        block = cls(chosen, {})
        for name, tap in taps.items():
            block.taps[name] = {"kind": tap.kind, "form": dict(tap.form), "parts": sorted(tap.parts)}
            block._columns |= {f"{name}/{p}": keep(column, places) for p, column in tap.parts.items()}
        return block

    def column(self, tap: str, part: str) -> Kept:
        """One part of one tap.

        Raises:
            ValueError: its bytes are not what they were.
        """
        name = f"{tap}/{part}"
        if name not in self._columns:
            self._columns[name] = self._load(name)
        return self._columns[name]

    def columns(self) -> dict[str, Kept]:
        """All parts of all taps."""
        return {f"{t}/{p}": self.column(t, p) for t, about in self.taps.items() for p in about["parts"]}

    def signature(self) -> str:
        """What two blocks have in common that can be one."""
        columns = {name: [k.kind, str(k.dtype), k.shape] for name, k in self.columns().items()}
        return json.dumps([self.taps, columns], sort_keys=True)

    def nbytes(self) -> int:
        """Its size on disk, or in memory."""
        if self.path is not None:
            return self.path.stat().st_size
        return len(self.keys) * KEY_BYTES + sum(kept.data.nbytes for kept in self._columns.values())

    def size(self, tap: str) -> tuple[int, int]:
        """The bytes of a tap's values, and its entries: examples, positions or pairs; read from headers alone."""
        total = entries = 0
        for part in self.taps[tap]["parts"]:
            name = f"{tap}/{part}"
            held = self._columns.get(name)
            kind, data = (held.kind, held.data) if held else (self._unread[name][key] for key in ("kind", "data"))
            total += data.nbytes
            entries = entries if kind == "ragged" else len(data)
        return total, entries

    def _load(self, name: str) -> Kept:
        assert self.path is not None
        entry = self._unread[name]
        lengths = self._read_lengths(entry["lengths"]) if entry["lengths"] else None
        return Kept(entry["kind"], entry["dtype"], entry["shape"], self._checked(name), lengths)

    def _read_lengths(self, name: str) -> Numbers:
        """Columns of the same lengths get the same array: what is found out about it serves them all."""
        if name not in self._lengths:
            self._lengths[name] = self._checked(name).reshape(-1).view(np.uint32).astype(np.int64)
        return self._lengths[name]

    def _checked(self, name: str) -> Bytes:
        entry = self._unread[name]
        if zlib.crc32(entry["data"].data) != entry["sum"]:
            raise ValueError(f"{self.path} is damaged; limbeck cache prune removes it")
        data: Bytes = entry["data"]
        return data


def merged(blocks: Sequence[Block]) -> Block:
    """Blocks of one signature as one."""
    names = blocks[0].columns()
    together = Block([key for block in blocks for key in block.keys], blocks[0].taps)
    together._columns |= {name: joined([block.columns()[name] for block in blocks]) for name in names}
    return together


def write_shard(folder: Path, writer: str, number: int, blocks: Sequence[Block]) -> Path:
    """Write blocks as one file, whole or not at all.

    Args:
        folder: Where shards lie.
        writer: Who writes, unlike any other that writes here.
        number: How many it wrote before.
        blocks: The signals, all of one signature.

    Returns:
        The file.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    header, chunks = _layout(blocks)
    path = folder / f"{writer}-{number:06d}-{digest_of(header)}{SUFFIX}"
    write_chunks(path, [header, *chunks])
    return path


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, in pieces: they are written as they lie in memory."""

    code: str
    shape: tuple[int, ...]
    pieces: Sequence[Bytes]

    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def checksum(self) -> int:
        found = 0
        for piece in self.pieces:
            found = zlib.crc32(piece.data, found)
        return found


def _layout(blocks: Sequence[Block]) -> tuple[bytes, list[Bytes]]:
    """The header of a file, with the length that stands before it, and what comes behind it."""
    whole = b"".join(key for block in blocks for key in block.keys)
    keys = np.frombuffer(whole, dtype=np.uint8).reshape(-1, KEY_BYTES)
    tensors = {KEY: _Tensor("U8", keys.shape, [keys])}
    about: dict[str, Any] = {"taps": blocks[0].taps, "columns": {}}
    for name, first in blocks[0].columns().items():
        kept = [block.columns()[name] for block in blocks]
        shape = (sum(len(k.data) for k in kept), *first.shape)
        tensors[name] = _Tensor(CODES[first.dtype], shape, [k.data for k in kept])
        found = [k.lengths for k in kept if k.lengths is not None]
        about["columns"][name] = [first.kind, _named_lengths(np.concatenate(found), tensors) if found else ""]
    # wide dtypes first, so that each tensor starts at a multiple of its own width
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPES[item[1].code].itemsize, item[0]))
    about["sums"] = {name: tensor.checksum() for name, tensor in ordered}
    entries: dict[str, Any] = {"__metadata__": {ABOUT: _json(about)}}
    ends = np.cumsum([0, *(tensor.nbytes() for _, tensor in ordered)]).tolist()
    for (name, tensor), span in zip(ordered, pairwise(ends), strict=True):
        entries[name] = {"dtype": tensor.code, "shape": tensor.shape, "data_offsets": span}
    text = _json(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [piece for _, tensor in ordered for piece in tensor.pieces]


def _named_lengths(lengths: Numbers, tensors: dict[str, _Tensor]) -> str:
    """The name of a tensor of lengths, which columns of the same lengths share."""
    data = lengths.astype(np.uint32).view(np.uint8)
    known = [name for name in tensors if name.startswith(LENGTHS)]
    for name in known:
        if np.array_equal(tensors[name].pieces[0], data):
            return name
    name = f"{LENGTHS}.{len(known)}"
    tensors[name] = _Tensor("U32", (len(lengths),), [data])
    return name


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def digest_of(data: bytes) -> str:
    """The digest that a shard's name ends with, of its header."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def open_shard(path: Path) -> Block:
    """Map a file; its keys are read and checked, its values when they are first wanted.

    Raises:
        ValueError: it is no shard, or damaged.
        OSError: it cannot be read, which says nothing about its content.
    """
    try:
        about, entries = _read_header(path)
        sums, columns = about["sums"], about["columns"]
        for name, entry in entries.items():
            kind, lengths = columns.get(name, ("row", ""))
            entry |= {"sum": sums[name], "kind": kind, "lengths": lengths}
        block = Block([], about["taps"], path, _unread=entries)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); limbeck cache prune removes it") from None
    whole = block._checked(KEY).tobytes()
    block.keys = [whole[i : i + KEY_BYTES] for i in range(0, len(whole), KEY_BYTES)]
    return block


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a file says of itself, and its tensors, mapped."""
    whole = _mapped_file(path)
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    if start > len(whole) or digest_of(whole[:start].tobytes()) != path.stem.rpartition("-")[2]:
        raise ValueError("its header is not the one that its name stands for")
    header = json.loads(whole[8:start].tobytes())
    about = json.loads(header.pop("__metadata__")[ABOUT])
    if start + max(entry["data_offsets"][1] for entry in header.values()) != len(whole):
        raise ValueError("it is cut short")
    return about, {name: _mapped(entry, whole[start:]) for name, entry in header.items()}


def _mapped_file(path: Path) -> Bytes:
    """The bytes of a file. Unlike numpy's maps, this one keeps no file open: of these a process has a thousand."""
    with path.open("rb") as file:  # says why, where it cannot be read
        size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError("it is empty")
    whole: Bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    whole.flags.writeable = False
    return whole


def _mapped(entry: Mapping[str, Any], behind: Bytes) -> dict[str, Any]:
    begin, end = entry["data_offsets"]
    count, *shape = entry["shape"]
    dtype = DTYPES[entry["dtype"]]
    data = behind[begin:end].reshape(count, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    return {"dtype": dtype, "shape": tuple(shape), "data": data}


def is_whole(path: Path) -> bool:
    """Whether all bytes of a shard are what its name says.

    Raises:
        OSError: it cannot be read.
    """
    try:
        block = open_shard(path)
        for name in block._unread:
            block._checked(name)
    except ValueError:
        return False
    return True
