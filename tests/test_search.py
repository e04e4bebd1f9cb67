"""A whole search: from a recipe to a student with its proof, over kills, workers and bad input."""

import json
import operator
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from limbeck.plan import Observer
from limbeck.recipe import Recipe
from limbeck.report import Report
from limbeck.report.candidates import COMPLETE
from limbeck.report.search.report import SearchReport
from limbeck.search import search, workers
from limbeck.search.searching import _make_room
from tests import tiny
from tests.searched import digits

ROOT = Path(__file__).parent.parent
SPACE = {"training.learning_rate": "loguniform(1e-4, 1e-2)", "student.layers": "choice([0], [1])"}


class Notes(Observer):
    """Keeps what a search tells."""

    def __init__(self):
        self.notes, self.stages = [], []

    def on_note(self, text):
        self.notes.append(text)

    def on_stage(self, name):
        self.stages.append(name)


def values_of(report):
    return [(c.number, c.values, c.state, c.score, c.done) for c in report.candidates]


def test_from_a_recipe_to_a_proven_student(command, tmp_path):
    place, out = tiny.place_of(tmp_path), tmp_path / "search"
    recipe = {**tiny.recipe(place), "search": SPACE}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["search", place / "recipe.yaml", "--trials", "2", "--keep", "0.01", "--seeds", "2", "--out", out]
    status, printed = command(*words)
    assert status == 0, printed
    assert "trial #1 complete" in printed
    report = SearchReport.load(out)
    assert [c.state for c in report.candidates] == [COMPLETE] * 2
    assert report.proof == Report.load(out / "best")
    assert report.proof.seeds == [0, 1]
    assert report.proof.baseline is not None
    assert report.proof.student.teacher_examples == 0  # what it said was there
    best = Recipe.load(out / "best" / "recipe.yaml")
    assert list(best.student.layers) == report.choice.chosen.values["student.layers"]
    assert best.task.holdout == 0.1
    assert report.examples["held out"] + report.examples["train"] + report.examples["validation"] == 80
    # The recipe that is kept has its space, and a run that is no search can still take it.
    assert yaml.safe_load((out / "recipe.yaml").read_text())["search"].keys() == SPACE.keys()
    assert Recipe.load(out / "recipe.yaml").terms["kd"].loss == "forward_kl"

    before = (out / "best" / "report.json").stat().st_mtime_ns
    status, printed = command(*words)
    assert status == 0, printed
    assert "trial #" not in printed  # nothing was left to do
    assert (out / "best" / "report.json").stat().st_mtime_ns == before

    status, printed = command(*words[:4], "--speedup", "1000", "--out", out)
    assert status == 2
    assert printed.strip().splitlines()[-1].startswith("error: no student has at least 1000x the teacher's speed")
    assert SearchReport.load(out).choice.nearest is not None
    assert SearchReport.load(out).proof is None

    status, printed = command(*words, "--set", "training.epochs=4")
    assert status == 2
    assert "holds another search (recipe.training.epochs: 3.0 there, 4.0 here)" in printed


def test_a_killed_search_goes_on_with_the_trial_at_hand(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-m", "tests.searched", str(tmp_path)], cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    observer = Notes()
    resumed = search(digits(tmp_path), tmp_path / "killed", trials=3, proof=False, observer=observer)
    whole = search(digits(tmp_path), tmp_path / "whole", trials=3, proof=False)
    assert values_of(resumed) == values_of(whole)
    assert [note.split(",")[0] for note in observer.notes if note.startswith("trial")] == [
        "trial #1 complete",
        "trial #2 complete",
    ]
    folder = next(p for p in (tmp_path / "killed" / "trials").iterdir() if (p / "log.jsonl").is_file())
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_worker_that_dies_is_told_of_and_its_trial_is_taken_up(tmp_path):
    student = {"model": "tests.searched:deadly", "options": {"mark": str(tmp_path / "mark")}}
    observer, recipe = Notes(), digits(tmp_path, student=student)
    report = search(recipe, tmp_path / "s", trials=3, workers=2, proof=False, observer=observer)
    assert (tmp_path / "mark").exists()
    assert [c.state for c in report.candidates] == [COMPLETE] * 3
    assert "a worker died (SIGKILL); its trial is taken up" in observer.notes


def test_workers_that_die_before_they_begin_end_the_search(monkeypatch):
    """As where a script calls it without a guard, which every worker would run again; here each has an error."""
    observer = Notes()
    monkeypatch.setattr(workers, "_work", operator.index)
    with pytest.raises(RuntimeError, match=r"3 workers in a row died before their first trial \(exit status 1\)"):
        workers.employ(None, 2, lambda: None, observer)
    assert observer.notes == ["a worker died (exit status 1); another begins"] * 2


def test_values_that_go_together_with_nothing_do_not_end_the_search(tmp_path):
    """Not even where every student that can be foreseen is timed before the first trial."""
    space = {"student.options.width": "choice(4, 8)", "student.options.depth": "choice(1, 2)"}
    student = {"model": "tests.searched:picky", "options": {"width": 4, "depth": 1}}
    report = search(digits(tmp_path, student=student, search=space), tmp_path / "s", trials=1, proof=False)
    assert [c.state for c in report.candidates] == [COMPLETE]


def test_a_database_that_goes_away_is_one_line(tmp_path):
    """And no failed trial: the same command goes on when it is back."""
    database = tmp_path / "study.db"

    class Breaks(Observer):
        def on_note(self, text):
            if text.startswith("trial #0"):
                database.write_bytes(b"nothing" * 1000)

    with pytest.raises(ValueError, match=r"sqlite:.*study\.db was lost \(.*\); what was finished is kept"):
        search(digits(tmp_path), tmp_path / "s", trials=2, storage=f"sqlite:///{database}", observer=Breaks())


def test_a_limit_shorter_than_a_trial_keeps_what_was_done(tmp_path):
    recipe = digits(tmp_path)
    with pytest.raises(ValueError, match=r"the time limit of 0.001 s ended before the first trial began"):
        search(recipe, tmp_path / "s", time_limit=0.001)
    assert len(search(recipe, tmp_path / "s", trials=1, proof=False).candidates) == 1


def test_where_all_trials_fail_it_says_why(tmp_path):
    space = {"training.learning_rate": "uniform(1e30, 2e30)"}
    with pytest.raises(ValueError, match=r"all 2 trials failed; the first one: .*lower the learning rate"):
        search(digits(tmp_path, search=space), tmp_path / "s", trials=2)


def test_where_all_values_fail_those_drawn_twice_say_so_too(tmp_path):
    space = {"training.learning_rate": "choice(1e30, 2e30)"}
    with pytest.raises(ValueError, match=r"all \d+ trials failed; the first one: .*lower the learning rate"):
        search(digits(tmp_path, search=space), tmp_path / "s", trials=12)


def test_how_teachers_outputs_are_kept_belongs_to_a_search_and_where_does_not(tmp_path):
    search(digits(tmp_path), tmp_path / "s", trials=1, proof=False)
    search(digits(tmp_path, cache={"gib": 2.0}), tmp_path / "s", trials=1, proof=False)
    with pytest.raises(ValueError, match=r"another search \(recipe.cache.dtype: 'fp32' there, 'fp16' here\)"):
        search(digits(tmp_path, cache={"dtype": "fp16", "place": str(tmp_path / "c")}), tmp_path / "s", trials=1)


@pytest.mark.parametrize("left", ['{"recipe": "ano', None])
def test_a_proof_that_a_kill_left_torn_is_put_aside(tmp_path, left):
    best = tmp_path / "best"
    best.mkdir()
    (best / "recipe.yaml").touch()
    if left is not None:
        (best / "made-by.json").write_text(left)
    _make_room(best, Recipe.parse(digits(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-1"]


def test_other_demands_put_the_earlier_proof_aside(tmp_path):
    space = {"student.options.widths": "choice([4, 8], [8, 16])"}
    recipe = digits(tmp_path, search=space)
    search(recipe, tmp_path / "s", trials=2)
    (tmp_path / "s" / "best" / "made-by.json").write_text('{"recipe": "another"}')
    search(recipe, tmp_path / "s", trials=2)
    assert sorted(p.name for p in (tmp_path / "s").glob("best*")) == ["best", "best-1", "best.lock"]


def test_a_space_that_the_models_refuse_is_refused_before_training(tmp_path):
    place, observer = tiny.place_of(tmp_path), Notes()
    recipe = {**tiny.recipe(place), "search": {"student.layers": "choice([0], [0, 7])"}}
    with pytest.raises(ValueError, match=r"search: student.layers=\[0, 7\] cannot be tried: "):
        search(recipe, tmp_path / "s", observer=observer)
    assert observer.stages == []
    assert not (tmp_path / "s" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a recipe, or --task, --teacher and --student"),
        (["{recipe}", "--space", "training.epochs"], "--space 'training.epochs' has no distribution"),
        (["{recipe}", "--space", "training.epoch=int(1, 2)"], "did you mean 'training.epochs'"),
        (["{recipe}", "--space", "training.epochs=int(2, 1)"], "begins at 2 above its end 1"),
        (["{recipe}", "--space", "a=int(1, 2)", "--space", "a=int(1, 3)"], "--space names a twice"),
        (["{recipe}", "--set", "search.task.holdout=uniform(0, 1)"], "task.holdout is not for a search"),
        (["{recipe}", "--set", "search={{training.epochs: 1}}"], "--set search=... names no path"),
        (["{recipe}", "--time-limit", "soon"], "'soon' is no time"),
        (["{recipe}", "--max-size", "20"], "'20' is no size"),
        (["{recipe}", "--latency", "2 minutes"], "'2 minutes' is no latency"),
        (["{recipe}", "--keep", "97"], "for 97% write 0.97"),
        (["{recipe}", "--trials", "0"], "trials is 0; a search needs at least 1"),
        (["{recipe}", "--workers", "0"], "workers is 0; a search needs at least 1"),
        (["{recipe}", "--storage", "sqlite:///no/such/folder/study.db"], "cannot be reached"),
        (["{recipe}", "--out", "{place}"], "holds no search of limbeck"),
        (["{recipe}", "--teacher", "cache:signals"], "name the teacher itself"),
        (["{place}/empty.yaml"], "the search space is empty"),
        (["{place}/words.yaml"], "write distributions by path"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, words, said):
    plain = digits(tmp_path)
    for name, part in (("recipe", plain["search"]), ("empty", {}), ("words", "all")):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**plain, "search": part}))
    given = [word.format(recipe=tmp_path / "recipe.yaml", place=tmp_path) for word in words]
    out = [] if "--out" in given else ["--out", str(tmp_path / "s")]
    status, printed = command("search", *given, *out)
    assert status == 2, printed
    assert "Traceback" not in printed
    assert said in printed.strip().splitlines()[-1]
