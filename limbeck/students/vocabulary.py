"""A tokenizer with fewer tokens, for a student with a smaller table of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FILE = "tokenizer.json"


def cut_tokenizer(tokenizer: Any, texts: Iterable[str], size: int) -> tuple[Any, list[int]]:
    """Make a tokenizer of the tokens that texts use most, and say which of the old tokens they are.

    Special and added tokens stay, and so do single characters and bytes, so that every text that could be encoded
    still can be. A text of which a token is gone is encoded by shorter ones. Tokens keep their order: the new
    token i is the old one ``ids[i]``, which is what ``shrink(model, vocabulary=ids)`` takes.

    Args:
        tokenizer: A fast tokenizer of transformers (BPE, WordPiece, Unigram or whole words).
        texts: What is counted.
        size: How many tokens there may be at most.

    Returns:
        The tokenizer, of the same class, and the ids.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: `size` is less than the tokens that have to stay.

    Example:
        >>> from limbeck.tasks.builtin import train_tokenizer
        >>> texts = ["a fine film", "a dull film", "a book"]
        >>> tokenizer = train_tokenizer(texts, vocabulary=60)
        >>> smaller, ids = cut_tokenizer(tokenizer, texts[:1], size=24)
        >>> len(tokenizer), len(smaller), len(ids)
        (28, 22, 22)
        >>> [ids[token] for token in smaller("a fine film")["input_ids"]] == tokenizer("a fine film")["input_ids"]
        True
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(f"a {type(tokenizer).__name__} is no fast tokenizer; load it by AutoTokenizer")
    data = json.loads(backend.to_str())
    tokens: dict[str, int] = tokenizer.get_vocab()
    needs = _Needs(data["model"], tokens)
    kept = {token for token in tokens if needs.has_to_stay(token)}
    kept |= {added["content"] for added in data["added_tokens"]}
    if len(kept) > size:
        raise ValueError(
            f"size={size} is less than the {len(kept)} special tokens and single characters; choose more"
        )
    names = {i: token for token, i in tokens.items()}
    counts = Counter(i for ids in tokenizer(list(texts))["input_ids"] for i in ids)
    for i, _ in counts.most_common():
        wanted = needs.of(names[i]) - kept
        if len(kept) + len(wanted) <= size:
            kept |= wanted
    ids = sorted(tokens[token] for token in kept)
    return _rebuilt(tokenizer, _renumbered(data, {old: new for new, old in enumerate(ids)}, kept)), ids


class _Needs:
    """Which tokens have to stay for others to be made."""

    def __init__(self, model: dict[str, Any], tokens: dict[str, int]) -> None:
        self.kind = model["type"]
        self.prefix = model.get("continuing_subword_prefix") or ""
        self.tokens = tokens
        self.unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            self.unknown = model["vocab"][model["unk_id"]][0]
        self.parts: dict[str, tuple[str, str]] = {}
        for left, right in model.get("merges", ()):
            self.parts.setdefault(left + right.removeprefix(self.prefix), (left, right))

    def has_to_stay(self, token: str) -> bool:
        if self.kind == "BPE":
            return token not in self.parts  # its alphabet, and special tokens
        short = len(token.removeprefix(self.prefix)) == 1
        in_bytes = token.startswith("<0x") and token.endswith(">")
        return token == self.unknown or (self.kind != "WordLevel" and (short or in_bytes))

    def of(self, token: str) -> set[str]:
        """The token and all of which it is merged."""
        found, open_ones = set(), [token]
        while open_ones:
            one = open_ones.pop()
            found.add(one)
            open_ones += [part for part in self.parts.get(one, ()) if part not in found]
        return found


def _renumbered(data: dict[str, Any], new: dict[int, int], kept: set[str]) -> dict[str, Any]:
    """A tokenizer's file with the kept tokens under their new ids."""
    model = data["model"]
    if model["type"] == "Unigram":
        unknown = model["unk_id"]
        pieces = [piece for i, piece in enumerate(model["vocab"]) if i in new]
        model |= {"vocab": pieces, "unk_id": None if unknown is None else new[unknown]}
    else:
        model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if {left, right, left + right.removeprefix(prefix)} <= kept
        ]
    for added in data["added_tokens"]:
        added["id"] = new[added["id"]]
    if data.get("padding"):
        data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
    _renumber_special(data["post_processor"], new)
    return data


def _renumber_special(processor: dict[str, Any] | None, new: dict[int, int]) -> None:
    """Change the ids of what is put around texts."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        _renumber_special(inner, new)
    for name in ("sep", "cls"):
        if name in processor:
            token, i = processor[name]
            processor[name] = [token, new[i]]
    for special in (processor.get("special_tokens") or {}).values():
        special["ids"] = [new[i] for i in special["ids"]]


def _rebuilt(tokenizer: Any, data: dict[str, Any]) -> Any:
    """A tokenizer of the same class from the file's new content."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, FILE).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return type(tokenizer).from_pretrained(folder)
