"""Data frames of mixed columns: what each column holds, and how a row becomes numbers.

Shape legend: B examples, L tokens, I image columns, S height and width, K categorical and N numerical columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from limbeck.metrics import Metric, check_metrics, get_metric
from limbeck.registry import nearest
from limbeck.tasks.column_kinds import (
    BINARY,
    CATEGORICAL,
    CLASSIFICATION,
    IMAGE,
    KINDS,
    NULL,
    NUMERICAL,
    REGRESSION,
    TEXT,
    Problem,
    column_types,
    first_path,
    problem_of,
)
from limbeck.tasks.image_files import Picture
from limbeck.tasks.pixels import Pixels
from limbeck.tasks.text import Padding, encode_texts
from limbeck.train import Examples
from limbeck.types import EXAMPLE_ID, LABELS

if TYPE_CHECKING:
    import pandas as pd

PIXEL_VALUES, CATEGORIES, NUMBERS = "pixel_values", "categories", "numbers"


@dataclass(frozen=True)
class Columns:
    """What the columns of a table hold, as found in training data; all that makes numbers of a row.

    Attributes:
        label: The column to predict.
        problem: ``"binary"``, ``"multiclass"`` or ``"regression"``.
        classes: The labels in the order of the logits; empty where a number is to be predicted.
        types: What each other column holds; see `column_types`.
        categories: The values of each categorical column. Others, and missing ones, have a place of their own.
        numbers: Mean and standard deviation of each numerical column, by which it is standardised. A missing value
            is the mean, and a second number says that it was missing.
        scale: Mean and standard deviation of a label that is a number; models predict it standardised.
    """

    label: str
    problem: Problem
    classes: tuple[Any, ...]
    types: dict[str, str]
    categories: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)
    scale: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def find(
        cls,
        frame: pd.DataFrame,
        label: str,
        problem: str | None = None,
        *,
        given: Mapping[str, str] | None = None,
        allowed: Collection[str] = KINDS,
        like: Columns | None = None,
    ) -> Columns:
        """Look at training data.

        Args:
            frame: The training data.
            label: The column to predict.
            problem: What is to be predicted, or ``"classification"``; by default `problem_of` the label.
            given: See `column_types`.
            allowed: See `column_types`.
            like: Columns of a teacher, whose order of the classes and scale of the label are taken over, so that
                the logits of both stand for the same.

        Raises:
            ValueError: no such label column, missing labels, labels that do not suit the problem or the teacher,
                an unknown problem, or no column to learn from.

        Example:
            >>> import pandas as pd
            >>> found = Columns.find(pd.DataFrame({"x": [1.0, 2.0, 4.0], "y": ["b", "a", "b"]}), "y")
            >>> found.problem, found.classes, found.types
            ('binary', ('a', 'b'), {'x': 'numerical'})
        """
        values = _label_values(frame, label)
        problem = problem_of(values, _told(problem, like))
        types = column_types(frame, label, given, allowed)
        if not any(kind in KINDS for kind in types.values()):
            raise ValueError(f"the table has no column to learn from beside {label!r}, only {types}")
        classes: tuple[Any, ...] = ()
        scale = (0.0, 1.0)
        if like is not None and (like.problem == REGRESSION) != (problem == REGRESSION):
            raise ValueError(f"the teacher was trained for a {like.problem} problem, the student's is {problem}")
        if problem == REGRESSION:
            scale = like.scale if like is not None else _mean_and_deviation(_numbers(values, label))
        else:
            classes = like.classes if like is not None else _sorted_classes(values, problem, label)
        made = cls(
            label,
            problem,
            classes,
            types,
            {
                n: sorted(set(map(_as_category, frame[n].dropna())))
                for n, kind in types.items()
                if kind == CATEGORICAL
            },
            {n: _mean_and_deviation(_numbers(frame[n], n)) for n, kind in types.items() if kind == NUMERICAL},
            scale,
        )
        made.labels(frame)  # a class that the teacher lacks
        return made

    @property
    def outputs(self) -> int:
        """The number of logits."""
        return max(1, len(self.classes))

    def of(self, kind: str) -> list[str]:
        """The names of the columns of one kind."""
        return [name for name, own in self.types.items() if own == kind]

    def labels(self, frame: pd.DataFrame) -> list[float]:
        """Class numbers, or standardised numbers.

        Raises:
            ValueError: missing labels, a class that training did not have, or words for numbers.
        """
        values = _label_values(frame, self.label)
        if self.problem == REGRESSION:
            mean, deviation = self.scale
            return [(value - mean) / deviation for value in _numbers(values, self.label).tolist()]
        number = {value: i for i, value in enumerate(self.classes)}
        found = values.tolist()
        wrong = next((value for value in found if value not in number), None)
        if wrong is not None:
            raise ValueError(
                f"the label {wrong!r} in column {self.label!r} is none of {list(self.classes)}; correct it, or "
                "leave such rows out"
            )
        return [number[value] for value in found]

    def split(self, frame: pd.DataFrame, share: float | None = None, seed: int = 0) -> tuple[Any, Any]:
        """Set rows aside to choose a model by, of each class alike where there are enough.

        Args:
            frame: The training data.
            share: What part of it; by default AutoGluon's: 500 rows, but a tenth at least and a fifth at most, and
                from 5000 rows on 2500, but a hundredth at least and a tenth at most.
            seed: Of the choice.

        Returns:
            The rows that stay, and those set aside.

        Raises:
            ValueError: nothing would stay, or nothing would be set aside.
        """
        from sklearn.model_selection import train_test_split

        if share is not None and not 0 < share < 1:
            raise ValueError(f"a holdout is a share of the rows, above 0 and below 1, got {share}")
        rows = len(frame)
        usual = max(0.1, min(0.2, 500 / rows)) if rows < 5000 else max(0.01, min(0.1, 2500 / rows))
        count = max(1, round(rows * (usual if share is None else share)))
        if count >= rows:
            raise ValueError(f"a holdout of {count} of {rows} rows leaves none to train on; pass tuning data")
        labels = np.asarray(self.labels(frame))
        evenly = bool(self.classes) and min(np.unique(labels, return_counts=True)[1]) > 1
        evenly = evenly and min(count, rows - count) >= len(self.classes)
        kept, held = train_test_split(
            frame, test_size=count, random_state=seed, stratify=labels if evenly else None
        )
        return kept, held

    def in_units(self, predictions: Any) -> Any:
        """Predicted numbers, or labels, as the table has them."""
        return predictions * self.scale[1] + self.scale[0]

    def metric(self, name: str) -> Metric:
        """A metric by name, for logits and labels as models see them; it judges numbers in the table's units.

        Raises:
            ValueError: an unknown metric, or one for another kind of problem.
        """
        check_metrics([name], len(self.classes))
        metric = get_metric(name)
        if not metric.numbers:
            return metric
        score = metric.score
        return dataclasses.replace(metric, score=lambda p, y, w: score(self.in_units(p), self.in_units(y), w))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Columns:
        """The inverse of `to_dict`."""
        tuples = {"classes": tuple(kept["classes"]), "scale": tuple(kept["scale"])}
        return cls(**{**kept, **tuples, "numbers": {name: tuple(v) for name, v in kept["numbers"].items()}})

    def encode(
        self,
        frame: pd.DataFrame,
        tokenizer: Any = None,
        pixels: Pixels | None = None,
        max_length: int = 512,
        *,
        labelled: bool = True,
    ) -> Examples:
        """Make the examples that a `limbeck.tasks.fusion.FusionNetwork` reads.

        Args:
            frame: A table with these columns.
            tokenizer: For the text columns. Two are a pair; of more, all but the first are joined by the
                separator token.
            pixels: For the image columns.
            max_length: Tokens after which a row's texts are cut.
            labelled: Whether the label column is there; without it every label is 0.

        Returns:
            Batches with ``input_ids`` and its like (B, L), ``pixel_values`` (B, I, 3, S, S), ``categories``
            (B, 1, K), ``numbers`` (B, 1, 2N), each where such columns are there, and ``labels`` (B,).

        Raises:
            ValueError: a column is missing, or holds what is no number, no image or an unknown label.
        """
        missing = next((name for name in self.types if self.types[name] != NULL and name not in frame), None)
        if missing is not None:
            raise ValueError(f"the table has no column {missing!r}; {nearest(missing, map(str, frame.columns))}")
        labels = self.labels(frame) if labelled else [0.0] * len(frame)
        items: list[dict[str, Any]] = [{LABELS: label, EXAMPLE_ID: i} for i, label in enumerate(labels)]
        lengths = None
        if self.of(TEXT):
            texts = encode_texts(self._texts(frame, tokenizer), None, tokenizer, max_length)
            items = [{**texts.items[i], **item} for i, item in enumerate(items)]
            lengths = texts.lengths
        for key, columns in ((CATEGORIES, self._categories(frame)), (NUMBERS, self._standardised(frame))):
            if columns is not None:
                items = [{**item, key: row} for item, row in zip(items, columns, strict=True)]
        pictures = [self._pictures(frame, name) for name in self.of(IMAGE)]
        collate = Rows(getattr(tokenizer, "pad_token_id", 0), self.problem == REGRESSION, pixels, pictures)
        return Examples(items, collate, lengths)

    def _texts(self, frame: pd.DataFrame, tokenizer: Any) -> list[tuple[str, ...]]:
        columns = [frame[name].map(_as_text, na_action=None).tolist() for name in self.of(TEXT)]
        between = f" {tokenizer.sep_token or ''} "
        rows = list(zip(*columns, strict=True))
        return [(row[0], between.join(row[1:])) for row in rows] if len(columns) > 1 else rows

    def _categories(self, frame: pd.DataFrame) -> Any:
        """(rows, 1, K); 0 stands for a value that training did not have."""
        columns = []
        for name in self.of(CATEGORICAL):
            number = {value: i for i, value in enumerate(self.categories[name], start=1)}
            columns.append([number.get(_as_category(value), 0) for value in frame[name]])
        return np.stack(columns, axis=1).astype(np.int64)[:, None] if columns else None

    def _standardised(self, frame: pd.DataFrame) -> Any:
        """(rows, 1, 2N): standardised, and whether they were missing."""
        columns = []
        for name in self.of(NUMERICAL):
            mean, deviation = self.numbers[name]
            values = _numbers(frame[name], name)
            gone = np.isnan(values)
            columns += [np.where(gone, 0.0, (values - mean) / deviation), gone]
        return np.stack(columns, axis=1).astype(np.float32)[:, None] if columns else None

    @staticmethod
    def _pictures(frame: pd.DataFrame, name: str) -> list[Picture | None]:
        found: list[Picture | None] = []
        for row, cell in enumerate(frame[name]):
            where = f"column {name!r}, row {row}"
            if isinstance(cell, bytes):
                found.append(Picture(where, data=cell))
            else:
                gone = not isinstance(cell, (str, Path)) or not str(cell)
                path = None if gone else first_path(cell)
                if path is not None and not path.is_file():
                    raise ValueError(
                        f"{where}: there is no file {path}; correct it, or empty the cell if it is missing"
                    )
                found.append(None if path is None else Picture(f"{where} ({path})", path))
        return found


@dataclass(frozen=True)
class Rows:
    """Collates encoded rows; pictures are decoded here, and a missing one is grey: zero after normalisation.

    Attributes:
        pad: The padding token's number.
        regression: Whether labels are numbers to predict.
        pixels: What becomes of pictures.
        pictures: Those of each image column, by row.
    """

    pad: int
    regression: bool
    pixels: Pixels | None
    pictures: Sequence[Sequence[Picture | None]]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch."""
        own = (CATEGORIES, NUMBERS)
        tokens = [{key: value for key, value in item.items() if key not in own} for item in items]
        if "input_ids" in items[0]:
            batch: dict[str, Any] = Padding(self.pad, self.regression)(tokens)
        else:
            kind = torch.float32 if self.regression else torch.int64
            batch = {LABELS: torch.tensor([item[LABELS] for item in items]).to(kind)}
            batch[EXAMPLE_ID] = torch.tensor([item[EXAMPLE_ID] for item in items])
        batch |= {key: torch.tensor(np.stack([item[key] for item in items])) for key in own if key in items[0]}
        if self.pictures:
            images = [torch.stack([self._image(column[i[EXAMPLE_ID]]) for column in self.pictures]) for i in items]
            batch[PIXEL_VALUES] = torch.stack(images)
        return batch

    def _image(self, picture: Picture | None) -> torch.Tensor:
        assert self.pixels is not None
        if picture is None:
            return torch.zeros(3, self.pixels.size, self.pixels.size)
        fitted = np.ascontiguousarray(self.pixels.fit(picture.decoded()))
        return self.pixels.normalised(torch.tensor(fitted).permute(2, 0, 1)[None])[0]


def _label_values(frame: pd.DataFrame, label: str) -> pd.Series:
    if label not in frame.columns:
        raise ValueError(f"the table has no label column {label!r}; {nearest(label, map(str, frame.columns))}")
    missing = int(frame[label].isna().sum())
    if missing:
        raise ValueError(f"the label column {label!r} has no value in {missing} of {len(frame)} rows; drop them")
    return frame[label]


def _told(problem: str | None, like: Columns | None) -> str | None:
    """What is known of the problem; the teacher says what the user leaves open."""
    if like is None or (problem == CLASSIFICATION and like.problem == REGRESSION):
        return problem
    return like.problem if problem in (None, CLASSIFICATION) else problem


def _sorted_classes(values: pd.Series, problem: str, label: str) -> tuple[Any, ...]:
    distinct = {value.item() if isinstance(value, np.generic) else value for value in values.tolist()}
    words = all(isinstance(value, str) for value in distinct)
    if not words and not all(isinstance(value, (bool, int, float)) for value in distinct):
        kinds = ", ".join(sorted({type(value).__name__ for value in distinct}))
        raise ValueError(
            f"the label column {label!r} holds {kinds}; labels are all words, or all numbers or truth values: "
            f"convert them, as by frame[{label!r}].astype(str)"
        )
    classes = sorted(distinct)
    if len(classes) < 2 or (problem == BINARY and len(classes) > 2):
        shown = ", ".join(map(repr, classes[:5]))
        wanted = "2" if problem == BINARY else "2 at least"
        raise ValueError(
            f"the label column {label!r} has {len(classes)} classes ({shown}), and a {problem} problem has "
            f"{wanted}; check the column"
        )
    return tuple(classes)


def _numbers(values: pd.Series, name: str) -> Any:
    """A column as floating-point numbers, NaN where missing."""
    import pandas as pd

    try:
        found = pd.to_numeric(values).astype(float).to_numpy(dtype=np.float64, na_value=math.nan)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"column {name!r} holds what is no number ({reason}); correct it") from None
    if np.isinf(found).any():
        row = int(np.isinf(found).argmax())
        raise ValueError(f"column {name!r} holds {found[row]} in row {row}; correct it, or empty the cell")
    return found


def _mean_and_deviation(values: Any) -> tuple[float, float]:
    """Of the numbers that are there; a deviation of 0 would divide by it, and is 1."""
    known = values[~np.isnan(values)]
    if not len(known):
        return 0.0, 1.0
    return float(known.mean()), float(known.std()) or 1.0


def _as_text(cell: Any) -> str:
    return "" if cell is None or cell != cell else str(cell)


def _as_category(cell: Any) -> str:
    """A value as text; a whole number is the same whether or not others of its column are missing."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
