"""Reading what OpenAI-compatible and vLLM servers answer, and refusing what cannot be right.

Shape legend: n tokens of one prompt, K known entries at each, V entries of the vocabulary, C labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.teachers.client import ReplyError

ABOVE_ZERO = 1e-4  # what rounding may make of a log-probability of 0
ABOVE_ONE = 1e-3  # and of a sum of 1
BY_ID = "token_id:"


def field(reply: Any, *path: str | int, kind: type) -> Any:
    """Follow a path into a reply.

    Raises:
        ReplyError: it leads nowhere, or to another kind of value.

    Example:
        >>> field({"choices": [{"text": "so"}]}, "choices", 0, "text", kind=str)
        'so'
    """
    name = ".".join(map(str, path))
    for step in path:
        try:
            reply = reply[step]
        except (KeyError, IndexError, TypeError):
            raise ReplyError(f"it has no {name}") from None
    if not isinstance(reply, kind):
        raise ReplyError(f"{name} is {str(reply)[:60]!r}")
    return reply


def choices(reply: Mapping[str, Any], count: int) -> list[Any]:
    """The choices of a reply, in the order of the prompts.

    Raises:
        ReplyError: there are not `count` of them, or their numbers are not 0, 1, 2, ...
    """
    if "choices" not in reply and reply.keys() & {"error", "message"}:
        raise ReplyError(f"an error in place of choices, {str(reply)[:200]}")
    found = field(reply, "choices", kind=list)
    if len(found) != count:
        raise ReplyError(f"{len(found)} choices for {count} prompts")
    by_number = {field(choice, "index", kind=int): choice for choice in found}
    if sorted(by_number) != list(range(count)):
        raise ReplyError(f"its choices have the numbers {sorted(by_number)}")
    return [by_number[number] for number in range(count)]


def log_rest(values: Tensor, size: int) -> Tensor:
    """How much probability is left beside the known entries.

    Args:
        values: Log-probabilities of the known entries (..., K), float64.
        size: V.

    Returns:
        log(1 - Σ exp(values)), (...), by ``expm1`` so that a small rest keeps its digits; minus infinity where
        nothing is left, and where K is V.

    Example:
        >>> round(log_rest(torch.tensor([0.5, 0.25], dtype=torch.float64).log(), 9).exp().item(), 6)
        0.25
        >>> log_rest(torch.tensor([0.75, 0.25], dtype=torch.float64).log(), 2).item()
        -inf
    """
    together = torch.logsumexp(values, dim=-1)
    left = torch.log(-torch.expm1(together.clamp(max=0.0)))
    return torch.full_like(left, -torch.inf) if values.shape[-1] == size else left


def prompt_entries(choice: Any, tokens: Sequence[int], k: int, size: int) -> tuple[Tensor, Tensor]:
    """The K most probable next tokens after each token of a prompt, as vLLM gives them.

    The entry at place i of ``prompt_logprobs`` is the distribution of token i given those before it, so it belongs
    to the logits at i - 1; those at the last token are of the one token that was generated.

    Args:
        choice: One choice of a reply to ``/v1/completions``.
        tokens: The prompt, n of them.
        k: K.
        size: V.

    Returns:
        Ids (n, K), and log-probabilities (n, K), float64, the most probable first. The prompt's own token, which
        the server adds where it is not among the K, stays only if it is.

    Raises:
        ReplyError: the number of entries, a token's id or a log-probability cannot be right.
    """
    rows = field(choice, "prompt_logprobs", kind=list)
    if len(rows) != len(tokens):
        raise ReplyError(f"prompt_logprobs has {len(rows)} entries for a prompt of {len(tokens)} tokens")
    places = [_by_id(row, size) for row in rows[1:]]
    for place, (entries, own) in enumerate(zip(places, tokens[1:], strict=True), start=1):
        if own not in entries:  # another beginning-of-text or another tokenizer would shift all that follows
            raise ReplyError(f"prompt_logprobs.{place} is of another token than the prompt's, {own}")
    places.append(_by_name(field(choice, "logprobs", "top_logprobs", 0, kind=dict), size))
    fewest = min(len(entries) for entries in places)
    if fewest < k:
        raise ReplyError(f"{fewest} log-probabilities at a token where {k} were asked for")
    top = [sorted(entries.items(), key=lambda entry: -entry[1])[:k] for entries in places]
    ids = torch.tensor([[entry[0] for entry in entries] for entries in top])
    values = torch.tensor([[entry[1] for entry in entries] for entries in top], dtype=torch.float64).clamp(max=0)
    most = values.exp().sum(dim=-1).max().item()
    if most > 1 + ABOVE_ONE:
        raise ReplyError(f"probabilities that sum to {most:.3f}")
    return ids, values


def _by_id(row: Any, size: int) -> dict[int, float]:
    """Log-probabilities by token, from ``{"123": {"logprob": -0.5, ...}, ...}``."""
    try:
        return _checked(((int(key), entry["logprob"]) for key, entry in row.items()), size)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ReplyError(f"a token's log-probabilities are {str(row)[:60]!r}") from None


def _by_name(row: Mapping[str, Any], size: int) -> dict[int, float]:
    """Log-probabilities by token, from ``{"token_id:123": -0.5, ...}``."""
    wrong = next((key for key in row if not key.startswith(BY_ID)), None)
    if wrong is not None:
        raise ReplyError(
            f"it names tokens by their text ({wrong!r}), which need not be unique, and not as {BY_ID}123"
        )
    try:
        return _checked(((int(key.removeprefix(BY_ID)), value) for key, value in row.items()), size)
    except (TypeError, ValueError):
        raise ReplyError(f"a token's log-probabilities are {str(row)[:60]!r}") from None


def _checked(entries: Iterable[tuple[int, Any]], size: int) -> dict[int, float]:
    found = dict(entries)
    for token, value in found.items():
        if not 0 <= token < size:
            raise ReplyError(f"token {token}, and the vocabulary has {size}")
        possible(value)
    return found


def possible(value: Any) -> float:
    """A log-probability as it came, if it can be one.

    Raises:
        ReplyError: it is NaN or positive.
        TypeError: it is no number.
    """
    if not value <= ABOVE_ZERO:
        raise ReplyError(f"a log-probability of {value}")
    return float(value)


def plain(text: str) -> str:
    """A label or an answer without case, and without what stands around it.

    Example:
        >>> plain(" **Positive.**")
        'positive'
    """
    return re.sub(r"^\W+|\W+$", "", text.casefold())


def stated(answer: str, labels: Sequence[str]) -> int | None:
    """The number of the label that the first line of an answer is; None if it is none.

    Example:
        >>> stated("Positive.", ["negative", "positive"]), stated("not positive", ["negative", "positive"])
        (1, None)
    """
    said = plain(next(iter(answer.strip().splitlines()), ""))
    return next((number for number, label in enumerate(labels) if plain(label) == said), None)


def label_scores(tokens: Sequence[Any], labels: Sequence[str], answer: int) -> list[float] | None:
    """Log-probabilities of labels, from the most probable tokens at each place of an answer.

    A token counts for the label that it begins (" Pos" for "positive"). Where what was said so far begins several
    labels, the next token decides. A label that none of the listed tokens begins gets its share of what they
    leave, but no more than the last of them.

    Args:
        tokens: ``logprobs.content`` of a chat completion.
        labels: C of them.
        answer: The number of the label that the answer is.

    Returns:
        C log-probabilities, together one; None where the tokens do not decide for that label, as when they are not
        what the answer says.

    Raises:
        ReplyError: a field is missing, or a log-probability cannot be right.
    """
    wanted = [plain(label) for label in labels]
    found: list[list[float]] = [[] for _ in wanted]
    said, known = "", 0.0
    for token in tokens:
        listed = _listed(token)
        for text, value in listed.items():
            begun = _begun(said + text, wanted)
            if len(begun) == 1:
                found[begun[0]].append(known + value)
        chosen = field(token, "token", kind=str)
        begun = _begun(said + chosen, wanted)
        if len(begun) <= 1:
            return _shared(found, listed, known) if begun == [answer] else None
        said, known = said + chosen, known + listed[chosen]
    return None


def _listed(token: Any) -> dict[str, float]:
    """The tokens that are listed at one place of an answer, and the one that was chosen there."""
    listed = field(token, "top_logprobs", kind=list)
    try:
        entries = {field(entry, "token", kind=str): possible(entry["logprob"]) for entry in [token, *listed]}
    except (KeyError, TypeError):
        raise ReplyError(f"a token's log-probabilities are {str(listed)[:60]!r}") from None
    return entries


def _begun(text: str, wanted: Sequence[str]) -> list[int]:
    """The labels that a text begins, or is."""
    start = re.sub(r"^\W+", "", text.casefold())
    return [n for n, label in enumerate(wanted) if label.startswith(start) or plain(start) == label]


def _shared(found: list[list[float]], listed: Mapping[str, float], known: float) -> list[float]:
    """Sum what was found for each label, give the others what is left, and make it one together."""
    values = torch.tensor(list(listed.values()), dtype=torch.float64)
    missing = sum(not values for values in found)
    left = log_rest(values, 0).item() - math.log(max(1, missing))
    left = known + min(left, values.min().item())
    sums = [torch.tensor(values or [left], dtype=torch.float64).logsumexp(0) for values in found]
    scores: list[float] = torch.log_softmax(torch.stack(sums), dim=0).tolist()
    return scores
