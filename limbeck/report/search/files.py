"""The files of a search's report: search.json, and the page that is made from it."""

from __future__ import annotations

from pathlib import Path

from limbeck.atomic import write_text
from limbeck.report.search.report import FILE, SearchReport

PAGE = "search.html"


def write_search(report: SearchReport, folder: Path) -> dict[str, Path]:
    """Write search.json and search.html into a folder.

    Both are rendered before the first is written, and each takes its place at once: nobody reads half a file.

    Args:
        report: What to write.
        folder: Where to; made where it is not there.

    Returns:
        The paths, by ``"json"`` and ``"html"``.

    Example:
        >>> import tempfile
        >>> from limbeck.report.search.report import example
        >>> sorted(path.name for path in write_search(example(), Path(tempfile.mkdtemp())).values())
        ['search.html', 'search.json']
    """
    from limbeck.report.search.html import render_search  # matplotlib and Jinja2 are wanted from here on

    texts = {"json": (FILE, report.to_json()), "html": (PAGE, render_search(report))}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.values():
        write_text(folder / name, text)
    return {kind: folder / name for kind, (name, _) in texts.items()}


def is_search(path: Path) -> bool:
    """Whether a path is the folder of a search, or the file of its report.

    Example:
        >>> is_search(Path("search.json")), is_search(Path("report.json"))
        (True, False)
    """
    return (path / FILE).is_file() if path.is_dir() else path.name == FILE
