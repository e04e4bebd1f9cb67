"""The report as one page that needs nothing else: no network, no script."""

from __future__ import annotations

import re
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from limbeck.report import plots, tables
from limbeck.report.format import clean
from limbeck.report.report import Report

_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:points|bytes|min|ms|MB|kB|[sMkBh])\b)")


def render_html(report: Report) -> str:
    """Write a report as a self-contained HTML page.

    Args:
        report: What to show. Texts in it are taken for texts, whatever they hold.

    Returns:
        The page. The same report gives the same page, byte for byte.
    """
    return page("template.html.j2").render(
        report=report,
        verdict=report.verdict(),
        rows=tables.side_by_side(report),
        scale_note=tables.scale_note(report),
        facts=tables.comparison_facts(report),
        plan_columns=tables.PLAN_COLUMNS,
        plan=tables.plan_rows(report),
        run=tables.facts_of_run(report),
        environment=tables.environment_rows(report.environment),
        recipe=tables.recipe_text(report.recipe),
        limits=tables.INTERVAL_NOTES,
        tap_map=trusted(plots.tap_map(report)),
        quality=trusted(plots.quality_against_latency(report)),
        scores=trusted(plots.scores_over_steps(report)),
        curves=[trusted(svg) for svg in plots.training_curves(report)],
    )


def page(name: str) -> Template:
    """Load the template of a page. Every text in a report is somebody's: no text becomes markup."""
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters["units"] = _units
    return environment.get_template(name)


def trusted(svg: str) -> Markup:
    """Let our own pictures in as markup; they come out of an XML writer, which escaped every text in them."""
    return Markup(svg)


def _source(name: str) -> str:
    return files("limbeck.report").joinpath(name).read_text("utf-8")


def _finalize(value: object) -> object:
    """Clean what goes into the page, but for the pictures, which are markup and clean already."""
    return clean(value) if type(value) is str else value


def _units(text: str) -> str:
    """Keep a number and its unit on one line."""
    return _BEFORE_UNIT.sub("\u00a0", text)
