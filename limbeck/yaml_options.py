"""A YAML file whose values the command line may change: each of them is an option, ``--section.key value``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from limbeck.registry import nearest

Read = Callable[[str], Any]


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
