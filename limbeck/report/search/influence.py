"""Which of the values that a search tried went together with the score."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.report.candidates import Candidate, finished, worse
from limbeck.report.search.report import SearchReport
from limbeck.report.search.values import value_text

FEWEST = 5  # trials: of fewer, ranks say nothing
CHANCE = 0.05


@dataclass(frozen=True)
class Group:
    """The trials that tried one choice.

    Attributes:
        value: The choice, as text.
        mean: Their mean score.
        count: How many they are.
    """

    value: str
    mean: float
    count: int


@dataclass(frozen=True)
class Influence:
    """What one value of the recipe did to the score, as far as the trials show.

    Attributes:
        path: Dotted path of the recipe.
        rank: Of a number: Spearman's rank correlation of the value with the score over the finished trials, above
            0 where more is better. None for a choice, and where there are too few trials or only one value.
        chance: Probability of a correlation so strong by chance alone; None without one.
        groups: Of a choice: the mean score of each, the best first. Empty for a number.
        importance: Its share in what varied the score, as Optuna computed it; None where it did not.
        count: Number of trials.
    """

    path: str
    rank: float | None
    chance: float | None
    groups: list[Group]
    importance: float | None
    count: int

    @property
    def within_chance(self) -> bool:
        """Whether a correlation is no stronger than chance makes it."""
        return self.chance is not None and self.chance > CHANCE


def influences(report: SearchReport) -> list[Influence]:
    """Which values went together with the score, in the order of the space.

    It is a tally, not an experiment: a search tries more of what went well, several values change at once, and
    pruned trials are left out.

    Example:
        >>> from limbeck.report.search.report import example
        >>> [(i.path, i.rank, i.count) for i in influences(example())]
        [('training.epochs', None, 2)]
    """
    able = finished(report.candidates)
    paths = dict.fromkeys([*report.space, *(path for c in able for path in c.values)])
    found = [_influence(report, path, [c for c in able if path in c.values]) for path in paths]
    return [each for each in found if each.count]


def _influence(report: SearchReport, path: str, able: Sequence[Candidate]) -> Influence:
    values = [c.values[path] for c in able]
    goodness = [-worse(c, report.higher_is_better) for c in able]
    importance = report.importance.get(path)
    if values and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        rank, chance = _correlation(values, goodness)
        return Influence(path, rank, chance, [], importance, len(able))
    groups = _groups([value_text(v) for v in values], [c.score or 0.0 for c in able])
    groups.sort(key=lambda g: (-g.mean if report.higher_is_better else g.mean, g.value))
    return Influence(path, None, None, groups, importance, len(able))


def _correlation(values: Sequence[Any], goodness: Sequence[float]) -> tuple[float | None, float | None]:
    """Spearman's correlation and its probability by chance; nothing where there is too little to rank."""
    if len(values) < FEWEST or len(set(values)) < 2 or len(set(goodness)) < 2:
        return None, None
    from scipy.stats import spearmanr

    with warnings.catch_warnings():  # a perfect correlation divides by zero on its way to the probability 0
        warnings.simplefilter("ignore", RuntimeWarning)
        result = spearmanr(values, goodness)
    return float(result.statistic), float(result.pvalue)


def _groups(values: Sequence[str], scores: Sequence[float]) -> list[Group]:
    by_value: dict[str, list[float]] = {}
    for value, score in zip(values, scores, strict=True):
        by_value.setdefault(value, []).append(score)
    return [Group(value, sum(each) / len(each), len(each)) for value, each in by_value.items()]
