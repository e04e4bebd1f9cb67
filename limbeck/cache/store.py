"""The store: signals found again by what their examples hold, in memory and, with a folder, on disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from limbeck.cache.folder import claim
from limbeck.cache.forms import SIZE, Form, from_description
from limbeck.cache.index import Index
from limbeck.cache.keys import first_difference
from limbeck.cache.layout import Kind, Positions
from limbeck.cache.shards import SUFFIX, Block, Tap, merged, open_shard, write_shard

SHARD_BYTES = 64 << 20
MOST_BLOCKS = 256
"""So many batches are held one by one before they become one block in memory."""


class Store:
    """Kept signals of one teacher.

    What was put in is first held in memory. With a folder it goes to disk in shards, when there is enough of it or
    when `flush` is called, and is read from there through a memory map. Any number of processes may put into one
    folder; each sees the others' shards after `refresh`.

    Args:
        belongs: What the signals belong to: the teacher, its tokenizer, the taps' dtype, ...
        folder: Where to keep them; None for memory alone.
        shard_bytes: How much is gathered before a shard is written.

    Raises:
        ValueError: the folder holds something else, signals of another teacher, or a damaged manifest; the message
            names both sides.

    Example:
        >>> import torch
        >>> from limbeck.cache import Dense, kept_by
        >>> store = Store({"teacher": "a"})
        >>> store.put([b"k" * 12], {"logits": kept_by(Dense(), torch.ones(1, 3), None, [b"k" * 12])})
        >>> store.holds(b"k" * 12, "logits"), store.read([b"k" * 12], ["logits"])
        (True, {'logits': tensor([[1., 1., 1.]])})
    """

    def __init__(
        self, belongs: Mapping[str, Any], folder: Path | None = None, *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.belongs = dict(belongs)
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: dict[Path, Block] = {}
        self._index = Index()
        self._taps: dict[str, tuple[Kind, Mapping[str, Any]]] = {}
        self._forms: dict[str, Form] = {}
        self._fresh: list[int] = []
        self._whole: list[int] = []
        self._fresh_bytes = self._merged_bytes = 0
        self._writer = f"{os.getpid():d}{secrets.token_hex(4)}"
        self._written = 0
        if folder is not None:
            claim(folder, self.belongs)
            self.refresh()

    def __len__(self) -> int:
        """The number of examples."""
        return len(self._index)

    def holds(self, key: bytes, tap: str) -> bool:
        """Whether a tap of an example is there."""
        return self._index.holds(key, tap)

    def missing(self, keys: Sequence[bytes], taps: Sequence[str]) -> list[int]:
        """The places of examples that lack one of the taps, each content once."""
        absent = sorted(set().union(*(self._index.absent(keys, tap) for tap in taps)))
        first = {keys[place]: place for place in reversed(absent)}
        return sorted(first.values())

    def parts(
        self, keys: Sequence[bytes], taps: Sequence[str], mask: Tensor | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """What is kept of some examples, put together for a batch, as it is kept: by tap and part.

        Args:
            keys: Of the examples.
            taps: Which.
            mask: (B, L), where the positions of each example stand; None where all have as many.

        Raises:
            KeyError: an example is not there.
            ValueError: a shard is damaged, or an example has another number of positions than the mask says.
        """
        positions = Positions(mask) if mask is not None and mask.ndim == 2 else None
        found: dict[tuple[int, ...], Any] = {}
        joined = {}
        for tap in taps:
            tables = self._index.tables(tap)
            known = tuple(map(id, tables))
            if known not in found:
                found[known] = self._index.find(keys, tables, positions)
            blocks, gathering = found[known]
            parts = blocks[0].taps[tap]["parts"] if blocks else []
            joined[tap] = {part: gathering.join([block.column(tap, part) for block in blocks]) for part in parts}
        return joined

    def read(self, keys: Sequence[bytes], taps: Sequence[str], mask: Tensor | None = None) -> dict[str, Any]:
        """The signals of some examples as a batch; see `parts`.

        Returns:
            By tap a tensor or a `limbeck.types.Sparse`.
        """
        parts = self.parts(keys, taps, mask)
        return {tap: self._forms[tap].decode(parts[tap], int(self.form(tap).get(SIZE, 0))) for tap in taps}

    def get(self, key: bytes, tap: str) -> Any:
        """The signal of one example alone; see `read`.

        Raises:
            KeyError: it is not there.
            ValueError: its shard is damaged.
        """
        return self.read([key], [tap])[tap][0]

    def kind(self, tap: str) -> Kind:
        """How the examples of a tap are kept.

        Raises:
            KeyError: nothing of it is kept.
        """
        return self._taps[tap][0]

    def form(self, tap: str) -> Mapping[str, Any]:
        """In which form a tap is kept; see `limbeck.cache.forms.describe`.

        Raises:
            KeyError: nothing of it is kept.
        """
        return self._taps[tap][1]

    def put(self, keys: Sequence[bytes], taps: Mapping[str, Tap]) -> None:
        """Keep taps of some examples; what is kept already stays as it is.

        Args:
            keys: Of the examples.
            taps: Their values, in the order of the keys.

        Raises:
            ValueError: a tap that was kept in another way before.
            OSError: the disk is full.
        """
        for name, tap in taps.items():
            self._know(name, tap.kind, tap.form)
        new: dict[tuple[int, ...], dict[str, Tap]] = {}
        for name, tap in taps.items():
            new.setdefault(tuple(self.missing(keys, [name])), {})[name] = tap
        for places, together in new.items():
            if places:
                self._hold(Block.of(keys, together, None if len(places) == len(keys) else places))
        if self._fresh_bytes >= self.shard_bytes:
            self.flush()
        elif len(self._fresh) >= MOST_BLOCKS and self._fresh_bytes >= 2 * self._merged_bytes:
            self._merge()
            self._merged_bytes = self._fresh_bytes

    def flush(self) -> None:
        """Bring to disk what is in memory alone; without a folder, bring it together."""
        if self.folder is None:
            self._whole += self._merge()
            self._fresh, self._fresh_bytes, self._merged_bytes = [], 0, 0
            return
        for numbers in self._alike():
            blocks = [block for number in numbers if (block := self._index.blocks[number]) is not None]
            self._add(write_shard(self.folder, self._writer, self._written, blocks))
            self._written += 1
            self._index.forget(numbers)
            self._fresh = [number for number in self._fresh if number not in numbers]
        self._fresh_bytes = self._merged_bytes = 0

    def drop(self) -> None:
        """Let go of what is in memory alone."""
        self._index.forget([*self._fresh, *self._whole])
        self._fresh, self._whole, self._fresh_bytes, self._merged_bytes = [], [], 0, 0

    def refresh(self) -> None:
        """See the shards that others have finished."""
        assert self.folder is not None
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path not in self.shards:
                with suppress(FileNotFoundError):  # which was pruned at this very moment
                    self._add(path)

    def taps(self) -> set[str]:
        """The taps that are kept of any example."""
        return set(self._taps)

    def size(self, tap: str) -> tuple[int, int]:
        """The bytes of a tap's values, and its entries: examples, positions or pairs, by its kind."""
        held = [block.size(tap) for block in self._index.blocks if block is not None and tap in block.taps]
        return sum(nbytes for nbytes, _ in held), sum(entries for _, entries in held)

    def nbytes(self) -> int:
        """The bytes on disk and in memory."""
        return sum(block.nbytes() for block in self._index.blocks if block is not None)

    def _hold(self, block: Block) -> None:
        self._fresh.append(self._index.add(block))
        self._fresh_bytes += block.nbytes()

    def _alike(self) -> list[list[int]]:
        """The blocks in memory that can be one."""
        alike: dict[str, list[int]] = {}
        for number in self._fresh:
            block = self._index.blocks[number]
            assert block is not None
            alike.setdefault(block.signature(), []).append(number)
        return list(alike.values())

    def _merge(self) -> list[int]:
        """Make one block of all in memory that can be one; return the numbers of what comes out."""
        self._fresh = [self._as_one(numbers) for numbers in self._alike()]
        return self._fresh

    def _as_one(self, numbers: Sequence[int]) -> int:
        if len(numbers) == 1:
            return numbers[0]
        blocks = [block for number in numbers if (block := self._index.blocks[number]) is not None]
        together = self._index.add(merged(blocks))
        self._index.forget(numbers)
        return together

    def _add(self, path: Path) -> None:
        block = open_shard(path)
        self.shards[path] = block
        for name, about in block.taps.items():
            self._know(name, about["kind"], about["form"])
        self._index.add(block)

    def _know(self, tap: str, kind: Kind, form: Mapping[str, Any]) -> None:
        known, before = self._taps.setdefault(tap, (kind, form))
        if known != kind:
            raise ValueError(
                f"tap {tap!r} was kept by {known} and comes by {kind} now; use another cache for batches with an "
                "attention mask and for those without"
            )
        difference = first_difference(form, before)
        if difference:
            raise ValueError(f"tap {tap!r} is kept in another form ({difference}); use another cache")
        if tap not in self._forms:
            self._forms[tap] = from_description(form)
