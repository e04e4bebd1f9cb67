"""The report of a suite for people: a table in the terminal, one page, and a README."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.atomic import write_text
from limbeck.report import format as write
from limbeck.report.format import NOTHING, POINTS, RATIO, one_line
from limbeck.report.report import Interval
from limbeck.report.suite.report import COMPLETE, FAILED, FILE, SuiteReport, SuiteRow
from limbeck.report.tables import INTERVAL_NOTES, Cell, Fact, environment_rows, in_one, recipe_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = ("teacher", "baseline", "student", "distillation ratio", "speed-up")
SHORT = {"distillation ratio": "ratio"}
NO_RATIO = "no gap"
"""In the place of a ratio whose gap is within noise."""

HOW = (
    "Scores are in points: 100 times the main metric of each task, as GLUE counts it (accuracy; CoLA: Matthews "
    "correlation; MRPC and QQP: the mean of accuracy and F1; STS-B: the mean of the Pearson and Spearman "
    "correlations). The average is their arithmetic mean."
)
COMBINED = (
    "Intervals of averages are 95% percentile intervals, too. Every task has 1000 resamples of its own evaluation "
    "examples and seeds, the same for teacher, baseline and student; those of different tasks are drawn "
    "independently of each other, and each resample of an average is the mean of one resample of every task."
)
TIMES = "Speed-ups are of the median time for one example, the models taking turns; their mean is geometric."
README, PAGE = "README.md", "suite.html"


@dataclass(frozen=True)
class Line:
    """One line of the table: the task, a cell for each of `COLUMNS`, its note, and whether it is the average."""

    name: str
    cells: list[Cell]
    note: str
    average: bool = False


def suite_lines(report: SuiteReport) -> list[Line]:
    """Build the table: a line for each task, then the average."""
    lines = [Line(one_line(row.task), _cells(row), _note(row)) for row in report.rows]
    found = report.averages
    if found is None:
        return lines
    done = len(report.in_state(COMPLETE))
    cells = [
        *map(_score, (found.teacher, found.baseline, found.student)),
        _ratio(found.ratio),
        _times(found.speedup),
    ]
    some = found.ratio is not None and len(found.ratio_tasks) < done
    over = f"mean of {len(found.ratio_tasks)} of {done} ratios" if some else ""
    counted = "" if done == len(report.rows) else f"over {done} of {len(report.rows)} tasks"
    return [*lines, Line("average", cells, "; ".join(filter(None, (counted, over))), average=True)]


def suite_facts(report: SuiteReport) -> list[Fact]:
    """Build what the tasks come to together."""
    found = report.averages
    if found is None:
        return []
    facts = [
        Fact(
            "Mean retention",
            write.share(found.retention.value),
            write.share_ends(found.retention),
            "The student's score over the teacher's, the mean over the tasks.",
        )
    ]
    if found.gain is None or found.gap is None:
        return facts
    return [*_gain_facts(found.gain, found.gap), *_ratio_facts(report), *facts]


def _gain_facts(gain: Interval, gap: Interval) -> list[Fact]:
    gain_text, gap_text = (f"{POINTS.signed(each.value)}{POINTS.unit}" for each in (gain, gap))
    return [
        Fact("Mean gain", gain_text, POINTS.signed_ends(gain), "Student minus baseline, the mean over the tasks."),
        Fact("Mean gap", gap_text, POINTS.signed_ends(gap), "Teacher minus baseline: what there was to win."),
    ]


def _ratio_facts(report: SuiteReport) -> list[Fact]:
    found = report.averages
    assert found is not None
    done = len(report.in_state(COMPLETE))
    pooled = found.pooled_ratio
    which = ", ".join(map(one_line, found.ratio_tasks))
    return [
        Fact(
            "Pooled distillation ratio",
            RATIO.write(pooled.value) if pooled else "none",
            RATIO.ends(pooled) if pooled else "",
            "The sum of all gains over the sum of all gaps: every task counts, and one with a large gap for more. "
            f"{one_line(found.pooled_note)}".strip(),
        ),
        Fact(
            "Mean distillation ratio",
            RATIO.write(found.ratio.value) if found.ratio else "none",
            RATIO.ends(found.ratio) if found.ratio else "",
            f"The mean of the ratios that are defined, {len(found.ratio_tasks)} of {done}"
            f"{f': {which}' if which else ''}. Where the gap between teacher and baseline is within noise, there "
            "is none.",
        ),
    ]


def _cells(row: SuiteRow) -> list[Cell]:
    if row.state != COMPLETE:
        return [Cell(row.state if i == 0 else NOTHING) for i in range(len(COLUMNS))]
    undefined = row.ratio is None and row.gap is not None
    ratio = Cell(NO_RATIO) if undefined else _ratio(row.ratio)
    return [*map(_score, (row.teacher, row.baseline, row.student)), ratio, _times(row.speedup)]


def _note(row: SuiteRow) -> str:
    failed = f"failed: {row.error}" if row.state == FAILED else ""
    return one_line("; ".join(filter(None, (row.note, failed))))


def _score(interval: Interval | None) -> Cell:
    return Cell(POINTS.write(interval.value), POINTS.ends(interval)) if interval else Cell(NOTHING)


def _ratio(interval: Interval | None) -> Cell:
    return Cell(RATIO.write(interval.value), RATIO.ends(interval)) if interval else Cell(NOTHING)


def _times(interval: Interval | None) -> Cell:
    return Cell(f"{interval.value:.2f}×", RATIO.ends(interval)) if interval else Cell(NOTHING)


def print_suite(report: SuiteReport, console: Console) -> None:
    """Print the verdict, the table, the notes below it, and what the tasks come to together.

    Args:
        report: What to show. Texts in it are printed as they are, never read as rich's markup.
        console: Where to print; everything but long notes fits in 80 columns.

    Example:
        >>> from rich.console import Console
        >>> from limbeck.report.suite.report import example
        >>> print_suite(example(), Console(width=80))
        Over 2 tasks the student keeps 98.0% of its teacher...
    """
    from rich.table import Table
    from rich.text import Text

    console.print(Text(one_line(report.verdict()), style="bold"))
    console.print()
    lines = suite_lines(report)
    console.print(_console_table(lines))
    for line in lines:
        if line.note:
            console.print(Text(f"* {line.name}: {line.note}", style="dim"), soft_wrap=True)
    for remark in report.remarks:
        console.print(Text(one_line(remark), style="dim"), soft_wrap=True)
    console.print()
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for fact in suite_facts(report):
        facts.add_row(fact.name, Text(fact.value, style="bold"), Text(fact.detail, style="dim"))
    console.print(facts)


def _console_table(lines: list[Line]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(SHORT.get(column, column), justify="right", no_wrap=True)
    for line in lines:
        texts = [Text.assemble(c.value, *([(f"\n{c.detail}", "dim")] if c.detail else [])) for c in line.cells]
        name = Text(f"{line.name}{'*' if line.note else ''}", style="bold" if line.average else "")
        table.add_row(name, *texts)
    return table


def render_suite(report: SuiteReport) -> str:
    """Write the report of a suite as a self-contained HTML page.

    Args:
        report: What to show. Texts in it are taken for texts, whatever they hold.

    Example:
        >>> from limbeck.report.suite.report import example
        >>> render_suite(example()).startswith("<!doctype html>")
        True
    """
    from limbeck.report.html import page  # Jinja2 and matplotlib are wanted from here on

    lines = suite_lines(report)
    return page("suite.html.j2").render(
        report=report,
        verdict=report.verdict(),
        facts=_facts_of_suite(report),
        columns=COLUMNS,
        lines=sorted(lines, key=lambda line: not line.average),  # what is asked for first, in large type
        findings=suite_facts(report),
        how=[HOW, *report.remarks],
        limits=[*INTERVAL_NOTES, COMBINED, TIMES],
        environment=environment_rows(report.environment),
        recipe=recipe_text(report.recipe),
    )


def render_suite_card(report: SuiteReport) -> str:
    """Write the report of a suite as Markdown.

    Example:
        >>> from limbeck.report.suite.report import example
        >>> "| **average** |" in render_suite_card(example())
        True
    """
    from limbeck.report.markdown import escape, fenced, table

    lines = suite_lines(report)
    rows = [
        [
            f"**{escape(line.name)}**" if line.average else escape(line.name),
            *(in_one(cell.value, cell.detail) for cell in line.cells),
            escape(line.note),
        ]
        for line in lines
    ]
    facts = [f"- **{f.name}: {in_one(f.value, f.detail)}.** {escape(f.meaning)}" for f in suite_facts(report)]
    sections = (
        f"# {escape(report.name)}",
        escape(report.verdict()),
        table(["task", *COLUMNS, "note"], rows, numbers_from=1),
        "\n".join(facts),
        "\n".join(f"- {escape(text)}" for text in (HOW, *report.remarks, *INTERVAL_NOTES, COMBINED, TIMES)),
        f"To repeat it:\n\n{fenced(report.command, 'sh')}" if report.command else "",
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _facts_of_suite(report: SuiteReport) -> list[tuple[str, str]]:
    return [
        ("Tasks", f"{len(report.in_state(COMPLETE))} of {len(report.rows)} finished"),
        ("Seeds", ", ".join(map(str, report.seeds)) or NOTHING),
        ("Created", one_line(report.created) or NOTHING),
    ]


def write_suite(report: SuiteReport, folder: Path) -> None:
    """Write suite.json, suite.html and README.md into a folder, each whole.

    Example:
        >>> import tempfile
        >>> from limbeck.report.suite.report import example
        >>> place = Path(tempfile.mkdtemp())
        >>> write_suite(example(), place)
        >>> sorted(path.name for path in place.iterdir())
        ['README.md', 'suite.html', 'suite.json']
    """
    texts = {FILE: report.to_json(), PAGE: render_suite(report), README: render_suite_card(report)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
