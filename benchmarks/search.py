"""What a search of many trials costs, beside as many independent runs of `limbeck distill` of the same values.

The search is timed whole: teacher, signals, trials, and the final proof with its baseline. Then some of the values
that it tried are distilled by runs of their own, which share nothing with it. Their mean time, times the number
of trials, is what independent runs cost: once with a teacher that each of them fine-tunes, and once with one that
lies in the store already.

    python benchmarks/search.py --recipe RECIPE.yaml [--set task.data=DIR] [--trials 20] [--runs 4]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import limbeck
from limbeck.plan import Observer
from limbeck.recipe import Recipe, read_yaml, set_value
from limbeck.report.candidates import COMPLETE, FAILED, PRUNED
from limbeck.search import search
from limbeck.search.searching import as_recipe_with_space
from limbeck.search.space import with_values
from limbeck.tasks import is_regression, make_task, reads_texts


class Notes(Observer):
    """Prints what a search tells."""

    def on_note(self, text):
        """A line."""
        print(f"  {text}", flush=True)


def content_of(path, changes):
    content = read_yaml(path)
    for change in changes:
        set_value(content, change)
    return content


def timed(function, *arguments, **options):
    began = time.perf_counter()
    found = function(*arguments, **options)
    return found, time.perf_counter() - began


def spread(candidates, count):
    """Some of the trials, from the first to the last in even steps; those that failed would say nothing."""
    able = [c for c in candidates if c.state != FAILED and not c.note.startswith("the same")]
    step = max(1, len(able) // count)
    return able[::step][:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--runs", type=int, default=4, help="independent runs that are timed")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()

    content = content_of(options.recipe, options.changes)
    plain, _ = as_recipe_with_space(content)
    task = make_task(plain.task)
    plain = plain.resolved(is_regression(task), reads_texts(task))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        content["store"] = str(place / "search-store")
        found, whole = timed(
            search, content, place / "search", trials=options.trials, workers=options.workers, observer=Notes()
        )
        states = [c.state for c in found.candidates]
        ended = ", ".join(f"{states.count(state)} {state}" for state in (COMPLETE, PRUNED, FAILED))
        print(f"search: {whole:.1f} s with the proof, {found.seconds:.1f} s without; {ended}")

        alone, kept = [], []
        for candidate in spread(found.candidates, options.runs):
            recipe = with_values(plain, candidate.values)
            own = Recipe.model_validate({**recipe.model_dump(), "store": str(place / f"store-{candidate.number}")})
            for times, name in ((alone, "alone"), (kept, "kept")):
                report, seconds = timed(limbeck.distill, own, place / f"{name}-{candidate.number}")
                times.append(seconds)
                score = report.student.score.value
                print(f"  trial {candidate.number} on its own, teacher {name}: {seconds:.1f} s, {score:.4f}")
    for name, times in (("each fine-tunes its teacher", alone), ("the teacher is in the store", kept)):
        cost = options.trials * statistics.mean(times)
        print(f"{options.trials} independent runs, {name}: {cost:.1f} s; the search costs {whole / cost:.3f}x")


if __name__ == "__main__":
    main()
