"""What may stand in the place of a word: its neighbours in an embedding, or what a masked language model expects.

Words are those between spaces. Signs at their ends stay where they are, and capitals are kept, so that tokenizers
of any kind may read what comes out.

Shape legend: W whole words, E dimensions of an embedding, B texts, L tokens, V entries of a vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.pretrained import load_masked_lm, load_tokenizer, most_tokens

Candidates = list[tuple[str, ...]]
"""For each word of a text, what may stand in its place, the likeliest first."""

Source = Callable[[Sequence[str]], list[Candidates]]
"""Gives the candidates of each word, for several texts at once."""

_PARTS = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)
AT_ONCE = 1024
"""Words that are compared with all others together."""


def whole_words(tokenizer: Any) -> dict[str, int]:
    """The entries of a vocabulary that are a word of letters each, by their numbers.

    Example:
        >>> from limbeck.tasks.builtin import train_tokenizer
        >>> {"warm", "room"} <= set(whole_words(train_tokenizer(["a warm room", "a warm hall"], vocabulary=60)))
        True
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])  # which comes in any order
    texts = (tokenizer.convert_tokens_to_string([token]).strip() for token, _ in vocabulary)
    words = list(dict.fromkeys(text for text in texts if text.isalpha()))
    pieces = zip(words, _pieces(tokenizer, words), strict=True)
    return {word: ids[0] for word, ids in pieces if len(ids) == 1 and ids[0] != tokenizer.unk_token_id}


def _pieces(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """The tokens of words as they stand inside a text; some tokenizers tell that by the space in front."""
    if not words:
        return []
    found: list[list[int]] = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    return found


def split_word(word: str) -> tuple[str, str, str]:
    """A word with the signs before and behind it.

    Example:
        >>> split_word('"fine,'), split_word("--")
        (('"', 'fine', ','), ('--', '', ''))
    """
    before, core, behind = _PARTS.fullmatch(word).groups()  # type: ignore[union-attr]  # it matches anything
    return before, core, behind


def dressed(word: str, like: str) -> str:
    """A word with the signs and the capitals of another.

    Example:
        >>> dressed("great", "Fine,"), dressed("great", "FINE!"), dressed("great", "fine")
        ('Great,', 'GREAT!', 'great')
    """
    before, core, behind = split_word(like)
    if word.islower() and core.isupper() and len(core) > 1:
        word = word.upper()
    elif word.islower() and core[:1].isupper():
        word = word.capitalize()
    return f"{before}{word}{behind}"


class Neighbours:
    """The words that come nearest in an embedding, by cosine.

    Args:
        embedding: A row for each token, (V, E).
        tokenizer: What numbers them.
        k: How many neighbours a word has at most.
        pieces: Whether a word of several tokens has neighbours too, those of the mean of its tokens' rows.

    Example:
        >>> from limbeck.tasks.builtin import train_tokenizer
        >>> tokenizer = train_tokenizer(["a warm room", "a hot hall"], vocabulary=60)
        >>> table = torch.eye(len(tokenizer))
        >>> table[whole_words(tokenizer)["hot"]] = table[whole_words(tokenizer)["warm"]] + 0.1
        >>> Neighbours(table, tokenizer, k=1)(["Hot!"])
        [[('Warm!',)]]
    """

    def __init__(self, embedding: Tensor, tokenizer: Any, k: int, pieces: bool = False) -> None:
        self.tokenizer, self.k, self.pieces = tokenizer, k, pieces
        self.rows = embedding.detach().float()
        known = whole_words(tokenizer)
        self.words, self.numbers = list(known), set(known.values())
        self.whole = nn.functional.normalize(self.rows[list(known.values())], dim=-1)

    def __call__(self, texts: Sequence[str]) -> list[Candidates]:
        """The neighbours of each word of each text; none for what is no word of the vocabulary."""
        split = [text.split() for text in texts]
        near = self.of(core for words in split for word in words if (core := split_word(word)[1]))
        return [
            [tuple(dressed(other, word) for other in near.get(split_word(word)[1], ())) for word in words]
            for words in split
        ]

    def of(self, words: Iterable[str]) -> dict[str, list[str]]:
        """The neighbours of words without signs around them; those that have none are left out."""
        distinct = list(dict.fromkeys(words))
        pieces = zip(distinct, _pieces(self.tokenizer, distinct), strict=True)
        usable = [(word, ids) for word, ids in pieces if word.isalpha() and self._is_known(ids)]
        found: dict[str, list[str]] = {}
        for start in range(0, len(usable), AT_ONCE):
            part = usable[start : start + AT_ONCE]
            rows = torch.stack([self.rows[ids].mean(dim=0) for _, ids in part])
            likeness = nn.functional.normalize(rows, dim=-1) @ self.whole.T
            best = likeness.topk(min(self.k + 2, len(self.words)), dim=-1).indices.tolist()
            for (word, _), places in zip(part, best, strict=True):
                found[word] = without([self.words[place] for place in places], word)[: self.k]
        return found

    def _is_known(self, ids: Sequence[int]) -> bool:
        if len(ids) == 1:
            return ids[0] in self.numbers
        return self.pieces and bool(ids) and self.tokenizer.unk_token_id not in ids


def without(words: Iterable[str], word: str) -> list[str]:
    """Words but for one, however it is written."""
    return [other for other in words if other.casefold() != word.casefold()]


@dataclass(frozen=True)
class Gap:
    """A word of a text that is masked, to be filled in."""

    text: int
    place: int
    masked: str


class MaskedWords:
    """What a masked language model expects in the place of each word, and neighbours of words of several tokens.

    Each word that is one token is masked by itself, the rest of its text is read as it is.

    Args:
        model: A masked language model of transformers.
        tokenizer: Its tokenizer, with a token that masks.
        k: How many candidates a word has at most.
        batch: Masked texts that are read together.

    Raises:
        ValueError: a tokenizer without such a token.

    Reference:
        Jiao et al. 2020, TinyBERT, arXiv:1909.10351, algorithm 1. There the neighbours are those of GloVe; here
        they are those of the model's own embedding.
    """

    def __init__(self, model: Any, tokenizer: Any, k: int, batch: int = 64) -> None:
        if tokenizer.mask_token is None:
            raise ValueError("extra.masked_lm has no token that masks; name a masked language model, such as BERT")
        on = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = on or torch.device("cpu")
        self.model, self.tokenizer, self.k, self.batch = model.eval().to(self.device), tokenizer, k, batch
        self.known = whole_words(tokenizer)
        self.words, self.numbers = list(self.known), torch.tensor(list(self.known.values()), device=self.device)
        self.neighbours = Neighbours(model.get_input_embeddings().weight.cpu(), tokenizer, k, pieces=True)
        self.longest = min(most_tokens(model) or tokenizer.model_max_length, 512)

    @classmethod
    def load(cls, source: str, k: int) -> MaskedWords:
        """Load it from a folder or the hub.

        Raises:
            ValueError: nothing can be loaded, or no masked language model.
        """
        return cls(load_masked_lm(source), load_tokenizer(source), k)

    def __call__(self, texts: Sequence[str]) -> list[Candidates]:
        """The candidates of each word of each text; none for what the model does not know."""
        found = self.neighbours(texts)
        gaps = [gap for number, text in enumerate(texts) for gap in self._gaps(number, text)]
        gaps.sort(key=lambda gap: len(gap.masked))
        for start in range(0, len(gaps), self.batch):
            part = gaps[start : start + self.batch]
            for gap, best in zip(part, self._expected([gap.masked for gap in part]), strict=True):
                word = texts[gap.text].split()[gap.place]
                kept = without(best, split_word(word)[1])[: self.k]
                found[gap.text][gap.place] = tuple(dressed(other, word) for other in kept)
        return found

    def _gaps(self, number: int, text: str) -> list[Gap]:
        """The text once for each of its words that is one token, masked."""
        words, mask = text.split(), self.tokenizer.mask_token
        if mask in text:  # which of them would be asked for?
            return []
        found = []
        for place, word in enumerate(words):
            before, core, behind = split_word(word)
            if core and self._is_one(core):
                masked = [*words[:place], f"{before}{mask}{behind}", *words[place + 1 :]]
                found.append(Gap(number, place, " ".join(masked)))
        return found

    def _is_one(self, word: str) -> bool:
        return word in self.known or word.lower() in self.known

    @torch.no_grad()
    def _expected(self, texts: Sequence[str]) -> list[list[str]]:
        """The most probable whole words in the place of the mask; none where it was cut off."""
        batch = self.tokenizer(
            list(texts), truncation=True, max_length=self.longest, padding=True, return_tensors="pt"
        ).to(self.device)
        here = batch["input_ids"] == self.tokenizer.mask_token_id
        there, place = here.any(dim=1).tolist(), here.int().argmax(dim=1)
        logits = self._logits_at(batch, place)[:, self.numbers]
        best = logits.topk(min(self.k + 2, len(self.words)), dim=-1).indices.tolist()
        return [
            [self.words[i] for i in row] if is_there else [] for row, is_there in zip(best, there, strict=True)
        ]

    def _logits_at(self, batch: Any, place: Tensor) -> Tensor:
        """The logits (B, V) at one token of each text; the head, which is most of the work, computes no others."""
        rows = torch.arange(len(place), device=place.device)
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return self.model(**batch).logits[rows, place].float()  # type: ignore[no-any-return]
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows, place].unsqueeze(1),))
        try:
            return self.model(**batch).logits[:, 0].float()  # type: ignore[no-any-return]
        finally:
            hook.remove()
