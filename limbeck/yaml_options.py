"""A YAML file whose values a command line may change: ``--set section.key=value``, or ``--section.key value``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from limbeck.registry import nearest

Read = Callable[[str], Any]


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which also refuses a key that stands twice; plain YAML keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        twice = next((k for k in keys if keys.count(k) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, by the safe loader.

    Raises:
        ValueError: no such file, or no mapping in it.
    """
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds no recipe but {type(data).__name__}; write keys such as task: and teacher:"
        )
    return data


def set_value(data: dict[str, Any], change: str) -> None:
    """Apply ``a.b=value`` to nested dictionaries; the value is read as YAML.

    Raises:
        ValueError: no equals sign, or a path through something that is no mapping.

    Example:
        >>> recipe = {"student": {}}
        >>> set_value(recipe, "student.layers=[0,3]")
        >>> recipe
        {'student': {'layers': [0, 3]}}
    """
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise ValueError(f"--set {change!r} has no value; write --set key.key=value")
    *parents, last = path.split(".")
    place = data
    for key in parents:
        if place.get(key) is None:  # of a recipe that was written out, too
            place[key] = {}
        inner = place[key]
        if not isinstance(inner, dict):
            raise ValueError(f"--set {path}: {key!r} is {inner!r} and has no keys of its own")
        place = inner
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {path}: cannot read the value {text!r}") from None


def change_values(
    config: dict[str, Any], arguments: Sequence[str], *, readers: Mapping[type, Read] | None = None
) -> dict[str, Any]:
    """Put the values of a command line into nested dictionaries, in the place of those that are there.

    A value is read as one of the kind of its default: a whole number, a decimal number, text, or a truth value,
    which may be the option alone; anything else as YAML. A mistake ends the program with one line.

    Args:
        config: What the file holds, as `limbeck.recipe.read_yaml` gives it; it is changed.
        arguments: Such as ``sys.argv[1:]``.
        readers: Other ways to read values, by the type of the default.

    Returns:
        The same dictionaries.

    Raises:
        SystemExit: an option that the file does not have, or a value of another kind.

    Example:
        >>> config = {"training": {"epochs": 1, "rate": 0.1, "resume": False}, "layers": [0, 6]}
        >>> change_values(config, ["--training.epochs", "3", "--training.resume", "--layers=[1, 2]"])
        {'training': {'epochs': 3, 'rate': 0.1, 'resume': True}, 'layers': [1, 2]}
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    places = dict(_places(config))
    for option, (section, key) in places.items():
        parser.add_argument(option, **_reader(section[key], readers or {}))
    found, strange = parser.parse_known_args(arguments)
    if strange:
        parser.error(f"the YAML file has no {strange[0]!r}; {nearest(strange[0], places)}")
    for name, value in vars(found).items():
        section, key = places[f"--{name}"]
        section[key] = value
    return config


def _places(section: dict[str, Any], path: str = "--") -> Iterator[tuple[str, tuple[dict[str, Any], str]]]:
    """Each value of nested dictionaries: its option, and where it stands."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _places(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", (section, key)


def _reader(default: Any, readers: Mapping[type, Read]) -> dict[str, Any]:
    """How argparse reads a value of the kind of a default."""
    if isinstance(default, bool):
        return {"type": truth, "nargs": "?", "const": True}
    kinds: dict[type, Read] = {int: number, float: float, str: str, **readers}
    return {"type": kinds.get(type(default), yaml.safe_load)}


def truth(text: str) -> bool:
    """A truth value: yes, true, t, y, 1, or no, false, f, n, 0, in any case.

    Raises:
        ValueError: it is none.

    Example:
        >>> truth("yes"), truth("F")
        (True, False)
    """
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if text.lower() not in words:
        raise ValueError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def number(text: str) -> int | float:
    """A whole number, or else another.

    Example:
        >>> number("2"), number("2.5")
        (2, 2.5)
    """
    return int(text) if text.lstrip("+-").isdigit() else float(text)
