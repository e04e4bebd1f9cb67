"""The report's files: report.json, and what is made from it for people."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

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
    return {kind: _replace(folder / name, text) for kind, (name, text) in texts.items()}


def _replace(path: Path, text: str) -> Path:
    """Write a file beside its place and move it there in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's own mode would keep the report from everyone else
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
