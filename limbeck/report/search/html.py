"""The report of a search as one page that needs nothing else: no network, no script."""

from __future__ import annotations

from limbeck.report import tables as of_run
from limbeck.report.format import one_line
from limbeck.report.html import page, trusted
from limbeck.report.search import plots, tables
from limbeck.report.search.influence import influences
from limbeck.report.search.proof import CAUTION
from limbeck.report.search.report import SearchReport

LIMITS = (
    "The trials share one held-out part, and each was trained once. Those whose scores differ by little may be in "
    "another order on other data.",
    *of_run.INTERVAL_NOTES,
)


def render_search(report: SearchReport) -> str:
    """Write the report of a search as a self-contained HTML page.

    Args:
        report: What to show. Texts in it are taken for texts, whatever they hold.

    Returns:
        The page. The same report gives the same page, byte for byte.

    Example:
        >>> from limbeck.report.search.report import example
        >>> render_search(example()).startswith("<!doctype html>")
        True
    """
    proof, answer = report.proof, report.choice.candidate
    return page("search.html.j2").render(
        report=report,
        verdict=report.headline(),
        lead=report.explanation(),
        facts=tables.facts_of_search(report),
        answer=f"#{answer.number}" if answer else "choice",
        demands=tables.demand_rows(report),
        by_latency=trusted(plots.quality_against(report, "latency")),
        by_size=trusted(plots.quality_against(report, "size")),
        outside=plots.outside(report),
        score_note=tables.score_note(report),
        measures=tables.MEASURES,
        first=tables.BEFORE_VALUES,
        columns=tables.value_columns(report),
        front=tables.trial_rows(report, report.front()),
        all=tables.trial_rows(report, tables.ranked(report)),
        failed=tables.trial_rows(report, tables.failed(report)),
        caution=CAUTION,
        proof=proof,
        proof_rows=of_run.side_by_side(proof) if proof else [],
        proof_note=of_run.scale_note(proof) if proof else "",
        proof_facts=of_run.comparison_facts(proof) if proof else [],
        influences=tables.influence_rows(report, influences(report)),
        space=[(one_line(path), one_line(how)) for path, how in report.space.items()],
        limits=LIMITS,
        environment=of_run.environment_rows(report.environment),
        recipe=of_run.recipe_text(report.recipe),
    )
