"""Several tasks by one recipe: each a run of its own, one report of all, one task's failure its own."""

import dataclasses
import io
import json
import re
import shutil
import statistics

import numpy as np
import pytest
import yaml
from rich.console import Console

import limbeck
from limbeck.evaluate import speedups
from limbeck.presets import load_preset
from limbeck.recipe import Recipe
from limbeck.report import Interval, Report
from limbeck.report.suite import SuiteReport, SuiteRow, print_suite, render_suite, render_suite_card
from limbeck.report.suite.report import example
from limbeck.suite import combine, distill_suite, task_recipe
from limbeck.tasks.glue import tasks_of_suite
from tests import tiny

TASKS = ("sst2", "stsb", "rte")
SUITE = "glue/sst2,stsb,rte"
FAST = ["--set", "training.steps=2", "--set", "teacher.training.steps=2", "--set", "training.batch_size=16"]
FILES = {"suite.json", "suite.html", "README.md", "recipe.yaml"}


def save_glue(folder):
    """Three of GLUE's tasks in small: one text, a pair with a number, a pair with a class."""
    for name in TASKS:
        (folder / name).mkdir(parents=True)
        for split, rows in (("train", 48), ("validation", 40)):
            table = tiny.table(rows, seed=rows)
            label = table["stars"] if name == "stsb" else (table["label"] == "good").astype(int)
            texts = {"sentence": table["text"]}
            if name != "sst2":
                texts = {"sentence1": table["text"], "sentence2": table["text"].iloc[::-1].to_numpy()}
            table.assign(**texts, label=label).to_parquet(folder / name / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny.save_encoder(folder / "encoder")
    save_glue(folder / "glue")
    return folder


def words(place, out, *more, task=SUITE, data=None):
    return [
        *("distill", "--task", task, "--data", data or place / "glue", "--teacher", place / "encoder"),
        *("--student", "layers:0", "--finetuned-cache", place / "store", "--out", out, *FAST, *more),
    ]


@pytest.fixture(scope="module")
def finished(place):
    """A suite that is done; tests that change it take a copy."""
    recipe = {
        "task": {"name": SUITE, "data": str(place / "glue")},
        "teacher": {"model": str(place / "encoder"), "training": {"steps": 2}},
        "student": "layers:0",
        "training": {"steps": 2, "batch_size": 16},
        "store": str(place / "store"),
    }
    distill_suite(recipe, place / "done", notes={"rte": "a remark"})
    return place / "done"


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "suite")


def test_each_task_is_a_run_and_all_are_one_report(finished):
    suite = SuiteReport.load(finished)
    assert {path.name for path in finished.iterdir()} == FILES | set(TASKS)
    assert [(row.task, row.state, row.note) for row in suite.rows] == [
        ("sst2", "complete", ""),
        ("stsb", "complete", ""),
        ("rte", "complete", "a remark"),
    ]
    reports = {name: Report.load(finished / name) for name in TASKS}
    assert [reports[name].metric for name in TASKS] == ["accuracy", "pearson_and_spearman", "accuracy"]
    assert [row.student for row in suite.rows] == [reports[name].student.score for name in TASKS]
    assert [row.gain for row in suite.rows] == [reports[name].comparison.gain for name in TASKS]
    assert [row.speedup.value for row in suite.rows] == pytest.approx(
        [reports[name].speedup["latency"] for name in TASKS]
    )
    for role in ("teacher", "baseline", "student"):
        mean = statistics.fmean(getattr(reports[name], role).score.value for name in TASKS)
        assert getattr(suite.averages, role).value == pytest.approx(mean)
    assert suite.averages.speedup.value == pytest.approx(
        statistics.geometric_mean(row.speedup.value for row in suite.rows)
    )


def test_a_finished_suite_is_loaded_and_an_unfinished_task_goes_on(command, place, copied):
    logs = {name: (copied / name / "log.jsonl").stat().st_mtime_ns for name in TASKS}
    (copied / "rte" / "report.json").unlink()
    before = json.loads((copied / "suite.json").read_text())["rows"]
    status, printed = command(*words(place, copied, "--note", "glue/rte=a remark"))
    assert status == 0, printed
    assert "ready" in printed  # of the one that went on
    assert "* rte: a remark" in printed
    after = json.loads((copied / "suite.json").read_text())["rows"]
    assert [row["student"] for row in after] == [row["student"] for row in before]
    assert logs == {name: (copied / name / "log.jsonl").stat().st_mtime_ns for name in TASKS}
    table = printed[printed.index("Over 3 tasks") :]
    for word in ("teacher", "baseline", "student", "ratio", "speed-up", "average", "Pooled distillation ratio"):
        assert word in table


def test_a_task_that_fails_does_not_lose_the_others(command, place, copied, monkeypatch):
    run = limbeck.distill

    def failing(recipe, folder, **options):
        if recipe.task.name == "glue/stsb":
            raise FloatingPointError("the loss is nan at step 3;\nlower training.learning_rate")
        return run(recipe, folder, **options)

    monkeypatch.setattr("limbeck.suite.distill", failing)
    status, printed = command(*words(place, copied))
    assert status == 1
    assert "stsb: failed: the loss is nan at step 3; lower training.learning_rate" in printed
    suite = SuiteReport.load(copied)
    assert [row.state for row in suite.rows] == ["complete", "failed", "complete"]
    done = [row.student.value for row in suite.rows if row.student]
    assert suite.averages.student.value == pytest.approx(statistics.fmean(done))
    assert "1 failed: stsb." in suite.verdict()
    assert "over 2 of 3 tasks" in printed


def test_what_is_finished_is_reported_after_an_interruption(command, place, copied, monkeypatch):
    run = limbeck.distill

    def interrupted(recipe, folder, **options):
        if recipe.task.name == "glue/stsb":
            raise KeyboardInterrupt("interrupted at step 1; kept there")
        return run(recipe, folder, **options)

    monkeypatch.setattr("limbeck.suite.distill", interrupted)
    for name in ("stsb", "rte"):
        shutil.rmtree(copied / name)
    status, printed = command(*words(place, copied))
    assert status == 130
    assert printed.endswith("error: interrupted at step 1; kept there; the same command goes on from there\n")
    assert [row.state for row in SuiteReport.load(copied).rows] == ["complete", "pending", "pending"]
    status, printed = command("report", copied)
    assert status == 0
    assert "2 not finished: stsb, rte." in printed
    (copied / "suite.html").unlink()
    assert command("report", copied / "suite.json")[0] == 0
    assert (copied / "suite.html").is_file()


def refused(result, said):
    status, printed = result
    assert status == 2, printed
    (line,) = printed.strip().splitlines()
    assert said in line, line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--note", "qnly=seen"], "a note is for 'qnly', which is no task here; known: rte, sst2, stsb"),
        (["--note", "qnli"], "the note 'qnli' says nothing of a task; write TASK=TEXT"),
        (["--set", "task.metric=accuracy"], "counts each task by its own metric; leave task.metric out"),
        (["--teacher", "cache:signals"], "is a cache of one task, and these are several; write {task} where"),
        (["--teacher", "no/such/folder"], "cannot load a text model from 'no/such/folder'"),
        (["--set", "terms={kd: {tap: nowhere, loss: mse}}"], "student: no module or output 'nowhere'"),
        (
            ["--set", "terms={kd: {loss: forward_kl}}"],
            "1 of 3 tasks cannot run: stsb: term 'kd' (logits -> logits): ",
        ),
        (["--set", "terms={kd: {loss: msee}}"], "error: terms.kd: unknown loss 'msee'; did you mean 'mse'"),
        (["--set", "task.label=x"], "takes no 'label'"),
        (["--set", "by_task.rtee.training.steps=2"], "by_task speaks of 'rtee', which is no task here; did"),
        (["--set", "by_task.rte.seeds=2"], "by_task.rte.seeds: seeds is the same for all tasks"),
        (["--set", "by_task.rte.task.name=glue/cola"], "by_task.rte.task.name: a task keeps its name"),
        (["--set", "by_task.rte.training.step=2"], "rte: 'training' has no key 'step'; did you mean 'steps'"),
        (["--set", "by_task.rte.training.steps=0"], "training.steps"),
    ],
)
def test_what_is_wrong_is_found_before_any_task_is_begun(command, place, tmp_path, more, said):
    status, printed = command(*words(place, tmp_path / "suite", *more, "--set", f"store={tmp_path / 'store'}"))
    assert status == 2, printed
    (line,) = printed.strip().splitlines()
    assert said in line
    assert not (tmp_path / "suite").exists()
    assert not (tmp_path / "store").exists()


def test_tasks_without_data_are_all_named(command, place, tmp_path):
    result = command(*words(place, tmp_path / "suite", task="glue/sst2,qnli,stsb,mnli"))
    refused(result, "2 of 4 tasks cannot run: qnli: ")
    refused(result, "; mnli: ")
    refused(result, "the others alone are --task glue/sst2,stsb")
    assert not (tmp_path / "suite").exists()


def test_names_of_suites(command, place, tmp_path):
    assert tasks_of_suite("glue/all") == ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
    assert tasks_of_suite("glue/wnli, rte") == ("wnli", "rte")
    out = tmp_path / "suite"
    refused(
        command(*words(place, out, task="glue/sst2,rtw")), "unknown GLUE task 'rtw' in 'glue/sst2,rtw'; did you"
    )
    refused(command(*words(place, out, task="glue/rte,rte")), "the task 'rte' stands twice")
    refused(command(*words(place, out, task="glue/rte,")), "unknown GLUE task ''")
    refused(
        command(*words(place, out, "--note", "rte=x", task="glue/rte")), "--note is for several tasks, and glue"
    )
    with pytest.raises(
        ValueError, match=r"glue/all names several tasks.* in Python limbeck\.suite\.distill_suite"
    ):
        limbeck.distill({"task": "glue/all", "teacher": "t", "student": "layers:0"}, out)


def test_folders_that_hold_other_things(command, place, copied, tmp_path):
    refused(command(*words(place, copied / "rte")), "holds the run of one task; choose another folder")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    refused(command(*words(place, tmp_path / "other")), "holds no suite of limbeck")
    more = ["--set", "training.learning_rate=1e-3"]
    refused(command(*words(place, copied, *more)), "3 of 3 tasks cannot run: sst2: ")
    refused(command(*words(place, copied, *more)), "holds another run (recipe.training.learning_rate")


def test_overwriting_begins_all_tasks_anew_at_once(copied, monkeypatch):
    """Else an interruption would leave old results that the next command takes for its own."""

    def interrupted(recipe, folder, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("limbeck.suite.distill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill_suite(copied / "recipe.yaml", copied, overwrite=True)
    assert [row.state for row in SuiteReport.load(copied).rows] == ["pending"] * 3
    assert not (copied / "rte" / "report.json").exists()


def test_the_recipe_of_a_suite_gives_it_again(command, copied):
    spelled = yaml.safe_load((copied / "recipe.yaml").read_text())
    assert spelled["task"]["name"] == "glue/sst2,stsb,rte"
    assert spelled["terms"] == {}  # each task has its own
    status, printed = command("distill", copied / "recipe.yaml", "--out", copied)
    assert status == 0, printed


def test_the_recipe_of_a_suite_has_what_its_preset_says_of_texts(copied, monkeypatch):
    """A recipe that is written out and read again is the same, with the extra data of its preset."""
    source = {"task": "glue/sst2,rte", "teacher": "t", "student": "layers:0", "preset": "best"}
    whole, without = Recipe.parse(source), Recipe.parse({**source, "extra": None})
    for recipe in (whole, without, whole.with_preset(texts=True)):
        again = Recipe.parse(yaml.safe_load(recipe.to_yaml()))
        assert again.resolved(regression=False) == recipe.resolved(regression=False)
    copies = load_preset("best").texts["extra"]["copies"]
    assert whole.with_preset(texts=True).extra.copies == copies
    assert without.with_preset(texts=True).extra is None
    ran = []

    def stopped(recipe, folder, **options):
        ran.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("limbeck.suite.distill", stopped)
    monkeypatch.setattr("limbeck.suite.check_task", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        distill_suite(whole, copied, overwrite=True)
    assert ran[0].extra.copies == copies
    assert yaml.safe_load((copied / "recipe.yaml").read_text())["extra"]["copies"] == copies


def test_retraining_that_was_interrupted_goes_on(copied, monkeypatch):
    """By the same command: what it finished is not made a third time, and is no reason to refuse the rest."""
    asked = {}

    def watched(recipe, folder, *, retrain, **options):
        asked[recipe.task.name] = retrain
        raise ArithmeticError("enough")

    monkeypatch.setattr("limbeck.suite.distill", watched)
    with pytest.raises(ValueError, match="holds a run with its teacher; to make it anew, pass --overwrite"):
        distill_suite(copied / "recipe.yaml", copied, retrain=True)
    shutil.rmtree(copied / "rte")
    distill_suite(copied / "recipe.yaml", copied, retrain=True)
    assert asked == {"glue/sst2": False, "glue/stsb": False, "glue/rte": True}


def test_a_store_that_cannot_be_written_is_found_before_any_task_is_begun(command, place, tmp_path, monkeypatch):
    def refusing(store):
        raise ValueError(f"fine-tuned models cannot be kept in {store.root}")

    monkeypatch.setattr("limbeck.models.TeacherStore.check_room", refusing)
    more = ["--set", f"store={tmp_path / 'store'}"]
    refused(command(*words(place, tmp_path / "suite", *more, task="glue/sst2,rte")), "cannot be kept in")
    assert not (tmp_path / "suite").exists()


def test_the_recipe_of_a_task(tmp_path):
    source = {"task": "glue/all", "teacher": "models/{task}", "student": "layers:0", "preset": "best"}
    own = task_recipe(Recipe.parse(source, [f"cache.place={tmp_path}", "task.data=my/{task}"]), "stsb")
    assert (own.task.name, own.task.data) == ("glue/stsb", "my/stsb")
    assert (own.teacher.model, own.student.layers) == ("models/stsb", (0,))
    assert own.cache.place == f"{tmp_path}/stsb"
    assert set(own.resolved(regression=True).terms) == {"kd", "labels", "hidden"}
    assert own.resolved(regression=True).terms["labels"].loss == "label_mse"
    assert task_recipe(Recipe.parse(source), "rte").cache.place == "memory"
    more = task_recipe(Recipe.parse({**source, "extra": "more/{task}.txt"}), "rte")
    assert more.extra.data == ("more/rte.txt",)


# ---- what the tasks come to together, against plain code


def test_a_task_may_differ():
    source = {"task": "glue/cola,rte", "teacher": "t", "student": "layers:0", "preset": "best"}
    changes = ["by_task.rte.training.steps=7", "by_task.rte.extra.copies=2", "by_task.rte.task.max_length=40"]
    changes.append("by_task.cola.student=layers:1")
    recipe = Recipe.parse(source, changes).with_preset(texts=True)
    cola, rte = (task_recipe(recipe, name) for name in ("cola", "rte"))
    assert rte.training == cola.training.model_copy(update={"steps": 7})
    assert rte.extra == cola.extra.model_copy(update={"copies": 2})
    assert (rte.task.name, rte.task.max_length, cola.task.max_length) == ("glue/rte", 40, recipe.task.max_length)
    assert not rte.by_task
    assert not cola.by_task
    assert (cola.student.layers, rte.student.layers) == ((1,), (0,))


def scores(generator, mean, spread, count=1000):
    return np.concatenate([[mean], generator.normal(mean, spread, count)])


def drawn(seed, teacher=0.9, baseline=0.8, student=0.86, spread=0.01):
    generator = np.random.default_rng(seed)
    means = {"teacher": teacher, "baseline": baseline, "student": student}
    return {role: scores(generator, mean, spread) for role, mean in means.items()}


def test_averages_and_ratios():
    tasks = {"sst2": drawn(0), "rte": drawn(1, 0.7, 0.6, 0.69), "stsb": drawn(2, 0.85, 0.849, 0.852)}
    found = combine(tasks, ["sst2", "rte"])
    gains, gaps = [0.06, 0.09, 0.003], [0.1, 0.1, 0.001]
    assert found.teacher.value == pytest.approx((0.9 + 0.7 + 0.85) / 3)
    assert found.gain.value == pytest.approx(sum(gains) / 3)
    assert found.gap.value == pytest.approx(sum(gaps) / 3)
    assert found.ratio.value == pytest.approx((0.6 + 0.9) / 2)
    assert found.ratio_tasks == ["sst2", "rte"]
    assert found.pooled_ratio.value == pytest.approx(sum(gains) / sum(gaps))
    assert found.retention.value == pytest.approx((0.86 / 0.9 + 0.69 / 0.7 + 0.852 / 0.85) / 3)
    assert found.speedup is None
    assert combine({}, []) is None


def test_intervals_of_averages_take_tasks_for_independent():
    """The width of a mean of k independent numbers; resamples that are the same for two tasks are no exception."""
    one = combine({"sst2": drawn(0)}, ["sst2"]).teacher
    assert one.high - one.low == pytest.approx(2 * 1.96 * 0.01, rel=0.15)
    same = {name: drawn(0) for name in ("sst2", "rte", "stsb", "qnli")}
    mean = combine(same, list(same)).teacher
    assert mean.high - mean.low == pytest.approx((one.high - one.low) / 2, rel=0.15)
    pooled = combine(same, list(same)).pooled_ratio
    each = combine({"sst2": drawn(0)}, ["sst2"]).pooled_ratio
    assert pooled.high - pooled.low == pytest.approx((each.high - each.low) / 2, rel=0.2)


def test_within_a_task_resamples_stay_paired():
    """What moves teacher and student together is no noise of their difference."""
    both = drawn(0)
    shift = np.concatenate([[0.0], np.random.default_rng(5).normal(0, 0.2, 1000)])
    moved = {role: values + shift for role, values in both.items()}
    gains = [combine({"rte": each}, []).gain for each in (moved, both)]
    assert dataclasses.astuple(gains[0]) == pytest.approx(dataclasses.astuple(gains[1]))


def test_where_there_is_no_gap_there_is_no_ratio():
    level = {"sst2": drawn(0, 0.8, 0.8, 0.8), "rte": drawn(1, 0.7, 0.7, 0.7)}
    found = combine(level, [])
    assert found.pooled_ratio is None
    assert found.pooled_note == "not defined: the gap between teacher and baseline is within noise"
    assert (found.ratio, found.ratio_tasks) == (None, [])
    without = {name: {r: v for r, v in drawn(0).items() if r != "baseline"} for name in ("sst2", "rte")}
    assert (combine(without, []).baseline, combine(without, []).gain) == (None, None)


def test_the_speed_up_is_of_medians_over_the_same_turns():
    generator = np.random.default_rng(0)
    slowed = generator.uniform(1, 5, 61)  # the machine is busier in some turns
    slow, fast = 3.0 * slowed, 1.0 * slowed
    assert speedups(slow, fast) == pytest.approx(np.full(1001, 3.0))
    fast = generator.uniform(1, 5, 61)
    noisy = speedups(slow, fast)
    assert noisy[0] == pytest.approx(statistics.median(slow) / statistics.median(fast))
    low, high = np.percentile(noisy[1:], [2.5, 97.5])
    assert low < noisy[0] < high


# ---- pages


def shown(report, width=80):
    printed = io.StringIO()
    print_suite(report, Console(file=printed, width=width))
    return printed.getvalue()


def hostile():
    text = "<script>alert(1)</script> [bold] | {{ 7*7 }} \x1b[31m"
    report = example()
    rows = [dataclasses.replace(report.rows[0], note=text), SuiteRow("rte", "failed", error=text), SuiteRow("qqp")]
    return dataclasses.replace(report, rows=rows, remarks=[text], command=text, name=text)


def test_the_table_fits_80_columns():
    text = shown(example())
    assert max(len(line) for line in text.splitlines() if "qnli:" not in line) <= 80
    assert re.search(r"^qnli\* +90\.0 +85\.0 +88\.0 +0\.60 +2\.00×", text, flags=re.MULTILINE)
    assert re.search(r"^rte +90\.0 +85\.0 +88\.0 +no gap", text, flags=re.MULTILINE)
    assert "* qnli: seen before" in text
    assert "* average: mean of 1 of 2 ratios" in text
    assert text.count("[89.0, 91.0]") == 3


def test_card_and_page_have_the_numbers():
    card, page = render_suite_card(example()), render_suite(example())
    assert "| qnli | 90.0 [89.0, 91.0] | 85.0 [84.0, 86.0] |" in card
    assert "| seen before |" in card
    for text in ("90.0", "[89.0, 91.0]", "0.60", "2.00×", "seen before", "no gap", "Pooled distillation ratio"):
        assert text in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_hostile_texts_stay_texts():
    page, card = render_suite(hostile()), render_suite_card(hostile())
    assert "<script" not in page
    assert "<script" not in re.sub(r"```.*?```", "", card, flags=re.DOTALL)  # in code it is inert
    assert "\x1b" not in page + card
    assert "{{ 7*7 }}" in page
    assert "[bold]" in shown(hostile(), 200)
    assert SuiteReport.from_json(hostile().to_json()) == hostile()


def test_verdicts():
    assert example().verdict().endswith("On no task is it worse than plain training beyond noise.")
    report = example()
    worse = dataclasses.replace(report.rows[1], gain=Interval(-0.02, -0.03, -0.01))
    assert (
        "It is worse than plain training on qnli."
        in dataclasses.replace(report, rows=[report.rows[0], worse]).verdict()
    )
    none = dataclasses.replace(report, rows=[SuiteRow("rte", "failed", error="x")], averages=None)
    assert none.verdict() == "No task is finished. 1 failed: rte."
    assert "failed" in shown(none)
    plain = dataclasses.replace(report, averages=dataclasses.replace(report.averages, gain=None, gap=None))
    assert "No plainly trained baseline was run" in plain.verdict()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "rows": [], "averages": null}'])
def test_what_is_no_report_of_a_suite(text):
    with pytest.raises(ValueError, match="report"):
        SuiteReport.from_json(text)


def test_wnli_and_mnli_are_spoken_of(tmp_path):
    from limbeck.suite import _Suite

    recipe = Recipe.parse({"task": "glue/all", "teacher": "t", "student": "layers:0"})
    suite = _Suite(recipe, tasks_of_suite("glue/all"), tmp_path, {}, "")
    remarks = suite.report({name: SuiteRow(name) for name in suite.tasks}).remarks
    assert ["WNLI" in remarks[0], "MNLI" in remarks[1]] == [True, True]


def test_one_task_has_nothing_by_task(tmp_path):
    source = {"task": "glue/rte", "teacher": "t", "student": "layers:0", "by_task": {"rte": {"seeds": 2}}}
    with pytest.raises(ValueError, match="by_task is for several tasks, and this recipe has one"):
        limbeck.distill(source, tmp_path / "run")
