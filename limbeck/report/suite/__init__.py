"""The report of a suite: several tasks side by side, as data, page, card and text."""

from limbeck.report.suite.pages import print_suite, render_suite, render_suite_card, write_suite
from limbeck.report.suite.report import Averages, SuiteReport, SuiteRow, is_suite_folder

__all__ = [
    "Averages",
    "SuiteReport",
    "SuiteRow",
    "is_suite_folder",
    "print_suite",
    "render_suite",
    "render_suite_card",
    "write_suite",
]
