"""How the signal of a batch is cut into examples, and put together again for a batch of other examples.

Shape legend: B examples, L positions of a batch, n positions of one example, D features, h heads.

What a teacher says of an example must not depend on how its batch was padded. So only valid positions are kept:

- ``"row"``: one entry for each example, whatever its shape: logits (B, C), maps (B, C, H, W);
- ``"tokens"``: one for each valid position: hidden states (B, L, D), token logits;
- ``"pairs"``: one for each pair of valid positions: attention (B, h, L, L);
- ``"ragged"``: any number of entries for each example, which a form makes and reads by itself.

Values are copied as rows of raw bytes: one copy in numpy costs a third of a microsecond, whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Size, Tensor

from limbeck.types import Sparse

Kind = Literal["row", "tokens", "pairs", "ragged"]
KINDS: tuple[Kind, ...] = ("row", "tokens", "pairs", "ragged")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


def kind_of(shape: Size, mask: Tensor | None) -> Kind:
    """Which of the first three a tensor is, given the batch's mask (B, L).

    Example:
        >>> mask = torch.ones(2, 5)
        >>> [kind_of(torch.Size(s), mask) for s in ((2, 3), (2, 5, 8), (2, 4, 5, 5))]
        ['row', 'tokens', 'pairs']
    """
    if mask is None or mask.ndim != 2:
        return "row"
    if len(shape) == 4 and shape[2] == shape[3] == mask.shape[1]:
        return "pairs"
    return "tokens" if len(shape) >= 3 and shape[:2] == mask.shape else "row"


@dataclass(frozen=True)
class Column:
    """Values of some examples, one behind the other.

    Attributes:
        kind: How they belong to the examples.
        flat: (entries, ...): an entry for each example of rows, for each valid position of tokens, for each pair.
        lengths: (B,), how many positions each example has (entries, where they are ragged); None for rows.
    """

    kind: Kind
    flat: Tensor
    lengths: Numbers | None = None


def cut(values: Any, kind: Kind, mask: Tensor | None) -> tuple[Any, Numbers | None]:
    """Take the valid positions of a batch, one behind the other.

    Args:
        values: (B, ...), a tensor or a `Sparse`.
        kind: From `kind_of`.
        mask: (B, L), which positions are valid; not needed for rows.

    Returns:
        The values, (B, ...) of rows, (sum of n, ...) of tokens, (sum of n², h) of pairs; and all n, None for rows.

    Example:
        >>> flat, lengths = cut(torch.zeros(2, 3, 4), "tokens", torch.tensor([[1, 1, 0], [1, 1, 1]]))
        >>> tuple(flat.shape), lengths.tolist()
        ((5, 4), [2, 3])
    """
    if kind == "row":
        return values, None
    assert mask is not None
    positions = Positions(mask)
    lengths = np.asarray(positions.lengths, dtype=np.int64)
    if isinstance(values, Sparse):
        return values.map(lambda tensor: _valid(tensor, positions)), lengths
    if kind == "tokens":
        return _valid(values, positions), lengths
    valid = mask.bool().to(values.device)
    return values.permute(0, 2, 3, 1)[valid[:, :, None] & valid[:, None, :]], lengths


def _valid(values: Tensor, positions: Positions) -> Tensor:
    """The valid positions (sum of n, ...) of (B, L, ...).

    They are copied slice by slice, which takes a third of the time of a mask as an index; and in numpy, which does
    not wait for threads that other processes keep busy.
    """
    if positions.full:
        return values.flatten(0, 1)
    if values.device.type != "cpu":
        places = [p if isinstance(p, slice) else torch.from_numpy(p).to(values.device) for p in positions.places]
        return torch.cat([row[place] for row, place in zip(values, places, strict=True)])
    flat = values.new_empty(sum(positions.lengths), *values.shape[2:])
    if flat.numel():
        into, ends = raw(flat), np.cumsum(positions.lengths).tolist()
        rows = raw(values.detach()).reshape(*values.shape[:2], -1)
        for row, place, start, end in zip(rows, positions.places, [0, *ends], ends, strict=False):
            into[start:end] = row[place]
    return flat


@dataclass(frozen=True)
class Kept:
    """Values of many examples as raw bytes, in memory or in a mapped file.

    Attributes:
        kind: How they belong to the examples.
        dtype: Of the values.
        shape: Of one entry.
        data: (entries, bytes of one).
        lengths: See `Column`.
    """

    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Bytes
    lengths: Numbers | None

    @cached_property
    def starts(self) -> list[int]:
        """Where the entries of each example begin, and where the last one's end."""
        assert self.lengths is not None
        entries = self.lengths**2 if self.kind == "pairs" else self.lengths
        return [0, *np.cumsum(entries, dtype=np.int64).tolist()]

    def entries(self, row: int) -> Bytes:
        """What belongs to one example that is no row."""
        return self.data[self.starts[row] : self.starts[row + 1]]


def raw(tensor: Tensor) -> Bytes:
    """The bytes of a tensor (N, ...) as (N, bytes of one), sharing its memory where it is contiguous."""
    count = len(tensor)
    cells = prod(tensor.shape[1:])
    if not count or not cells:
        return np.empty((count, cells * tensor.element_size()), dtype=np.uint8)
    return tensor.contiguous().view(count, cells).view(torch.uint8).numpy()


def keep(column: Column, places: Sequence[int] | None = None) -> Kept:
    """A column in memory of its own, or some of its examples."""
    flat, lengths = column.flat.detach(), column.lengths
    if places is not None:
        whole = keep(column)
        chosen = np.asarray(places, dtype=np.int64)
        if lengths is None:
            return Kept(column.kind, whole.dtype, whole.shape, whole.data[chosen], None)
        pieces = [whole.entries(place) for place in places]
        return Kept(column.kind, whole.dtype, whole.shape, np.concatenate(pieces), lengths[chosen])
    flat = flat.cpu().contiguous()
    if flat.untyped_storage().nbytes() > flat.nbytes:  # a view would hold all that it was cut out of
        flat = flat.clone()
    return Kept(column.kind, flat.dtype, tuple(flat.shape[1:]), raw(flat), lengths)


class Positions:
    """Where the valid positions of each example stand in a batch.

    Args:
        mask: (B, L).
    """

    def __init__(self, mask: Tensor) -> None:
        valid = mask.detach().cpu().bool().numpy()
        self.width = valid.shape[1]
        self.lengths: list[int] = valid.sum(axis=1).tolist()
        self.full = bool(valid.all())
        starts = valid.argmax(axis=1).tolist() if self.width else [0] * len(valid)
        stops = (self.width - valid[:, ::-1].argmax(axis=1)).tolist() if self.width else [0] * len(valid)
        self.places: list[slice | Numbers] = [
            slice(start, start + n) if n in (0, stop - start) else np.flatnonzero(row)
            for row, n, start, stop in zip(valid, self.lengths, starts, stops, strict=True)
        ]


@dataclass(frozen=True)
class Gathering:
    """Some examples of some blocks, in the order in which they are wanted.

    Attributes:
        which: (B,), the number of each example's block.
        rows: (B,), its row there.
        positions: Where its positions go; None where no mask says so.
    """

    which: Numbers
    rows: Numbers
    positions: Positions | None
    _spans: dict[tuple[int, ...], list[tuple[int, int, int]]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, sources: Sequence[Kept]) -> Tensor:
        """Put a column of the examples together, padded with zeros.

        Args:
            sources: The column of each block.

        Returns:
            (B, ...) of rows, (B, L, ...) of tokens, (B, h, L, L) of pairs, (entries, ...) of ragged ones.

        Raises:
            ValueError: examples of different shapes, or of another length than the mask says.
        """
        first = sources[0]
        for other in sources:
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"examples of one batch were kept with different shapes, {first.shape} and {other.shape} of "
                    f"{first.dtype} and {other.dtype}; batch those of a size together"
                )
        if first.kind == "row":
            return self._rows(sources)
        data = [source.data for source in sources]
        pieces = [data[which][start:end] for which, start, end in self._find(sources)]
        if first.kind == "ragged":
            return _tensor(np.concatenate(pieces), first, sum(map(len, pieces)))
        return self._padded(pieces, first)

    def _find(self, sources: Sequence[Kept]) -> list[tuple[int, int, int]]:
        """Each example's block, and where it begins and ends there; found once for columns of the same lengths."""
        pairs = sources[0].kind == "pairs"
        known = (int(pairs), *(id(source.lengths) for source in sources))
        if known not in self._spans:
            starts = [source.starts for source in sources]
            places = zip(self.which.tolist(), self.rows.tolist(), strict=True)
            self._spans[known] = [(which, starts[which][row], starts[which][row + 1]) for which, row in places]
        return self._spans[known]

    def _rows(self, sources: Sequence[Kept]) -> Tensor:
        first = sources[0]
        joined = torch.empty(len(self), *first.shape, dtype=first.dtype)
        if not joined.numel():
            return joined
        into = raw(joined)
        if len(sources) == 1:
            np.take(first.data, self.rows, axis=0, out=into, mode="clip")
            return joined
        order = np.argsort(self.which, kind="stable")
        ends = np.cumsum(np.bincount(self.which, minlength=len(sources))).tolist()
        by_block = np.empty_like(into)
        for source, start, end in zip(sources, [0, *ends], ends, strict=False):
            rows = self.rows[order[start:end]]
            np.take(source.data, rows, axis=0, out=by_block[start:end], mode="clip")
        np.take(by_block, np.argsort(order), axis=0, out=into, mode="clip")
        return joined

    def _padded(self, pieces: Sequence[Bytes], first: Kept) -> Tensor:
        pairs = first.kind == "pairs"
        counts = [round(len(piece) ** 0.5) if pairs else len(piece) for piece in pieces]
        width = self.positions.width if self.positions else max(counts, default=0)
        lengths = self.positions.lengths if self.positions else [width] * len(counts)
        if counts != lengths:
            count, length = next((c, n) for c, n in zip(counts, lengths, strict=True) if c != n)
            raise ValueError(f"an example of {length} positions was kept with {count}")
        sizes = (len(self), width, width) if pairs else (len(self), width)
        if self.positions is None or self.positions.full:
            into = np.concatenate(pieces)
        else:
            into = np.empty((*sizes, first.data.shape[1]), dtype=np.uint8)
            for row, piece, place in zip(into, pieces, self.positions.places, strict=True):
                (_fill_pairs if pairs else _fill)(row, piece, place)
        joined = _tensor(into, first, *sizes)
        return joined.permute(0, 3, 1, 2) if pairs else joined


def _fill(row: Bytes, piece: Bytes, place: slice | Numbers) -> None:
    """Write an example's positions into its row (L, bytes), and zeros beside them."""
    if isinstance(place, slice):
        row[: place.start] = 0
        row[place.stop :] = 0
    else:
        row[:] = 0
    row[place] = piece


def _fill_pairs(row: Bytes, piece: Bytes, place: slice | Numbers) -> None:
    if len(piece) < row.shape[0] * row.shape[1]:
        row[:] = 0
    count = round(len(piece) ** 0.5)
    index = (place, place) if isinstance(place, slice) else np.ix_(place, place)
    row[index] = piece.reshape(count, count, -1)


def _tensor(data: Bytes, like: Kept, *sizes: int) -> Tensor:
    """Bytes, as a tensor of these sizes and the shape of a column's entries."""
    if not data.size:
        return torch.empty(*sizes, *like.shape, dtype=like.dtype)
    return torch.from_numpy(data).view(like.dtype).view(*sizes, *like.shape)


def joined(kept: Sequence[Kept]) -> Kept:
    """Columns of the same shape, one behind the other."""
    first = kept[0]
    lengths = None if first.lengths is None else np.concatenate([k.lengths for k in kept if k.lengths is not None])
    return Kept(first.kind, first.dtype, first.shape, np.concatenate([k.data for k in kept]), lengths)
