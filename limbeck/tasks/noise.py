"""Noise on texts: what changes a list of tokens at random, by a generator that it is given.

A student of a large teacher may learn from texts that have no labels, so noisy ones do for data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from limbeck.registry import Registry

T = TypeVar("T")
Generator = np.random.Generator | np.random.RandomState

AUGMENTATIONS: Registry[Callable[..., Any]] = Registry("augmentation")
"""What changes the words of a text, by the names of a recipe: ``(words, generator, *, options) -> words``."""


@AUGMENTATIONS.register_as("mask")
def masking(
    tokens: Sequence[T], generator: Generator, *, p: float = 0.1, mask: T | str = "[MASK]"
) -> list[T | str]:
    """Replace each token by `mask` with the probability `p`.

    Args:
        tokens: Tokens or their numbers.
        generator: What draws.
        p: From 0 to 1.
        mask: The token that stands for a hidden one, or its number.

    Raises:
        ValueError: p is no probability.

    Example:
        >>> masking(["a", "warm", "room"], np.random.default_rng(0), p=0.5)
        ['a', '[MASK]', '[MASK]']
    """
    _check_probability(p)
    return [mask if generator.random() < p else token for token in tokens]


@AUGMENTATIONS.register_as("delete")
def deleting(tokens: Sequence[T], generator: Generator, *, p: float = 0.1) -> list[T]:
    """Leave each token out with the probability `p`.

    Args:
        tokens: Tokens or their numbers.
        generator: What draws.
        p: From 0 to 1.

    Raises:
        ValueError: p is no probability.

    Example:
        >>> deleting(list("abcdef"), np.random.default_rng(0), p=0.5)
        ['a', 'e', 'f']
    """
    _check_probability(p)
    kept = generator.binomial(1, 1 - p, len(tokens))
    return [token for token, stays in zip(tokens, kept, strict=True) if stays]


@AUGMENTATIONS.register_as("ngram")
def n_gram_sampling(
    tokens: Sequence[T],
    generator: Generator,
    *,
    lengths: Sequence[int] = (1, 2, 3, 4, 5),
    probabilities: Sequence[float] = (0.2, 0.2, 0.2, 0.2, 0.2),
) -> list[T]:
    """Keep one span of the tokens, of a random length at a random place.

    Args:
        tokens: Tokens or their numbers.
        generator: What draws.
        lengths: The lengths to choose from; a text that is shorter is kept whole.
        probabilities: How probable each of them is; they sum to 1.

    Raises:
        ValueError: not one probability for each length, or they do not sum to 1.

    Example:
        >>> n_gram_sampling(list("abcdef"), np.random.default_rng(0))
        ['b', 'c', 'd', 'e']
    """
    _check_choice(probabilities, len(lengths))
    length = int(generator.choice(list(lengths), p=list(probabilities)))
    start = int(generator.choice(max(1, len(tokens) - length + 1)))
    return list(tokens[start : start + length])


SHORT = ((0, 1, 2), (1, 0), (2, 1, 0), (2, 0, 1), (1, 2, 0))
"""How the next three tokens may come out: as they are, or in one of four other orders."""


@AUGMENTATIONS.register_as("shuffle")
def short_disorder(
    tokens: Sequence[T], generator: Generator, *, probabilities: Sequence[float] = (0.9, 0.1, 0, 0, 0)
) -> list[T]:
    """Change the order of neighbours: ``abc`` stays, or becomes ``bac``, ``cba``, ``cab`` or ``bca``.

    Args:
        tokens: Tokens or their numbers.
        generator: What draws.
        probabilities: Those of the five outcomes, in this order; they sum to 1. Of the last two tokens, any
            change is an exchange. What was changed is not changed again.

    Raises:
        ValueError: not five probabilities, or they do not sum to 1.

    Example:
        >>> short_disorder(list("abcdef"), np.random.default_rng(0), probabilities=(0.5, 0, 0, 0, 0.5))
        ['b', 'c', 'a', 'd', 'e', 'f']
    """
    _check_choice(probabilities, len(SHORT))
    out, place = list(tokens), 0
    while place < len(out) - 1:
        drawn = int(generator.choice(len(SHORT), p=list(probabilities)))
        if not drawn:
            place += 1
            continue
        order = SHORT[drawn] if place < len(out) - 2 else (1, 0)
        out[place : place + len(order)] = [out[place + i] for i in order]
        place += len(order)
    return out


@AUGMENTATIONS.register_as("long_shuffle")
def long_disorder(tokens: Sequence[T], generator: Generator, *, p: float = 0.1, length: float = 20) -> list[T]:
    """Exchange the halves of spans.

    Args:
        tokens: Tokens or their numbers.
        generator: What draws.
        p: The probability that a span begins at a place; what was changed is not changed again.
        length: Of a span, rounded up to an even number; up to 1, as a share of all tokens.

    Raises:
        ValueError: p is no probability, or length is not positive.

    Example:
        >>> long_disorder(list(range(11)), np.random.default_rng(0), p=1, length=0.4)
        [2, 3, 0, 1, 6, 7, 4, 5, 8, 9, 10]
    """
    _check_probability(p)
    if not length > 0:
        raise ValueError(f"the length of a span must be positive, got {length!r}")
    half = (int(length * len(tokens) if length <= 1 else length) + 1) // 2
    out, place = list(tokens), 0
    while half and place <= len(out) - 2 * half:
        if generator.random() < p:
            middle, end = place + half, place + 2 * half
            out[place:end] = out[middle:end] + out[place:middle]
            place = end
        else:
            place += 1
    return out


REPLACED, NEAREST = 0.4, 15
"""How probably a word is replaced, and by one of how many, where nothing else is said: as in TinyBERT."""


@AUGMENTATIONS.register_as("replace")
@AUGMENTATIONS.register_as("masked_lm")
def replacing(
    tokens: Sequence[T],
    generator: Generator,
    *,
    candidates: Sequence[Sequence[T]],
    p: float = REPLACED,
    k: int = NEAREST,
) -> list[T]:
    """Replace each token by one of its candidates with the probability `p`.

    Args:
        tokens: Tokens or their numbers.
        generator: What draws.
        candidates: What may stand for each token, the likeliest first; one without any stays.
        p: From 0 to 1.
        k: How many of the candidates are drawn from, all of them alike.

    Raises:
        ValueError: p is no probability, k is no number from 1 on, or not as many lists of candidates as tokens.

    Example:
        >>> near = [[], ["hot", "cool"], ["hall"]]
        >>> replacing(["a", "warm", "room"], np.random.default_rng(2), candidates=near, p=0.5)
        ['a', 'hot', 'room']

    Reference:
        Jiao et al. 2020, TinyBERT, arXiv:1909.10351, algorithm 1 (p 0.4, K 15).
    """
    check_count(k)
    places = drawn(len(tokens), generator, p)
    return [
        one_of(near, generator, k, token) if i in places else token
        for i, (token, near) in enumerate(zip(tokens, candidates, strict=True))
    ]


def drawn(count: int, generator: Generator, p: float) -> list[int]:
    """The places that are to be replaced, each with the probability `p`, so that only they need candidates.

    Raises:
        ValueError: p is no probability.

    Example:
        >>> drawn(6, np.random.default_rng(0), 0.5)
        [1, 2, 3]
    """
    _check_probability(p)
    return [place for place in range(count) if generator.random() < p]


def one_of(candidates: Sequence[T], generator: Generator, k: int, token: T) -> T:
    """One of the k likeliest candidates, all of them alike; the token itself where there are none.

    Example:
        >>> one_of(["hot", "cool", "dim"], np.random.default_rng(0), 2, "warm"), one_of([], None, 2, "warm")
        ('cool', 'warm')
    """
    return candidates[int(generator.choice(min(k, len(candidates))))] if candidates else token


def check_count(k: Any) -> None:
    """Refuse a number of candidates that is none.

    Raises:
        ValueError: it is no whole number from 1 on.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is the number of candidates, at least 1, got {k!r}")


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability from 0 to 1, got {p!r}")


def _check_choice(probabilities: Sequence[float], count: int) -> None:
    if len(probabilities) != count or abs(sum(probabilities) - 1) > 1e-6:
        raise ValueError(f"there must be {count} probabilities that sum to 1, got {list(probabilities)}")
