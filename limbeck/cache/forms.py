"""Forms: how the values of a tap are turned into what is kept, and back.

Shape legend: B examples, N positions in a row, V entries of a vocabulary, K kept ones, T temperatures.

What each takes, for a vocabulary of 151,936 entries:

==================  ==========================================================  =========================
form                bytes for each position                                     what comes back
==================  ==========================================================  =========================
`Dense`             2 or 4 for each value                                       the tensor
`TopKForm`          5 for each entry, 4 for each temperature                    `limbeck.types.TopK`
`SampledForm`       1, and 3 for each entry that was drawn at least once, and   `limbeck.types.Sampled`
                    2 more for each temperature but the first
`HybridForm`        1, and 3 for each entry, and 2 more for each temperature    `limbeck.types.Sampled`
==================  ==========================================================  =========================
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from limbeck.cache.layout import Column, Kind, Numbers, cut, kind_of
from limbeck.cache.pack import pack, unpack
from limbeck.cache.shards import Tap
from limbeck.sparse import sample, top_k
from limbeck.types import Sampled, Sparse, TopK

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE = "size"


class Form(Protocol):
    """How the values of a tap are kept; a frozen dataclass of plain options, which stand in the manifest."""

    NAME: ClassVar[str]

    def encode(self, values: Any, kind: Kind, mask: Tensor | None, keys: Sequence[bytes]) -> dict[str, Column]:
        """Turn the values of a batch into named parts.

        Args:
            values: (B, ...), a tensor, or a `Sparse` where the teacher gives no more.
            kind: How they belong to the examples.
            mask: (B, L), which positions are valid.
            keys: The key of each example.
        """
        ...

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Any:
        """Turn the parts of a batch back into values.

        Args:
            parts: By name, put together for a batch; ragged ones are all entries in a row.
            size: V, of the tensor that was encoded.
        """
        ...


def describe(form: Form, size: int | None = None) -> dict[str, Any]:
    """A form's name and options, as JSON holds them.

    Example:
        >>> describe(TopKForm(8, (1.0, 2.0)))
        {'form': 'top-k', 'k': 8, 'temperatures': [1.0, 2.0], 'dtype': 'fp16'}
    """
    options = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(form).items()}  # type: ignore[call-overload]
    return {"form": form.NAME, **options, **({} if size is None else {SIZE: size})}


def from_description(found: Mapping[str, Any]) -> Form:
    """The form that was described.

    Raises:
        ValueError: it is none of this limbeck's.

    Example:
        >>> from_description({"form": "dense", "dtype": "bf16"})
        Dense(dtype='bf16')
    """
    kind = FORMS.get(str(found.get("form")))
    if kind is None:
        raise ValueError(f"unknown form {found.get('form')!r} of kept signals; known: {', '.join(FORMS)}")
    known = {field.name for field in fields(kind)}
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in found.items() if key in known}
    made: Form = kind(**options)
    return made


def kept_by(form: Form, values: Any, mask: Tensor | None, keys: Sequence[bytes], given: bool = False) -> Tap:
    """What is kept of a tap, of one batch.

    Args:
        form: In which form.
        values: (B, ...), a tensor or a `Sparse`.
        mask: (B, L), which positions are valid; None where no mask says so.
        keys: The key of each example.
        given: The form is the teacher's own: it gives no more than this.

    Raises:
        ValueError: the form cannot keep these values.

    Example:
        >>> tap = kept_by(Dense("fp16"), torch.ones(2, 3), None, [b"a", b"b"])
        >>> tap.kind, tap.form, tap.parts[""].flat.dtype
        ('row', {'form': 'dense', 'dtype': 'fp16'}, torch.float16)
    """
    kind = kind_of(values.shape, mask)
    # dense values may have other shapes in the next batch: those of another task, or pictures of another size
    about = describe(form, None if form.NAME == Dense.NAME else values.shape[-1])
    return Tap(kind, about | ({"given": True} if given else {}), form.encode(values, kind, mask, keys))


@dataclass(frozen=True)
class Dense:
    """All values, as they are, in a dtype; whole numbers stay what they are.

    Args:
        dtype: ``"fp32"``, ``"bf16"`` (relative error up to 2^-8) or ``"fp16"`` (up to 2^-11, to 65,504).

    Raises:
        ValueError: an unknown dtype.
    """

    dtype: str = "fp32"
    NAME: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)

    def encode(self, values: Any, kind: Kind, mask: Tensor | None, keys: Sequence[bytes]) -> dict[str, Column]:
        """See `Form`.

        Raises:
            ValueError: a value is too large for fp16, or the teacher gives no dense values.
        """
        if isinstance(values, Sparse):
            raise ValueError(
                f"the teacher gives {type(values).__name__} and no dense values; name the form to keep them in"
            )
        flat, lengths = cut(values, kind, mask)
        return {"": Column(kind, _rounded(flat, self.dtype), lengths)}

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Any:
        """See `Form`."""
        return parts[""]


@dataclass(frozen=True)
class TopKForm:
    """The largest logits of each position, and what all others hold together: exact at these temperatures.

    Values are kept relative to the largest of their position. In fp16, probabilities above 0.1 are then off by
    2^-10 of themselves at most, smaller ones by 2^-7 (down to 1e-6, at temperature 1; less above it).

    Args:
        k: How many logits.
        temperatures: At which a term may use them; one number is that one alone.
        dtype: Of the values, as in `Dense`.

    Raises:
        ValueError: `k` is below 1, an unknown dtype, no temperature.

    Example:
        >>> form = TopKForm(2)
        >>> parts = form.encode(torch.tensor([[1.0, 5.0, 3.0, 1.0]]), "row", None, [b""])
        >>> {name: column.flat.tolist() for name, column in parts.items()}
        {'ids.0': [[1, 2]], 'values': [[0.0, -2.0]], 'rest': [[-3.3068528175354004]]}
    """

    k: int
    temperatures: tuple[float, ...] = (1.0,)
    dtype: str = "fp16"
    NAME: ClassVar[str] = "top-k"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        _check_counts(k=self.k)
        object.__setattr__(self, "temperatures", _temperatures(self.temperatures))

    def encode(self, values: Any, kind: Kind, mask: Tensor | None, keys: Sequence[bytes]) -> dict[str, Column]:
        """See `Form`.

        Raises:
            ValueError: the teacher gives a `TopK` of fewer entries or of other temperatures.
        """
        flat, lengths = cut(values, _positions(kind, self.NAME), mask)
        known = self._fitting(flat) if isinstance(flat, Sparse) else top_k(flat, self.k, self.temperatures)
        planes = pack(known.ids, known.size)
        kept = {f"ids.{i}": plane for i, plane in enumerate(planes)}
        kept |= {"values": known.values.to(DTYPES[self.dtype]), "rest": known.log_rest.float()}
        return {name: Column(kind, tensor, lengths) for name, tensor in kept.items()}

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Any:
        """See `Form`; values stay in the dtype in which they are kept."""
        return TopK(_ids(parts, "ids"), size, self.temperatures, parts["values"], parts["rest"])

    def _fitting(self, given: Sparse) -> TopK:
        """What a teacher gives that knows no more than its largest logits."""
        columns = [given.column(t) for t in self.temperatures]
        if not isinstance(given, TopK) or given.ids.shape[-1] < min(self.k, given.size):
            raise ValueError(
                f"the teacher gives {type(given).__name__} of {given.ids.shape[-1]} entries, and {self.k} of the "
                "largest are to be kept; lower k, or ask the teacher for more"
            )
        values, order = given.values.float().sort(dim=-1, descending=True)
        largest = values[..., 0].nan_to_num(neginf=0.0)
        values = values - largest.unsqueeze(-1)
        rest = [
            given.log_rest[..., c].float() - largest / t for c, t in zip(columns, self.temperatures, strict=True)
        ]
        if values.shape[-1] > self.k:
            dropped = [torch.logsumexp(values[..., self.k :] / t, dim=-1) for t in self.temperatures]
            rest = [torch.logaddexp(a, b) for a, b in zip(rest, dropped, strict=True)]
        ids = given.ids.gather(-1, order)[..., : self.k]
        return TopK(ids, given.size, self.temperatures, values[..., : self.k], torch.stack(rest, dim=-1))


@dataclass(frozen=True)
class SampledForm:
    """Entries drawn at random by the teacher's distribution at the first temperature, and how often each was.

    An example's draws depend on its content and the seed alone, and not on the batch that it came in.
    What an entry weighs at another temperature is kept as the logarithm of a ratio in fp16: 2 bytes for each.

    Args:
        draws: How many times to draw.
        temperatures: At which a term may use them.
        seed: Of the draws.

    Raises:
        ValueError: `draws` is below 1, or there is no temperature.
    """

    draws: int
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0
    NAME: ClassVar[str] = "sampled"

    def __post_init__(self) -> None:
        _check_counts(draws=self.draws)
        object.__setattr__(self, "temperatures", _temperatures(self.temperatures))

    def encode(self, values: Any, kind: Kind, mask: Tensor | None, keys: Sequence[bytes]) -> dict[str, Column]:
        """See `Form`."""
        drawn = _drawn(values, kind, mask, keys, self)
        weights = drawn.sampled.weights
        counts = (weights[..., 0] * self.draws).round().long()
        present = counts > 0
        packed = pack((drawn.sampled.ids * self.draws + counts - 1)[present], drawn.sampled.size * self.draws)
        ratios = (weights[..., 1:] / weights[..., :1])[present].log()
        return drawn.columns(present, "entries", packed, ratios)

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Any:
        """See `Form`."""
        numbers = _ids(parts, "entries")
        share = (numbers % self.draws + 1).float() / self.draws
        ratios = [parts["weights"].float().exp()] if "weights" in parts else []
        weights = share.unsqueeze(-1) * torch.cat([torch.ones_like(share).unsqueeze(-1), *ratios], dim=-1)
        return _spread(parts["count"], numbers // self.draws, weights, size, self.temperatures)


@dataclass(frozen=True)
class HybridForm:
    """The largest entries with their exact probabilities, and draws from the rest; weights as logarithms in fp16.

    A weight between 1/256 and 1 is off by 2^-9 of itself at most, one of 1e-6 by 2^-8.

    Args:
        k: How many of the largest entries.
        draws: How many times to draw from the others.
        temperatures: At which a term may use them.
        seed: Of the draws, as in `SampledForm`.

    Raises:
        ValueError: `k` or `draws` is below 1, or there is no temperature.
    """

    k: int
    draws: int
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0
    NAME: ClassVar[str] = "hybrid"

    def __post_init__(self) -> None:
        _check_counts(k=self.k, draws=self.draws)
        object.__setattr__(self, "temperatures", _temperatures(self.temperatures))

    def encode(self, values: Any, kind: Kind, mask: Tensor | None, keys: Sequence[bytes]) -> dict[str, Column]:
        """See `Form`."""
        drawn = _drawn(values, kind, mask, keys, self, head=self.k)
        present = (drawn.sampled.weights > 0).any(dim=-1)
        packed = pack(drawn.sampled.ids[present], drawn.sampled.size)
        return drawn.columns(present, "ids", packed, drawn.sampled.weights[present].log())

    def decode(self, parts: Mapping[str, Tensor], size: int) -> Any:
        """See `Form`."""
        weights = parts["weights"].float().exp()
        return _spread(parts["count"], _ids(parts, "ids"), weights, size, self.temperatures)


FORMS: dict[str, Any] = {form.NAME: form for form in (Dense, TopKForm, SampledForm, HybridForm)}


@dataclass(frozen=True)
class _Draws:
    """What was drawn for the positions of a batch."""

    sampled: Sampled
    kind: Kind
    lengths: Numbers | None

    def columns(self, present: Tensor, name: str, packed: Sequence[Tensor], weights: Tensor) -> dict[str, Column]:
        """How many entries each position has, and the entries of each example in a row."""
        counts = present.sum(dim=-1)
        small = torch.uint8 if present.shape[-1] < 256 else torch.int16
        entries = _by_example(counts, self.lengths)
        parts = {"count": Column(self.kind, counts.to(small), self.lengths)}
        parts |= {f"{name}.{i}": Column("ragged", plane, entries) for i, plane in enumerate(packed)}
        if weights.shape[-1]:
            parts["weights"] = Column("ragged", weights.half(), entries)
        return parts


def _drawn(
    values: Any, kind: Kind, mask: Tensor | None, keys: Sequence[bytes], form: Any, head: int = 0
) -> _Draws:
    if isinstance(values, Sparse):
        raise ValueError(
            f"the teacher gives {type(values).__name__} and no dense values to draw from; keep them as top-k"
        )
    flat, lengths = cut(values, _positions(kind, form.NAME), mask)
    examples = flat.split(1) if lengths is None else flat.split(lengths.tolist())
    drawn = [
        sample(positions, form.draws, form.temperatures, _generator(form.seed, key), head)
        for positions, key in zip(examples, keys, strict=True)
        if len(positions)
    ]
    if not drawn:
        raise ValueError("a batch without any valid position has nothing to draw from; leave it out")
    ids, weights = (torch.cat(part) for part in zip(*((d.ids, d.weights) for d in drawn), strict=True))
    return _Draws(Sampled(ids, flat.shape[-1], form.temperatures, weights), kind, lengths)


def _generator(seed: int, key: bytes) -> torch.Generator:
    digest = hashlib.blake2b(key, digest_size=8, salt=seed.to_bytes(8, "little", signed=True)).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _by_example(counts: Tensor, lengths: Numbers | None) -> Numbers:
    """The number of entries of each example, of those of each position: (B, ...) of rows, else (N,)."""
    found = counts.cpu().numpy()
    if lengths is None:
        return np.asarray(found.reshape(len(found), -1).sum(axis=1))
    ends = np.cumsum(lengths)
    by_example: Numbers = np.diff(np.concatenate([[0], np.cumsum(found)])[np.concatenate([[0], ends])])
    return by_example


def _spread(counts: Tensor, ids: Tensor, weights: Tensor, size: int, temperatures: tuple[float, ...]) -> Sampled:
    """Entries in a row as (..., K), with the weight 0 where a position has fewer than the others."""
    most = int(counts.max()) if counts.numel() else 0
    present = torch.arange(most) < counts.to(torch.int64).unsqueeze(-1)
    spread_ids = torch.zeros(present.shape, dtype=torch.int64)
    spread_weights = torch.zeros(*present.shape, weights.shape[-1])
    spread_ids[present], spread_weights[present] = ids, weights
    return Sampled(spread_ids, size, temperatures, spread_weights)


def _ids(parts: Mapping[str, Tensor], name: str) -> Tensor:
    return unpack([parts[f"{name}.{i}"] for i in range(2) if f"{name}.{i}" in parts])


def _rounded(values: Tensor, dtype: str) -> Tensor:
    if not values.is_floating_point():
        return values
    rounded = values.to(DTYPES[dtype])
    if dtype == "fp16" and bool((rounded.isinf() & values.isfinite()).any()):
        raise ValueError(
            f"a value of {values[values.isfinite()].abs().max():.3g} is too large for fp16, which ends at 65,504; "
            "keep it in bf16 or fp32"
        )
    return rounded


def _positions(kind: Kind, name: str) -> Kind:
    if kind == "pairs":
        raise ValueError(
            f"the form {name!r} is for logits, and this tap is a map between positions; keep it dense"
        )
    return kind


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r} for kept signals; known: {', '.join(DTYPES)}")


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} is {count!r}; give a whole number of entries of at least 1")


def _temperatures(given: Any) -> tuple[float, ...]:
    """One or more, as numbers."""
    found = (given,) if isinstance(given, Real) else given
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise ValueError(f"temperatures={given!r} are not numbers; give one or more, such as (1.0, 2.0)")
    found = tuple(found)
    if not found or not all(isinstance(t, Real) and 0 < float(t) < math.inf for t in found):
        raise ValueError(f"the temperatures {list(found)} are not all positive numbers; give one or more")
    return tuple(float(t) for t in found)
