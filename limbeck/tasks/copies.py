"""Altered copies of texts, and what is left out since it is there already."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.tasks.base import TRAIN, Task, content
from limbeck.tasks.noise import AUGMENTATIONS, NEAREST, REPLACED, drawn, one_of
from limbeck.tasks.rewriting import Candidates, CandidatesOf, WordAt, dressed

Example = tuple[str, ...]
Count = Callable[[int, int], None]

EVALUATED, KNOWN = "in the evaluation data", "there already"
"""Why an example is left out."""

MASK = "mask"
BY_CANDIDATES = ("replace", "masked_lm")
"""Augmentations that ask what may stand in the place of a word."""

TRIES = 4
"""How often a copy is drawn that comes out like one that is there."""

AT_ONCE = 512
"""Copies that are made together, whose words are asked about together."""


class Kept:
    """What is there already, so that nothing comes twice and nothing of the evaluation data comes at all."""

    def __init__(self, task: Task) -> None:
        evaluated = (row for name, rows in task.splits.items() if name != TRAIN for row in rows.inputs)
        self.evaluated = {key for row in evaluated for key in (_key(row), _key(row[::-1]))}
        self.known = {content(row) for row in task.splits[TRAIN].inputs}
        self.dropped = {EVALUATED: 0, KNOWN: 0}

    def reason(self, row: Example) -> str | None:
        """Why a row is left out, if it is."""
        if content(row) in self.known or not all(text.strip() for text in row):
            return KNOWN
        return EVALUATED if _key(row) in self.evaluated else None

    def takes(self, row: Example) -> bool:
        """Take a row, or count why not."""
        why = self.reason(row)
        if why is not None:
            self.dropped[why] += 1
        self.known.add(content(row))
        return why is None


def _key(row: Example) -> Example:
    """What two rows have in common that are the same but for case, spaces, signs and the encoding of accents."""
    plain = (unicodedata.normalize("NFKD", text).casefold() for text in row)
    return tuple("".join(filter(str.isalnum, text)) or text.strip() for text in plain)


@dataclass(frozen=True)
class _Copy:
    """One copy that is to be made of a row, by one augmentation."""

    row: Example
    name: str
    generator: np.random.Generator


class Copies:
    """Altered copies of rows; one text of each is altered, drawn at random.

    Each copy has a generator of its own, so that it draws the same whatever else is there.

    Args:
        augment: The augmentations that copies are drawn from, with their options.
        count: Copies of each row.
        seed: Of all that is drawn.
        rows: The rows.
        candidates: For the augmentations that draw from such, what gives the candidates of words.

    Example:
        >>> copies = Copies({"delete": {"p": 0.5}}, 1, 0, [("a warm room",)], {})
        >>> copies.altered([copies.copy(0, 0)])
        [('a',)]
    """

    def __init__(
        self,
        augment: Mapping[str, Mapping[str, Any]],
        count: int,
        seed: int,
        rows: Sequence[Example],
        candidates: Mapping[str, CandidatesOf],
    ) -> None:
        self.augment, self.count, self.seed, self.rows, self.candidates = augment, count, seed, rows, candidates
        self.found: dict[tuple[str, WordAt], Candidates] = {}

    def all(self, kept: Kept, tell: Count = lambda done, total: None) -> Iterator[tuple[str, Example]]:
        """Each copy that is new, with the name of what made it.

        Args:
            kept: What is there already; the copies are added to it.
            tell: Called now and then with how many copies are done, of how many.
        """
        total = len(self.rows) * self.count
        for start in range(0, total, AT_ONCE):
            stop = min(start + AT_ONCE, total)
            self.found.clear()
            yield from self._new([self.copy(*divmod(i, self.count)) for i in range(start, stop)], kept)
            tell(stop, total)

    def copy(self, number: int, copy: int) -> _Copy:
        """What is to be done for one of the copies of a row."""
        generator = np.random.default_rng((self.seed, number, copy))
        names = list(self.augment)
        return _Copy(self.rows[number], names[int(generator.integers(len(names)))], generator)

    def _new(self, copies: list[_Copy], kept: Kept) -> Iterator[tuple[str, Example]]:
        """Those that come out new; what does not is drawn again a few times, and then counted."""
        left: list[tuple[_Copy, str]] = []
        for _ in range(TRIES):
            left = yield from self._tried(copies, kept)
            copies = [copy for copy, _ in left]
        for _, why in left:
            kept.dropped[why] += 1

    def _tried(
        self, copies: list[_Copy], kept: Kept
    ) -> Generator[tuple[str, Example], None, list[tuple[_Copy, str]]]:
        left = []
        for copy, row in zip(copies, self.altered(copies), strict=True):
            why = kept.reason(row)
            if why is not None:
                left.append((copy, why))
            elif kept.takes(row):
                yield copy.name, row
        return left

    def altered(self, copies: Sequence[_Copy]) -> list[Example]:
        """The rows of copies, altered; their words are asked about together."""
        sides = [int(copy.generator.integers(len(copy.row))) for copy in copies]
        texts = [copy.row[side] for copy, side in zip(copies, sides, strict=True)]
        places = [self._places(copy, text) for copy, text in zip(copies, texts, strict=True)]
        self._ask(copies, places)
        made = map(self._changed, copies, texts, places)
        return [
            (*copy.row[:side], text, *copy.row[side + 1 :])
            for copy, side, text in zip(copies, sides, made, strict=True)
        ]

    def _places(self, copy: _Copy, text: str) -> list[WordAt]:
        """The words of a text that are to be replaced; none by what needs no candidates."""
        if copy.name not in BY_CANDIDATES:
            return []
        share = self.augment[copy.name].get("p", REPLACED)
        return [WordAt(text, place) for place in drawn(len(text.split()), copy.generator, share)]

    def _ask(self, copies: Sequence[_Copy], places: Sequence[Sequence[WordAt]]) -> None:
        """Ask for the candidates of words that are not known yet."""
        for name in BY_CANDIDATES:
            asked = (
                word for copy, words in zip(copies, places, strict=True) if copy.name == name for word in words
            )
            new = [word for word in dict.fromkeys(asked) if (name, word) not in self.found]
            if new:
                near = self.candidates[name](new)
                self.found |= {(name, word): each for word, each in zip(new, near, strict=True)}

    def _changed(self, copy: _Copy, text: str, places: Sequence[WordAt]) -> str:
        words, options = text.split(), self.augment[copy.name]
        if copy.name not in BY_CANDIDATES:
            return " ".join(AUGMENTATIONS.get(copy.name)(words, copy.generator, **options))
        for at in places:
            near, old = self.found[copy.name, at], words[at.place]
            new = one_of(near, copy.generator, options.get("k", NEAREST), "")
            words[at.place] = dressed(new, old) if new else old
        return " ".join(words)
