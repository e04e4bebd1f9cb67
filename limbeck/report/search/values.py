"""How the values that a trial tried are named and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from limbeck.report.format import one_line, shorten

MOST_VALUES, LONGEST = 6, 28


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Name dotted paths by as many of their last parts as tell them apart.

    Example:
        >>> short_names(["terms.kd.weight", "terms.ce.weight", "training.epochs"])
        {'terms.kd.weight': 'kd.weight', 'terms.ce.weight': 'ce.weight', 'training.epochs': 'epochs'}
    """
    parts = {path: path.split(".") for path in paths}
    names = {}
    for path, own in parts.items():
        others = [other for key, other in parts.items() if key != path]
        length = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        names[path] = ".".join(own[-length:])
    return names


def value_text(value: Any) -> str:
    """Write a value that was tried: numbers with three digits, lists and the like as JSON.

    Example:
        >>> value_text(0.000123456), value_text([1, 3, 5]), value_text("forward_kl"), value_text(True)
        ('0.000123', '[1, 3, 5]', 'forward_kl', 'true')
    """
    if isinstance(value, float):
        return f"{value:.3g}"
    return one_line(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))


def values_in_words(values: Mapping[str, Any], most: int = MOST_VALUES) -> str:
    """Write what a trial tried on one line, the first few values.

    Args:
        values: Values by dotted path.
        most: How many are written; of the others there is the number.

    Example:
        >>> values_in_words({"student.layers": [1, 3, 5], "terms.kd.temperature": 4.21})
        'layers [1, 3, 5], temperature 4.21'
    """
    names = short_names(values)
    texts = [f"{shorten(names[path], LONGEST)} {shorten(value_text(v), LONGEST)}" for path, v in values.items()]
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")
