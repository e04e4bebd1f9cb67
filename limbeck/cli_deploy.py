"""``limbeck export`` and ``limbeck evaluate``: models as files that are served. `limbeck.cli` has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from limbeck.tasks import TaskOptions

console = Console()

TaskName = Annotated[str | None, typer.Option("--task", help="glue/rte, table, ...; a run has its own.")]
Data = Annotated[str | None, typer.Option(help="Folder or file of the task; by default the hub.")]
Text = Annotated[list[str] | None, typer.Option(help="Text column of a table; twice for pairs.")]
Label = Annotated[str | None, typer.Option(help="Label column of a table.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens after which a text is cut.")]
EvalExamples = Annotated[int | None, typer.Option(min=1, help="Use a random part of the evaluation data.")]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]


def export(
    model: Annotated[str, typer.Argument(help="Folder of a finished run, or a transformers folder or hub id.")],
    out: Annotated[Path, typer.Option(help="A new folder for the model and what belongs to it.")],
    format: Annotated[str, typer.Option(help="onnx, or torch for a .pt2 file.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Make the weights int8.")] = False,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators.")] = None,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Let onnxruntime rewrite the graph, for itself alone.")
    ] = False,
    role: Annotated[str, typer.Option(help="student or teacher of a run.")] = "student",
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    max_length: MaxLength = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts to check with, one in a line, where there is no task.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Inputs that the export is checked on.")] = 200,
    allowance: Annotated[
        float | None, typer.Option(min=0, help="What int8 may cost; 0.01, by default, is a point.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    debug: Debug = False,
) -> None:
    """Write a model as ONNX, int8 or .pt2, checked against PyTorch on real inputs."""
    from limbeck.deploy.export import ExportOptions, check_folder, need_format
    from limbeck.deploy.export import export as write
    from limbeck.deploy.parity import ALLOWANCE
    from limbeck.deploy.sources import find_source

    if allowance is not None and not int8:
        raise ValueError("--allowance is what int8 may cost; add --int8, or leave it out")
    options = ExportOptions(format, int8, opset, optimize, examples, ALLOWANCE if allowance is None else allowance)
    need_format(options)
    check_folder(out, overwrite)
    source = find_source(model, role, task_options(task, data, text, label, max_length), texts)
    made = write(source, out, options, overwrite=overwrite, say=_say)
    size = f"{made.size_bytes / 1e6:.1f} MB, {made.runtime}" + (f", opset {made.opset}" if made.opset else "")
    console.print(f"{out / made.file}: {size}", highlight=False, markup=False, soft_wrap=True)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Exports, RUN or RUN:teacher, transformers folders; the first is compared with."),
    ],
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    max_length: MaxLength = None,
    eval_examples: EvalExamples = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a timed batch.")] = 1,
    length: Annotated[int | None, typer.Option(help="Tokens of timed texts, cut and padded.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each model; by default as PyTorch has.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns.")] = 60,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    debug: Debug = False,
) -> None:
    """Score and time models side by side, in PyTorch, ONNX or torch.export."""
    from limbeck.atomic import write_text
    from limbeck.deploy.console import print_evaluation
    from limbeck.deploy.evaluation import evaluate as measure

    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"there is no folder {json_file.parent} for {json_file.name}; make it, or name another")
    options = task_options(task, data, text, label, max_length, eval_examples)
    found = measure(models, options, batch_size=batch_size, length=length, threads=threads, repeats=repeats)
    print_evaluation(found, console)
    if json_file is not None:
        write_text(json_file, found.to_json() + "\n")


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def task_options(
    task: str | None,
    data: str | None = None,
    text: list[str] | None = None,
    label: str | None = None,
    max_length: int | None = None,
    eval_examples: int | None = None,
) -> TaskOptions | None:
    """The task that a command names; None where it names none.

    Raises:
        ValueError: an option of a task that is not named, or one that it does not take.
    """
    given = {"data": data, "text": text, "label": label, "max_length": max_length, "eval_examples": eval_examples}
    chosen = {name: value for name, value in given.items() if value}
    if task is None:
        if chosen:
            raise ValueError(f"--{next(iter(chosen)).replace('_', '-')} belongs to a task; name it with --task")
        return None
    from limbeck.tasks import TaskOptions

    return TaskOptions.model_validate({"name": task, **chosen})
