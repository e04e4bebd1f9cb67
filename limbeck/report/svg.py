"""What makes a matplotlib picture a citizen of a web page: its colours, ids and words become the page's own."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK = "#010200"
TEACHER = "#010201"
BASELINE = "#010202"
STUDENT = "#010203"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")

# Colours that no picture shows: they stand for what the page decides, in light and dark. Behind each variable
# stands a colour that is legible on both, for an SVG without the page. Hues after Okabe and Ito.
COLOURS = {
    INK: "currentColor",
    TEACHER: "var(--teacher, #2f7fbf)",
    BASELINE: "var(--baseline, #c27a00)",
    STUDENT: "var(--student, #008f6b)",
    SERIES[0]: "var(--series-1, #008f6b)",
    SERIES[1]: "var(--series-2, #b0569a)",
    SERIES[2]: "var(--series-3, #c27a00)",
    SERIES[3]: "var(--series-4, #2f7fbf)",
    SERIES[4]: "var(--series-5, #d0512b)",
    SERIES[5]: "var(--series-6, #7a7a7a)",
}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "limbeck",
    "font.size": 10.5,
    "text.parse_math": False,  # a name with dollar signs is a name
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
}

_NAMESPACE = re.compile(r"\{[^}]*\}")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_FONT = re.compile(r"font:\s*(?:(italic|oblique)\s+)?(?:(bold|\d00)\s+)?([\d.]+px)[^;]*")


@contextmanager
def style() -> Iterator[None]:
    """Draw in the page's manner; matplotlib's settings are as before afterwards."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser sets the text in its own fonts, so a glyph that matplotlib lacks is no loss.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        yield


def panel(width: float, height: float) -> tuple[Any, Any]:
    """Make a figure of so many pixels with one pair of axes, outside of pyplot's global state."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def ticks(axis: Any, form: str, count: int = 5, *, whole: bool = False) -> None:
    """Set an axis' ticks at round numbers, written in plain figures: no mathematical text, no offset."""
    axis.set_major_locator(MaxNLocator(count, steps=(1, 2, 2.5, 5, 10), integer=whole))
    write_plainly(axis, form)


def write_plainly(axis: Any, form: str) -> None:
    """Write an axis' ticks in plain figures."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))


def to_svg(figure: Any, name: str, title: str, description: str) -> str:
    """Write a figure as one ``<svg>`` element that may stand in a page beside others.

    Args:
        figure: What to write, made and written under `style`.
        name: Prefix of all ids, unique on the page.
        title: Its accessible name.
        description: What the picture shows, in words.
    """
    figure.patch.set_visible(False)
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        _adopt(element, name)
    _introduce(root, name, title, description)
    return ElementTree.tostring(root, encoding="unicode")


def _adopt(element: Any, name: str) -> None:
    """Rewrite one element's name, ids, references, colours and fonts."""
    element.tag = _NAMESPACE.sub("", element.tag)
    for key in list(element.attrib):
        value = element.attrib.pop(key)
        key = _NAMESPACE.sub("", key)
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            value = value.replace("#", f"#{name}-", 1)
        elif key in ("style", "fill", "stroke", "clip-path"):
            value = _paint(value.replace("url(#", f"url(#{name}-"))
        elif key in ("d", "x", "y", "transform"):  # a hundredth of a pixel is enough
            value = _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", value)
        element.set(key, value)


def _paint(value: str) -> str:
    """Give the stand-in colours their meaning and leave the choice of font to the page."""
    for stand_in, colour in COLOURS.items():
        value = value.replace(stand_in, colour)
    return _FONT.sub(_without_family, _FAMILY.sub("", value))


def _without_family(match: re.Match[str]) -> str:
    slant, weight, size = match.groups()
    parts = (("font-style", slant), ("font-weight", weight), ("font-size", size))
    return "; ".join(f"{key}: {value}" for key, value in parts if value)


def _introduce(root: Any, name: str, title: str, description: str) -> None:
    """Say what the picture is, and let it take the width that it is given."""
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-description",
        "font-family": "system-ui, sans-serif",
        "stroke-linejoin": "round",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag.replace('desc', 'description')}"})
        element.text = text
        root.insert(place, element)
