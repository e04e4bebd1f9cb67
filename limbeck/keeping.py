"""In which form a run keeps its teacher's logits, by its recipe and its terms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from limbeck.cache import Form, HybridForm, SampledForm, TopKForm, describe
from limbeck.cache.forms import DTYPES
from limbeck.cache.pack import width
from limbeck.recipe import CacheSpec
from limbeck.terms import Term

LOGITS, TEMPERATURE = "logits", "temperature"

USUAL_DRAWS = 12
"""Different entries among 50 draws of a language model, which is seldom in doubt."""

FORMS: dict[str, Callable[[CacheSpec, tuple[float, ...]], Form]] = {
    "topk": lambda cache, temperatures: TopKForm(cache.k, temperatures, cache.dtype),
    "sampled": lambda cache, temperatures: SampledForm(cache.draws, temperatures),
    "hybrid": lambda cache, temperatures: HybridForm(cache.k, cache.draws, temperatures),
}


def forms_of(cache: CacheSpec, terms: Sequence[Term]) -> dict[str, Form]:
    """The forms of taps that are not kept whole, by tap.

    Raises:
        ValueError: a term's temperature is none of which a few entries can be kept.

    Example:
        >>> kd = Term("logits", loss="forward_kl", temperature=2.0)
        >>> forms_of(CacheSpec(logits="topk", k=8), [kd])
        {'logits': TopKForm(k=8, temperatures=(2.0,), dtype='fp32')}
    """
    if cache.logits not in FORMS:
        return {}
    found = cache.temperatures or tuple(sorted({_temperature(t) for t in terms if LOGITS in t.teacher_taps}))
    return {LOGITS: FORMS[cache.logits](cache, found or (1.0,))}


def _temperature(term: Term) -> float:
    """The one temperature of a term; 1 of a loss that has none."""
    parameter = inspect.signature(term.comparison.loss).parameters.get(TEMPERATURE)
    default = 1.0 if parameter is None else parameter.default
    found = term.comparison.options.get(TEMPERATURE, default)
    if isinstance(found, (int, float)):
        return float(found)
    raise ValueError(
        f"term {term.name!r} has the temperature {found}, and a few logits are kept at fixed ones; give it a "
        "number, or keep all of them (cache.logits=dense)"
    )


def logit_bytes(cache: CacheSpec, size: int, form: Form) -> float:
    """About how many bytes a position's logits take; of draws, as of a teacher that is rarely in doubt.

    Example:
        >>> cache = CacheSpec(logits="topk", k=32, dtype="fp16")
        >>> logit_bytes(cache, 152_000, forms_of(cache, [])["logits"])
        164.0
    """
    item, temperatures = DTYPES[cache.dtype].itemsize, len(describe(form)["temperatures"])
    drawn = min(cache.draws, USUAL_DRAWS)
    return {
        "topk": float(cache.k * (width(size) + item) + 4 * temperatures),
        "sampled": float(1 + drawn * (width(size * cache.draws) + 2 * (temperatures - 1))),
        "hybrid": float(1 + (cache.k + drawn) * (width(size) + 2 * temperatures)),
    }[cache.logits]
