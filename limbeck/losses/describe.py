"""What a signature and a docstring say, in parts: for `limbeck list`, for docs/losses.md, for whoever asks.

The docstrings are Google's, with a ``.. math::`` block and the sections ``Args:`` and ``Reference:``. This is the
only place that reads them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.losses.base import SUPPLIED, traits_of

SECTION = re.compile(r"^(Args|Returns|Raises|Example|Examples|Reference|Attributes|Yields):$")
ARGUMENT = re.compile(r"^ {4}(\*{0,2}\w+): ?(.*)$")
SENTENCE = re.compile(r"(.+?(?<!\bal)\.)(?:\s|$)", re.DOTALL)
"""Up to a full stop that does not abbreviate "et al."."""


@dataclass(frozen=True)
class Description:
    """What there is to say about a loss, or about anything else that has a name and options.

    Attributes:
        name: Its name.
        family: The module that it stands in.
        summary: The first line.
        formula: The ``.. math::`` block, one line of LaTeX, or "".
        notes: What stands between the summary and ``Args:``, without the formula.
        arguments: What ``Args:`` says of each argument.
        options: The user's options with their defaults; `REQUIRED` where there is none.
        asks: What of the batch it asks for: ``labels``, ``mask``, ``example_id``.
        brings: What it learns or borrows, and whence: ``learned: linear``, ``a part of the teacher``.
        returns: The section ``Returns:``.
        reference: The section ``Reference:``.
    """

    name: str
    family: str
    summary: str
    formula: str
    notes: str
    arguments: Mapping[str, str]
    options: Mapping[str, Any]
    asks: tuple[str, ...]
    brings: Mapping[str, str]
    returns: str
    reference: str

    @property
    def reads(self) -> str:
        """What it reads of the student."""
        return self.arguments.get("student", "")

    @property
    def paper(self) -> str:
        """The first sentence of the reference."""
        found = SENTENCE.match(self.reference)
        return found[1].rstrip(".") if found else self.reference


class Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


def describe(thing: Callable[..., Any], name: str | None = None) -> Description:
    r"""Read the signature and the docstring of a function or class.

    Args:
        thing: A loss, or anything else that a registry holds.
        name: Its name there; by default its own.

    Example:
        >>> from limbeck.losses import forward_kl
        >>> found = describe(forward_kl)
        >>> found.formula, dict(found.options), found.reads
        ('T^2 \\sum_c p_c (\\log p_c - \\log q_c)', {'temperature': 1.0}, 'Logits (..., C).')
    """
    sections = _sections(thing.__doc__ or "")
    summary, _, behind = sections.pop("", "").partition("\n")
    formula, notes = _formula(behind)
    traits = traits_of(thing)
    brings = {part: f"learned: {kind}" for part, kind in traits.learns.items()}
    brings |= dict.fromkeys(traits.borrows, "a part of the teacher")
    keyword = _keyword_only(thing)
    return Description(
        name=name or thing.__name__,
        family=thing.__module__.rpartition(".")[2],
        summary=summary.strip(),
        formula=formula,
        notes=notes,
        arguments=_arguments(sections.get("Args", "")),
        options={n: default for n, default in keyword.items() if n not in SUPPLIED and n not in brings},
        asks=tuple(sorted(SUPPLIED & set(keyword))),
        brings=brings,
        returns=_one_line(sections.get("Returns", "")),
        reference=_one_line(sections.get("Reference", "")),
    )


def shown(option: str, default: Any) -> str:
    """An option as one would write it: ``temperature=1.0``, or its name alone where it has no default.

    Example:
        >>> shown("heads", "each"), shown("points", REQUIRED)
        ("heads='each'", 'points')
    """
    return option if default is REQUIRED else f"{option}={default!r}"


def _keyword_only(thing: Callable[..., Any]) -> dict[str, Any]:
    """The options that stand behind the ``*``, or, for a class without one, all that have a default."""
    parameters = inspect.signature(thing).parameters.values()
    chosen = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if not chosen and inspect.isclass(thing):
        chosen = [p for p in parameters if p.default is not p.empty]
    return {p.name: REQUIRED if p.default is p.empty else p.default for p in chosen}


def _sections(docstring: str) -> dict[str, str]:
    """The text by section; what stands before the first has the key ""."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(docstring).splitlines():
        heading = SECTION.match(line)
        if heading:
            current = heading[1]
            found[current] = []
        else:
            found[current].append(line)
    return {heading: "\n".join(lines).strip("\n") for heading, lines in found.items()}


def _formula(text: str) -> tuple[str, str]:
    """The first ``.. math::`` block in one line, and the text without it."""
    math: list[str] = []
    rest: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith(".. math::") and not math:
            inside = True
            math.append(line.removeprefix(".. math::"))
        elif inside and line.startswith("    "):
            math.append(line)
        else:
            inside = False
            rest.append(line)
    return _one_line("\n".join(math)), "\n".join(rest).strip()


def _arguments(text: str) -> dict[str, str]:
    """What is said of each argument, in one line each."""
    found: dict[str, str] = {}
    current = ""
    for line in text.splitlines():
        argument = ARGUMENT.match(line)
        if argument:
            current = argument[1]
            found[current] = argument[2]
        elif current:
            found[current] += " " + line.strip()
    return {name: _one_line(said) for name, said in found.items()}


def _one_line(text: str) -> str:
    return " ".join(text.split())
