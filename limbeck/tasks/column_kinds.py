"""What the columns of a data frame hold, and what kind of problem its label makes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limbeck.registry import nearest
from limbeck.tasks.image_files import SUFFIXES
from limbeck.tasks.tables import read_table

if TYPE_CHECKING:
    import pandas as pd

TEXT, IMAGE, CATEGORICAL, NUMERICAL, NULL = "text", "image_path", "categorical", "numerical", "null"
KINDS = (TEXT, IMAGE, CATEGORICAL, NUMERICAL)
Problem = Literal["binary", "multiclass", "regression"]
BINARY: Problem = "binary"
MULTICLASS: Problem = "multiclass"
REGRESSION: Problem = "regression"
PROBLEMS = (BINARY, MULTICLASS, REGRESSION)
CLASSIFICATION = "classification"
"""Either of the first two, as the number of classes says."""

MOST_CATEGORIES, CATEGORY_SHARE = 20, 0.1
"""A column is categorical with fewer distinct values than this, and than this share of the rows."""

LOOKED_AT = 500
"""Cells by which image paths are told from words."""

FEWEST_WORDS, TEXT_SHARE = 3, 0.01
"""A text has as many words on average, and its distinct values are more than this share of the rows."""

MOST_CLASSES, MANY_ROWS = 1000, 1000


def as_frame(data: Any) -> pd.DataFrame:
    """A data frame of what is one, of the path of a table, of columns by name or of a list of rows.

    Columns whose names are numbers get their text for a name.

    Raises:
        ValueError: a file that is not there or cannot be read, no rows, or two columns of one name.
        TypeError: none of these.

    Example:
        >>> as_frame({"text": ["a", "b"]}).shape
        (2, 1)
    """
    import pandas as pd

    if isinstance(data, (str, Path)):
        data = read_table(Path(data))
    if isinstance(data, (Mapping, list)):
        data = pd.DataFrame(data)
    if not isinstance(data, pd.DataFrame):
        raise TypeError(f"a {type(data).__name__} is no table; pass a pandas DataFrame, or the path of a file")
    if not len(data):
        raise ValueError("the data frame has no rows; check the data")
    if not all(isinstance(name, str) for name in data.columns):
        data = data.rename(columns=str)
    if not data.columns.is_unique:
        twice = data.columns[data.columns.duplicated()][0]
        raise ValueError(f"the table has several columns {twice!r}; rename all but one")
    return data


def problem_of(labels: pd.Series, told: str | None = None) -> Problem:
    """What is to be predicted, by the values of the label column, as AutoGluon tells it.

    Two distinct values are a binary problem. Words are classes. Numbers are classes where they are whole and their
    distinct values at most a tenth of the rows (a twentieth above 1000 rows), and numbers to predict otherwise.

    Args:
        labels: The values.
        told: What is known of the problem; ``"classification"`` leaves open how many classes there are.

    Raises:
        ValueError: there is no such problem.

    Example:
        >>> import pandas as pd
        >>> [problem_of(pd.Series(values)) for values in (["a", "b", "c"], [0, 1, 1], [0.5, 1, 2])]
        ['multiclass', 'binary', 'regression']
    """
    from pandas.api import types

    for problem in PROBLEMS:
        if told == problem:
            return problem
    if told not in (None, CLASSIFICATION):
        raise ValueError(f"unknown problem_type {told!r}; {nearest(told, (*PROBLEMS, CLASSIFICATION))}")
    known = labels.dropna()
    distinct = known.nunique()
    if distinct == 2:
        return BINARY
    if told is not None or not types.is_numeric_dtype(known):
        return MULTICLASS
    share = 0.05 if len(known) > MANY_ROWS else 0.1
    whole = bool((known % 1 == 0).all())
    return MULTICLASS if whole and distinct <= min(MOST_CLASSES, share * len(known)) else REGRESSION


def column_types(
    frame: pd.DataFrame,
    label: str | None = None,
    given: Mapping[str, str] | None = None,
    allowed: Collection[str] = KINDS,
) -> dict[str, str]:
    """Say what each column but the label holds.

    The first rule that fits decides: ``"null"`` (not used) where all values are missing or equal;
    ``"image_path"`` for encoded images, and where more than half of the values name image files that are there;
    ``"categorical"`` for pandas categories, truth values, and columns with fewer than 20 distinct values that are
    also fewer than a tenth of the rows; ``"numerical"`` where all values are numbers, or texts of numbers;
    ``"text"`` for three words
    or more on average, whose distinct values are more than a hundredth of the rows; ``"categorical"`` for others.

    Args:
        frame: The table.
        label: The column that is to be predicted.
        given: What some columns hold, which then is not looked for.
        allowed: The kinds that a model can read. Categories and numbers that it cannot are read as text where it
            reads texts; other columns are not used.

    Raises:
        ValueError: `given` names a column that is not there, or a kind that is none; or a column holds lists.

    Example:
        >>> import pandas as pd
        >>> column_types(pd.DataFrame({"says": ["a fine film", "a dull old book"], "stars": [4.5, 1.0]}))
        {'says': 'text', 'stars': 'numerical'}
    """
    given = dict(given or {})
    names = [name for name in frame.columns if name != label]
    for name, kind in given.items():
        if name not in frame.columns:
            raise ValueError(f"column_types names {name!r}, no column; {nearest(name, map(str, frame.columns))}")
        if kind not in (*KINDS, NULL):
            raise ValueError(f"column {name!r} cannot be {kind!r}; {nearest(kind, (*KINDS, NULL))}")
    found = {str(name): given.get(name) or _kind_of(frame[name]) for name in names}
    return {name: _readable(kind, allowed) for name, kind in found.items()}


def _readable(kind: str, allowed: Collection[str]) -> str:
    if kind in allowed:
        return kind
    return TEXT if kind in (CATEGORICAL, NUMERICAL) and TEXT in allowed else NULL


def _kind_of(values: pd.Series) -> str:
    import pandas as pd
    from pandas.api import types

    known = values.dropna()
    if not len(known):
        return NULL
    if isinstance(known.iloc[0], bytes):
        return IMAGE
    try:
        distinct = known.nunique()
    except TypeError:  # what has no hash is no single value
        kind = type(known.iloc[0]).__name__
        raise ValueError(
            f"column {values.name!r} holds a {kind} in a cell; spread it over columns, or leave it out"
        ) from None
    if distinct == 1 and len(values) > 1 and len(known) == len(values):
        return NULL
    if not types.is_numeric_dtype(values) and _are_images(known):
        return IMAGE
    if isinstance(values.dtype, pd.CategoricalDtype) or types.is_bool_dtype(values):
        return CATEGORICAL
    if distinct < min(MOST_CATEGORIES, int(CATEGORY_SHARE * len(values))):
        return CATEGORICAL
    if _are_numbers(known):
        return NUMERICAL
    words = known.astype(str).drop_duplicates().str.split().str.len().mean()
    return TEXT if words >= FEWEST_WORDS and distinct > TEXT_SHARE * len(values) else CATEGORICAL


def _are_numbers(values: pd.Series) -> bool:
    """Whether all are numbers, or texts of them as in a file that was read without its types."""
    import pandas as pd
    from pandas.api import types

    if not (types.is_object_dtype(values) or types.is_string_dtype(values)):
        return bool(types.is_numeric_dtype(values))
    return bool(pd.to_numeric(values.astype(str), errors="coerce").notna().all())


def _are_images(values: pd.Series) -> bool:
    paths = [first_path(value) for value in values.iloc[:: max(1, len(values) // LOOKED_AT)]]
    images = [path.suffix.lower() in SUFFIXES and path.is_file() for path in paths]
    return sum(images) > len(images) / 2


def first_path(cell: Any) -> Path:
    """The first of the paths in a cell, which ``;`` separates.

    Example:
        >>> first_path("a.jpg;b.jpg").name
        'a.jpg'
    """
    return Path(str(cell).split(";")[0].strip())
