"""The command line. Nothing heavy is imported before a command runs, so that ``limbeck --help`` is instant."""

from __future__ import annotations

import errno
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from limbeck.cli_cache import Interrupted
from limbeck.cli_cache import app as cache_app
from limbeck.cli_deploy import evaluate, export
from limbeck.cli_distill import NOTHING_BEGUN, Debug, demo, distill
from limbeck.cli_search import search
from limbeck.registry import nearest

if TYPE_CHECKING:
    from limbeck.registry import Registry
    from limbeck.testing import Verdict

ABOUT = "Knowledge distillation: a trained teacher goes in; a smaller, faster student comes out."

app = typer.Typer(
    help=ABOUT,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(distill)
app.add_typer(cache_app, name="cache")
app.command()(search)
app.command()(export)
app.command()(evaluate)
console = Console()
errors = Console(stderr=True)

LISTS = (
    *("losses", "transforms", "temperatures", "schedules", "balances", "projections"),
    *("tasks", "metrics", "presets"),
)
WIDTH, INDENT = 100, 24
INTERRUPTED = 130
KEPT = "; nothing finished is lost"
CURES = {
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY), "; name another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; choose a folder that can be written"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"; make room, and start again{KEPT}"),
    errno.EFBIG: f"; choose a disk that takes larger files, or see ulimit -f, and start again{KEPT}",
    errno.ENOENT: "; check the path",
}
"""What to do about an error of the file system."""
COLORS = {"passed": "green", "failed": "red", "skipped": "yellow"}
HINTS = {
    "is zero at equality": "--no-identity",
    "is never negative": "--negative",
    "does not depend on the cut": "--whole-batch",
    "ignores a constant added to the logits": "no --logits",
}
"""What to say on the command line where a failed promise was not meant."""


@app.callback(help=ABOUT)
def show_help(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Show the version or, where no command is named, the help."""
    if version:
        from limbeck import __version__

        typer.echo(f"limbeck {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(name="list")
def list_names(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(LISTS)}.")],
    debug: Debug = False,
) -> None:
    """List what can be named in a recipe."""
    if what not in LISTS:
        raise ValueError(f"there is no list of {what!r}; {nearest(what, LISTS)}")
    for name, lines in _entries(what):
        first, *more = _wrapped(lines) or [""]
        console.print(
            f"[bold]{name:<{INDENT - 1}}[/bold] {_escaped(first)}".rstrip(), highlight=False, soft_wrap=True
        )
        for line in more:
            console.print(" " * INDENT + _escaped(line), highlight=False, soft_wrap=True)


@app.command()
def check(
    loss: Annotated[str, typer.Argument(help="package.module:function, or a name of: limbeck list losses.")],
    logits: Annotated[
        bool, typer.Option(help="It compares logits: a constant added to them counts nothing.")
    ] = False,
    identity: Annotated[
        bool, typer.Option(help="Whether it is zero where the student equals the teacher.")
    ] = True,
    negative: Annotated[bool, typer.Option("--negative", help="It may be negative.")] = False,
    whole_batch: Annotated[
        bool, typer.Option("--whole-batch", help="It compares the examples of a batch.")
    ] = False,
    shape: Annotated[
        list[str] | None, typer.Option(help="Of its inputs: B,7 or B,L,7 (B examples, L positions) or B,3,5,5.")
    ] = None,
    places: Annotated[int | None, typer.Option(min=1, help="How many tensors it takes on each side.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="Of the loss.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Check that a loss does what every loss has to do: edges, masks, precision, gradients."""
    sys.path.insert(0, str(Path.cwd()))
    from limbeck.losses import LOSSES
    from limbeck.testing import contract_of, verdicts

    function = LOSSES.get(loss)
    if not callable(function):
        raise ValueError(f"{loss!r} is no function")
    promises = {"logits": logits, "shift_invariant": logits, "non_negative": not negative}
    promises |= {"per_example": not whole_batch} | ({} if identity else {"identity": False})
    contract = contract_of(function, options=_options(option), shapes=shape or (), places=places, **promises)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for verdict in verdicts(contract):
        counts[verdict.outcome] += 1
        said = f": {textwrap.shorten(verdict.reason, 240)}{_hint(verdict)}" if verdict.reason else ""
        outcome = f"[{COLORS[verdict.outcome]}]{verdict.outcome:<7}[/]"
        console.print(f"{outcome}  {verdict.check}{_escaped(said)}", highlight=False, soft_wrap=True)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), highlight=False)
    if counts["failed"]:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, suite or search that is finished.")],
    debug: Debug = False,
) -> None:
    """Print the report of a finished run, suite or search, and write its HTML page (and README) anew."""
    from limbeck.report import Report, print_report, write_report
    from limbeck.report.search import SearchReport, is_search, print_search, write_search
    from limbeck.report.suite import SuiteReport, is_suite_folder, print_suite, write_suite

    place = folder if folder.is_dir() else folder.parent
    if is_suite_folder(folder):
        suite = SuiteReport.load(folder)
        print_suite(suite, console)
        write_suite(suite, place)
    elif is_search(folder):
        found = SearchReport.load(folder)
        print_search(found, console)
        write_search(found, place)
    else:
        run = Report.load(folder)
        print_report(run, console)
        write_report(run, place)


def main() -> None:
    """Run a command; turn an error into one clear line and an exit status."""
    debug = "--debug" in sys.argv
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # where nothing of this package was at work: typer says it so
            _fail(NOTHING_BEGUN, INTERRUPTED)
        sys.exit(status)
    except Interrupted as stop:
        _fail(str(stop), INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(_one_line(error), 2)


def _one_line(error: Exception) -> str:
    usage = getattr(error, "format_message", None)  # typer has its errors from a private copy of click
    if usage is not None:
        return str(usage())
    if isinstance(error, (ValueError, TypeError, ArithmeticError)):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        if error.errno is None:  # a library's own words, maybe on several lines
            return " ".join(str(error).split()) or type(error).__name__
        return f"{error.strerror or error}{place}{CURES.get(error.errno, KEPT)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}; --debug shows where"


def _fail(message: str, status: int) -> None:
    errors.print(f"[red]error:[/red] {_escaped(message)}", highlight=False, soft_wrap=True)
    sys.exit(status)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _hint(verdict: Verdict) -> str:
    said = HINTS.get(verdict.check) if verdict.outcome == "failed" else None
    return f" ({said}, if that is meant)" if said else ""


def _options(written: list[str] | None) -> dict[str, Any]:
    """Options of a loss, each KEY=VALUE with a value in YAML."""
    import yaml

    options = {}
    for text in written or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"the option {text!r} has no value; write KEY=VALUE")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"the value of the option {text!r} is no YAML") from None
    return options


def _wrapped(lines: list[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH - INDENT)]


def _entries(what: str) -> list[tuple[str, list[str]]]:
    """What has a name, and the lines that say what it is: of a function its first line, options and paper."""
    if what == "tasks":
        from limbeck.tasks import about_tasks

        return [(name, [about]) for name, about in about_tasks().items()]
    if what == "metrics":
        from limbeck.metrics import METRICS

        return [(n, ["higher is better" if m.higher_is_better else "lower is better"]) for n, m in METRICS.items()]
    if what == "presets":
        from limbeck.presets import PRESETS, load_preset

        return [(name, [load_preset(name).about]) for name in PRESETS]
    from limbeck.losses.describe import describe, shown

    registry = _registry(what)
    entries = []
    for name in registry:
        found = describe(registry.get(name), name)
        options = ", ".join(shown(option, default) for option, default in found.options.items())
        entries.append((name, [found.summary, options, found.paper]))
    return entries


def _registry(what: str) -> Registry[Callable[..., Any]]:
    if what == "losses":
        from limbeck.losses import LOSSES

        return LOSSES
    if what in ("transforms", "temperatures"):
        from limbeck.losses.transforms import TEMPERATURES, TRANSFORMS

        return TRANSFORMS if what == "transforms" else TEMPERATURES
    if what == "schedules":
        from limbeck.schedules import SCHEDULES

        return SCHEDULES
    if what == "balances":
        from limbeck.balance import BALANCES

        return cast("Registry[Callable[..., Any]]", BALANCES)
    from limbeck.projectors import PROJECTORS

    return PROJECTORS
