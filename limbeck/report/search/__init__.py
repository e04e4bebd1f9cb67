"""The report of a search: its data, and the page and the terminal tables that are made from it.

Importing this costs neither matplotlib nor Jinja2; they come in when a page is written.
"""

from limbeck.report.search.console import print_search
from limbeck.report.search.files import is_search, write_search
from limbeck.report.search.report import SearchReport, TeacherResult

__all__ = ["SearchReport", "TeacherResult", "is_search", "print_search", "write_search"]
