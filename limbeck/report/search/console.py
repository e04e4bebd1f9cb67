"""The report of a search in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.report.candidates import Candidate
from limbeck.report.format import NOTHING, one_line, shorten
from limbeck.report.search import tables
from limbeck.report.search.influence import influences
from limbeck.report.search.proof import CAUTION
from limbeck.report.search.report import SearchReport
from limbeck.report.search.values import values_in_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

MEASURES = ("score", "kept", "speed-up", "ms", "size")  # what fits beside the values in 80 columns
MOST_ROWS, MOST_VALUES, MOST_FAILED, LONGEST_NOTE = 15, 12, 3, 160
STYLES = {"chosen": "bold green", "nearest": "bold yellow"}


def print_search(report: SearchReport, console: Console) -> None:
    """Print the verdict, the demands, the Pareto front and what went wrong.

    Args:
        report: What to show. Texts in it are printed as they are, never read as rich's markup.
        console: Where to print; everything fits in 80 columns.

    Example:
        >>> from rich.console import Console
        >>> from limbeck.report.search.report import example
        >>> print_search(example(), Console(width=80))
        The smallest of 2 finished students with at least 94% of the teacher's accuracy...
    """
    console.print(_text(report.verdict(), "bold"))
    console.print(_text(f"Trials: {tables.counts_in_words(report)}.", "dim"))
    for table in (_demands(report), _front(report), _influences(report)):
        if table is not None:
            console.print()
            console.print(table)
    _print_failed(report, console)
    console.print()
    console.print(_text(CAUTION, "dim"))


def _demands(report: SearchReport) -> Table | None:
    rows = tables.demand_rows(report)
    if not rows:
        return None
    table = _table()
    for name in ("asked", "held-out part", "validation data", "proof"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(_text(row.asked), _text(row.held_out), _text(row.proven), _text(row.outcome, "bold"))
    return table


def _front(report: SearchReport) -> Table | None:
    front = report.front()
    if not front:
        return None
    table = _table()
    table.add_column("front", no_wrap=True)
    for name in MEASURES:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("values", overflow="fold")
    shown = _shortened(front, report)
    for candidate, row in zip(shown, tables.trial_rows(report, shown), strict=True):
        measures = dict(zip(tables.MEASURES, row.measures, strict=True))
        style = STYLES.get(row.mark, "")
        values = values_in_words(candidate.values, MOST_VALUES)
        table.add_row(
            _text(row.number, style), *(_text(measures[name], style) for name in MEASURES), _text(values, style)
        )
    more = f" {len(front) - len(shown)} more of the front are in the page." if len(front) > len(shown) else ""
    table.caption, table.caption_justify = _text(tables.score_note(report) + more, "dim"), "left"
    return table


def _shortened(front: list[Candidate], report: SearchReport) -> list[Candidate]:
    """A front of many: evenly spread, with both ends and the answer among them."""
    if len(front) <= MOST_ROWS:
        return front
    step = (len(front) - 1) / (MOST_ROWS - 1)
    places = {round(i * step) for i in range(MOST_ROWS)}
    answer = report.choice.candidate
    return [c for i, c in enumerate(front) if i in places or (answer and c.number == answer.number)]


def _influences(report: SearchReport) -> Table | None:
    rows = [row for row in tables.influence_rows(report, influences(report)) if row.figure != NOTHING]
    if not rows:
        return None
    table = _table()
    table.add_column("value", overflow="fold", ratio=2)
    table.add_column("with the score", justify="right", no_wrap=True)
    table.add_column("", overflow="fold", ratio=5)
    for row in rows:
        table.add_row(_text(row.name), _text(row.figure, "bold"), _text(row.meaning, "dim"))
    return table


def _print_failed(report: SearchReport, console: Console) -> None:
    failed = tables.failed(report)
    if not failed:
        return
    console.print()
    for candidate in failed[:MOST_FAILED]:
        note = shorten(candidate.note, LONGEST_NOTE) or "no reason was noted"
        console.print(_text(f"#{candidate.number} failed: {note}", "red"))
    if len(failed) > MOST_FAILED:
        console.print(_text(f"{len(failed) - MOST_FAILED} more failed; the page has them all.", "red"))


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(one_line(text), style=style)
