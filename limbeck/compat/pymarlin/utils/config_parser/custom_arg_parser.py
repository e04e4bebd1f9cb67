"""``CustomArgParser``: a YAML file whose values the command line overrides."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.recipe import read_yaml
from limbeck.registry import nearest

WORDS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


class CustomArgParser:
    """Reads ``--config_path file.yaml`` and, over it, ``--section.key value`` for the keys that the file has.

    Values are read as the file's own are: a list as ``[0,6,11]``, ``0,6,11`` or ``0-6-11``, a truth value as
    ``yes`` or by the key alone; where the file says ``null``, a number or else text. ``--params`` takes several at
    once, ``'{"--section.key": "value"}'``.

    Args:
        yaml_file_arg_key: What the option for the file is called.
        default_yamlfile: The file without that option. A folder stands for the one YAML file in it.
        log_level: Accepted, and of no effect.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "config.yaml"
        >>> _ = file.write_text("distill: {temperature: 1, student_layers: [0, 6, 11]}")
        >>> CustomArgParser(default_yamlfile=str(file)).parse(["--distill.student_layers", "0-2"])
        {'distill': {'temperature': 1, 'student_layers': [0, 2]}}
    """

    def __init__(
        self,
        yaml_file_arg_key: str = "config_path",
        default_yamlfile: str = "config.yaml",
        log_level: str = "INFO",
    ) -> None:
        self.parser = argparse.ArgumentParser(allow_abbrev=False)
        self.parser.add_argument(f"--{yaml_file_arg_key}", dest="file", default=default_yamlfile)
        self.parser.add_argument("--params", default="{}")

    def parse(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Read the file and what overrides it; a mistake ends the program with one line.

        Args:
            arguments: By default those of the command line.

        Raises:
            FileNotFoundError: there is no such file.
            SystemExit: an option that the file does not have, or a value of another kind.
        """
        known, others = self.parser.parse_known_args(arguments)
        config = read_yaml(_file_of(Path(known.file)))
        try:
            changes = [*_pairs(others), *_of_json(known.params)]
            for option, text in changes:
                _override(config, option, text)
        except ValueError as error:
            self.parser.error(str(error))
        return config


def _file_of(path: Path) -> Path:
    found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if len(found) != 1 or not found[0].is_file():
        there = f"{len(found)} YAML files" if path.is_dir() else "no file"
        raise FileNotFoundError(f"there is {there} at {path}; name one with --config_path")
    return found[0]


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options and what stands behind them, if anything does."""
    waiting: str | None = None
    for argument in arguments:
        if argument.startswith("--"):
            if waiting is not None:
                yield waiting, None
            waiting, equals, text = argument.partition("=")
            if equals:
                yield waiting, text
                waiting = None
        elif waiting is None:
            raise ValueError(f"{argument!r} belongs to no option; write --section.key value, a list as [0,6,11]")
        else:
            yield waiting, argument
            waiting = None
    if waiting is not None:
        yield waiting, None


def _of_json(text: str) -> Iterator[tuple[str, str | None]]:
    try:
        values = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--params is no JSON of options and values: {error}") from None
    for option, value in values.items():
        yield option, value if isinstance(value, str) else json.dumps(value)


def _override(config: dict[str, Any], option: str, text: str | None) -> None:
    *sections, key = option.removeprefix("--").split(".")
    place: Any = config
    for part in [*sections, key]:
        if not isinstance(place, dict) or part not in place:
            known = _paths(config)
            raise ValueError(f"the YAML file has no {option!r}; {nearest(option, known)}")
        owner, place = place, place[part]
    owner[key] = read_like(place, text, option)


def _paths(config: dict[str, Any], start: str = "--") -> list[str]:
    found = []
    for key, value in config.items():
        found += _paths(value, f"{start}{key}.") if isinstance(value, dict) else [f"{start}{key}"]
    return found


def read_like(default: Any, text: str | None, option: str) -> Any:
    """Read a text as a value of the kind of a default.

    Args:
        default: What the file says.
        text: What the command line says; None for nothing, which is yes.
        option: Named in an error message.

    Raises:
        ValueError: it is of another kind.

    Example:
        >>> read_like([0], "0-6-11", "--layers"), read_like(1, "2.5", "--temperature")
        ([0, 6, 11], 2.5)
    """
    if isinstance(default, bool):
        if text is not None and text.lower() not in WORDS:
            raise ValueError(f"{option} is true or false, got {text!r}")
        return True if text is None else WORDS[text.lower()]
    if text is None:
        raise ValueError(f"{option} has no value; write {option} value")
    if isinstance(default, dict):
        raise ValueError(
            f"{option} has keys of its own; override one of them, {option}.{next(iter(default), 'key')}"
        )
    if isinstance(default, list):
        return [read_like(default[0] if default else None, part, option) for part in as_list(text)]
    if isinstance(default, str):
        return text
    number = _number(text)
    if number is None and default is not None:
        raise ValueError(f"{option} is a number, got {text!r}")
    if number is None:
        return None if text == "null" else text
    return float(number) if isinstance(default, float) else number


def as_list(text: str) -> list[str]:
    """The parts of a list that is written as ``[0, 6, 11]``, ``0,6,11`` or ``0-6-11``; nothing is evaluated.

    Example:
        >>> as_list("[logits-attentions]"), as_list("[-1, -2]"), as_list("-1")
        (['logits', 'attentions'], ['-1', '-2'], ['-1'])
    """
    body = text.strip().removeprefix("[").removesuffix("]").strip()
    parts = [body] if _number(body) is not None else body.split("," if "," in body else "-")
    return [part.strip().strip("'\"") for part in parts] if body else []


def _number(text: str) -> int | float | None:
    kinds: tuple[Callable[[str], int | float], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return None
