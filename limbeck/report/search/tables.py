"""What the report of a search says, as rows of text: the page and the terminal show the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from limbeck.report import format as write
from limbeck.report.candidates import COMPLETE, FAILED, PRUNED, Candidate, Demands, finished, shortfalls
from limbeck.report.format import NOTHING, one_line, shorten
from limbeck.report.search.influence import FEWEST, Influence
from limbeck.report.search.proof import checks
from limbeck.report.search.report import SearchReport
from limbeck.report.search.values import LONGEST, short_names, value_text

MEASURES = ("score", "kept", "speed-up", "ms", "size", "parameters", "time")
BEFORE_VALUES = 5  # of these: what a trial was chosen by
DEMANDS = ("keep", "speedup", "max_size", "latency_ms")
MOST_GROUPS = 6


@dataclass(frozen=True)
class TrialRow:
    """One trial as text.

    Attributes:
        number: ``"#12"``.
        mark: ``"chosen"``, ``"nearest"``, ``"front"``, or the trial's state where it was not finished.
        measures: Texts in the order of `MEASURES`.
        values: Texts in the order of `value_columns`.
        note: Why it was pruned or failed.
    """

    number: str
    mark: str
    measures: list[str]
    values: list[str]
    note: str


@dataclass(frozen=True)
class DemandRow:
    """One demand: what was asked, what the choice has on the held-out part, what the proof found."""

    asked: str
    held_out: str
    proven: str
    outcome: str


@dataclass(frozen=True)
class InfluenceRow:
    """What one value did: its name, a figure, and what the figure means."""

    name: str
    figure: str
    meaning: str


def value_columns(report: SearchReport) -> dict[str, str]:
    """The paths that were tried, with the short name of each."""
    return short_names(dict.fromkeys([*report.space, *(path for c in report.candidates for path in c.values)]))


def trial_rows(report: SearchReport, candidates: Iterable[Candidate]) -> list[TrialRow]:
    """Write trials as rows, in the order in which they are given."""
    paths, on_front = list(value_columns(report)), {c.number for c in report.front()}
    return [_trial(report, c, paths, on_front) for c in candidates]


def ranked(report: SearchReport) -> list[Candidate]:
    """All trials: the finished ones first, the best of them on top, then the others by number."""
    able = finished(report.candidates)
    sign = -1 if report.higher_is_better else 1
    return [
        *sorted(able, key=lambda c: (sign * (c.score or 0.0), c.latency_ms, c.number)),
        *sorted((c for c in report.candidates if not c.finished), key=lambda c: c.number),
    ]


def failed(report: SearchReport) -> list[Candidate]:
    """The trials that failed, by number."""
    return sorted((c for c in report.candidates if c.state == FAILED), key=lambda c: c.number)


def facts_of_search(report: SearchReport) -> list[tuple[str, str]]:
    """List what the search was: metric, examples, trials, time, teacher."""
    examples = ", ".join(f"{count:,} {one_line(split)}" for split, count in report.examples.items())
    teacher = report.teacher
    measured = (
        f"{report.scale.write(teacher.score)}, {write.size(teacher.size_bytes)}, "
        f"{write.measure(teacher.latency_ms)} ms"
    )
    trained = sum(c.seconds for c in report.candidates)  # also of those before this command, or beside it
    direction = "higher" if report.higher_is_better else "lower"
    return [
        ("Metric", f"{one_line(report.metric)}, {direction} is better"),
        ("Examples", examples or NOTHING),
        ("Trials", counts_in_words(report)),
        ("Time", f"{write.duration(report.seconds)}; all trials together {write.duration(trained)}"),
        ("Teacher", measured),
        ("Created", one_line(report.created) or NOTHING),
    ]


def counts_in_words(report: SearchReport) -> str:
    """Say how many trials there were, and what became of them.

    Example:
        >>> from limbeck.report.search.report import example
        >>> counts_in_words(example())
        '2: 2 complete'
    """
    states = ", ".join(f"{count} {state}" for state, count in report.counts.items())
    asked = f" of {report.trials} asked" if report.trials > len(report.candidates) else ""
    ended = f" ({one_line(report.ended)})" if report.ended else ""
    return f"{len(report.candidates)}{asked}{': ' if states else ''}{states}{ended}"


def demand_rows(report: SearchReport) -> list[DemandRow]:
    """Write each demand beside what the choice has and what the proof found; nothing where none was made."""
    demands, candidate = report.demands, report.choice.candidate
    proven = {check.demand: check for check in checks(report.proof, demands)} if report.proof else {}
    rows = []
    for name in DEMANDS:
        value = getattr(demands, name)
        if value is None:
            continue
        alone = Demands(**{name: value})
        held_out = NOTHING if candidate is None else _held_out(report, candidate, alone)
        check = proven.get(name)
        asked = alone.in_words(one_line(report.metric))
        rows.append(
            DemandRow(asked, held_out, check.found if check else NOTHING, check.outcome if check else "not made")
        )
    return rows


def influence_rows(report: SearchReport, found: Iterable[Influence]) -> list[InfluenceRow]:
    """Write what each value did to the score."""
    names = value_columns(report)
    return [
        InfluenceRow(shorten(names[i.path], 40), *_influence(report, i))
        for i in sorted(found, key=lambda i: -(i.importance or 0.0))
    ]


def score_note(report: SearchReport) -> str:
    """Say in words how scores are written and which direction is good."""
    direction = "Higher is better." if report.higher_is_better else "Lower is better."
    points = f" Scores are in points, 100 times {one_line(report.metric)}." if report.scale.in_points else ""
    return direction + points


def _trial(report: SearchReport, candidate: Candidate, paths: list[str], on_front: set[int]) -> TrialRow:
    values = candidate.values
    return TrialRow(
        f"#{candidate.number}",
        _mark(report, candidate, on_front),
        _measures(report, candidate),
        [shorten(value_text(values[path]), LONGEST) if path in values else NOTHING for path in paths],
        one_line(candidate.note),
    )


def _mark(report: SearchReport, candidate: Candidate, on_front: set[int]) -> str:
    answer = report.choice.candidate
    if answer is not None and candidate.number == answer.number:
        return "chosen" if report.choice.chosen else "nearest"
    if candidate.number in on_front:
        return "front"
    if candidate.state == PRUNED:
        return f"pruned at {write.share(candidate.done)}"
    return "" if candidate.finished else candidate.state if candidate.state != COMPLETE else "no score"


def _measures(report: SearchReport, candidate: Candidate) -> list[str]:
    share, score = report.kept(candidate), candidate.score
    time = candidate.latency_ms
    return [
        NOTHING if score is None or not math.isfinite(score) else report.scale.write(score),
        NOTHING if share is None else write.share(share),
        write.times(candidate.speedup) if candidate.speedup > 0 else NOTHING,
        write.measure(time) if time > 0 else NOTHING,
        write.size(candidate.size_bytes) if candidate.size_bytes else NOTHING,
        write.parameters(candidate.parameters) if candidate.parameters else NOTHING,
        write.duration(candidate.seconds),
    ]


def _held_out(report: SearchReport, candidate: Candidate, demands: Demands) -> str:
    """What the choice has of one demand, and whether that is enough."""
    missed = shortfalls(candidate, demands, report.teacher.score, report.higher_is_better)
    if missed:
        return missed[0].words.split(" where ")[0]
    share = report.kept(candidate)
    if demands.keep is not None:
        return f"keeps {write.share(share or 0.0)}"
    if demands.speedup is not None:
        return f"has {candidate.speedup:.1f}x the speed"
    if demands.max_size is not None:
        return f"takes {write.size(candidate.size_bytes)}"
    return f"takes {write.measure(candidate.latency_ms)} ms"


def _influence(report: SearchReport, influence: Influence) -> tuple[str, str]:
    """The figure of one value and what it means."""
    part = ""
    if influence.importance is not None:
        part = f" Optuna gives it {write.share(influence.importance)} of what varied the score."
    if influence.groups:
        return _spread(report, influence), _groups(report, influence) + part
    if influence.rank is None:
        return (
            NOTHING,
            f"Not ranked: that takes {FEWEST} trials that differ, and there are {influence.count}.{part}",
        )
    meant = "within noise" if influence.within_chance else f"{'more' if influence.rank > 0 else 'less'} is better"
    return f"{influence.rank:+.2f}", f"Rank correlation over {influence.count} trials: {meant}.{part}"


def _spread(report: SearchReport, influence: Influence) -> str:
    means = [group.mean for group in influence.groups]
    return f"{report.scale.write(max(means) - min(means))}{report.scale.unit}" if len(means) > 1 else NOTHING


def _groups(report: SearchReport, influence: Influence) -> str:
    shown = [
        f"{shorten(g.value, LONGEST)} {report.scale.write(g.mean)} ({g.count})"
        for g in influence.groups[:MOST_GROUPS]
    ]
    more = len(influence.groups) - MOST_GROUPS
    return f"Mean score of each, and of how many trials: {'; '.join(shown)}{f'; {more} more' if more > 0 else ''}."
