"""``limbeck cache``: looking after what teachers said. `limbeck.cli` adds these commands to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Look after kept signals of a teacher.", no_args_is_help=True)
console = Console()


class Interrupted(Exception):  # noqa: N818  (no error: the user wanted it)
    """Ctrl-C, with what is to be said about it; typer would swallow a KeyboardInterrupt."""


Folder = Annotated[Path, typer.Argument(help="A folder that a recipe named as its cache.")]


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="A recipe, in YAML; a run's folder has its own.")],
    out: Annotated[Path, typer.Option(help="The folder for the signals, new or begun before.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: cache.dtype=fp16.")
    ] = None,
    retrain: Annotated[bool, typer.Option(help="Fine-tune the teacher anew.")] = False,
) -> None:
    """Ask a recipe's teacher about all training examples, once; runs then take it as --teacher cache:DIR."""
    from limbeck.building import build_cache
    from limbeck.progress import ConsoleObserver
    from limbeck.recipe import Recipe

    try:
        with ConsoleObserver(console) as observer:
            built = build_cache(Recipe.load(recipe, changes or []), out, retrain=retrain, observer=observer)
    except KeyboardInterrupt as stop:
        said = str(stop) or f"interrupted; what the teacher said is kept in {out}"
        raise Interrupted(f"{said}; the same command goes on from there") from None
    if not built.is_main:
        return
    console.print(
        f"{out}: {built.examples:,} examples, {built.bytes:,} bytes; the teacher ran for {built.computed:,} now",
        highlight=False,
    )


@app.command()
def info(folder: Folder) -> None:
    """Say what is kept, of which teacher, and how large it is."""
    from limbeck.cache import Store, read_manifest

    belongs = read_manifest(folder)
    store = Store(belongs, folder)
    console.print(f"{folder}: {len(store):,} examples in {len(store.shards)} shards, {store.nbytes():,} bytes")
    for tap in sorted(store.taps()):
        form = ", ".join(f"{k} {v}" for k, v in store.form(tap).items() if k != "form")
        nbytes, entries = store.size(tap)
        each = f"{nbytes / max(1, entries):,.1f} bytes for each of {entries:,}"
        console.print(
            f"  {tap}, kept by {store.kind(tap)}: {store.form(tap)['form']} ({form}), {each}", highlight=False
        )
    for field, value in belongs.items():
        console.print(f"  {field}: {value}", highlight=False)


@app.command()
def verify(folder: Folder) -> None:
    """Read every byte, and say what is damaged; the exit status is 1 if anything is."""
    from limbeck.cache import verify as find_damage

    wrong = find_damage(folder)
    console.print("\n".join(wrong) if wrong else f"{folder} is whole", highlight=False)
    if wrong:
        console.print(f"limbeck cache prune {folder} removes it; a run computes it anew", highlight=False)
        raise typer.Exit(1)


@app.command()
def prune(folder: Folder) -> None:
    """Delete what is damaged, was not finished, or stands twice."""
    from limbeck.cache import prune as delete

    gone = delete(folder)
    console.print("\n".join(f"deleted {name}" for name in gone) if gone else "nothing to delete", highlight=False)


@app.command()
def merge(
    target: Annotated[Path, typer.Argument(help="A new folder, or a cache to add to.")],
    sources: Annotated[list[Path], typer.Argument(help="Caches of one and the same teacher.")],
) -> None:
    """Bring several caches of one teacher together."""
    from limbeck.cache import merge as bring

    came = bring(target, sources)
    console.print(f"{came} shards came into {target}", highlight=False)
