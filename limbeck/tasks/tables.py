"""Tables of examples: finding and reading files, choosing columns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.pretrained import first_line
from limbeck.registry import nearest

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")


def read_table(path: Path, *, suffix: str | None = None, header: int | None = 0) -> pd.DataFrame:
    r"""Read a table from Parquet, CSV, TSV, JSON lines or JSON.

    Text stays as it is: the words "NA" and "null" are words.

    Args:
        path: The file.
        suffix: The format, where the file's name does not tell it: ``".tsv"``.
        header: Of CSV and TSV, the line with the columns' names; None if there is none, and the columns are called
            ``"0"``, ``"1"``, ...

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
    suffix = suffix or path.suffix
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in (".csv", ".tsv"):
            # In chunks (low_memory), "007" would be a number in one chunk and a word in the next.
            options = {"keep_default_na": False, "na_values": [""], "low_memory": False, "header": header}
            table = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", **options)
            return table if header is not None else table.rename(columns=str)
        if suffix in (".jsonl", ".json"):
            return _read_json(path, lines=suffix == ".jsonl")
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as {suffix[1:]}: {first_line(error)}") from None
    raise ValueError(f"{path} has an unknown format; use one of {', '.join(SUFFIXES)}")


def _read_json(path: Path, lines: bool) -> pd.DataFrame:
    """A table from JSON, every value as it is written: pandas' own reader makes numbers and dates of words."""
    import pandas as pd

    text = path.read_text(encoding="utf-8")
    if lines:
        return pd.DataFrame([json.loads(line) for line in text.split("\n") if line.strip()])
    return pd.DataFrame(json.loads(text))


def find_split(folder: Path, name: str) -> list[Path]:
    """The files of a split in a folder: ``train.csv``, or all of the hub's ``train-00000-of-00002.parquet``.

    Raises:
        ValueError: shards are missing.
    """
    for suffix in SUFFIXES:
        whole = folder / f"{name}{suffix}"
        if whole.is_file():
            return [whole]
        shards = sorted(folder.glob(f"{name}-?????-of-?????{suffix}"))
        if shards:
            _check_shards(shards)
            return shards
    return []


def _check_shards(shards: Sequence[Path]) -> None:
    """Refuse a split of which a part is missing.

    Raises:
        ValueError: the message names the missing file.
    """
    names = {path.name for path in shards}
    for path in shards:
        count = re.findall(r"-of-(\d{5})", path.name)
        for number in range(int(count[-1]) if count else 0):
            wanted = re.sub(r"-\d{5}-of-", f"-{number:05d}-of-", path.name)
            if wanted not in names:
                raise ValueError(f"{path.parent} lacks {wanted}, a part of the split; fetch all {count[-1]}")


def read_tables(paths: Sequence[Path]) -> pd.DataFrame:
    """Read the files of a split, one after the other, as one table; see `read_table`.

    Raises:
        ValueError: as `read_table`, or all of them hold no row.
    """
    import pandas as pd

    table = pd.concat([read_table(path) for path in paths], ignore_index=True)
    if not len(table):
        raise ValueError(f"the file {paths[0]} is empty: it holds no rows; check the data")
    return table


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


def class_numbers(labels: Sequence[object], names: Sequence[object]) -> list[int]:
    """The number of each label among the names of the classes.

    Raises:
        ValueError: a label that is none of them.

    Example:
        >>> class_numbers(["good", "bad"], ["bad", "good"])
        [1, 0]
    """
    number = {name: i for i, name in enumerate(names)}
    wrong = next((label for label in labels if label not in number), None)
    if wrong is not None:
        raise ValueError(f"label {wrong!r} is none of the classes; {nearest(str(wrong), map(str, names))}")
    return [number[label] for label in labels]
