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


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "shard"), counted(2000, "shard")
        ('1 shard', '2,000 shards')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def recipe_file(path: Path, takes_folders: bool = False) -> Path:
    """The recipe that a path names; a run's folder has its own.

    Raises:
        ValueError: a folder, where none is taken or none is in it.
    """
    if not path.is_dir():
        return path
    own = path / "recipe.yaml"
    if not own.is_file():
        raise ValueError(f"{path} is a folder without a recipe.yaml; name a recipe's file")
    if not takes_folders:
        raise ValueError(f"{path} is a folder; name the recipe in it, {own}")
    return own


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
            loaded = Recipe.load(recipe_file(recipe, takes_folders=True), changes or [])
            built = build_cache(loaded, out, retrain=retrain, observer=observer)
    except KeyboardInterrupt as stop:
        said = str(stop) or f"interrupted; what the teacher said is kept in {out}"
        raise Interrupted(f"{said}; the same command goes on from there") from None
    if not built.is_main:
        return
    size = f"{counted(built.examples, 'example')}, {counted(built.bytes, 'byte')}"
    console.print(f"{out}: {size}; the teacher ran for {built.computed:,} now", highlight=False, soft_wrap=True)


@app.command()
def info(folder: Folder) -> None:
    """Say what is kept, of which teacher, and how large it is."""
    from limbeck.cache import Store, read_manifest

    belongs = read_manifest(folder)
    store = Store(belongs, folder)
    size = f"{counted(len(store.shards), 'shard')}, {counted(store.nbytes(), 'byte')}"
    console.print(f"{folder}: {counted(len(store), 'example')} in {size}", highlight=False, soft_wrap=True)
    for tap in sorted(store.taps()):
        form = ", ".join(f"{k} {v}" for k, v in store.form(tap).items() if k != "form")
        nbytes, entries = store.size(tap)
        each = f"{nbytes / max(1, entries):,.1f} bytes for each of {entries:,}"
        console.print(
            f"  {tap}, kept by {store.kind(tap)}: {store.form(tap)['form']} ({form}), {each}", highlight=False
        )
    for field, value in belongs.items():
        console.print(f"  {field}: {value}", highlight=False, soft_wrap=True)


@app.command()
def verify(folder: Folder) -> None:
    """Read every byte, and say what is damaged; the exit status is 1 if anything is."""
    from limbeck.cache import verify as find_damage

    wrong = find_damage(folder)
    console.print("\n".join(wrong) if wrong else f"{folder} is whole", highlight=False, soft_wrap=True)
    if wrong:
        console.print(_remedy(folder, wrong), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1)


def _remedy(folder: Path, wrong: list[str]) -> str:
    """What to do about damage; what lies in folders of the cache is written by a build, which replaces it."""
    build = f"limbeck cache build RECIPE --out {folder}"
    in_folders = [line for line in wrong if line.endswith(" is damaged") and "/" in line]
    lost = [line for line in wrong if line.endswith((" is missing", "build it again"))]
    said = [
        f"limbeck cache prune {folder} removes it; {build}, or a run with the teacher itself, computes it anew"
    ]
    if in_folders or lost:
        said = said if len(in_folders) + len(lost) < len(wrong) else []
        said.append(f"{build} writes what stands for the teacher anew")
    return "\n".join(said)


@app.command()
def prune(folder: Folder) -> None:
    """Delete what is damaged, was not finished, or stands twice."""
    from limbeck.cache import prune as delete

    gone = delete(folder)
    console.print(
        "\n".join(f"deleted {name}" for name in gone) if gone else "nothing to delete",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def merge(
    target: Annotated[Path, typer.Argument(help="A new folder, or a cache to add to.")],
    sources: Annotated[list[Path], typer.Argument(help="Caches of one and the same teacher.")],
) -> None:
    """Bring several caches of one teacher together."""
    from limbeck.cache import merge as bring

    if all(source.resolve() == target.resolve() for source in sources):
        raise ValueError(f"{target} cannot be merged into itself; name another cache")
    came = bring(target, sources)
    nothing = "" if came else ", it has them all already"
    console.print(f"{counted(came, 'shard')} came into {target}{nothing}", highlight=False, soft_wrap=True)
