"""The shapes in which data travels between a student, a teacher and the terms between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Size, Tensor, device

if TYPE_CHECKING:
    from typing_extensions import Self

Batch = Mapping[str, Any]
"""One batch by name: the model's inputs, ``labels``, ``example_id``."""

LABELS, LOGITS = "labels", "logits"
EXAMPLE_ID = "example_id"
INPUTS = "inputs"
"""The key under which positional inputs of a plain module stand in a batch, as a tuple."""

STUDENT, TEACHER = "student", "teacher"
"""Where a batch keeps what only one of the two models is given, each a batch of its own."""

TEACHER_CACHE = "teacher_cache"
"""Where a batch brings along what the teacher said of it, by tap, so that the teacher need not run."""

TASK = "task"
"""The name of the one task that all examples of a batch belong to, where a student learns several."""

IGNORE_INDEX = -100
"""The label of a position that does not count, as in PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Sparse:
    """A distribution over many classes of which only some entries are known, at each position.

    It stands where logits (..., V) would stand: `shape`, `ndim` and indexing of the leading dimensions are theirs.

    Attributes:
        ids: (..., K), the known entries' numbers, int64. Of `TopK`, a place that holds none has the number -1 and
            the value minus infinity; of `Sampled`, the weight 0.
        size: V, the number of all entries.
        temperatures: Those at which it is known, T of them.
    """

    ids: Tensor
    size: int
    temperatures: tuple[float, ...]

    @property
    def shape(self) -> Size:
        """(..., V)."""
        return Size((*self.ids.shape[:-1], self.size))

    @property
    def ndim(self) -> int:
        """The number of dimensions of the logits."""
        return self.ids.ndim

    @property
    def device(self) -> device:
        """Where it is."""
        return self.ids.device

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Self:
        return self.map(lambda tensor: tensor[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed; only the leading dimensions may be."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {n: change(v) if isinstance(v, Tensor) else v for n, v in found.items()}
        return type(self)(**changed)

    def to(self, *args: Any, **options: Any) -> Self:
        """The same in another place; see `torch.Tensor.to`."""
        return self.map(lambda tensor: tensor.to(*args, **options))

    def column(self, temperature: float) -> int:
        """The place of a temperature among those at which it is known.

        Raises:
            ValueError: it is none of them.
        """
        for place, known in enumerate(self.temperatures):
            if abs(known - temperature) <= 1e-6 * known:
                return place
        known_ones = ", ".join(f"{known:g}" for known in self.temperatures)
        raise ValueError(
            f"the teacher's targets are known at temperature {known_ones}, and not at {temperature:g}; keep them "
            "at that one too, or set the term's temperature"
        )


@dataclass(frozen=True)
class TopK(Sparse):
    """The largest logits of a teacher, and how much all others hold together.

    Attributes:
        values: (..., K), logits of the known entries, up to a constant of each position; float32.
        log_rest: (..., T), log of the sum of exp(z / temperature) over all other entries, for each of the
            temperatures and up to the same constant; minus infinity where there are no others.

    Example:
        >>> import torch
        >>> known = TopK(torch.tensor([[4, 2]]), 5, (1.0,), torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0]]))
        >>> known.shape, known[:1].ids.shape
        (torch.Size([1, 5]), torch.Size([1, 2]))
    """

    values: Tensor
    log_rest: Tensor


@dataclass(frozen=True)
class Sampled(Sparse):
    """Entries drawn at random by a teacher's distribution; what they weigh is right on average.

    Attributes:
        weights: (..., K, T), for each of the temperatures; the mean over draws is the probability of each entry.
            Places without a draw have the weight 0.

    Example:
        >>> import torch
        >>> drawn = Sampled(torch.tensor([[4, 2]]), 5, (1.0,), torch.tensor([[[0.75], [0.25]]]))
        >>> drawn.weights.sum().item()
        1.0
    """

    weights: Tensor


Value = Tensor | Sparse
"""What was read at one place."""


@dataclass(frozen=True)
class Signal:
    """What was read from one model for one batch, by tap.

    Example:
        >>> import torch
        >>> Signal({"logits": torch.zeros(2, 3)})["logits"].shape
        torch.Size([2, 3])
    """

    values: Mapping[str, Any]
    """By tap: a tensor, or a `Sparse` in place of logits."""

    def __getitem__(self, tap: str) -> Any:
        return self.values[tap]


@dataclass(frozen=True)
class Output:
    """What a Distiller returns in training mode.

    Attributes:
        loss: The weighted sum of the terms, a scalar to call ``backward`` on.
        logits: The student's logits, or None where the student has none.
        terms: The unweighted value of each term by name, detached scalars.
        weights: What each term was multiplied by, schedules and balance included, or would have been, of those
            for other tasks than the batch's.
        gradients: Dot products of the unweighted terms' gradients in the student, (terms, terms), where they were
            measured.

    Example:
        >>> import torch
        >>> out = Output(torch.tensor(1.5), None, {"kd": torch.tensor(3.0)})
        >>> float(out["loss"]), float(out.terms["kd"])
        (1.5, 3.0)
    """

    loss: Tensor
    logits: Tensor | None
    terms: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    gradients: Tensor | None = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)
