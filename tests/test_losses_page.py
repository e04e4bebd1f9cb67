"""docs/losses.md says what the code says, of every loss."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from limbeck.losses import LOSSES
from limbeck.losses.describe import describe, shown

DOCS = Path(__file__).parent.parent / "docs"


def script():
    spec = importlib.util.spec_from_file_location("make_losses", DOCS / "make_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = script()
OWN = [found for members in MAKE.losses().values() for found in members]


def test_the_page_is_up_to_date():
    assert MAKE.PAGE.read_text() == MAKE.page(), "docs/losses.md is not what the docstrings say; run: make docs"


@pytest.mark.parametrize("found", OWN, ids=lambda found: found.name)
def test_every_loss_has_every_column(found):
    assert found.summary.endswith(".")
    assert found.formula
    assert found.reads
    assert found.returns
    assert found.paper
    assert MAKE.oracles().get(found.name), f"nothing agrees with {found.name}"


@pytest.mark.parametrize("found", OWN, ids=lambda found: found.name)
def test_every_option_is_described(found):
    for name in (*found.options, *found.asks, *found.brings):
        assert found.arguments.get(name), f"the docstring of {found.name} says nothing of {name!r}"
    assert set(found.arguments) == set(inspect.signature(LOSSES.get(found.name)).parameters)


@pytest.mark.parametrize("found", OWN, ids=lambda found: found.name)
def test_the_page_has_a_row_and_a_section(found):
    text = MAKE.PAGE.read_text()
    assert text.count(f"\n| [`{found.name}`](#{found.name}) |") == 1
    section = text.split(f"\n### {found.name}\n")[1].split("\n#")[0]
    for part in ("$$", "**Reads**", "**Options**", "**Gives**", "**Paper**", "**Agrees with**"):
        assert part in section
    for option, default in found.options.items():
        assert f"`{shown(option, default)}`" in section


def test_parts_of_a_docstring():
    def example(student, labels, *, scale=2.0, mask=None, margin):
        """Scaled difference.

        .. math:: a
            + b

        A note.

        Args:
            student: Logits (..., C).
            labels: Indices; one
                per position.
            scale: s.
            margin: m.

        Returns:
            One value.

        Reference:
            Doe et al. 2020, Title, arXiv:1.2. Others differ.
        """

    found = describe(example, "named")
    assert (found.name, found.summary, found.formula, found.notes) == (
        "named",
        "Scaled difference.",
        "a + b",
        "A note.",
    )
    assert found.arguments["labels"] == "Indices; one per position."
    assert [shown(*item) for item in found.options.items()] == ["scale=2.0", "margin"]
    assert found.asks == ("mask",)
    assert (found.reads, found.returns) == ("Logits (..., C).", "One value.")
    assert found.paper == "Doe et al. 2020, Title, arXiv:1.2"


def test_what_has_no_docstring_is_described_too():
    found = describe(lambda student, teacher, *, scale=1: student, "mine")
    assert (found.summary, found.formula, found.reads, found.paper) == ("", "", "", "")
    assert dict(found.options) == {"scale": 1}
