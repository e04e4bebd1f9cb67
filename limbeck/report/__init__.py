"""The report of a run: its data, and the page, model card and terminal table that are made from it.

Importing this costs neither matplotlib nor Jinja2; they come in when a page is written.
"""

from limbeck.report.console import print_report
from limbeck.report.files import write_report
from limbeck.report.report import Comparison, Curve, Interval, ModelResult, Report

__all__ = [
    "Comparison",
    "Curve",
    "Interval",
    "ModelResult",
    "Report",
    "print_report",
    "write_report",
]
