"""Folders of kept signals: whose they are, and looking after them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.atomic import SUFFIX as PARTIAL
from limbeck.atomic import create_text, write_bytes
from limbeck.cache.keys import first_difference
from limbeck.cache.shards import SUFFIX, digest_of, is_whole, open_shard

FORMAT = 2
MANIFEST = "manifest.json"
WORK = "work"
"""The folder beside the signals in which a teacher is fine-tuned; it goes when that is done."""


def claim(folder: Path, belongs: Mapping[str, Any]) -> None:
    """Take a new folder for these signals, or check that an old one holds them.

    Raises:
        ValueError: it holds something else, or signals of another teacher.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file, and a cache is a folder; name another place")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).is_file():
        _check_new(folder)
        create_text(folder / MANIFEST, _manifest_text(belongs))
    difference = first_difference(json.loads(json.dumps(belongs)), read_manifest(folder))
    if difference:
        raise ValueError(f"{folder} holds signals of another teacher ({difference}); choose another folder")


def _check_new(folder: Path) -> None:
    """Refuse a folder with files of something else.

    Folders in it may be of what was built with it. Another process may take it at this very moment: its manifest
    and its first shards are nothing foreign.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.endswith(PARTIAL))
    if MANIFEST in names or (folder / MANIFEST).is_file():
        return
    if names and all(name.endswith(SUFFIX) for name in names):
        raise ValueError(
            f"{folder} has {len(names)} shards and no {MANIFEST}; it was copied in part, copy it anew"
        )
    if names:
        raise ValueError(f"{folder} is no cache of limbeck, it holds {names[0]!r}; choose another folder")


def _manifest_text(belongs: Mapping[str, Any]) -> str:
    content = {"format": FORMAT, "belongs": dict(belongs)}
    checksum = digest_of(json.dumps(content, sort_keys=True).encode())
    return json.dumps({**content, "checksum": checksum}, indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the signals in a folder belong to.

    Raises:
        ValueError: it is no cache, one of another format, or its manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no cache of limbeck: it has no {MANIFEST}")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        belongs: dict[str, Any] = found["belongs"]
        number = found["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; build the cache anew") from None
    if number != FORMAT:
        raise ValueError(f"{folder} has the format {number}, and this limbeck reads {FORMAT}; build it anew")
    if text != _manifest_text(belongs):
        raise ValueError(f"{path} is damaged; build the cache anew")
    return belongs


def verify(folder: Path) -> list[str]:
    """Read every byte of a cache and list what is wrong.

    Raises:
        ValueError: it is no cache at all, or its manifest is damaged.
        OSError: a file cannot be read.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp())
        >>> claim(place, {"teacher": "a"})
        >>> _ = (place / "b.safetensors").write_bytes(b"...")
        >>> verify(place)
        ['b.safetensors is damaged']
    """
    read_manifest(folder)
    wrong = [f"{path.name} is damaged" for path in sorted(folder.glob(f"*{SUFFIX}")) if not is_whole(path)]
    wrong += [f"{path.name} was not finished" for path in sorted(folder.glob(f"*{PARTIAL}"))]
    return wrong


def prune(folder: Path) -> list[str]:
    """Delete what is damaged or was not finished, and the shards whose examples all stand in others too.

    Whoever reads the folder meanwhile goes on; whoever writes into it may lose the file at hand.

    Returns:
        The names of the files that are gone.

    Raises:
        ValueError: it is no cache.
        OSError: a file cannot be read; nothing is deleted.
    """
    read_manifest(folder)
    gone = [*folder.glob(f"*{PARTIAL}")]
    seen: set[tuple[bytes, str]] = set()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        block = open_shard(path) if is_whole(path) else None
        held = set() if block is None else {(key, tap) for key in block.keys for tap in block.taps}
        if held <= seen:
            gone.append(path)
        seen |= held
    for path in gone:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # another may prune, too
    return sorted(path.name for path in gone)


def merge(target: Path, sources: Sequence[Path]) -> int:
    """Bring the shards of other caches of the same teacher into one.

    The folders in a cache, which hold what stands for its teacher, come from the first that has them.

    Returns:
        The number of shards that came.

    Raises:
        ValueError: one of them is of another teacher, or damaged.
        OSError: the disk is full.
    """
    belongs = read_manifest(sources[0])
    for source in sources:
        difference = first_difference(belongs, read_manifest(source))
        if difference:
            raise ValueError(f"{source} and {sources[0]} hold signals of different teachers ({difference})")
    claim(target, belongs)
    came = 0
    for path in (p for source in sources for p in sorted(source.glob(f"*{SUFFIX}"))):
        if not is_whole(path):
            raise ValueError(f"{path} is damaged; limbeck cache prune removes it")
        if not (target / path.name).exists():
            write_bytes(target / path.name, path.read_bytes())
            came += 1
    for folder in (p for source in sources for p in sorted(source.iterdir()) if p.is_dir() and p.name != WORK):
        if not (target / folder.name).exists():
            partial = target / f"{folder.name}{PARTIAL}"
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            partial.rename(target / folder.name)
    return came
