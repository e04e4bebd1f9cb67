"""Where the kept signals of each example stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from limbeck.cache.layout import Gathering, Positions
from limbeck.cache.shards import Block

ROWS = 32
"""Bits of a place that number the row in its block; those above number the block."""


class Index:
    """Finds examples by their keys in blocks.

    There is one table for all blocks that hold the same taps, which mostly are all blocks: what a batch wants of
    several taps is looked up once.

    Example:
        >>> import torch
        >>> from limbeck.cache.layout import Column
        >>> from limbeck.cache.shards import Tap
        >>> index, values = Index(), Column("row", torch.zeros(2, 3))
        >>> _ = index.add(Block.of([b"a", b"b"], {"logits": Tap("row", {}, {"": values})}))
        >>> index.holds(b"b", "logits"), index.holds(b"b", "hidden"), len(index)
        (True, False, 2)
    """

    def __init__(self) -> None:
        self.blocks: list[Block | None] = []
        self._tables: dict[tuple[str, ...], dict[bytes, int]] = {}

    def __len__(self) -> int:
        return len(set().union(*self._tables.values()))

    def add(self, block: Block) -> int:
        """Find the examples of a block there from now on; return the block's number."""
        number = len(self.blocks)
        self.blocks.append(block)
        table = self._tables.setdefault(tuple(sorted(block.taps)), {})
        first = number << ROWS
        table.update(zip(block.keys, range(first, first + len(block.keys)), strict=True))
        return number

    def forget(self, numbers: Iterable[int]) -> None:
        """Let go of blocks, and of examples that stand nowhere else."""
        gone = set(numbers)
        for number in gone:
            block = self.blocks[number]
            assert block is not None
            table = self._tables[tuple(sorted(block.taps))]
            for key in block.keys:
                if table.get(key, -1) >> ROWS == number:
                    del table[key]
            self.blocks[number] = None

    def tables(self, tap: str) -> list[dict[bytes, int]]:
        """The tables that a tap's examples stand in."""
        return [table for taps, table in self._tables.items() if tap in taps]

    def holds(self, key: bytes, tap: str) -> bool:
        """Whether a tap of an example is there."""
        return any(key in table for table in self.tables(tap))

    def absent(self, keys: Sequence[bytes], tap: str) -> list[int]:
        """The places of the keys whose examples lack the tap."""
        tables = self.tables(tap)
        if len(tables) == 1:
            return [place for place, key in enumerate(keys) if key not in tables[0]]
        return [place for place, key in enumerate(keys) if not any(key in table for table in tables)]

    def find(
        self, keys: Sequence[bytes], tables: Sequence[dict[bytes, int]], positions: Positions | None
    ) -> tuple[list[Block], Gathering]:
        """The blocks that hold some examples, and where.

        Raises:
            KeyError: an example is in none of the tables.
        """
        if len(tables) == 1:
            (table,) = tables
            places = np.array([table[key] for key in keys], dtype=np.int64)
        else:
            places = np.array([_find(key, tables) for key in keys], dtype=np.int64)
        numbers, which = np.unique(places >> ROWS, return_inverse=True)
        blocks = [block for number in numbers.tolist() if (block := self.blocks[number]) is not None]
        return blocks, Gathering(which, places & ((1 << ROWS) - 1), positions)


def _find(key: bytes, tables: Sequence[dict[bytes, int]]) -> int:
    for table in tables:
        if key in table:
            return table[key]
    raise KeyError(key)
