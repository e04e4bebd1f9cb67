"""Writes docs/losses.md from the losses' docstrings and signatures, and from what proves them; see: make docs."""

import importlib
import json
import pkgutil
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import tests.losses  # noqa: E402
from limbeck.losses import FAMILIES, LOSSES, traits_of  # noqa: E402
from limbeck.losses.describe import Description, describe, shown  # noqa: E402
from limbeck.losses.transforms import TEMPERATURES, TRANSFORMS  # noqa: E402
from tests.golden_cases import CASES  # noqa: E402

PAGE = ROOT / "docs" / "losses.md"
AGREEMENT = ROOT / "tests" / "oracles" / "agreement.json"
SECOND = "second implementation"
VERSION = re.compile(r"[0-9a-f]{7}|\d+(\.\w+)+")

HEAD = """# Losses

<!-- Written by docs/make_losses.py; `make docs` writes it anew. -->

A loss is called `(student, teacher, *, options)` and gives one value per position; `limbeck/reduce.py` makes one
number of them. In the formulas, `p` is the teacher's distribution, `q` the student's, `s` and `t` are features of
both, `y` is the label, `T` or `τ` a temperature. `limbeck list losses` prints a shorter form of this page, and
`limbeck check package.module:name` runs this suite on a loss of your own; flags say what it does not promise.

*Top-k targets* says whether the teacher's logits may be a `TopK` (`limbeck.sparse.top_k`): both sides are then
compared over K + 1 classes, the kept ones and all others as one, exactly at each temperature that was kept. A
divergence of these is a lower bound of the whole one. A loss of your own takes them below
`limbeck.losses.sparse.over_buckets`. Against targets drawn at random (`limbeck.sparse.sample`),
`soft_cross_entropy` is right on average, in value and gradient; no other loss is.

*Agrees with* names independent code that gave the same value and gradient: numbers of other projects' code kept in
`tests/golden/losses.json`, projects that `make oracles` runs beside ours, and a *second implementation* in float64
written from the paper with plain loops (`tests/losses`).
"""


def losses() -> dict[str, list[Description]]:
    """Descriptions of the package's own losses, by family in its order."""
    found = defaultdict(list)
    for name in LOSSES:
        function = LOSSES.get(name)
        if function.__module__ in {
            f"limbeck.losses.{family}" for family in FAMILIES
        }:  # others may have registered
            found[describe(function).family].append(describe(function, name))
    return {family: found[family] for family in FAMILIES if found[family]}


def oracles() -> dict[str, list[str]]:
    """What agrees with each loss."""
    found = defaultdict(set)
    second = set()
    names = [
        module.name for module in pkgutil.iter_modules(tests.losses.__path__) if module.name.startswith("test_")
    ]
    for family in (importlib.import_module(f"tests.losses.{name}") for name in names if name != "test_all"):
        for loss, cases in getattr(family, "GOLDEN", {}).items():
            found[loss] |= {project(r["oracle"]) for case in cases for r in CASES[case]["results"]}
        second |= set(getattr(family, "NAIVE", {}))
    for loss, live in json.loads(AGREEMENT.read_text())["losses"].items():
        found[loss] |= {entry["oracle"] for entry in live if entry["agrees"]}
    return {
        loss: sorted(found[loss], key=str.lower) + [SECOND] * (loss in second) for loss in found.keys() | second
    }


def project(oracle: str) -> str:
    """The project and its version, without the place in it: ``RepDistiller b84f547``."""
    name, _, behind = oracle.partition(" ")
    version = behind.split(" ")[0]
    return f"{name} {version}" if VERSION.fullmatch(version) else name.removesuffix(".nn.CosineEmbeddingLoss")


def markdown(text: str) -> str:
    """Docstring text as Markdown."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    return text.replace("``", "`")


def cell(text: str) -> str:
    """Text for a table."""
    return markdown(text).replace("|", "\\|")


def options(found: Description) -> str:
    """The options with their defaults."""
    return ", ".join(f"`{shown(name, default)}`" for name, default in found.options.items())


def row(found: Description, agreeing: list[str] | None = None, link: str = "") -> str:
    """One row of a table."""
    name = f"[`{found.name}`]({link})" if link else f"`{found.name}`"
    cells = [name, cell(found.summary), cell(options(found)) or "none", cell(found.paper) or "none"]
    cells += [] if agreeing is None else [", ".join(agreeing)]
    return f"| {' | '.join(cells)} |"


def section(found: Description, agreeing: list[str]) -> str:
    """All that there is to say about a loss."""
    said = [f"- `{shown(n, d)}`: {markdown(found.arguments.get(n, ''))}" for n, d in found.options.items()]
    said += [f"- `{n}` ({by}): {markdown(found.arguments.get(n, ''))}" for n, by in found.brings.items()]
    said += [f"- `{n}` (from the batch): {markdown(found.arguments.get(n, ''))}" for n in found.asks]
    able = traits_of(LOSSES.get(found.name)).sparse
    parts = [
        f"### {found.name}",
        markdown(found.summary),
        f"$$\n{found.formula}\n$$",
        markdown(found.notes),
        f"**Reads** {markdown(found.reads)}",
        "**Options**" + ("\n\n" + "\n".join(said) if said else " none."),
        f"**Gives** {markdown(found.returns)}",
        f"**Top-k targets** {'yes' if able is True else f'no: {able}'}." if able else "",
        f"**Paper** {markdown(found.reference)}",
        f"**Agrees with** {', '.join(agreeing)}.",
    ]
    return "\n\n".join(part for part in parts if part)


def deviations() -> str:
    """Where other projects' code gives other numbers, as `make oracles` last saw it."""
    found = json.loads(AGREEMENT.read_text())["deviations"]
    rows = [f"| {entry['oracle']} | `{entry['loss']}` | {cell(entry['reason'])} |" for entry in found]
    said = "`make oracles` sees that these still differ, so that it is noticed when they no longer do."
    return f"## Code that differs\n\n{said}\n\n" + "\n".join(
        ["| code | beside | how |\n| --- | --- | --- |", *rows]
    )


def page() -> str:
    """The whole page."""
    agree = oracles()
    parts = [HEAD.strip()]
    for family, members in losses().items():
        title = (importlib.import_module(f"limbeck.losses.{family}").__doc__ or "").strip().splitlines()[0]
        rows = [row(found, agree.get(found.name, []), f"#{found.name}") for found in members]
        head = "| loss | what it is | options | paper | agrees with |\n| --- | --- | --- | --- | --- |"
        parts.append(f"## {family}\n\n{title}\n\n" + "\n".join([head, *rows]))
        parts += [section(found, agree.get(found.name, [])) for found in members]
    for title, registry in (("Transforms", TRANSFORMS), ("Temperatures", TEMPERATURES)):
        rows = [row(describe(registry.get(name), name)) for name in registry]
        head = "| name | what it does | options | paper |\n| --- | --- | --- | --- |"
        parts.append(f"## {title}\n\nThey compose with any loss between logits.\n\n" + "\n".join([head, *rows]))
    return "\n\n".join([*parts, deviations()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
