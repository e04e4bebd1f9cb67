"""The run on the screen: the plan as a table, a bar for each training."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from limbeck.plan import Observer, Plan
from limbeck.report.format import parameters
from limbeck.terms import Term
from limbeck.train import Callback, State

ROUNDING = 1e-6


class Bar(Callback):
    """Moves a bar with a training.

    Args:
        progress: Where the bar is.
        bar: The bar.
    """

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self.progress = progress
        self.bar = bar
        self.note = ""

    def on_start(self, state: State) -> None:
        """Set the bar to where the training goes on."""
        self.progress.update(self.bar, total=state.total_steps, completed=state.step, visible=True)

    def on_step(self, state: State) -> None:
        """Move on by one step."""
        self._draw(state)

    def on_evaluate(self, state: State) -> None:
        """Show the last score."""
        self.note = "".join(f"  {name} {value:.3f}" for name, value in state.scores.items())
        self._draw(state)

    def _draw(self, state: State) -> None:
        loss = f"loss {state.loss:.3f}" if state.terms else ""  # until the first line of the log there is none
        self.progress.update(self.bar, completed=state.step, note=f"{loss}{self.note}")

    def on_end(self, state: State) -> None:
        """Fill the bar, even where training stopped early."""
        self.progress.update(self.bar, completed=state.total_steps)


class ConsoleObserver(Observer):
    """Shows a run on a console; used as a context manager, which ends the bars.

    Args:
        console: Where to.

    Attributes:
        begun: Whether the preflight is done and the run's folder is open.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.begun = False
        self.counts: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> ConsoleObserver:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def on_plan(self, plan: Plan) -> None:
        """Print what is about to happen."""
        self.begun = True
        sizes = ", ".join(f"{count} {name}" for name, count in plan.examples.items())
        self.console.print(f"[bold]{escape(plan.task)}[/bold]: {sizes} examples")
        for role, count in plan.parameters.items():
            steps = f", {plan.steps[role]} steps" if role in plan.steps else ""
            state = f", {plan.teacher}" if role == "teacher" else ""
            self.console.print(f"  {role}: {parameters(count)} parameters{state}{steps}")
        self.console.print(_term_table(plan))
        self.progress.start()

    def on_note(self, text: str) -> None:
        """Print it."""
        self.console.print(f"  {escape(text)}")

    def on_stage(self, name: str) -> None:
        """Remember the stage's name; its bar comes with its callbacks."""
        if name == "evaluation":
            self.progress.stop()
            self.console.print("Measuring scores, intervals and speed ...")

    def on_count(self, name: str, done: int, total: int) -> None:
        """Move the bar of that name."""
        if name not in self.counts:
            self.counts[name] = self.progress.add_task(name, total=total, note="")
            self.progress.start()  # this may be before there is a plan
        self.progress.update(self.counts[name], completed=done)

    def callbacks(self, stage: str) -> list[Callback]:
        """A bar for the stage, drawn when its training starts: a stage that is done needs none."""
        return [Bar(self.progress, self.progress.add_task(stage, total=1, note="", visible=False))]


def _value(value: float) -> str:
    """The value of a term; what rounding leaves below zero of a distance that is zero is written as zero."""
    return "0" if -ROUNDING < value < 0 else f"{value:.4g}"


def _weight(term: Term) -> str:
    """A number in three digits, or what a scheduled weight follows."""
    return f"{term.weight:.3g}" if isinstance(term.weight, float) else str(term.weight)


def _term_table(plan: Plan) -> Table:
    """One row for each term; the column of projections only where there are any."""
    projected = any(planned.term.project for planned in plan.terms)
    headings = ["term", "loss", "student", "teacher", "weight", *(["projection"] if projected else []), "at start"]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")  # what learns from what must be readable, however narrow
    for planned in plan.terms:
        term = planned.term
        row = [term.name, term.loss_name, term.tap, term.teacher_tap, _weight(term)]
        if projected:
            row.append(f"{term.project} ({planned.parameters:,})" if term.project else "")
        table.add_row(*(escape(cell) for cell in row), _value(planned.value))
    return table
