"""The store: signals found again by what their examples hold, in memory and, with a folder, on disk."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from limbeck.atomic import SUFFIX as PARTIAL
from limbeck.atomic import write_text
from limbeck.cache.keys import first_difference
from limbeck.cache.layout import Kind
from limbeck.cache.shards import SUFFIX, Columns, Shard, digest_of, is_whole, write_shard

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 64 << 20


class Store:
    """Kept signals of one teacher.

    What was put in is first held in memory. With a folder it goes to disk in shards, when there is enough of it or
    when `flush` is called, and is read from there through a memory map. Any number of processes may put into one
    folder; each sees the others' shards after `refresh`.

    Args:
        belongs: What the signals belong to: the teacher, its tokenizer, the taps' dtype, ...
        folder: Where to keep them; None for memory alone.
        shard_bytes: How much is gathered before a shard is written.

    Raises:
        ValueError: the folder holds something else, signals of another teacher, or a damaged manifest; the message
            names both sides.

    Example:
        >>> import torch
        >>> store = Store({"teacher": "a"})
        >>> store.put([b"k" * 16], {"logits": "row"}, {"logits": [torch.ones(3)]})
        >>> store.holds(b"k" * 16, "logits"), store.get(b"k" * 16, "logits")
        (True, tensor([1., 1., 1.]))
    """

    def __init__(
        self, belongs: Mapping[str, Any], folder: Path | None = None, *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.belongs = dict(belongs)
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: dict[Path, Shard] = {}
        self._places: dict[str, dict[bytes, tuple[Shard, int]]] = {}
        self._fresh: dict[bytes, dict[str, Tensor]] = {}
        self._kinds: dict[str, Kind] = {}
        self._fresh_bytes = 0
        self._writer = f"{os.getpid():d}{secrets.token_hex(4)}"
        self._written = 0
        if folder is not None:
            _claim(folder, self.belongs)
            self.refresh()

    def __len__(self) -> int:
        """The number of examples."""
        return len(set(self._fresh).union(*self._places.values()))

    def holds(self, key: bytes, tap: str) -> bool:
        """Whether a tap of an example is there."""
        return tap in self._fresh.get(key, {}) or key in self._places.get(tap, {})

    def get(self, key: bytes, tap: str) -> Tensor:
        """A tap of an example; see `limbeck.cache.layout.cut` for its shape.

        Raises:
            KeyError: it is not there.
            ValueError: its shard is damaged.
        """
        fresh = self._fresh.get(key, {}).get(tap)
        if fresh is not None:
            return fresh
        shard, row = self._places[tap][key]
        return shard.get(tap, row)

    def kind(self, tap: str) -> Kind:
        """How the examples of a tap are kept.

        Raises:
            KeyError: nothing of it is kept.
        """
        return self._kinds[tap]

    def put(
        self, keys: Sequence[bytes], kinds: Mapping[str, Kind], values: Mapping[str, Sequence[Tensor]]
    ) -> None:
        """Keep taps of some examples.

        Args:
            keys: Of the examples.
            kinds: How the examples of each tap are kept.
            values: Each tap's examples, in the order of the keys.

        Raises:
            ValueError: a tap whose examples were kept in another way before.
            OSError: the disk is full.
        """
        for tap, kind in kinds.items():
            self._know(tap, kind)
        for place, key in enumerate(keys):
            entry = self._fresh.setdefault(key, {})
            for tap in kinds:
                if not self.holds(key, tap):
                    entry[tap] = piece = values[tap][place].detach().cpu()
                    self._fresh_bytes += piece.numel() * piece.element_size()
        if self.folder is not None and self._fresh_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Bring to disk what is in memory alone."""
        if self.folder is None:
            return
        for names in dict.fromkeys(tuple(sorted(entry)) for entry in self._fresh.values()):
            keys = [key for key, entry in self._fresh.items() if tuple(sorted(entry)) == names]
            if not names:
                continue
            kinds = {tap: self._kinds[tap] for tap in names}
            columns = Columns(kinds, {tap: [self._fresh[key][tap] for key in keys] for tap in names})
            path = write_shard(self.folder, self._writer, self._written, keys, columns)
            self._written += 1
            self._add(path)
        self._fresh, self._fresh_bytes = {}, 0

    def refresh(self) -> None:
        """See the shards that others have finished."""
        assert self.folder is not None
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path not in self.shards:
                self._add(path)

    def taps(self) -> set[str]:
        """The taps that are kept of any example."""
        return set(self._kinds)

    def nbytes(self) -> int:
        """The bytes on disk and in memory."""
        return sum(shard.nbytes() for shard in self.shards.values()) + self._fresh_bytes

    def _add(self, path: Path) -> None:
        shard = Shard.open(path)
        self.shards[path] = shard
        for tap, kind in shard.kinds.items():
            self._know(tap, kind)
            self._places.setdefault(tap, {}).update((key, (shard, row)) for row, key in enumerate(shard.keys))

    def _know(self, tap: str, kind: Kind) -> None:
        if self._kinds.setdefault(tap, kind) != kind:
            raise ValueError(
                f"tap {tap!r} was kept by {self._kinds[tap]} and comes by {kind} now; use another cache for "
                "batches with an attention mask and for those without"
            )


def _claim(folder: Path, belongs: Mapping[str, Any]) -> None:
    """Take a new folder for these signals, or check that an old one holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if manifest.is_file():
        difference = first_difference(belongs, read_manifest(folder))
        if difference:
            raise ValueError(f"{folder} holds signals of another teacher ({difference}); choose another folder")
        return
    foreign = next((p.name for p in folder.iterdir() if p.is_file() and not p.name.endswith(PARTIAL)), None)
    if foreign is not None:
        raise ValueError(f"{folder} is no cache of limbeck, it holds {foreign!r}; choose another folder")
    write_text(manifest, _manifest_text(belongs))


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

    Example:
        >>> import tempfile
        >>> import torch
        >>> place = Path(tempfile.mkdtemp())
        >>> store = Store({"teacher": "a"}, place)
        >>> store.put([b"k" * 16], {"logits": "row"}, {"logits": [torch.ones(3)]})
        >>> store.flush()
        >>> verify(place)
        []
    """
    read_manifest(folder)
    wrong = [f"{path.name} is damaged" for path in sorted(folder.glob(f"*{SUFFIX}")) if not is_whole(path)]
    wrong += [f"{path.name} was not finished" for path in sorted(folder.glob(f"*{PARTIAL}"))]
    return wrong


def prune(folder: Path) -> list[str]:
    """Delete what is damaged or was not finished, and the shards whose examples all stand in others too.

    Returns:
        The names of the files that are gone.

    Raises:
        ValueError: it is no cache.
    """
    read_manifest(folder)
    gone = [*folder.glob(f"*{PARTIAL}")]
    seen: set[tuple[bytes, str]] = set()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        shard = Shard.open(path) if is_whole(path) else None
        held = set() if shard is None else {(key, tap) for key in shard.keys for tap in shard.kinds}
        if held <= seen:
            gone.append(path)
        seen |= held
    for path in gone:
        path.unlink()
    return sorted(path.name for path in gone)


def merge(target: Path, sources: Sequence[Path]) -> int:
    """Bring the shards of other caches of the same teacher into one.

    Returns:
        The number of shards that came.

    Raises:
        ValueError: one of them is of another teacher, or damaged.
        OSError: the disk is full.
    """
    from limbeck.atomic import write_bytes

    belongs = read_manifest(sources[0])
    _claim(target, belongs)
    for source in sources:
        difference = first_difference(belongs, read_manifest(source))
        if difference:
            raise ValueError(f"{source} and {sources[0]} hold signals of different teachers ({difference})")
    came = 0
    for path in (p for source in sources for p in sorted(source.glob(f"*{SUFFIX}"))):
        if not is_whole(path):
            raise ValueError(f"{path} is damaged; limbeck cache prune removes it")
        if not (target / path.name).exists():
            write_bytes(target / path.name, path.read_bytes())
            came += 1
    return came
