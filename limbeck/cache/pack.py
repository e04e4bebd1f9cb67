"""Small whole numbers in as few bytes as they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOW = 1 << 16
PLANES = {
    1: (torch.uint8,),
    2: (torch.uint16,),
    3: (torch.uint16, torch.uint8),
    4: (torch.uint32,),
    8: (torch.int64,),
}


def width(limit: int) -> int:
    """How many bytes numbers from 0 to below `limit` take: 1, 2, 3, 4 or 8.

    Example:
        >>> [width(limit) for limit in (256, 257, 151_936, 1 << 24, (1 << 24) + 1)]
        [1, 2, 3, 3, 4]
    """
    return next(size for size in PLANES if limit <= 1 << (8 * size) or size == 8)


def pack(numbers: Tensor, limit: int) -> list[Tensor]:
    """Numbers from 0 to below `limit` as planes: their low bytes, and, of three, the high one by itself.

    Three bytes in a row would have to be taken apart one by one; two planes are read in two strokes.

    Args:
        numbers: (...), whole numbers.
        limit: What they all are below.

    Returns:
        One or two tensors of their shape.

    Raises:
        ValueError: a number is not in that range.

    Example:
        >>> [plane.dtype for plane in pack(torch.tensor([5, 151_935]), 151_936)]
        [torch.uint16, torch.uint8]
        >>> unpack(pack(torch.tensor([5, 151_935]), 151_936))
        tensor([     5, 151935])
    """
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
        raise ValueError(f"numbers from {int(numbers.min())} to {int(numbers.max())} are not all below {limit}")
    first, *second = PLANES[width(limit)]
    if not second:
        return [numbers.to(first)]
    return [(numbers % LOW).to(first), (numbers // LOW).to(second[0])]


def unpack(planes: Sequence[Tensor]) -> Tensor:
    """The numbers that `pack` was given, int64."""
    if len(planes) == 1:
        return planes[0].to(torch.int64)
    numbers = planes[1].to(torch.int32)  # half the bytes to work on; they are below 2^24
    numbers <<= 16
    numbers |= planes[0].to(torch.int32)
    return numbers.to(torch.int64)
