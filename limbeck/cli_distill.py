"""``limbeck demo`` and ``limbeck distill``: from what was typed to a recipe, and its run on the screen."""

from __future__ import annotations

import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from limbeck.cli_cache import Interrupted, recipe_file
from limbeck.registry import closest, nearest

if TYPE_CHECKING:
    from limbeck.recipe import Recipe

console = Console()

Out = Annotated[Path | None, typer.Option(help="Folder for everything; by default runs/ and the task's name.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: training.epochs=5.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Train baseline and student this often, and pool.")]
Overwrite = Annotated[bool, typer.Option(help="Delete what is in the folder and start anew.")]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]
Kept = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where fine-tuned teachers are kept; ~/.cache/limbeck."),
]

DEMOS = ("docstrings", "digits")
PLACES = ("off", "memory")
NOTHING_BEGUN = "interrupted; nothing was begun"


def demo(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(DEMOS)}.")] = "docstrings",
    out: Out = None,
    changes: Set = None,
    seeds: Seeds = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Distil on data that comes with Python: docstrings of the standard library, or scikit-learn's digits."""
    if task not in DEMOS:
        raise ValueError(f"there is no demo {task!r}; {nearest(task, DEMOS)}")
    with resources.as_file(resources.files("limbeck") / "recipes" / f"demo-{task}.yaml") as path:
        recipe = read_recipe(path, changes, seeds)
    _run(recipe, out or Path("runs") / f"demo-{task}", overwrite, retrain=False)


def distill(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, in YAML.")] = None,
    task: Annotated[
        str | None, typer.Option(help="glue/rte, glue/all, table, ...; see: limbeck list tasks.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder or file; by default the hub.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text column of a table; twice for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="Label column of a table.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder, hub id, package.module:function, or cache:DIR.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="layers:1,3,5 or shrink:0.5 of the teacher, or a model.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="fast, balanced or best: what is not said comes from it.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Where what the teacher says is remembered: off, memory or a folder.")
    ] = None,
    cache_gib: Annotated[
        float | None, typer.Option(help="GiB of it that are held in memory; more goes to the disk.")
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Option(help="More texts for the student, without labels: a file or a folder.")
    ] = None,
    augment: Annotated[
        list[str] | None, typer.Option(help="Add altered copies of the texts: delete, mask, ngram, replace, ...")
    ] = None,
    copies: Annotated[int | None, typer.Option(min=1, help="Altered copies of each text.")] = None,
    finetuned_cache: Kept = None,
    out: Out = None,
    changes: Set = None,
    seeds: Seeds = None,
    notes: Annotated[
        list[str] | None,
        typer.Option("--note", metavar="TASK=TEXT", help="A remark beside one of several tasks: qnli=TEXT."),
    ] = None,
    retrain: Annotated[bool, typer.Option(help="Fine-tune the teacher anew.")] = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Distil a teacher into a student, beside a plainly trained twin, and report."""
    parts: dict[str, Any] = {
        "task": said(name=task, data=data, text=text, label=label),
        "teacher": {} if teacher is None else {"model": teacher},
        "student": student or {},
        "cache": said(place=cache, gib=cache_gib),
        "extra": said(data=extra, augment=augment, copies=copies),
        "preset": preset,
        "store": finetuned_cache,
    }
    if recipe is None and (task is None or teacher is None or student is None):
        raise ValueError("name a recipe, or --task, --teacher and --student; see: limbeck distill --help")
    from limbeck.suite import is_suite

    made = read_recipe(recipe, changes, seeds, parts)
    if is_suite(made):
        _run_suite(made, out, _notes(notes), overwrite, retrain)
    elif notes:
        raise ValueError(f"--note is for several tasks, and {made.task.name} is one; leave it out")
    else:
        _run(made, out, overwrite, retrain)


def said(**options: Any) -> dict[str, Any]:
    """A part of a recipe, of what was typed."""
    return {key: value for key, value in options.items() if value not in (None, [], "")}


def read_recipe(
    path: Path | None,
    changes: list[str] | None,
    seeds: int | None,
    parts: dict[str, Any] | None = None,
) -> Recipe:
    """A recipe from a file, then the command's own options, then --set.

    Args:
        path: The file, if there is one.
        changes: What --set says.
        seeds: What --seeds says.
        parts: Parts of a recipe, by key, as the command's options say them; what was not said is None or empty.

    Raises:
        ValueError: no such file, or no recipe.
    """
    from limbeck.recipe import Recipe, read_yaml, spelled_out

    data = spelled_out(read_yaml(recipe_file(path))) if path is not None else {}
    for key, part in (parts or {}).items():
        if part is None or (key == "extra" and not part):  # which is not there unless it says something
            continue
        # Layers or a model, a model or a cache: one takes the other's place, with all that belongs to it.
        kept = key == "teacher" and part.get("model", "").startswith("cache:")
        replaces = not isinstance(part, dict) or kept
        data[key] = part if replaces else {**(data.get(key) or {}), **part}
    recipe = Recipe.parse(data, [*([f"seeds={seeds}"] if seeds else []), *(changes or [])])
    _check_place(recipe.cache.place)
    return recipe


def _check_place(place: str) -> None:
    """Refuse what looks like off or memory written wrong, and would be a new folder."""
    meant = closest(place.strip().lower(), PLACES, cutoff=0.75)
    if meant and place not in PLACES and Path(place).name == place and not Path(place).exists():
        raise ValueError(f"the cache {place!r} is no folder yet; did you mean {meant[0]!r}? else write ./{place}")


def _run(recipe: Recipe, out: Path | None, overwrite: bool, retrain: bool) -> None:
    from limbeck.progress import ConsoleObserver
    from limbeck.report.console import print_report
    from limbeck.run import default_folder, distill

    folder = out or default_folder(recipe)
    command = shlex.join(["limbeck", *sys.argv[1:]])
    observer = ConsoleObserver(console)
    try:
        with observer:
            found = distill(
                recipe, folder, overwrite=overwrite, retrain=retrain, observer=observer, command=command
            )
    except KeyboardInterrupt as stop:
        said = how_to_go_on(str(stop), overwrite) if observer.begun else NOTHING_BEGUN
        raise Interrupted(said) from None
    print_report(found, console)
    console.print(f"\nReport: {folder / 'report.html'}   Student: {folder / 'student'}", soft_wrap=True)


def _run_suite(recipe: Recipe, out: Path | None, notes: dict[str, str], overwrite: bool, retrain: bool) -> None:
    from limbeck.progress import ConsoleObserver
    from limbeck.report.suite import print_suite
    from limbeck.report.suite.report import FAILED
    from limbeck.run import default_folder
    from limbeck.suite import distill_suite

    folder, begun = out or default_folder(recipe), []

    def observer_of(task: str, number: int, count: int) -> ConsoleObserver:
        begun.append(task)
        console.print(f"\n[bold]{number} of {count}[/bold]", highlight=False)
        return ConsoleObserver(console)

    command = shlex.join(["limbeck", *sys.argv[1:]])
    try:
        found = distill_suite(
            recipe,
            folder,
            notes=notes,
            overwrite=overwrite,
            retrain=retrain,
            observers=observer_of,
            command=command,
        )
    except KeyboardInterrupt as stop:
        raise Interrupted(how_to_go_on(str(stop), overwrite) if begun else NOTHING_BEGUN) from None
    console.print()
    print_suite(found, console)
    console.print(f"\nReport: {folder / 'suite.html'}   Runs: {folder}", soft_wrap=True)
    if found.in_state(FAILED):
        raise typer.Exit(1)


def _notes(written: list[str] | None) -> dict[str, str]:
    """Remarks by task, each TASK=TEXT."""
    notes = {}
    for text in written or []:
        task, equals, remark = text.partition("=")
        if not equals or not remark.strip():
            raise ValueError(
                f"the note {text!r} says nothing of a task; write TASK=TEXT, as in qnli='seen before'"
            )
        notes[task.strip().removeprefix("glue/")] = remark.strip()
    return notes


def how_to_go_on(said: str, overwrite: bool) -> str:
    """What to type after an interruption, since a command that overwrites would begin anew.

    Args:
        said: What is known of the interruption; may be empty.
        overwrite: Whether the command was told to overwrite.
    """
    words = [word for word in sys.argv[1:] if word != "--overwrite"]
    again = shlex.join(["limbeck", *words])
    cure = f"to go on from there, type {again}" if overwrite else "the same command goes on from there"
    return f"{said or 'interrupted; what was finished is kept'}; {cure}"
