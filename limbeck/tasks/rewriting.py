"""What may stand in the place of a word: its neighbours in an embedding, or what a masked language model expects.

Words are those between spaces. Signs at their ends stay where they are, and capitals are kept, so that tokenizers
of any kind may read what comes out.

Shape legend: W whole words, E dimensions of an embedding, B texts, L tokens, V entries of a vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.pretrained import load_masked_lm, load_tokenizer, most_tokens


class WordAt(NamedTuple):
    """One of the words of a text, which something else may stand for."""

    text: str
    place: int

    @property
    def core(self) -> str:
        """The word without the signs around it."""
        return split_word(self.text.split()[self.place])[1]


Candidates = Sequence[str]
"""What may stand for a word, the likeliest first, without its signs and capitals."""

CandidatesOf = Callable[[Sequence[WordAt]], list[Candidates]]
"""Gives the candidates of words, many at once."""

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
        >>> Neighbours(table, tokenizer, k=1)([WordAt("Hot!", 0)])
        [['warm']]
    """

    def __init__(self, embedding: Tensor, tokenizer: Any, k: int, pieces: bool = False) -> None:
        self.tokenizer, self.k, self.pieces = tokenizer, k, pieces
        self.rows = embedding.detach().float()
        known = whole_words(tokenizer)
        self.words, self.numbers = list(known), set(known.values())
        self.whole = nn.functional.normalize(self.rows[list(known.values())], dim=-1)

    def __call__(self, asked: Sequence[WordAt]) -> list[Candidates]:
        """The neighbours of words in their texts; none for what is no word of the vocabulary."""
        cores = [each.core for each in asked]
        near = self.of(cores)
        return [near.get(core, ()) for core in cores]

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


class MaskedWords:
    """What a masked language model expects in the place of each word, and neighbours of words of several tokens.

    Each word that is asked about and is one token is masked by itself; the rest of its text is read as it is.

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

    def __call__(self, asked: Sequence[WordAt]) -> list[Candidates]:
        """The candidates of words in their texts; none for what the model does not know."""
        found: list[Candidates] = [()] * len(asked)
        masked = {i: text for i, each in enumerate(asked) if (text := self._masked(each)) is not None}
        others = [i for i in range(len(asked)) if i not in masked]
        for i, near in zip(others, self.neighbours([asked[i] for i in others]), strict=True):
            found[i] = near
        order = sorted(masked, key=lambda i: len(masked[i]))  # texts of like length together
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            for i, best in zip(part, self._expected([masked[i] for i in part]), strict=True):
                found[i] = without(best, asked[i].core)[: self.k]
        return found

    def _masked(self, asked: WordAt) -> str | None:
        """The text with that word masked; None where it is not one token, or others are masked there."""
        words, mask = asked.text.split(), self.tokenizer.mask_token
        before, core, behind = split_word(words[asked.place])
        if mask in asked.text or not (core and self._is_one(core)):
            return None
        words[asked.place] = f"{before}{mask}{behind}"
        return " ".join(words)

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
