"""More examples for the student, labelled by the teacher alone: unlabelled texts, altered copies of the others.

What comes out is a function of the data, of what a recipe says, and of its seed; the examples have no label.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from limbeck.registry import check_options
from limbeck.strict import Strict, Texts
from limbeck.tasks.base import TRAIN, Rows, Task, TaskOptions, is_regression, reads_texts
from limbeck.tasks.copies import BY_CANDIDATES, MASK, Copies, Count, Example, Kept
from limbeck.tasks.glue import GLUE
from limbeck.tasks.noise import AUGMENTATIONS
from limbeck.tasks.rewriting import CandidatesOf
from limbeck.tasks.tables import SUFFIXES, read_table, text_rows
from limbeck.types import IGNORE_INDEX

UNLABELLED = "unlabelled"
REPLACE, MASKED_LM, CANDIDATES = "replace", "masked_lm", "candidates"
TEXT = ".txt"
FEW = 32


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
        """Check names and options by altering a few words."""
        for name, options in self.augment.items():
            function = AUGMENTATIONS.get(name)
            given = {CANDIDATES: [["other"]] * FEW} if name in BY_CANDIDATES else {}
            try:
                check_options(function, options, given, f"augment: {name}")
                " ".join(function(["word"] * FEW, np.random.default_rng(0), **given, **options))
            except (TypeError, ValueError) as error:
                where = "" if str(error).startswith("augment") else f"augment: {name}: "
                raise ValueError(f"{where}{error}") from None
        return self

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
            digest.update(path.suffix.encode() + hashlib.sha256(path.read_bytes()).digest())
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
    tell: Count = lambda done, total: None,
) -> Extra:
    """Read the unlabelled texts and alter the training examples.

    Left out is what the training data have already, and what the evaluation data have, written alike but for case,
    spaces and signs: the teacher's answers on those would make the scores dishonest.

    Args:
        spec: What is wanted.
        task: The task with its data.
        options: Its options, which may name the text columns.
        candidates: For the augmentations that draw from such, what gives the candidates of words.
        mask: The token that masks a word, for ``augment: mask``.
        tell: Called now and then with how many copies are done, of how many.

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
    kept = Kept(task)
    found = [row for row in read_unlabelled(spec, width, options) if kept.takes(row)]
    if spec.examples is not None and len(found) > spec.examples:
        chosen = np.random.default_rng(spec.seed).permutation(len(found))[: spec.examples]
        found = [found[i] for i in sorted(chosen.tolist())]
    origins = {UNLABELLED: len(found)} if spec.data else {}
    if spec.augment:
        rows = task.splits[TRAIN].inputs
        copies = Copies(_with_mask(spec, mask), spec.copies or 1, spec.seed, rows, candidates)
        made = list(copies.all(kept, tell))
        counts = Counter(name for name, _ in made)
        origins |= {name: counts[name] for name in spec.augment}
        found += [row for _, row in made]
    if not found:
        why = ", ".join(f"{count:,} {reason}" for reason, count in kept.dropped.items() if count)
        raise ValueError(f"extra leaves no example ({why or 'none were made'}); name other data, or drop it")
    return Extra(unlabelled(found, is_regression(task)), origins, kept.dropped)


def _with_mask(spec: ExtraSpec, mask: str | None) -> dict[str, dict[str, Any]]:
    """The augmentations with their options, and what masks for the one that does not say.

    Raises:
        ValueError: nothing masks.
    """
    options = dict(spec.augment)
    if MASK in options and MASK not in options[MASK]:
        if mask is None:
            raise ValueError(
                "augment: mask finds no token that masks in the teacher's tokenizer; write "
                "{mask: {mask: '[MASK]'}}"
            )
        options[MASK] = {MASK: mask, **options[MASK]}
    return options


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
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
