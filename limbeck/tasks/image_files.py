"""Pictures with labels on disk: folders by class, or Parquet with the hub's image column."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from limbeck.pretrained import first_line
from limbeck.registry import nearest
from limbeck.tasks.base import TRAIN, VALIDATION, Rows, split_rows
from limbeck.tasks.pixels import Raw
from limbeck.tasks.table import EVALUATION_NAMES, class_names
from limbeck.tasks.tables import find_split

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PARQUET = ".parquet"


@dataclass(frozen=True)
class Picture:
    """An image as it is stored, decoded when it is needed.

    Attributes:
        where: What it is called in error messages.
        path: Its file; None where `data` holds it.
        data: The encoded image.
    """

    where: str
    path: Path | None = None
    data: bytes | None = None

    def encoded(self) -> bytes:
        """The bytes of the file.

        Raises:
            ValueError: there is no such file, or it cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {self.where}: {error.strerror}") from None

    @cached_property
    def content(self) -> bytes:
        """A hash, to tell equal pictures."""
        return hashlib.sha256(self.encoded()).digest()

    def size(self) -> tuple[int, int]:
        """Height and width, of which the file's head tells.

        Raises:
            ValueError: it is no image.
        """
        with self._opened() as image:
            return image.height, image.width

    def decoded(self) -> Raw:
        """The pixels (H, W, 3), red, green and blue, turned as the camera noted.

        Raises:
            ValueError: it is no image, or half of one.
        """
        with self._opened() as image:
            try:
                upright = ImageOps.exif_transpose(image)
                return np.asarray(upright.convert("RGB"))
            except Exception as error:  # Pillow's decoders raise many kinds
                raise ValueError(self._unreadable(error)) from None

    def _opened(self) -> Image.Image:
        data = self.encoded()
        try:
            return Image.open(io.BytesIO(data))
        except Exception as error:
            raise ValueError(self._unreadable(error)) from None

    def _unreadable(self, error: Exception) -> str:
        # Pillow names the buffer in memory, which nobody knows.
        reason = first_line(error).split(" <_io")[0]
        return f"{self.where} is no image that can be read ({reason}); replace it or take it out"


@dataclass(frozen=True)
class Labelled:
    """The pictures of one split with labels, before classes have numbers."""

    pictures: list[Picture]
    labels: list[Any]
    names: tuple[str, ...] | None = None


def read_images(path: Path, column: str | None, label: str | None) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """Read class folders or Parquet.

    Args:
        path: A Parquet file, a folder with one for each split, or a folder of class folders, with or without a
            folder for each split above them.
        column: The image column of a table.
        label: The label column of a table.

    Returns:
        The names of the classes, and the rows of ``"train"`` and ``"validation"``. Where the data has no
        validation split, a fifth of the distinct pictures of each class becomes one (seed 0).

    Raises:
        ValueError: nothing to read, a class without examples on one side, no such column.
    """
    splits = _read_folders(path) if _has_class_folders(path) else _read_parquet(path, column, label)
    if _has_class_folders(path) and (column or label):
        raise ValueError(f"{path} holds class folders, which have no columns; drop task.image and --label")
    for name, split in splits.items():
        if not split.pictures:
            raise ValueError(f"the {name} split of {path} is empty; check the data")
    names = _class_names(splits, str(path))
    rows = {name: Rows(split.pictures, _numbers(split, names, name, path)) for name, split in splits.items()}
    if VALIDATION not in rows:
        rows[TRAIN], rows[VALIDATION] = split_by_class(rows[TRAIN], names)
    _check_both_sides(rows, names, path)
    return names, rows


def _has_class_folders(path: Path) -> bool:
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}; --data names class folders or a Parquet file")
    return path.is_dir() and not any(path.glob(f"*{PARQUET}"))


def _read_folders(path: Path) -> dict[str, Labelled]:
    """The pictures of each split's class folders; of one split where there are no folders of splits."""
    if not (path / TRAIN).is_dir():
        return {TRAIN: _read_classes(path)}
    evaluation = next((path / name for name in EVALUATION_NAMES if (path / name).is_dir()), None)
    return {
        TRAIN: _read_classes(path / TRAIN),
        **({VALIDATION: _read_classes(evaluation)} if evaluation is not None else {}),
    }


def _read_classes(folder: Path) -> Labelled:
    """The pictures below each folder, in a fixed order, labelled with its name."""
    pictures, labels = [], []
    for own in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found = sorted(p for p in own.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not found:
            raise ValueError(
                f"the class folder {own} holds no image ({', '.join(SUFFIXES[:4])}, ...); fill or drop it"
            )
        pictures += [Picture(str(p), path=p) for p in found]
        labels += [own.name] * len(found)
    if not pictures:
        raise ValueError(f"{folder} has no class folders; put images into {folder}/CLASS/, or name a Parquet file")
    return Labelled(pictures, labels)


def _read_parquet(path: Path, column: str | None, label: str | None) -> dict[str, Labelled]:
    files = {TRAIN: [path]}
    if path.is_dir():
        found = {
            name: [p for p in find_split(path, name) if p.suffix == PARQUET] for name in (TRAIN, *EVALUATION_NAMES)
        }
        if not found[TRAIN]:
            raise ValueError(f"{path} has no {TRAIN}{PARQUET} and no class folders")
        evaluation = next((found[name] for name in EVALUATION_NAMES if found[name]), None)
        files = {TRAIN: found[TRAIN], **({VALIDATION: evaluation} if evaluation else {})}
    return {name: _joined([_read_file(p, column, label) for p in paths]) for name, paths in files.items()}


def _joined(parts: Sequence[Labelled]) -> Labelled:
    pictures = [picture for part in parts for picture in part.pictures]
    return Labelled(pictures, [label for part in parts for label in part.labels], parts[0].names)


def _read_file(path: Path, column: str | None, label: str | None) -> Labelled:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path} as parquet: {first_line(error)}") from None
    features = hub_features(table.schema.metadata)
    images = _image_column(table, features, column, path)
    labels = _label_column(table, features, label, path)
    missing = table[labels].null_count
    if missing:
        raise ValueError(f"{path}: column {labels!r} has no value in {missing} of {len(table)} rows; drop them")
    pictures = [_picture(path, i, value) for i, value in enumerate(table[images].to_pylist())]
    names = features.get(labels, {}).get("names")
    return Labelled(pictures, table[labels].to_pylist(), None if names is None else tuple(names))


def hub_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What the hub notes in a file about its columns, by name.

    Example:
        >>> hub_features({b"huggingface": b'{"info": {"features": {"x": {"_type": "Image"}}}}'})
        {'x': {'_type': 'Image'}}
    """
    noted = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = (noted.get("info") or {}).get("features") or {}
    return features


def _image_column(table: pa.Table, features: Mapping[str, Any], chosen: str | None, path: Path) -> str:
    """The column that is asked for, or the only one that holds images."""
    images = [name for name in table.column_names if _holds_images(table, features, name)]
    if chosen is not None and chosen not in table.column_names:
        raise ValueError(f"{path} has no column {chosen!r}; {nearest(chosen, table.column_names)}")
    if chosen is not None and chosen not in images:
        raise ValueError(f"{path}: column {chosen!r} holds no images (bytes and path); {nearest(chosen, images)}")
    if chosen is None and len(images) != 1:
        raise ValueError(
            f"{path} has {len(images)} image columns ({', '.join(images) or 'bytes and path'}); "
            f"name one: task.image=COLUMN, of {', '.join(table.column_names)}"
        )
    return chosen or images[0]


def _holds_images(table: pa.Table, features: Mapping[str, Any], name: str) -> bool:
    import pyarrow.types as types

    kind = table.schema.field(name).type
    parts = {kind.field(i).name for i in range(kind.num_fields)} if types.is_struct(kind) else set()
    return features.get(name, {}).get("_type") == "Image" or {"bytes", "path"} <= parts


def _label_column(table: pa.Table, features: Mapping[str, Any], chosen: str | None, path: Path) -> str:
    """The column that is asked for, or the only one with named classes, or ``label``."""
    classes = [name for name in table.column_names if features.get(name, {}).get("_type") == "ClassLabel"]
    name = chosen or (classes[0] if len(classes) == 1 else "label")
    if name not in table.column_names:
        raise ValueError(f"{path} has no label column {name!r}; {nearest(name, table.column_names)}")
    return name


def _picture(path: Path, row: int, value: Any) -> Picture:
    """One cell of an image column: the hub's mapping, or the encoded image itself."""
    cell = value if isinstance(value, Mapping) else {"bytes": value}
    data, file = cell.get("bytes"), cell.get("path")
    where = f"{path}, row {row}" + (f" ({file})" if file else "")
    if data is not None:
        return Picture(where, data=data)
    if file is None:
        raise ValueError(f"{where} has no image; drop the row")
    return Picture(where, path=path.parent / file)


def _class_names(splits: Mapping[str, Labelled], source: str) -> tuple[str, ...]:
    """The names that the file notes; else the labels themselves, in order.

    Raises:
        ValueError: labels that are no classes.
    """
    named = splits[TRAIN].names
    if named is not None:
        return named
    labels = [label for split in splits.values() for label in split.labels]
    wrong = next((label for label in labels if not isinstance(label, (int, str))), None)
    if wrong is not None:
        raise ValueError(
            f"{source} has the label {wrong!r}, which is no class; classes are whole numbers or names"
        )
    try:
        return class_names(labels)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _numbers(split: Labelled, names: tuple[str, ...], name: str, path: Path) -> list[int]:
    """The class numbers of a split's labels."""
    if split.names is not None and split.names != names:
        raise ValueError(f"the {name} split of {path} has the classes {split.names}, and the train split {names}")
    if split.names is not None:
        wrong = {label for label in split.labels if label not in range(len(names))}
        if wrong:
            raise ValueError(
                f"the {name} split of {path} has the label {min(wrong)}, outside of its {len(names)} "
                "classes; a test split without labels cannot be used"
            )
        return [int(label) for label in split.labels]
    number = {label: i for i, label in enumerate(names)}
    return [number[str(label)] for label in split.labels]


def split_by_class(rows: Rows, names: Sequence[str], share: float = 0.2, seed: int = 0) -> tuple[Rows, Rows]:
    """Split off a random share of the distinct inputs of each class, one at least.

    Raises:
        ValueError: a class with fewer than two distinct inputs.

    Example:
        >>> rows = Rows([("a",), ("b",), ("c",), ("d",)], [0, 0, 1, 1])
        >>> train, validation = split_by_class(rows, ["x", "y"])
        >>> train.labels, validation.labels
        ([0, 1], [0, 1])
    """
    kept: list[int] = []
    held: list[int] = []
    labels = np.asarray(rows.labels)
    for number, name in enumerate(names):
        members = np.flatnonzero(labels == number).tolist()
        own = Rows([(rows.inputs[i]) for i in members], members)
        parts = split_rows(own, max(share, 0.51 / max(1, len(members))), seed)
        if not all(len(part) for part in parts):
            raise ValueError(
                f"the class {name!r} has {len(members)} images, too few to set a fifth of the different "
                "ones aside; add some, or bring a validation split"
            )
        for place, part in zip((kept, held), parts, strict=True):
            place += [int(i) for i in part.labels]
    return rows.take(sorted(kept)), rows.take(sorted(held))


def _check_both_sides(rows: Mapping[str, Rows], names: Sequence[str], path: Path) -> None:
    """Refuse classes that only one split knows: nobody learns them, or nobody asks.

    Raises:
        ValueError: such a class.
    """
    seen = {name: set(split.labels) for name, split in rows.items()}
    for here, there in ((TRAIN, VALIDATION), (VALIDATION, TRAIN)):
        alone = sorted(seen[here] - seen[there])
        if alone:
            name = names[int(alone[0])]
            raise ValueError(
                f"the class {name!r} stands in the {here} split of {path} alone; add examples of it to "
                f"the {there} split, or take it out"
            )
