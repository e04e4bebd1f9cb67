"""Tables of examples: reading files, choosing columns, splitting what is not split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from limbeck.registry import nearest
from limbeck.tasks.base import Rows

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")


def read_table(path: Path) -> pd.DataFrame:
    r"""Read a table from Parquet, CSV, TSV, JSON lines or JSON.

    Text stays as it is: the words "NA" and "null" are words.

    Raises:
        ValueError: no such file, an unknown format, or a file that cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.csv"
        >>> _ = path.write_text("text,label\nNA,1\n")
        >>> read_table(path)["text"].tolist()
        ['NA']
    """
    import pandas as pd

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix in (".csv", ".tsv"):
            separator = "\t" if path.suffix == ".tsv" else ","
            return pd.read_csv(path, sep=separator, keep_default_na=False, na_values=[""])
        if path.suffix in (".jsonl", ".json"):
            return pd.read_json(path, lines=path.suffix == ".jsonl")
    except (ValueError, OSError, UnicodeDecodeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {path} as {path.suffix[1:]}: {first}") from None
    raise ValueError(f"{path} has an unknown format; use one of {', '.join(SUFFIXES)}")


def find_split(folder: Path, name: str) -> Path | None:
    """The file of a split in a folder, ``train.csv`` or the hub's ``train-00000-of-00001.parquet``."""
    for suffix in SUFFIXES:
        found = [folder / f"{name}{suffix}", *sorted(folder.glob(f"{name}-?????-of-?????{suffix}"))]
        for path in found:
            if path.is_file():
                return path
    return None


def column(table: pd.DataFrame, name: str, source: str) -> list[object]:
    """One column of a table without missing values.

    Raises:
        ValueError: there is no such column, or values are missing.
    """
    if name not in table.columns:
        raise ValueError(f"{source} has no column {name!r}; {nearest(name, map(str, table.columns))}")
    values = table[name]
    missing = int(values.isna().sum())
    if missing:
        raise ValueError(f"{source}: column {name!r} has no value in {missing} of {len(values)} rows; drop them")
    return list(values.tolist())


def text_rows(table: pd.DataFrame, texts: Sequence[str], source: str) -> list[tuple[str, ...]]:
    """The text columns of a table, one tuple for each row.

    Raises:
        ValueError: a column that is not there or holds no text.
    """
    columns = [column(table, name, source) for name in texts]
    for name, values in zip(texts, columns, strict=True):
        wrong = next((v for v in values if not isinstance(v, str)), None)
        if wrong is not None:
            raise ValueError(f"{source}: column {name!r} holds {wrong!r}, which is no text")
    return [tuple(str(v) for v in row) for row in zip(*columns, strict=True)]


def split_rows(rows: Rows, share: float = 0.2, seed: int = 0) -> tuple[Rows, Rows]:
    """Split into training and validation, so that equal inputs stay on one side.

    Example:
        >>> rows = Rows([("a",), ("a",), ("b",), ("c",), ("d",)], [0, 0, 1, 0, 1])
        >>> train, validation = split_rows(rows, 0.25)
        >>> len(train), len(validation), set(train.inputs) & set(validation.inputs)
        (4, 1, set())
    """
    groups: dict[object, list[int]] = {}
    for i, example in enumerate(rows.inputs):
        groups.setdefault(example, []).append(i)
    order = np.random.default_rng(seed).permutation(len(groups))
    members = list(groups.values())
    wanted = round(share * len(members))
    validation = sorted(i for g in order[:wanted] for i in members[g])
    train = sorted(i for g in order[wanted:] for i in members[g])
    return rows.take(train), rows.take(validation)
