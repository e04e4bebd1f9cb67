"""The report's files: report.json, and what is made from it for people."""

from __future__ import annotations

from pathlib import Path

from limbeck.atomic import write_text
from limbeck.report.report import Report


def write_report(report: Report, folder: Path) -> dict[str, Path]:
    """Write report.json, report.html and README.md (the model card) into a folder.

    All are rendered before the first is written, and each takes its place at once: nobody reads half a file.

    Args:
        report: What to write.
        folder: Where to; made where it is not there.

    Returns:
        The paths, by ``"json"``, ``"html"`` and ``"card"``.

    Example:
        >>> import tempfile
        >>> from limbeck.report.report import example
        >>> paths = write_report(example(), Path(tempfile.mkdtemp()))
        >>> sorted(path.name for path in paths.values())
        ['README.md', 'report.html', 'report.json']
    """
    from limbeck.report.html import render_html  # matplotlib and Jinja2 are wanted from here on
    from limbeck.report.markdown import render_card

    texts = {
        "json": ("report.json", report.to_json()),
        "html": ("report.html", render_html(report)),
        "card": ("README.md", render_card(report)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.values():
        write_text(folder / name, text)
    return {kind: folder / name for kind, (name, _) in texts.items()}
