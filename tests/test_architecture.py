"""The house's rules, held by test: import direction, budgets, import time, public names, docstrings."""

import ast
import importlib
import inspect
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import limbeck
from limbeck.losses import LOSSES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "limbeck"

# A module imports only from lower lines, and from its own folder.
LAYERS = [
    "types registry shapes stopwatch atomic hub",
    "batch metrics pretrained reduce schedules sparse strict yaml_options",
    "taps projectors matching cache",
    "losses",
    "terms teachers students balance",
    "objective checks layerwise stages",
    "distiller witness standin",
    "train report alongside accompanied adapted",
    "tasks evaluate presets baseline",
    "recipe stage encodings",
    "models pairing plan keeping frame_model belonging",
    "teaching enlarging deploy",
    "summary remember",
    "run",
    "suite",
    "progress testing building compat",
    "search",
    "cli_cache",
    "cli_distill",
    "cli_search cli_deploy",
    "cli",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}

FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION, LONGEST_FILE, MEDIAN_FUNCTION = 80, 450, 10


def unit(path: Path) -> str:
    """The name under which a file stands in the list of layers."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """The parts of limbeck that a module imports when it is loaded or run, not those for type checkers alone."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for inner in ast.walk(node):
                inner.skipped = True
    for node in ast.walk(tree):
        if getattr(node, "skipped", False):
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("limbeck."):
            names.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("limbeck.")}
    return names


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node, clean=False)
                size = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", size


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = unit(path)
    if own in ("__init__", "__main__"):
        return
    assert own in LEVEL, f"{own} stands in no layer"
    for other in imported(ast.parse(path.read_text())) - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} must not import {other}"


def test_the_document_draws_the_same_layers():
    """The picture in docs/architecture.md has the layers of this test, line by line."""
    lines = re.findall(r"^ ?(\d+)  (.+)$", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    drawn = {int(level): text for level, text in lines}
    for level, names in enumerate(LAYERS):
        words = drawn[level].split()
        assert words[: len(names.split())] == names.split()


def test_functions_are_short():
    sizes = dict(functions())
    long = {name: size for name, size in sizes.items() if size > LONGEST_FUNCTION}
    assert not long
    assert statistics.median(sizes.values()) <= MEDIAN_FUNCTION


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def modules_after(code: str) -> set[str]:
    script = f"import sys, json\n{code}\nprint('MODULES' + json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout.split("MODULES")[-1]))


def test_import_limbeck_is_light():
    loaded = modules_after("import limbeck")
    assert not loaded & {"torch", "transformers", "datasets", "optuna", "matplotlib", "sklearn", "pandas"}


def test_the_core_loads_without_transformers():
    loaded = modules_after("import limbeck; limbeck.Distiller, limbeck.Term, limbeck.fit, limbeck.Settings")
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "optuna", "matplotlib"}


def test_help_loads_no_torch():
    call = "from limbeck.cli import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass"
    assert not modules_after(call) & {"torch", "transformers", "datasets", "pandas", "limbeck.recipe"}


def test_public_names():
    """The surface grows on purpose only."""
    assert len(limbeck.__all__) <= 26
    for name in limbeck.__all__:
        assert getattr(limbeck, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Distller'"):
        limbeck.Distller  # noqa: B018


def public_functions():
    """What the package and its parts export, but for plain values."""
    parts = (
        ".deploy",
        ".losses",
        ".report",
        ".report.search",
        ".report.suite",
        ".students",
        ".tasks",
        ".teachers",
        ".train",
    )
    for part in ("", ".search", *parts):
        module = importlib.import_module(f"limbeck{part}")
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) or (inspect.isclass(thing) and not part):
                yield pytest.param(thing, id=f"{module.__name__}.{name}")
    for name in LOSSES:
        yield pytest.param(LOSSES.get(name), id=name)


@pytest.mark.parametrize("thing", list(public_functions()))
def test_public_functions_have_a_runnable_example(thing):
    assert ">>>" in (inspect.getdoc(thing) or "")
