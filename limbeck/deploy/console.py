"""An evaluation in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.deploy.evaluation import Evaluation, Measured
from limbeck.metrics import get_metric
from limbeck.report.format import Scale, scale_for

if TYPE_CHECKING:
    from rich.console import Console

MEGABYTE = 1e6


def print_evaluation(found: Evaluation, console: Console) -> None:
    """Print models side by side: each a block of lines, so that long names fit anywhere.

    Args:
        found: What to show.
        console: Where to print.

    Example:
        >>> from rich.console import Console
        >>> from limbeck.report.report import Interval
        >>> point = Interval(1.0, 1.0, 1.0)
        >>> one = Measured("a", "ONNX", point, None, None, 2, 8_000_000, point, point)
        >>> print_evaluation(Evaluation("t", "accuracy", 9, 1, None, 1, "in turns", [one], {}), Console(width=80))
        t, accuracy on 9 examples...
    """
    from rich.text import Text

    console.print(Text(f"{found.task}, {found.metric} on {found.examples:,} examples"), soft_wrap=True)
    for one in found.models:
        console.print()
        console.print(Text(one.name, style="bold"), soft_wrap=True)
        for name, value in _lines(one, found):
            console.print(Text.assemble((f"  {name:<11}", "dim"), value), soft_wrap=True)
    length = "their own lengths" if found.length is None else f"length {found.length}"
    console.print()
    said = f"Times at batch {found.batch_size}, {length}, threads: {found.threads}; {found.method}."
    console.print(Text(said, style="dim"), soft_wrap=True)


def _lines(one: Measured, found: Evaluation) -> list[tuple[str, str]]:
    """What is said of one model: names and values."""
    scale, first = _scale(found), found.models[0].name
    lines = [("runs in", one.runtime), ("score", f"{scale.write(one.score.value)} {scale.ends(one.score)}")]
    if one.difference is not None and one.agreement is not None:
        change = f"{scale.signed(one.difference.value)}{scale.unit} {scale.signed_ends(one.difference)}"
        lines += [
            ("change", f"{change} against {first}"),
            ("agreement", f"{one.agreement.value:.3f} with {first}"),
        ]
    lines.append(("size", f"{one.size_bytes / MEGABYTE:.1f} MB, {one.parameters:,} parameters"))
    lines.append(("latency", f"{one.latency_ms.format(2)} ms"))
    if one.difference is not None:
        lines.append(("speed-up", f"{one.speedup.format(2)} times as fast as {first}"))
    return lines


def _scale(found: Evaluation) -> Scale:
    ends = [end for each in found.models for end in (each.score.value, each.score.low, each.score.high)]
    return scale_for(found.metric, ends, higher_is_better=get_metric(found.metric).higher_is_better)
