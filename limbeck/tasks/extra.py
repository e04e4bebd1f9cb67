"""More examples for the student, labelled by the teacher alone: unlabelled texts, altered copies of the others.

What comes out is a function of the data, of what a recipe says, and of its seed; the examples have no label.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from limbeck.registry import check_options
from limbeck.strict import Strict, Texts
from limbeck.tasks.base import TRAIN, Rows, Task, TaskOptions, content, is_regression, reads_texts
from limbeck.tasks.glue import GLUE
from limbeck.tasks.noise import AUGMENTATIONS
from limbeck.tasks.tables import SUFFIXES, read_table, text_rows
from limbeck.types import IGNORE_INDEX

Example = tuple[str, ...]
CandidatesOf = Callable[[Sequence[str]], list[list[tuple[str, ...]]]]

UNLABELLED = "unlabelled"
EVALUATED, KNOWN = "in the evaluation data", "there already"
"""Why an example is left out."""

REPLACE, MASKED_LM, MASK, CANDIDATES = "replace", "masked_lm", "mask", "candidates"
TEXT = ".txt"
TRIES = 4
"""How often a copy is drawn that comes out like one that is there."""


def _as_methods(value: Any) -> Any:
    """``delete``, ``[delete, {mask: {p: 0.2}}]`` or ``{mask: {p: 0.2}}`` as options by name."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    found: dict[str, Any] = {}
    for entry in entries:
        for name, options in entry.items() if isinstance(entry, Mapping) else [(entry, None)]:
            if not isinstance(name, str):
                raise ValueError("write the name of an augmentation, or {name: {option: value}}")
            if name in found:
                raise ValueError(f"{name} stands twice; name each augmentation once")
            found[name] = options or {}
    return found


class ExtraSpec(Strict):
    """The ``extra:`` part of a recipe: more examples for the student, which only the teacher labels.

    Example:
        >>> ExtraSpec(augment=["delete", {"mask": {"p": 0.2}}], copies=2).augment
        {'delete': {}, 'mask': {'p': 0.2}}
        >>> ExtraSpec(augment="delte")
        Traceback (most recent call last):
        ValueError: ExtraSpec: unknown augmentation 'delte'; did you mean 'delete'?
    """

    data: Texts = Field((), description="files or folders of unlabelled text: .txt, or tables")
    text: Texts = Field((), description="their text columns, by default those of the task's own data")
    examples: int | None = Field(None, gt=0, description="take at most so many of them, drawn at random")
    augment: Annotated[dict[str, dict[str, Any]], BeforeValidator(_as_methods)] = Field(
        default_factory=dict,
        description="mask, delete, ngram, shuffle, long_shuffle, replace, masked_lm, or several; each copy is "
        "made by one of them",
    )
    copies: int | None = Field(None, gt=0, description="altered copies of each training example, by default 1")
    seed: int = Field(0, ge=0, description="of all that is drawn here")
    masked_lm: str | None = Field(None, description="folder or hub id of the model that fills masked words in")
    compare: bool = Field(False, description="train the student without these examples too, for the report")

    @model_validator(mode="after")
    def _belong_together(self) -> ExtraSpec:
        if not self.data and not self.augment:
            raise ValueError("it names no examples; set extra.data or extra.augment")
        for name in ("text", "examples"):
            if getattr(self, name) and not self.data:
                raise ValueError(
                    f"{name} is about unlabelled data, and there are none; set extra.data, or drop it"
                )
        if self.copies is not None and not self.augment:
            raise ValueError(f"copies={self.copies} of each example are made by augment; set it, or drop copies")
        if (self.masked_lm is None) == (MASKED_LM in self.augment):
            if self.masked_lm is None:
                raise ValueError("augment: masked_lm needs a model that fills words in; set extra.masked_lm")
            raise ValueError("extra.masked_lm is for augment: masked_lm; add that, or drop the model")
        return self

    @model_validator(mode="after")
    def _can_be_done(self) -> ExtraSpec:
        """Check names and options by altering one word."""
        for name, options in self.augment.items():
            function = AUGMENTATIONS.get(name)
            given = {CANDIDATES: [()]} if self.draws_from_candidates(name) else {}
            try:
                check_options(function, options, given, f"augment: {name}")
                function(["word"], np.random.default_rng(0), **given, **options)
            except (TypeError, ValueError) as error:
                where = "" if str(error).startswith("augment") else f"augment: {name}: "
                raise ValueError(f"{where}{error}") from None
        return self

    @staticmethod
    def draws_from_candidates(name: str) -> bool:
        """Whether an augmentation asks what may stand in the place of each word."""
        return name in (REPLACE, MASKED_LM)

    def files(self) -> list[Path]:
        """The files of unlabelled text; of a folder those with a known ending, by name.

        Raises:
            ValueError: one that is not there, of an unknown format, or a folder without any.
        """
        return [file for place in self.data for file in _files(Path(place).expanduser())]

    def digest(self) -> str:
        """A hash of the files' content.

        Raises:
            ValueError: see `files`.
        """
        digest = hashlib.sha256()
        for path in self.files():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Extra:
    """The extra examples of a run.

    Attributes:
        rows: Their texts; none has a label.
        origins: How many came from where: ``"unlabelled"`` or the name of an augmentation.
        dropped: How many were left out, by the reason.
    """

    rows: Rows
    origins: dict[str, int]
    dropped: dict[str, int] = field(default_factory=dict)

    def in_words(self) -> str:
        """What they are, in one line.

        Example:
            >>> Extra(Rows([("a",)] * 3, [-100] * 3), {"delete": 3}, {"there already": 1}).in_words()
            '3 extra examples that the teacher labels (3 delete); left out: 1 there already'
        """
        parts = ", ".join(f"{count:,} {name}" for name, count in self.origins.items())
        left = ", ".join(f"{count:,} {why}" for why, count in self.dropped.items() if count)
        found = f"{len(self.rows):,} extra examples that the teacher labels ({parts})"
        return f"{found}; left out: {left}" if left else found


def check_texts(task: Task) -> int:
    """How many texts an example of a task has.

    Raises:
        ValueError: its examples are no texts.
    """
    if not reads_texts(task):
        raise ValueError(f"extra is for texts, and the examples of {task.name} are none; leave extra out")
    return len(task.splits[TRAIN].inputs[0])


def unlabelled(rows: Sequence[Example], regression: bool) -> Rows:
    """Rows that carry no label: -100 in the place of a class, NaN in that of a number.

    Example:
        >>> unlabelled([("a",)], regression=False).labels, unlabelled([("a",)], regression=True).labels
        ([-100], [nan])
    """
    return Rows(list(rows), [float("nan") if regression else IGNORE_INDEX] * len(rows))


def make_extra(
    spec: ExtraSpec,
    task: Task,
    options: TaskOptions,
    candidates: Mapping[str, CandidatesOf],
    mask: str | None = None,
) -> Extra:
    """Read the unlabelled texts and alter the training examples.

    Left out is what the training data have already, and what the evaluation data have, written alike but for case,
    spaces and signs: the teacher's answers on those would make the scores dishonest.

    Args:
        spec: What is wanted.
        task: The task with its data.
        options: Its options, which may name the text columns.
        candidates: For the augmentations that draw from such, what gives the candidates of each word.
        mask: The token that masks a word, for ``augment: mask``.

    Raises:
        ValueError: files that cannot be read, no token that masks, or nothing left.

    Example:
        >>> from limbeck.tasks import make_task
        >>> docstrings = TaskOptions(name="docstrings", train_examples=8, eval_examples=4)
        >>> made = make_extra(ExtraSpec(augment="delete"), make_task(docstrings), docstrings, {})
        >>> list(made.origins), 0 < len(made.rows) <= 8, made.rows.labels[0]
        (['delete'], True, -100)
    """
    width = check_texts(task)
    kept = _Kept(task)
    found = [row for row in read_unlabelled(spec, width, options) if kept.takes(row)]
    if spec.examples is not None and len(found) > spec.examples:
        chosen = np.random.default_rng(spec.seed).permutation(len(found))[: spec.examples]
        found = [found[i] for i in sorted(chosen.tolist())]
    origins = {UNLABELLED: len(found)} if spec.data else {}
    if spec.augment:
        made = list(_Copies(spec, task.splits[TRAIN].inputs, candidates, mask).all(kept))
        counts = Counter(name for name, _ in made)
        origins |= {name: counts[name] for name in spec.augment}
        found += [row for _, row in made]
    if not found:
        why = ", ".join(f"{count:,} {reason}" for reason, count in kept.dropped.items() if count)
        raise ValueError(f"extra leaves no example ({why or 'none were made'}); name other data, or drop it")
    return Extra(unlabelled(found, is_regression(task)), origins, kept.dropped)


class _Kept:
    """What is there already, so that nothing comes twice and nothing of the evaluation data comes at all."""

    def __init__(self, task: Task) -> None:
        evaluated = (row for name, rows in task.splits.items() if name != TRAIN for row in rows.inputs)
        self.evaluated = {key for row in evaluated for key in _keys(row)}
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


def _key(row: Example) -> tuple[str, ...]:
    """What two texts have in common that are the same but for case, spaces and signs."""
    return tuple("".join(filter(str.isalnum, text.casefold())) or text.strip() for text in row)


def _keys(row: Example) -> set[tuple[str, ...]]:
    """The same of a pair in either order."""
    return {_key(row), _key(row[::-1])}


class _Copies:
    """Altered copies of the training examples; one text of each is altered, drawn at random."""

    def __init__(
        self, spec: ExtraSpec, rows: Sequence[Example], candidates: Mapping[str, CandidatesOf], mask: str | None
    ) -> None:
        self.spec, self.rows, self.names = spec, rows, list(spec.augment)
        texts = list(dict.fromkeys(text for row in rows for text in row))
        asking = [name for name in self.names if spec.draws_from_candidates(name)]
        self.near = {name: dict(zip(texts, candidates[name](texts), strict=True)) for name in asking}
        self.options = dict(spec.augment)
        if MASK in self.options and MASK not in self.options[MASK]:
            if mask is None:
                raise ValueError(
                    "augment: mask finds no token that masks in the teacher's tokenizer; write "
                    "{mask: {mask: '[MASK]'}}"
                )
            self.options[MASK] = {MASK: mask, **self.options[MASK]}

    def all(self, kept: _Kept) -> Iterator[tuple[str, Example]]:
        """Each copy with the name of what made it; the same draws whatever else is there."""
        for number, row in enumerate(self.rows):
            for copy in range(self.spec.copies or 1):
                generator = np.random.default_rng((self.spec.seed, number, copy))
                name = self.names[int(generator.integers(len(self.names)))]
                tries = (self._altered(row, name, generator) for _ in range(TRIES))
                made = next((new for new in tries if kept.reason(new) is None), None)
                if made is None:
                    kept.dropped[KNOWN] += 1
                elif kept.takes(made):
                    yield name, made

    def _altered(self, row: Example, name: str, generator: np.random.Generator) -> Example:
        side = int(generator.integers(len(row)))
        options = self.options[name]
        if name in self.near:
            options = {**options, CANDIDATES: self.near[name][row[side]]}
        words = AUGMENTATIONS.get(name)(row[side].split(), generator, **options)
        return (*row[:side], " ".join(words), *row[side + 1 :])


def read_unlabelled(spec: ExtraSpec, width: int, options: TaskOptions) -> list[Example]:
    """The unlabelled texts, in the order of the files.

    Args:
        spec: Names files and columns.
        width: Texts of an example.
        options: The task's options, which may name the text columns.

    Raises:
        ValueError: a file that cannot be read or holds no texts, columns that are not there, or not as many texts
            as an example of the task has.
    """
    if spec.text and len(spec.text) != width:
        raise ValueError(
            f"extra.text names {len(spec.text)} columns, and an example of {options.name} has {width}; name as "
            "many"
        )
    return [row for path in spec.files() for row in _read(path, spec, width, options)]


def _files(place: Path) -> list[Path]:
    known = (TEXT, *SUFFIXES)
    if not place.is_dir():
        if not place.is_file():
            raise ValueError(f"there is no file or folder {place}; correct extra.data")
        if place.suffix not in known:
            raise ValueError(f"{place} has an unknown format; extra.data takes {', '.join(known)}")
        return [place]
    found = sorted(path for path in place.iterdir() if path.suffix in known and path.is_file())
    if not found:
        raise ValueError(f"{place} holds no file of text; extra.data takes {', '.join(known)}")
    return found


def _read(path: Path, spec: ExtraSpec, width: int, options: TaskOptions) -> list[Example]:
    found = _lines(path, width) if path.suffix == TEXT else _table(path, spec, width, options)
    if not found:
        raise ValueError(f"{path} is empty: it holds no text; check extra.data")
    return found


def _lines(path: Path, width: int) -> list[Example]:
    """One example a line, with a tab between the texts of a pair."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path} as UTF-8: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = tuple(text.strip() for text in line.split("\t")) if width > 1 else (line.strip(),)
            if len(row) != width:
                raise ValueError(
                    f"line {number} of {path} has {len(row)} texts, and an example of the task has {width}; write "
                    "a tab between them"
                )
            found.append(row)
    return found


def _table(path: Path, spec: ExtraSpec, width: int, options: TaskOptions) -> list[Example]:
    table = read_table(path)
    if not len(table):
        return []
    return text_rows(table, spec.text or _columns(table, path, width, options), str(path))


def _columns(table: Any, path: Path, width: int, options: TaskOptions) -> tuple[str, ...]:
    """The columns that the task's own data have, or else the only ones that hold text."""
    about = GLUE.get(options.name.removeprefix("glue/"))
    own = options.text or (about.texts if about else ())
    if own and set(own) <= set(table.columns):
        return tuple(own)
    texts = [str(name) for name in table.columns if table[name].map(lambda value: isinstance(value, str)).all()]
    if len(texts) != width:
        raise ValueError(
            f"{path} has the text columns {texts or 'none'} (all columns: {list(map(str, table.columns))}), and "
            f"an example of {options.name} has {width}; name them: extra.text"
        )
    return tuple(texts)
