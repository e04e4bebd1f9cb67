"""Folders of kept signals: whose they are, and looking after them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from limbeck.atomic import SUFFIX as PARTIAL
from limbeck.atomic import create_text, write_bytes
from limbeck.cache.keys import first_difference, tensors_digest
from limbeck.cache.shards import SUFFIX, digest_of, is_whole, open_shard

FORMAT = 2
MANIFEST = "manifest.json"
WORK = "work"
"""The folder beside the signals in which a teacher is fine-tuned; it goes when that is done."""
TEACHER, START, ABOUT, ANSWERS = "teacher", "student", "about.json", "answers.safetensors"
"""What a build lays beside the signals, so that they stand for the teacher; ABOUT comes last of all."""
FIELDS = {"format", "belongs", "checksum"}
READ_AT_ONCE = 2**24


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
        count = "1 shard" if len(names) == 1 else f"{len(names)} shards"
        raise ValueError(f"{folder} has {count} and no {MANIFEST}; it was copied in part, copy it anew")
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
        raise ValueError(f"{folder} is no cache of limbeck: {_why_none(folder)}")
    damaged = ValueError(f"{path} is damaged; build the cache anew")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except ValueError:
        raise damaged from None
    if not isinstance(found, dict) or len(FIELDS & found.keys()) < 2:  # damage leaves more of them
        raise ValueError(
            f"{folder} is no cache of limbeck: its {MANIFEST} is of something else; choose another folder"
        )
    number, belongs = found.get("format"), found.get("belongs")
    if number is None or not isinstance(belongs, dict):
        raise damaged
    if number != FORMAT:
        raise ValueError(f"{folder} has the format {number}, and this limbeck reads {FORMAT}; build it anew")
    if text != _manifest_text(belongs):
        raise damaged
    return belongs


def _why_none(folder: Path) -> str:
    """What a path is that has no manifest, and how to come by a cache."""
    if folder.is_dir():
        shards = any(folder.glob(f"*{SUFFIX}"))
        empty = not any(folder.iterdir())
        cure = "it was copied in part, copy it anew" if shards else _make(folder if empty else None)
        return f"it has no {MANIFEST}; {cure}"
    if folder.exists():
        return f"it is a file; name a folder, {_make(None)}"
    return f"there is no such folder; {_make(folder)}"


def _make(folder: Path | None) -> str:
    return f"limbeck cache build RECIPE --out {folder or 'FOLDER'} makes one"


def verify(folder: Path) -> list[str]:
    """Read every byte of a cache and list what is wrong, also with what stands for its teacher.

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
    shards = sorted(folder.glob(f"*{SUFFIX}"))
    wrong = [f"{path.name} is damaged" for path in shards if not is_whole(path)]
    wrong += [f"{path.relative_to(folder).as_posix()} was not finished" for path in _unfinished(folder)]
    if (folder / TEACHER / ABOUT).is_file() and not shards:
        wrong.append("no signals are left; build it again")
    return wrong + _wrong_beside(folder)


def _unfinished(folder: Path) -> list[Path]:
    places = (folder, folder / TEACHER, folder / START)
    return [path for place in places for path in sorted(place.glob(f"*{PARTIAL}"))]


def _wrong_beside(folder: Path) -> list[str]:
    """What is damaged or missing of what stands for the teacher, by the digests that lie with it."""
    about, answers = f"{TEACHER}/{ABOUT}", f"{TEACHER}/{ANSWERS}"
    if not (folder / about).is_file():
        begun = any((folder / TEACHER).glob("*"))
        return [f"{about} is missing"] if begun else []
    try:
        found = json.loads((folder / about).read_text(encoding="utf-8"))
        expected = dict(found.get("files") or {})
    except (ValueError, TypeError, AttributeError):
        return [f"{about} is damaged"]
    wrong = {name: _wrong_file(folder / name, digest) for name, digest in expected.items()}
    if not wrong.get(answers):
        wrong[answers] = _wrong_answers(folder / answers, found.get("answers"))
    return [f"{name} is {fault}" for name, fault in sorted(wrong.items()) if fault]


def _wrong_file(path: Path, expected: Any) -> str:
    if not path.is_file():
        return "missing"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_AT_ONCE):
            digest.update(data)
    return "" if digest.hexdigest() == expected else "damaged"


def _wrong_answers(path: Path, expected: Any) -> str:
    """The same for what a teacher answered, whose digest is of the values and not of the file."""
    if not path.is_file():
        return "missing"
    try:
        return "" if tensors_digest(load(path.read_bytes())) == expected else "damaged"
    except (SafetensorError, ValueError, KeyError):
        return "damaged"


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
    gone = _unfinished(folder)
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
    return sorted(path.relative_to(folder).as_posix() for path in gone)


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
