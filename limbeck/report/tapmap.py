"""The picture of a plan: which of the student's taps learn from which of the teacher's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.patches import PathPatch
from matplotlib.path import Path

from limbeck.report.format import one_line, shorten
from limbeck.report.report import Report
from limbeck.report.svg import INK, SERIES, STUDENT, TEACHER, panel, style, to_svg
from limbeck.report.tables import TRUE_LABELS, weight_text

WIDTH, ROW, HEAD = 350, 22, 30
LEFT, RIGHT = 124, WIDTH - 124  # the columns' dots; the names stand outside of them
LONGEST = 22
LABELS = "labels"
LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Group:
    """The terms of one loss, drawn alike.

    Attributes:
        name: What is common to the terms' names.
        loss: The loss.
        rows: Their rows of the plan.
        colour: Colour of the links.
        line: Their line style.
    """

    name: str
    loss: str
    rows: list[Mapping[str, Any]]
    colour: str
    line: Any

    def title(self) -> str:
        """Write the group's line of the legend."""
        weight = sum(_weight(row) for row in self.rows)
        loss = f" ({self.loss})" if self.loss != self.name else ""
        count = f"{len(self.rows)} terms, " if len(self.rows) > 1 else ""
        return f"{shorten(self.name + loss, 32)}, {count}weight {weight_text(weight)}"


def tap_map(report: Report) -> str:
    """Draw the teacher's taps to the left, the student's to the right, and a link for each term.

    The thicker a link, the greater the term's weight. Nothing where the plan is empty.
    """
    if not report.plan:
        return ""
    teacher, student = _taps(report.plan, "teacher_tap"), _taps(report.plan, "tap")
    groups = _groups(report.plan)
    body = ROW * max(len(teacher), len(student))
    height = HEAD + body + 14 + ROW * len(groups)
    with style():
        figure, axes = _canvas(height)
        left, right = _places(teacher, body), _places(student, body)
        _draw_links(axes, groups, left, right)
        _draw_column(axes, left, "teacher", LEFT)
        _draw_column(axes, right, "student", RIGHT)
        for place, group in enumerate(groups):
            _draw_key(axes, group, HEAD + body + 18 + ROW * place)
        said = "; ".join(one_line(f"{r.get('tap')} learns from {r.get('teacher_tap')}") for r in report.plan)
        return to_svg(figure, "taps", "Which student taps learn from which teacher taps", f"{said}.")


def _canvas(height: float) -> tuple[Any, Any]:
    """Make a figure whose coordinates are pixels, counted from the top."""
    figure, axes = panel(WIDTH, height)
    figure.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def _taps(plan: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """List a column's taps from input to output: layers in natural order, logits, and the labels at the end."""
    return sorted(dict.fromkeys(str(row.get(key)) for row in plan), key=_depth)


def _depth(tap: str) -> tuple[int, list[tuple[int, str]]]:
    last = {"logits": 1, LABELS: 2}.get(tap, 0)
    return last, [(int(n or 0), w) for n, w in re.findall(r"([0-9]{1,9})|([^0-9]+)", tap)]


def _places(taps: list[str], body: float) -> dict[str, float]:
    """Spread a column evenly over the height."""
    return {tap: HEAD + body * (i + 0.5) / len(taps) for i, tap in enumerate(taps)}


def _groups(plan: Sequence[Mapping[str, Any]]) -> list[Group]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in plan:
        name = re.split(r"[.\[]", str(row.get("name")), maxsplit=1)[0]
        found.setdefault((name, str(row.get("loss"))), []).append(row)
    return [
        Group(name, loss, rows, SERIES[i % len(SERIES)], LINES[i % len(LINES)])
        for i, ((name, loss), rows) in enumerate(found.items())
    ]


def _weight(row: Mapping[str, Any]) -> float:
    return float(row.get("weight", 1.0))


def _draw_links(axes: Any, groups: list[Group], left: dict[str, float], right: dict[str, float]) -> None:
    heaviest = max((abs(_weight(row)) for group in groups for row in group.rows), default=0) or 1.0
    for group in groups:
        for row in group.rows:
            start, end = left[str(row.get("teacher_tap"))], right[str(row.get("tap"))]
            width = 1 + 2.5 * abs(_weight(row)) / heaviest
            _draw_link(axes, (LEFT + 6, start), (RIGHT - 7, end), group, width)


def _draw_link(
    axes: Any, start: tuple[float, float], end: tuple[float, float], group: Group, width: float
) -> None:
    middle = (start[0] + end[0]) / 2
    path = Path(
        [start, (middle, start[1]), (middle, end[1]), end], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    )
    look = {"edgecolor": group.colour, "linewidth": width, "linestyle": group.line, "alpha": 0.85}
    axes.add_patch(PathPatch(path, facecolor="none", **look))
    axes.plot([end[0]], [end[1]], marker=">", markersize=3.5 + width, color=group.colour)


def _draw_column(axes: Any, places: dict[str, float], role: str, x: float) -> None:
    """Write one column: its heading, and for each tap a dot and a name on the outer side."""
    outwards, align = (-1, "right") if role == "teacher" else (1, "left")
    colour = TEACHER if role == "teacher" else STUDENT
    text = {"ha": align, "va": "center_baseline"}
    axes.text(x + 8 * outwards, 14, role, fontweight="bold", color=colour, fontsize=10, **text)
    for tap, y in places.items():
        truth = tap == LABELS
        axes.plot([x], [y], marker="o", markersize=5, color=INK if truth else colour)
        name = TRUE_LABELS if truth else _short(tap)
        axes.text(x + 8 * outwards, y, name, fontsize=9, fontstyle="italic" if truth else "normal", **text)


def _short(tap: str) -> str:
    """Leave out the first parts of a long module path, or its middle where that is not enough."""
    parts = one_line(tap).split(".")
    for first in range(1, len(parts) if len(tap) > LONGEST else 0):
        if len(ending := ".".join(parts[first:])) < LONGEST:
            return f"…{ending}"
    return shorten(tap, LONGEST)


def _draw_key(axes: Any, group: Group, y: float) -> None:
    """Write one line of the legend."""
    axes.plot([8, 34], [y, y], color=group.colour, linestyle=group.line, linewidth=2)
    axes.text(42, y, group.title(), fontsize=9, va="center_baseline")
