"""``limbeck search``: many students on one ground, the one that answers, and its proof."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from limbeck.cli_cache import Interrupted, recipe_file
from limbeck.cli_distill import Debug, Kept, Set, read_recipe, said
from limbeck.report.candidates import Demands
from limbeck.report.quantities import milliseconds_of, seconds_of, size_of

if TYPE_CHECKING:
    from limbeck.recipe import Recipe

console = Console()


def search(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, in YAML; search: in it is the space.")] = None,
    trials: Annotated[int, typer.Option(help="How many trials there shall be in the study altogether.")] = 20,
    time_limit: Annotated[
        str | None, typer.Option(help="After which no trial goes on: 30s, 10m, 2h. The proof comes after that.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the teacher's score that is asked: 0.97.")] = None,
    speedup: Annotated[float | None, typer.Option(help="How many times as fast as the teacher: 3.5.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Largest size of the weights: 20MB.")] = None,
    latency: Annotated[str | None, typer.Option(help="Longest time for one example: 2ms.")] = None,
    space: Annotated[
        list[str] | None,
        typer.Option("--space", metavar="PATH=DISTRIBUTION", help="What to try: training.epochs=int(2, 6)."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that do trials.")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="A journal's file or a database that others share; see docs/search.md.")
    ] = None,
    study: Annotated[str, typer.Option(help="The study's name there.")] = "limbeck",
    seed: Annotated[int | None, typer.Option(min=0, help="Of the values that are drawn.")] = None,
    proof: Annotated[
        bool,
        typer.Option(help="Train the chosen student beside its baseline, judged on the validation data."),
    ] = True,
    task: Annotated[str | None, typer.Option(help="glue/rte, table, ...; see: limbeck list tasks.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder or file; by default the hub.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text column of a table; twice for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="Label column of a table.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder, hub id, or package.module:function.")] = None,
    student: Annotated[
        str | None, typer.Option(help="layers:1,3,5 or shrink:0.5 of the teacher, or a model.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="fast, balanced or best: what is not said comes from it.")
    ] = None,
    finetuned_cache: Kept = None,
    out: Annotated[Path | None, typer.Option(help="Folder for everything; by default runs/TASK-search.")] = None,
    changes: Set = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Train the proof this often, and pool.")] = None,
    debug: Debug = False,
) -> None:
    """Search for the best student, or the smallest that keeps what is asked, and prove it."""
    parts: dict[str, Any] = {
        "task": said(name=task, data=data, text=text, label=label),
        "teacher": {} if teacher is None else {"model": teacher},
        "student": student or {},
        "preset": preset,
        "store": finetuned_cache,
    }
    if recipe is None and (task is None or teacher is None or student is None):
        raise ValueError("name a recipe, or --task, --teacher and --student; see: limbeck search --help")
    demands = Demands(
        keep,
        speedup,
        None if max_size is None else size_of(max_size),
        None if latency is None else milliseconds_of(latency),
    )
    options = {
        "trials": trials,
        "time_limit": None if time_limit is None else seconds_of(time_limit),
        "space": _space(recipe, space or [], changes or []),
        "demands": demands,
        "workers": workers,
        "storage": storage,
        "study": study,
        "seed": seed,
        "proof": proof,
    }
    _run(read_recipe(recipe, changes, seeds, parts), out, options)


def _space(path: Path | None, options: Sequence[str], changes: Sequence[str]) -> dict[str, Any] | None:
    """The space from a recipe's file, then --set search.PATH, then --space; None where nothing says it."""
    from limbeck.recipe import SEARCH, read_yaml
    from limbeck.search.searching import space_in
    from limbeck.search.space import flat

    written = space_in(read_yaml(recipe_file(path))) if path is not None else None
    if any(change.startswith(f"{SEARCH}=") for change in changes):
        raise ValueError("--set search=... names no path; write --space 'training.epochs=int(2, 6)'")
    set_too = [change.removeprefix(f"{SEARCH}.") for change in changes if change.startswith(f"{SEARCH}.")]
    said = {**_options(set_too), **_options(options)}
    if written is None:
        return said or None
    return {**flat(written), **said}


def _options(space: Sequence[str]) -> dict[str, str]:
    """Distributions by path, each PATH=DISTRIBUTION.

    Raises:
        ValueError: no equals sign, or a path twice.
    """
    found: dict[str, str] = {}
    for text in space:
        path, equals, distribution = text.partition("=")
        if not equals or not path:
            raise ValueError(f"--space {text!r} has no distribution; write --space 'training.epochs=int(2, 6)'")
        if path in found:
            raise ValueError(f"--space names {path} twice, {found[path]} and {distribution}; drop one")
        found[path] = distribution
    return found


def _run(recipe: Recipe, out: Path | None, options: Mapping[str, Any]) -> None:
    from limbeck.progress import ConsoleObserver
    from limbeck.report.search import print_search
    from limbeck.search import search as execute
    from limbeck.search.searching import folder_for

    folder = folder_for(recipe, out)
    command = shlex.join(["limbeck", *sys.argv[1:]])
    try:
        with ConsoleObserver(console) as observer:
            found = execute(recipe, folder, observer=observer, command=command, **options)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; what was finished is kept in {folder}; the same command goes on from there"
        ) from None
    print_search(found, console)
    console.print(f"\nReport: {folder / 'search.html'}", soft_wrap=True)
    if found.choice.chosen is None:
        raise ValueError(
            f"no student has {found.demands.in_words(found.metric)}; all that was tried is kept in {folder}"
        )
