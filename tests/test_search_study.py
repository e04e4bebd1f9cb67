"""The study: who does which trial, over kills, processes and storages. No model is trained here."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from limbeck.report.candidates import COMPLETE, FAILED, PRUNED, RUNNING
from limbeck.search import Space, study
from limbeck.search.records import Record, Speed
from limbeck.search.storage import open_storage
from limbeck.search.study import Study

SPACE = Space.parse({"training.learning_rate": "loguniform(1e-5, 1e-3)", "student.layers": "choice([1], [0, 1])"})


def make(folder, space=SPACE, **options):
    folder.mkdir(exist_ok=True)
    return Study(folder, space, **options)


def finish(found, draw, score=0.5, state=COMPLETE, **known):
    record = dataclasses.replace(found.record(draw.number), score=score, latency_ms=1.0, size_bytes=100, **known)
    found.tell(draw, state, record)
    draw.release()


def worth(values):
    """A made-up score, the same for the same values."""
    return random.Random(json.dumps(values, sort_keys=True)).random()


def sequence(folder, count, again_after=(), **options):
    """What a search tries, if its process dies after some trials and another goes on."""
    found, tried = make(folder, **options), []
    while (draw := found.next(count)) is not None:
        tried.append(draw.values)
        finish(found, draw, worth(draw.values))
        if len(tried) in again_after:
            found = make(folder, **options)
    return tried


def test_there_are_as_many_trials_as_were_asked_for_altogether(tmp_path):
    assert len(sequence(tmp_path / "s", 3)) == 3
    assert sequence(tmp_path / "s", 3) == []
    assert len(sequence(tmp_path / "s", 5)) == 2
    assert [c.state for c in make(tmp_path / "s").candidates()] == [COMPLETE] * 5


def test_the_same_seed_tries_the_same_also_in_another_process(tmp_path):
    """Also after the first eight, from where the sampler learns from what was tried."""
    whole = sequence(tmp_path / "whole", 14, seed=3)
    assert sequence(tmp_path / "cut", 14, again_after=(2, 7, 11), seed=3) == whole
    assert sequence(tmp_path / "other", 14, seed=4) != whole


def test_the_recipes_own_values_come_first(tmp_path):
    first = {"training.learning_rate": 5e-5, "student.layers": [0, 1]}
    assert sequence(tmp_path / "s", 2, first=first)[0] == first


def test_a_trial_that_was_left_behind_is_taken_up_with_its_values(tmp_path):
    found = make(tmp_path / "s")
    draw = found.next(3)
    found.note(draw.number, dataclasses.replace(found.record(draw.number), done=0.4, history=((0.4, 0.7),)))
    draw.release()  # as the system does when the process dies
    again = make(tmp_path / "s").next(3)
    assert (again.number, again.values, again.folder, again.again) == (draw.number, draw.values, draw.folder, True)
    assert found.record(draw.number).begun == (0.0, 0.4)
    assert len(found.candidates()) == 1


def test_a_trial_of_a_living_process_is_left_alone(tmp_path):
    found, other = make(tmp_path / "s"), make(tmp_path / "s")
    mine, its = found.next(2), other.next(2)
    assert mine.number != its.number
    assert found.next(2) is None
    assert [c.state for c in found.candidates()] == [RUNNING, RUNNING]


def test_a_trial_elsewhere_is_taken_up_when_nothing_is_heard_of_it(tmp_path, monkeypatch):
    address = f"sqlite:///{tmp_path / 'study.db'}"
    there, here = make(tmp_path / "there", storage=address), make(tmp_path / "here", storage=address)
    draw = there.next(1)
    draw.release()
    assert here.next(1) is None
    there.note(draw.number, there.record(draw.number))
    later = time.time() + study.STALE_SECONDS + 1
    monkeypatch.setattr(study.time, "time", lambda: later)
    again = here.next(1)
    assert (again.number, again.values) == (draw.number, draw.values)
    finish(here, again, 0.6)
    finish(there, draw, 0.1)  # it was alive after all, and too late
    assert [(c.state, c.score) for c in here.candidates()] == [(COMPLETE, 0.6)]


def test_a_machine_that_has_another_name_now_goes_on_at_once(tmp_path, monkeypatch):
    """As a container has after a restart: the locks beside the journal say who is alive."""
    draw = make(tmp_path / "s").next(1)
    draw.release()
    monkeypatch.setattr(study.platform, "node", lambda: "another")
    again = make(tmp_path / "s").next(1)
    assert (again.number, again.values) == (draw.number, draw.values)


def test_a_search_is_done_when_its_trials_are_finished_whatever_others_go_on_with(tmp_path):
    found = make(tmp_path / "s")
    assert not found.is_done(1)
    mine, its = found.next(2), found.next(2)
    assert not found.is_done(1)
    finish(found, mine)
    assert found.is_done(1)
    assert not found.is_done(2)
    finish(found, its, state=FAILED)
    assert found.is_done(2)


@pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize"]])
def test_a_study_of_another_program_is_left_as_it_is(tmp_path, directions):
    optuna, address = pytest.importorskip("optuna"), f"sqlite:///{tmp_path / 'study.db'}"
    foreign = optuna.create_study(storage=address, study_name="limbeck", directions=directions)
    foreign.add_trial(optuna.trial.create_trial(values=[0.5] * len(directions)))
    with pytest.raises(ValueError, match=r"the study 'limbeck' in sqlite:.* is of no search of limbeck"):
        make(tmp_path / "s", storage=address)
    assert optuna.load_study(storage=address, study_name="limbeck").user_attrs == {}


def test_a_trial_that_kills_its_process_is_given_up(tmp_path):
    found, numbers = make(tmp_path / "s"), []
    while (draw := found.next(1)) is not None:
        numbers.append(draw.number)
        draw.release()
    assert numbers == [0] * study.IN_VAIN
    (candidate,) = found.candidates()
    assert candidate.state == FAILED
    assert candidate.note == "its process died 3 times after 0% of its training"


def test_a_trial_that_gets_on_each_time_is_not_given_up(tmp_path):
    found = make(tmp_path / "s")
    for done in (0.0, 0.2, 0.4, 0.6, 0.8):
        draw = found.next(1)
        assert draw.number == 0
        found.note(0, dataclasses.replace(found.record(0), done=done))
        draw.release()


def test_what_was_tried_is_not_tried_again(tmp_path):
    space = Space.parse({"student.layers": "choice([0], [1])", "training.epochs": "int(1, 2)"})
    tried = sequence(tmp_path / "s", 30, space=space)
    assert len(tried) == 4
    assert len({json.dumps(values, sort_keys=True) for values in tried}) == 4
    copies = [c for c in make(tmp_path / "s", space).candidates() if c.state == PRUNED]
    assert copies
    assert all(c.note.startswith("the same values as trial ") for c in copies)
    assert all((c.score, c.done, c.latency_ms) == (None, 0.0, 0.0) for c in copies)  # nothing was trained of them


def test_another_ground_is_refused_by_its_difference(tmp_path):
    ground = {"recipe": {"training": {"epochs": 3}}, "data": {"train": "abc"}}
    make(tmp_path / "s").claim(ground)
    make(tmp_path / "s").claim(ground)
    other = {**ground, "recipe": {"training": {"epochs": 4}}}
    with pytest.raises(ValueError, match=r"of another search \(recipe.training.epochs: 3 there, 4 here\)"):
        make(tmp_path / "s").claim(other)
    make(tmp_path / "s", name="second").claim(other)


def test_a_speed_is_measured_once(tmp_path):
    found = make(tmp_path / "s")
    assert found.keep_speed("a", Speed(1.0, 2.0)) == Speed(1.0, 2.0)
    assert make(tmp_path / "s").keep_speed("a", Speed(9.0, 9.0)) == Speed(1.0, 2.0)
    # twice as busy a machine, and yet the faster student: milliseconds say so too
    assert make(tmp_path / "s").keep_speed("c", Speed(1.6, 2.5)) == Speed(0.8, 2.5)
    assert found.speed("b") is None


def test_records_outlast_json():
    record = Record("here", 1.0, 2, 3, 4.0, 5.0, ((0.2, 0.5),), 0.5, 0.2, 6.0, "note", (0.0,))
    assert Record.read(json.loads(json.dumps(record.as_json()))) == record
    assert Record.read(None) == Record()


def test_a_journal_that_a_kill_cut_off_is_mended(tmp_path):
    found = make(tmp_path / "s")
    draw = found.next(2)
    journal = tmp_path / "s" / "journal.log"
    with journal.open("a") as file:
        file.write('{"op_code": 5, "wor')
    finish(make(tmp_path / "s"), draw)
    assert [c.state for c in make(tmp_path / "s").candidates()] == [COMPLETE]


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("{place}", "is a folder; name a file in it"),
        ("{place}/no/journal.log", "lies in no folder"),
        ("{place}/notes.txt", "is no journal of a search; name another file"),
        ("{place}/broken.log", "is damaged"),
        ("sqlite:///{place}/no/study.db", "cannot be reached (unable to open database file)"),
        ("sqlite:///{place}/notes.txt", "cannot be reached (file is not a database)"),
        ("postgresql+nodriver://user:secret@localhost/x", "cannot be reached"),
        ("mysql+pymysql://user:secret@localhost/x", "needs the driver pymysql, which is not installed"),
        ("://", "cannot be read"),
    ],
)
def test_storages_that_cannot_be_opened(tmp_path, storage, said):
    (tmp_path / "notes.txt").write_text("what I must not forget")
    (tmp_path / "broken.log").write_text('{"op_code":0}\nnothing\n{"op_code":0}\n')
    with pytest.raises(ValueError) as failed:  # noqa: PT011
        open_storage(storage.format(place=tmp_path))
    assert said in str(failed.value)
    assert "secret" not in str(failed.value)
    assert (tmp_path / "notes.txt").read_text() == "what I must not forget"


def work(folder, dies, died):
    """A process that does trials. One dies in its first, and the other waits for that before its second."""
    found, count = Study(folder, SPACE, seed=1), 0
    while (draw := found.next(12)) is not None:
        if dies:
            died.set()
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        finish(found, draw, worth(draw.values))
        assert count > 1 or died.wait(60)


def test_several_processes_share_a_study_and_one_may_die(tmp_path):
    make(tmp_path / "s", seed=1)
    context = multiprocessing.get_context("spawn")
    died = context.Event()
    workers = [context.Process(target=work, args=(tmp_path / "s", dies, died)) for dies in (True, False)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0]
    candidates = make(tmp_path / "s").candidates()
    assert [c.number for c in candidates] == list(range(12))
    assert all(c.state == COMPLETE and c.score == worth(c.values) for c in candidates)
