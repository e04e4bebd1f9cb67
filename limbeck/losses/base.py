"""What every loss is: a function ``(student, teacher, *, options) -> one value per position``.

A loss reduces over classes or features, never over positions: `limbeck.reduce` does that, with the right count.
Keyword-only parameters named in `SUPPLIED` are filled in by the Distiller when a loss asks for them, and so are
those that it `learns`; all others are the user's options and are checked when a term is built.

A loss over several places of a model (a flow between two layers, queries with keys) takes a tuple of tensors on
each side.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, overload

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.registry import Registry
from limbeck.shapes import mismatch
from limbeck.types import Sparse

SUPPLIED = frozenset({"mask", "labels", "example_id"})
"""What the Distiller takes from the batch for a loss that asks: the term's mask, ``labels``, ``example_id``."""

FAMILIES = (
    "logits",
    "targets",
    "ranking",
    "correlations",
    "features",
    "maps",
    "activations",
    "attention",
    "relations",
    "contrastive",
    "labels",
)
"""The modules of this package that hold losses."""


class Loss(Protocol):
    """A distance between a student's and a teacher's tensor, per position."""

    __name__: str

    def __call__(self, student: Tensor, teacher: Tensor, /, **options: object) -> Tensor:
        """Return one value per position; the leading dimensions of `student` are kept."""
        ...


Function = TypeVar("Function", bound=Callable[..., Tensor])


def _import_families() -> None:
    for family in FAMILIES:
        importlib.import_module(f"limbeck.losses.{family}")


LOSSES: Registry[Callable[..., Tensor]] = Registry("loss", load=_import_families)


@dataclass(frozen=True)
class Traits:
    """What a loss brings along, beside its formula.

    Attributes:
        project: The projection that belongs to the method, used where a term names none.
        learns: Keyword-only parameters that are modules trained with the student, each with the name of the
            projection kind that makes it, ``{"variance": "channel_variance"}``. The Distiller builds, sizes,
            trains and saves them; a caller of the bare function passes them itself.
        borrows: Keyword-only parameters that may be parts of the teacher, such as its classifier: in a term one
            names the module by its path, and the Distiller passes the module.
        sparse: True where the teacher's side may be `limbeck.types.TopK`, as it may for all that is computed of
            `limbeck.losses.distributions.paired_log_probs`; or why it may not.
    """

    project: str | None = None
    learns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    borrows: tuple[str, ...] = ()
    sparse: bool | str = False


_TRAITS: dict[Callable[..., Any], Traits] = {}


def traits_of(function: Callable[..., Any]) -> Traits:
    """What a loss declared with `loss`; a plain function declares nothing.

    Example:
        >>> traits_of(LOSSES.get("mgd")).project
        'masked_generator'
    """
    return _TRAITS.get(function, Traits())


@overload
def loss(function: Function) -> Function: ...


@overload
def loss(
    *,
    project: str | None = None,
    learns: Mapping[str, str] | None = None,
    borrows: tuple[str, ...] = (),
    sparse: bool | str = False,
) -> Callable[[Function], Function]: ...


def loss(
    function: Function | None = None,
    *,
    project: str | None = None,
    learns: Mapping[str, str] | None = None,
    borrows: tuple[str, ...] = (),
    sparse: bool | str = False,
) -> Function | Callable[[Function], Function]:
    """Register a loss under its function's name; used as a decorator, with or without what the loss brings along.

    Args:
        function: The loss.
        project: See `Traits`.
        learns: See `Traits`.
        borrows: See `Traits`.
        sparse: See `Traits`.

    Example:
        >>> from limbeck.losses import LOSSES, loss
        >>> @loss
        ... def squared(student, teacher, *, scale: float = 1.0):
        ...     return scale * (student - teacher).square().mean(-1)
        >>> LOSSES.get("squared") is squared
        True
    """

    def add(function: Function) -> Function:
        able = sparse or traits_of(function).sparse
        _TRAITS[function] = Traits(project, MappingProxyType(dict(learns or {})), borrows, able)
        return LOSSES.register(function)

    return add if function is None else add(function)


def accepts_sparse(function: Function) -> Function:
    """Note that a function takes `limbeck.types.TopK` for a teacher's logits; `loss` notes it too."""
    _TRAITS[function] = replace(traits_of(function), sparse=True)
    return function


def refuse_sparse(name: str, reason: bool | str, teacher: object) -> None:
    """Refuse targets of which only some entries are known.

    Args:
        name: The loss.
        reason: Why, as `Traits` has it; or that it accepts them.
        teacher: What it is given.

    Raises:
        ValueError: they are such targets and the loss does not take them.

    Example:
        >>> refuse_sparse("logit_mse", "it needs all", torch.zeros(2, 3))
    """
    if reason is True or not isinstance(teacher, Sparse):
        return
    why = reason or "it compares all entries"
    raise ValueError(
        f"{name} cannot be computed from targets that hold only some of the teacher's logits "
        f"({type(teacher).__name__}), since {why}; use forward_kl or soft_cross_entropy, or keep all logits"
    )


def full_precision(tensor: Tensor) -> Tensor:
    """Lift half precision to float32, where differences of log-probabilities keep their digits.

    Example:
        >>> full_precision(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def mean_square(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """Mean squared difference along a dimension, of two tensors of one shape.

    It is a sum that is divided, since the gradient of a mean would be laid out in full.

    Example:
        >>> mean_square(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([2.])
    """
    return F.mse_loss(student, teacher, reduction="none").sum(dim=dim) / student.shape[dim]


class SquaredLength(torch.autograd.Function):
    """The sum of squares along a dimension, without a tensor of squares, not even in backward."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, dim: int) -> Tensor:
        """Compute (...,) of (..., D), where D may be another dimension than the last."""
        ctx.save_for_backward(vectors)
        ctx.dim = dim
        lengths: Tensor = torch.linalg.vector_norm(vectors, dim=dim)
        return lengths.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Compute twice the vectors times the gradient, which can be differentiated again."""
        (vectors,) = ctx.saved_tensors
        return (2 * gradient).unsqueeze(ctx.dim) * vectors, None


def squared_length(vectors: Tensor, dim: int = -1) -> Tensor:
    """The sum of squares along a dimension.

    Example:
        >>> squared_length(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([25.,  1.])
    """
    if torch.compiler.is_compiling():  # it does the same by itself
        return vectors.square().sum(dim=dim)
    squares: Tensor = SquaredLength.apply(vectors, dim)  # type: ignore[no-untyped-call]
    return squares


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse a pair that would broadcast.

    Raises:
        ValueError: the shapes differ, or the teacher's side is a `limbeck.types.Sparse`.

    Example:
        >>> same_shape(torch.zeros(2, 3), torch.zeros(2, 5))
        Traceback (most recent call last):
        ValueError: student (2, 3) and teacher (2, 5) differ in shape; add project='linear'
    """
    refuse_sparse("the loss", False, teacher)
    if student.shape != teacher.shape:
        raise ValueError(mismatch(student.shape, teacher.shape))
