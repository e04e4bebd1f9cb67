"""How the signal of a batch is cut into examples, and put together again for a batch of other examples.

Shape legend: B examples, L positions of a batch, n positions of one example, D features, h heads.

What a teacher says of an example must not depend on how its batch was padded. So only valid positions are kept:

- ``"row"``: one tensor for each example, whatever its shape: logits (B, C), maps (B, C, H, W);
- ``"tokens"``: one for each valid position: hidden states (B, L, D), token logits;
- ``"pairs"``: one for each pair of valid positions: attention (B, h, L, L).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Size, Tensor

Kind = Literal["row", "tokens", "pairs"]
KINDS: tuple[Kind, ...] = ("row", "tokens", "pairs")


def kind_of(shape: Size, mask: Tensor | None) -> Kind:
    """Which of the three a tensor is, given the batch's mask (B, L).

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


def cut(values: Tensor, kind: Kind, mask: Tensor | None) -> list[Tensor]:
    """Cut a batch into examples.

    Args:
        values: (B, ...).
        kind: From `kind_of`.
        mask: (B, L), which positions are valid; not needed for rows.

    Returns:
        For each example: (...) of a row, (n, ...) of tokens, (n, n, h) of pairs.
    """
    if kind == "row":
        return list(values.unbind(0))
    assert mask is not None
    valid = mask.bool().to(values.device)
    if kind == "tokens":
        return list(torch.split(values[valid], valid.sum(dim=1).tolist()))
    by_pair = values.permute(0, 2, 3, 1)
    return [by_pair[b][v][:, v] for b, v in enumerate(valid)]


def join(pieces: Sequence[Tensor], kind: Kind, mask: Tensor | None) -> Tensor:
    """Put examples together to a batch, padded with zeros where its mask (B, L) says so.

    Raises:
        ValueError: an example has another number of positions than the mask says.

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> values = torch.arange(6.0).view(2, 3, 1) + 1
        >>> join(cut(values, "tokens", mask), "tokens", mask)[:, :, 0]
        tensor([[1., 2., 0.],
                [4., 5., 6.]])
    """
    if kind == "row":
        return torch.stack(tuple(pieces))
    assert mask is not None
    valid = mask.bool()
    lengths = valid.sum(dim=1).tolist()
    for piece, length in zip(pieces, lengths, strict=True):
        if len(piece) != length:
            raise ValueError(f"an example of {length} positions was kept with {len(piece)}")
    if kind == "tokens":
        flat = torch.cat(tuple(pieces))
        if bool(valid.all()):
            return flat.view(*mask.shape, *flat.shape[1:])
        joined = flat.new_zeros(*mask.shape, *flat.shape[1:])
        joined[valid] = flat
        return joined
    heads = pieces[0].shape[-1]
    joined = pieces[0].new_zeros(len(pieces), mask.shape[1], mask.shape[1], heads)
    for b, piece in enumerate(pieces):
        places = valid[b].nonzero().flatten()
        joined[b, places[:, None], places] = piece
    return joined.permute(0, 3, 1, 2)
