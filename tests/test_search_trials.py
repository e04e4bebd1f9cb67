"""Trials on one ground: they end, pause, fail and are given up, and nothing but them is trained twice."""

import dataclasses
import math

import pytest

import limbeck.search.trial
from limbeck.metrics import get_metric
from limbeck.plan import Observer
from limbeck.recipe import Recipe
from limbeck.report.candidates import COMPLETE, FAILED, PRUNED, RUNNING, Demands
from limbeck.search import Space
from limbeck.search.ground import Ground, for_search
from limbeck.search.study import Study
from limbeck.search.trial import Clock, Trials, evaluated
from limbeck.tasks import HOLDOUT, TRAIN, VALIDATION
from limbeck.train import read_log
from tests import tiny

SPACE = Space.parse(
    {
        "training.learning_rate": "choice(1e-3, 1e30)",
        "student.layers": "choice([0], [0, 1])",
        "terms.kd.temperature": "uniform(1, 4)",
    }
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """One ground for all of these trials."""
    place = tiny.place_of(tmp_path_factory.mktemp("place"))
    task = {**tiny.recipe(place)["task"], "holdout": 0.3}
    training = {"steps": 12, "batch_size": 16, "learning_rate": 1e-3}
    recipe = Recipe.parse(tiny.recipe(place, task=task, training=training))
    made = Ground(for_search(recipe, place / "search"), place / "search", Observer())
    made.prepare(SPACE, lambda space: None)
    return made


def study_for(folder, rate=1e-3, layers=(0, 1)):
    """A study whose first trial has these values."""
    folder.mkdir()
    first = {"training.learning_rate": rate, "student.layers": list(layers), "terms.kd.temperature": 2.0}
    return Study(folder, SPACE, first=first)


def run(ground, study, trials=1, demands=None, told=lambda: False):
    Trials(ground, study, demands or Demands(), Clock(None, told), Observer()).execute(trials)
    return study.candidates()


def test_a_trial_says_what_its_student_is_worth_and_costs(ground, tmp_path):
    study = study_for(tmp_path / "s")
    (found,) = run(ground, study)
    student = ground.run.student().model
    assert (found.state, found.done, found.note) == (COMPLETE, 1.0, "")
    assert 0 <= found.score <= 1
    assert found.latency_ms > 0
    assert found.speedup > 0
    assert found.parameters > sum(p.numel() for p in student.parameters())  # of one layer, and this one has two
    shares = [share for share, _ in study.record(0).history]
    assert shares == [0.25, 0.5, 0.75, 1.0]  # of 12 steps, every fifth rounded up
    assert not (tmp_path / "s" / "trials" / "checkpoints").exists()


def test_the_score_is_that_of_what_is_held_out_of_the_training_data(ground, tmp_path):
    task, whole = ground.task, tiny.table()
    assert len(task.splits[HOLDOUT]) + len(task.splits[TRAIN]) + len(task.splits[VALIDATION]) == len(whole)
    assert not set(task.splits[HOLDOUT].inputs) & set(task.splits[VALIDATION].inputs)
    study = study_for(tmp_path / "s")
    (found,) = run(ground, study)
    count = len(task.splits[HOLDOUT])
    assert math.isclose(found.score * count, round(found.score * count))
    assert study.record(0).history[-1][1] == found.score
    assert get_metric("accuracy").name == ground.metric.name


def test_nothing_predicts_on_the_validation_data(ground, tmp_path, monkeypatch):
    import limbeck.stage
    import limbeck.train.scoring

    seen, predict = [], limbeck.stage.predict

    def watched(model, examples, **options):
        seen.append(examples)
        return predict(model, examples, **options)

    monkeypatch.setattr(limbeck.stage, "predict", watched)
    monkeypatch.setattr(limbeck.train.scoring, "predict", watched)
    run(ground, study_for(tmp_path / "s"))
    assert len(seen) == 5  # four evaluations and the end
    assert all(examples is ground.run.data.student[HOLDOUT] for examples in seen)


def test_the_teacher_is_asked_once_for_all_trials(ground, tmp_path, monkeypatch):
    """What it said of all examples was kept before the first trial; trials run it on the samples of preflights."""
    source, rows = ground.live.source(), []
    signal = type(source).signal

    def counted(self, batch, wants):
        rows.append(len(batch["labels"]))
        return signal(self, batch, wants)

    monkeypatch.setattr(type(source), "signal", counted)
    run(ground, study_for(tmp_path / "s"), trials=2)
    assert sum(rows) <= 2 * 2
    assert len(ground.run.memory.store) == len({tuple(row) for row in ground.task.splits[TRAIN].inputs})


def test_a_pause_goes_on_as_if_nothing_had_been(ground, tmp_path):
    whole = run(ground, study_for(tmp_path / "whole"))
    paused, steps = study_for(tmp_path / "paused"), iter([False] * 8 + [True] * 99)
    (found,) = run(ground, paused, told=lambda: next(steps))
    assert (found.state, found.done) == (RUNNING, 8 / 12)  # it looks once before the trial
    assert len(paused.record(0).history) == 2  # a pause is no evaluation
    assert paused.record(0).begun == ()  # and no death
    (found,) = run(ground, paused)
    assert (found.state, found.score) == (COMPLETE, whole[0].score)
    logs = [read_log(next((tmp_path / name / "trials").glob("*/log.jsonl"))) for name in ("whole", "paused")]
    kept = [[(line["step"], line.get("loss"), line.get("scores")) for line in log] for log in logs]
    assert kept[0] == kept[1]


def test_a_weak_trial_is_given_up(ground, tmp_path):
    study = study_for(tmp_path / "s")
    first, *others = [study.next(5) for _ in range(5)]
    for draw in others:
        record = study.record(draw.number)
        study.note(draw.number, dataclasses.replace(record, history=((0.2, 1.1),), score=1.1))
    first.release()
    found = run(ground, study, trials=5, told=lambda: study.candidates()[0].state != RUNNING)[0]
    assert (found.state, found.done) == (PRUNED, 0.25)
    assert found.note.startswith("at 25% of its training")
    assert "below 1.1, the median of 4 trials that cost no more" in found.note


def test_a_trial_that_fails_says_why_and_the_next_one_runs(ground, tmp_path):
    found = run(ground, study_for(tmp_path / "s", rate=1e30), trials=2)
    assert found[0].state == FAILED
    assert "lower the learning rate" in found[0].note
    assert not list((tmp_path / "s" / "trials").glob("*/checkpoints"))
    assert found[1].number == 1
    assert found[1].state in (COMPLETE, FAILED)


def test_a_student_that_costs_too_much_is_not_trained_where_another_does_not(ground, tmp_path):
    study = study_for(tmp_path / "s", layers=[0])
    (small,) = run(ground, study)
    demands = Demands(max_size=small.size_bytes)
    for candidate in run(ground, study, trials=6, demands=demands)[1:]:
        if candidate.size_bytes > small.size_bytes and not candidate.note.startswith("the same"):
            assert (candidate.state, candidate.done) == (PRUNED, 0.0)
            assert "which another trial reaches" in candidate.note
            break
    else:
        pytest.fail("no larger student was drawn")


def test_an_architecture_is_measured_once(ground, tmp_path, monkeypatch):
    measured = []
    measure = ground.measure

    def counted(student):
        measured.append(student)
        return measure(student)

    monkeypatch.setattr(ground, "measure", counted)
    study = study_for(tmp_path / "s")
    found = run(ground, study, trials=4)
    sizes = {c.parameters for c in found if c.parameters}
    assert len(measured) == len(sizes) == len(study.speeds())


def test_a_trial_of_another_process_is_waited_for(ground, tmp_path, monkeypatch):
    """Else the first to find nothing left would choose, and look at the validation data, without it."""
    study = study_for(tmp_path / "s")
    held, naps = study.next(1), []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:  # now its process dies
            held.release()

    monkeypatch.setattr(limbeck.search.trial.time, "sleep", nap)
    (found,) = run(ground, study, trials=1)
    assert len(naps) == 3
    assert (found.number, found.state, found.values) == (held.number, COMPLETE, held.values)


def test_trials_are_evaluated_at_fixed_shares(ground):
    for steps, every in ((5, 1), (12, 3), (100, 20), (101, 21), (2, 1)):
        recipe = ground.recipe.model_copy(
            update={"training": ground.recipe.training.model_copy(update={"steps": steps})}
        )
        assert evaluated(recipe, ground.run).training.evaluate_every == every
