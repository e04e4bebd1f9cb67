"""The report in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.report import tables
from limbeck.report.format import one_line
from limbeck.report.report import Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# Names of the terminal's own colours, which its theme keeps legible.
COLOUR = {"teacher": "blue", "baseline": "yellow", "student": "green"}


def print_report(report: Report, console: Console) -> None:
    """Print the verdict, the models side by side, and what the comparison found.

    Args:
        report: What to show. Texts in it are printed as they are, never read as rich's markup.
        console: Where to print; everything fits in 80 columns.

    Example:
        >>> from rich.console import Console
        >>> from limbeck.report.report import example
        >>> print_report(example(), Console(width=80))
        The student keeps 100.0% of the teacher's accuracy at 2.0x the speed...
    """
    from rich.text import Text

    console.print(Text(one_line(report.verdict()), style="bold"))
    console.print()
    console.print(_models_table(report))
    console.print(Text(tables.scale_note(report), style="dim"))
    console.print()
    console.print(_facts_table(report))


def _models_table(report: Report) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("", overflow="fold")
    for model in report.models:
        table.add_column(model.role, justify="right", header_style=f"bold {COLOUR[model.role]}", min_width=12)
    for row in tables.side_by_side(report):
        table.add_row(_text(row.label), *(_cell(cell) for cell in row.cells))
    return table


def _facts_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for fact in tables.comparison_facts(report):
        table.add_row(_text(fact.name), _text(fact.value, "bold"), _text(fact.detail, "dim"))
    if report.comparison is not None and report.comparison.ratio is None:
        table.caption_justify = "left"
        table.caption = _text(f"Distillation ratio: {tables.ratio_note(report.comparison)}", "dim")
    return table


def _cell(cell: tables.Cell) -> Text:
    from rich.text import Text

    seeds = cell.value.replace("  ", "\n")  # one below the other: side by side they would take too much room
    return Text.assemble(seeds, *([(f"\n{cell.detail}", "dim")] if cell.detail else []))


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(one_line(text), style=style)
