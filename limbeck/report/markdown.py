"""The report as a model card: the README.md that stands beside the student, as the Hugging Face Hub reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import yaml

from limbeck.report import tables
from limbeck.report.format import clean, one_line
from limbeck.report.report import Report

_SPECIAL = re.compile(r"([\\`*_\[\]|#~$])")

LOADING = """\
The folder `student` holds the student alone; limbeck is not needed to use it.

```python
{code}
```"""

WITH_TRANSFORMERS = """\
from transformers import AutoModelFor{head}

model = AutoModelFor{head}.from_pretrained("student")"""

TOKENIZER = """
tokenizer = AutoTokenizer.from_pretrained("student")"""

PLAIN_MODULE = """\
from safetensors.torch import load_model

load_model(module, "student/model.safetensors")  # a {name}, built as it was for training"""

NO_BASELINE = (
    "No baseline was trained (a twin of the student with the same start and budget, without the teacher), so "
    "how much of the student's quality came from distillation is not known."
)


def render_card(report: Report) -> str:
    """Write a report as a model card: YAML front matter, then Markdown.

    Args:
        report: What to show. Texts in it are escaped, so that none of them becomes markup.

    Returns:
        The card. The same report gives the same card, byte for byte.
    """
    sections = (
        _front_matter(report),
        f"# Distilled student: {escape(report.task)}",
        escape(report.verdict()),
        "## Side by side",
        f"{escape(tables.scale_note(report))} Brackets hold 95% intervals for scores, quartiles for times.",
        _models_table(report),
        "## What distillation did",
        NO_BASELINE if report.comparison is None else "",
        _facts(report),
        "## How to load it",
        _loading(report),
        *_plan(report),
        *_making(report),
        "## Limits",
        "\n".join(f"- {note}" for note in tables.INTERVAL_NOTES),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _loading(report: Report) -> str:
    """Say how to load the student; the classes of transformers are told by their names, ``XForY``."""
    name = re.sub(r"\W", "", report.student_class)
    head = name.partition("For")[2]
    code = WITH_TRANSFORMERS.format(head=head) if head else PLAIN_MODULE.format(name=name or "module")
    if head and not head.startswith("Image"):
        code = code.replace("\n", ", AutoTokenizer\n", 1) + TOKENIZER
    return LOADING.format(code=code)


def escape(text: str) -> str:
    r"""Make a text stand for itself in Markdown, on one line and in a table too.

    Example:
        >>> print(escape("a|b <script> *c*"))
        a\|b &lt;script&gt; \*c\*
    """
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", text)


def _front_matter(report: Report) -> str:
    library = "transformers" if "For" in report.student_class else "pytorch"
    data = {
        "library_name": library,
        "tags": ["knowledge-distillation", "limbeck"],
        "metrics": [one_line(report.metric)],
    }
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def _models_table(report: Report) -> str:
    rows = tables.side_by_side(report)
    body = [[escape(row.label), *(tables.in_one(c.value, c.detail) for c in row.cells)] for row in rows]
    return table(["", *(model.role for model in report.models)], body, numbers_from=1)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 99) -> str:
    """Write a table of Markdown cells, whose columns from one on are set flush right."""
    rules = ["---:" if i >= numbers_from else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *rows))


def _facts(report: Report) -> str:
    lines = [
        f"- **{fact.name}: {tables.in_one(fact.value, fact.detail)}.** {escape(fact.meaning)}"
        for fact in tables.comparison_facts(report)
    ]
    return "\n".join(lines)


def _plan(report: Report) -> list[str]:
    if not report.plan:
        return []
    rows = [[escape(value) for value in row] for row in tables.plan_rows(report)]
    return ["## What the student learned from", table(tables.PLAN_COLUMNS, rows)]


def _making(report: Report) -> list[str]:
    environment = [(escape(name), escape(value)) for name, value in tables.environment_rows(report.environment)]
    recipe = tables.recipe_text(report.recipe)
    parts = [
        "## How it was made",
        "\n".join(f"- {name}: {escape(value)}" for name, value in tables.facts_of_run(report)),
        f"To repeat the run:\n\n{fenced(report.command, 'sh')}" if report.command else "",
        table(("environment", ""), environment) if environment else "",
        "The recipe, with every default filled in:" if recipe else "",
        fenced(recipe, "yaml") if recipe else "",
    ]
    return [part for part in parts if part]


def fenced(text: str, language: str) -> str:
    """Put a text in a code block whose fence is longer than any that the text holds."""
    text = clean(text).rstrip("\n")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
