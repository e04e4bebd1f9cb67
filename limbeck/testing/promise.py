"""A `LossContract` for any loss, from a few words: what ``limbeck check`` runs.

A shape is written ``B,L,7``: B examples, L positions of each, and numbers for what stands behind them.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.losses import SUPPLIED, traits_of
from limbeck.losses.describe import describe
from limbeck.registry import check_options
from limbeck.testing.loss import Example, LossContract

EITHER = ("B,7", "B,L,7")
"""One vector per example, and one per position."""

WRITTEN = {  # how docstrings write shapes, and an instance of each
    "B, C, H, W": ("B,3,5,5",),
    "B, h, L, L": ("B,2,5,5",),
    "B, L, D": ("B,L,7",),
    "B, D": ("B,7",),
    "B, ...": ("B,7",),
}


def contract_of(
    loss: Callable[..., Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    shapes: Sequence[str] = (),
    places: int | None = None,
    **promises: Any,
) -> type[LossContract]:
    """Make the contract of a loss.

    Args:
        loss: The function. It gets ``labels`` and ``mask`` if it asks for them by keyword; if its second
            parameter is called ``labels``, class indices stand in the teacher's place.
        options: Its options.
        shapes: Shapes to try, such as ``B,7`` or ``B,L,7``; by default what its docstring says it reads, or these
            two.
        places: How many tensors it takes on each side; by default one, or two where its docstring says so.
        **promises: Attributes of `LossContract`: ``logits``, ``identity``, ``non_negative``, ``per_example``.

    Raises:
        ValueError: a shape that cannot be read, or inputs that the loss refuses.
        TypeError: an option that the loss does not have, or one that it needs.

    Example:
        >>> from limbeck.losses import forward_kl
        >>> from limbeck.testing import run
        >>> len(run(contract_of(forward_kl, options={"temperature": 2.0}, logits=True)))
        14
    """
    options = dict(options or {})
    traits = traits_of(loss)
    brought = [name for name in (*traits.learns, *traits.borrows) if name not in options]
    if brought:
        raise ValueError(
            f"{loss.__name__} works with a module, its {brought[0]!r}; "
            "subclass limbeck.testing.LossContract and put one into its options"
        )
    check_options(loss, options, SUPPLIED, f"loss {loss.__name__!r}")
    reads = describe(loss).reads
    labelled = _second_parameter(loss) == "labels"
    leading, behind = _parsed(shapes or _shapes_in(reads))
    attributes = {
        "loss": staticmethod(loss),
        "options": options,
        "leading": leading,
        "example": _example(loss, dict(zip(leading, behind, strict=True)), places or _places_in(reads), labelled),
        **({"cut": lambda self, side: side.unbind(-1)} if (places or _places_in(reads)) > 1 else {}),
        **({"identity": False} if labelled else {}),
        **promises,
    }
    contract: type[LossContract] = type("Contract", (LossContract,), attributes)
    for tried in leading:
        _try(contract(), tried, loss.__name__)
    return contract


def _try(contract: LossContract, leading: tuple[int, ...], name: str) -> None:
    example = contract.example(*leading)
    try:
        contract.call(example)
    except (ValueError, TypeError, RuntimeError, IndexError) as refusal:
        shape = tuple(example["student"].shape)
        raise ValueError(f"{name} fails for inputs {shape}: {refusal}; try others with --shape") from None


def _second_parameter(loss: Callable[..., Tensor]) -> str:
    return list(inspect.signature(loss).parameters)[1]


def _shapes_in(reads: str) -> Sequence[str]:
    written = re.search(r"\(([^)]*)\)", reads)
    return WRITTEN.get(written[1], EITHER) if written else EITHER


def _places_in(reads: str) -> int:
    return 2 if reads.startswith("Two ") else 1


def _parsed(shapes: Sequence[str]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The leading dimensions of each shape, and what stands behind them.

    Raises:
        ValueError: a shape that cannot be read, or two with the same leading dimensions.
    """
    leading: list[tuple[int, ...]] = []
    behind: list[tuple[int, ...]] = []
    for shape in shapes:
        found = re.fullmatch(r"B(,L)?((?:,[1-9]\d*)*)", shape.replace(" ", ""))
        if not found:
            raise ValueError(f"{shape!r} is no shape; write B,7 or B,L,7 or B,3,5,5")
        leading.append((3, 5) if found[1] else (4,))
        behind.append(tuple(int(size) for size in found[2].split(",")[1:]))
    if len(set(leading)) < len(leading):
        raise ValueError(f"{', '.join(shapes)}: give one shape with positions L and one without at most")
    return leading, behind


def _example(
    loss: Callable[..., Tensor], behind: Mapping[tuple[int, ...], tuple[int, ...]], places: int, labelled: bool
) -> Callable[..., Example]:
    """The method that makes inputs with some leading dimensions."""
    asked = set(describe(loss).asks)

    def example(self: LossContract, *leading: int) -> Example:
        shape = (*leading, *behind[leading], *([places] if places > 1 else []))
        generator = torch.Generator().manual_seed(7)
        student, teacher = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        number = torch.arange(math.prod(leading)).view(leading)
        labels = number % (shape[len(leading)] if behind[leading] else 2)
        found = {"student": student, "teacher": labels if labelled else teacher}
        if "labels" in asked:
            found["labels"] = labels
        if "mask" in asked and len(leading) > 1:
            found["mask"] = number % 3 > 0
        if "example_id" in asked:
            found["example_id"] = torch.arange(leading[0])
        return found

    return example
