"""The command line as a user meets it: a whole run, bad input, interruptions."""

import io
import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from limbeck import Term, __version__, cli
from limbeck.objective import PlannedTerm
from limbeck.progress import ConsoleObserver
from limbeck.report import Report
from limbeck.run import Plan
from limbeck.train import State
from tests import tiny

FAST = ["--set", "training.epochs=1", "--set", "teacher.training.epochs=1", "--set", "training.batch_size=16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder and a table."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save_encoder(folder / "encoder")
    tiny.table().to_csv(folder / "reviews.csv", index=False)
    return folder


@pytest.fixture
def limbeck(command, place):
    """The command line, beside a folder with models and data."""
    return command


def main_job(place, out, **changes):
    options = {
        "task": "table",
        "data": place / "reviews.csv",
        "text": "text",
        "label": "label",
        "teacher": place / "encoder",
        "student": "layers:0",
        "out": out,
        **changes,
    }
    flags = [str(part) for key, value in options.items() if value is not None for part in (f"--{key}", value)]
    return ["distill", *flags, "--set", f"store={place / 'store'}", *FAST]


def failed(result, *fragments):
    status, printed = result
    assert status == 2, printed
    line = printed.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in printed
    for fragment in fragments:
        assert fragment in line


def test_whole_run(limbeck, place, tmp_path):
    status, printed = limbeck(*main_job(place, tmp_path / "run"), "--seeds", "2")
    assert status == 0, printed
    assert "hidden.0" in printed  # the plan
    assert "baseline" in printed
    found = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert found == [
        *("README.md", "checkpoints", "log.jsonl", "made-by.json", "recipe.yaml"),
        *("report.html", "report.json", "resamples.safetensors", "student"),
    ]
    report = Report.load(tmp_path / "run")
    assert report.seeds == [0, 1]
    assert len(report.student.scores_by_seed) == 2
    assert report.student.parameters < report.teacher.parameters
    stages = {json.loads(line)["stage"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()}
    assert stages == {"teacher", "baseline-0", "student-0", "baseline-1", "student-1"}


def test_student_loads_without_limbeck(limbeck, place, tmp_path):
    limbeck(*main_job(place, tmp_path / "run"))
    student = str(tmp_path / "run" / "student")
    script = (
        "import sys; sys.modules['limbeck'] = None\n"
        "from transformers import AutoModelForSequenceClassification as M, AutoTokenizer as T\n"
        f"m, t = M.from_pretrained({student!r}), T.from_pretrained({student!r})\n"
        "logits = m(**t('a fine film', return_tensors='pt')).logits\n"
        "print(m.config.num_hidden_layers, m.config.id2label[1], logits.shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 good torch.Size([1, 2])"


def test_running_the_saved_recipe_repeats_the_run(limbeck, place, tmp_path):
    limbeck(*main_job(place, tmp_path / "a"))
    status, printed = limbeck("distill", tmp_path / "a" / "recipe.yaml", "--out", tmp_path / "b")
    assert status == 0, printed
    first, second = (load_file(tmp_path / run / "student" / "model.safetensors") for run in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "a" / "recipe.yaml").read_text() == (tmp_path / "b" / "recipe.yaml").read_text()


def test_teacher_is_fine_tuned_once(limbeck, place, tmp_path):
    command = [*main_job(place, tmp_path / "a"), "--set", f"store={tmp_path / 'store'}"]
    assert "to be fine-tuned" in limbeck(*command)[1]
    command[command.index("--out") + 1] = str(tmp_path / "b")
    assert "ready" in limbeck(*command)[1]
    command[command.index("--out") + 1] = str(tmp_path / "c")
    assert "to be fine-tuned" in limbeck(*command, "--retrain")[1]
    command[command.index("--out") + 1] = str(tmp_path / "d")
    assert "to be fine-tuned" in limbeck(*command, "--set", "teacher.training.learning_rate=1e-3")[1]


def test_trained_teacher_is_used_as_it_is(limbeck, place, tmp_path):
    teacher = tiny.save_classifier(tmp_path / "teacher", ["bad", "good"])
    status, printed = limbeck(*main_job(place, tmp_path / "run", teacher=teacher))
    assert status == 0, printed
    assert "ready" in printed
    assert Report.load(tmp_path / "run").teacher.training_seconds == 0


def test_regression_from_a_table(limbeck, place, tmp_path):
    status, printed = limbeck(*main_job(place, tmp_path / "run", label="stars"))
    assert status == 0, printed
    report = Report.load(tmp_path / "run")
    assert report.metric == "pearson"
    assert report.regression
    assert {row["loss"] for row in report.plan} == {"mse", "label_mse"}


def test_a_finished_run_is_not_done_again(limbeck, place, tmp_path):
    limbeck(*main_job(place, tmp_path / "run"))
    before = (tmp_path / "run" / "log.jsonl").read_text()
    status, _ = limbeck(*main_job(place, tmp_path / "run"))
    assert status == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_another_run_in_the_same_folder_is_refused(limbeck, place, tmp_path):
    limbeck(*main_job(place, tmp_path / "run"))
    failed(
        limbeck(*main_job(place, tmp_path / "run"), "--set", "training.learning_rate=1e-3"),
        "training.learning_rate: 5e-05 there, 0.001 here",
        "--overwrite",
    )


def test_a_finished_run_keeps_its_report(limbeck, place, tmp_path):
    """Nothing is measured again, and the teacher's cost is not forgotten."""
    limbeck(*main_job(place, tmp_path / "run"), "--set", f"store={tmp_path / 'store'}")
    before = (tmp_path / "run" / "report.json").read_text()
    limbeck(*main_job(place, tmp_path / "run"), "--set", f"store={tmp_path / 'store'}")
    assert (tmp_path / "run" / "report.json").read_text() == before
    (tmp_path / "run" / "report.json").unlink()  # as if it had been stopped before the report
    limbeck(*main_job(place, tmp_path / "run"), "--set", f"store={tmp_path / 'store'}")
    assert Report.load(tmp_path / "run").teacher.training_seconds > 0


def test_changed_data_is_another_run(limbeck, place, tmp_path):
    table = tiny.table()
    table.to_csv(tmp_path / "data.csv", index=False)
    command = main_job(place, tmp_path / "run", data=tmp_path / "data.csv")
    limbeck(*command)
    table["label"] = table["label"].map({"good": "bad", "bad": "good"})
    table.to_csv(tmp_path / "data.csv", index=False)
    failed(limbeck(*command), "holds another run (data.", "--overwrite")


def test_overwrite_deletes_a_run_and_nothing_else(limbeck, place, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    failed(limbeck(*main_job(place, home), "--overwrite"), "holds no run of limbeck")
    assert (home / "thesis.txt").is_file()
    limbeck(*main_job(place, tmp_path / "run"))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    report = (tmp_path / "run" / "report.json").read_text()
    failed(limbeck(*main_job(place, tmp_path / "run", teacher="nowhere/at/all"), "--overwrite"), "cannot load")
    assert (tmp_path / "run" / "report.json").read_text() == report
    status, _ = limbeck(*main_job(place, tmp_path / "run"), "--overwrite")
    assert status == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "report.json").read_text() != report


def test_a_failed_preflight_leaves_the_folder_free(limbeck, place, tmp_path):
    failed(
        limbeck(*main_job(place, tmp_path / "run"), "--set", "terms={kd: {loss: mse, tap: nowhere}}"), "nowhere"
    )
    status, printed = limbeck(*main_job(place, tmp_path / "run"))
    assert status == 0, printed


def test_retrain_in_the_folder_of_a_run_needs_overwrite(limbeck, place, tmp_path):
    limbeck(*main_job(place, tmp_path / "run"), "--set", f"store={tmp_path / 'store'}")
    command = [*main_job(place, tmp_path / "run"), "--set", f"store={tmp_path / 'store'}", "--retrain"]
    failed(limbeck(*command), "pass --overwrite too")
    assert len(list((tmp_path / "store" / "teachers").iterdir())) == 1
    status, printed = limbeck(*command, "--overwrite")
    assert status == 0, printed
    assert "to be fine-tuned" in printed


def test_an_option_replaces_the_recipes_student(limbeck, place, tmp_path):
    limbeck(*main_job(place, tmp_path / "a"))
    student = tiny.save_classifier(tmp_path / "small", ["bad", "good"], hidden_size=8)
    result = limbeck("distill", tmp_path / "a" / "recipe.yaml", "--student", student, "--out", tmp_path / "b")
    assert "both models need a list of layers" not in result[1]
    (tmp_path / "flat.yaml").write_text("task: 5")
    failed(limbeck("distill", tmp_path / "flat.yaml"), "'task' in the recipe is 5", "name: glue/rte")


def test_version(limbeck):
    assert limbeck("--version") == (0, f"limbeck {__version__}\n")


def test_the_plan_is_written_for_readers():
    """Small models in thousands of parameters; no negative distance; no loss before there is one."""
    term = Term("logits", loss="forward_kl")
    planned = PlannedTerm(term, (2, 2), (2, 2), None, -8.9e-8, 0)
    plan = Plan("own", {"train": 2}, [planned], {"teacher": 9_100, "student": 640}, {"student": 3}, "ready")
    printed = io.StringIO()
    with ConsoleObserver(Console(file=printed, width=120)) as observer:
        observer.on_plan(plan)
        (bar,) = observer.callbacks("student-0")
        bar.on_step(State(None, 3, step=1))
        assert observer.progress.tasks[0].fields["note"] == ""
        bar.on_step(State(None, 3, step=2, loss=0.25, terms={"forward_kl": 0.25}))
        assert observer.progress.tasks[0].fields["note"] == "loss 0.250"
    shown = printed.getvalue()
    assert "9.1 k parameters" in shown
    assert "640 parameters" in shown
    assert "e-08" not in shown


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_says_what_to_type(limbeck, place, tmp_path, monkeypatch, overwrite):
    def interrupted(*arguments, observer, **options):
        observer.begun = True
        raise KeyboardInterrupt("interrupted at step 3; kept here")

    monkeypatch.setattr("limbeck.run.distill", interrupted)
    command = [*main_job(place, tmp_path / "run"), *(["--overwrite"] if overwrite else [])]
    status, printed = limbeck(*command)
    assert status == 130
    again = shlex.join(["limbeck", *main_job(place, tmp_path / "run")])
    cure = f"to go on from there, type {again}" if overwrite else "the same command goes on from there"
    assert printed.endswith(f"error: interrupted at step 3; kept here; {cure}\n")


def test_an_interruption_before_anything_was_begun(limbeck, place, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    for place_of_work in ("limbeck.cli_distill._run", "limbeck.run.distill"):
        monkeypatch.setattr(place_of_work, interrupted)
        status, printed = limbeck(*main_job(place, tmp_path / "run"), "--overwrite")
        # --overwrite has deleted nothing yet
        assert (status, printed.strip()) == (130, "error: interrupted; nothing was begun")
        monkeypatch.undo()


def test_a_teacher_whose_retraining_was_interrupted_goes_on(limbeck, place, tmp_path):
    """With the same command, and without --retrain: not with the teacher that the store still has."""
    store = ["--set", f"store={tmp_path / 'store'}"]
    limbeck(*main_job(place, tmp_path / "first"), *store)
    stopped = [*main_job(place, tmp_path / "run"), *store]
    assert limbeck(*stopped, "--retrain")[0] == 0
    for name in (
        "report.json",
        "checkpoints/teacher/result.json",
    ):  # as if it had been stopped at the teacher's end
        (tmp_path / "run" / name).unlink()
    for flags in ([], ["--retrain"]):
        assert "to be fine-tuned" in limbeck(*stopped, *flags)[1]
        (tmp_path / "run" / "report.json").unlink()
        (tmp_path / "run" / "checkpoints/teacher/result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "teacher")  # as if the teacher had come from the store
    failed(limbeck(*stopped, "--retrain"), "holds a run with its teacher", "pass --overwrite too")


def test_no_command_shows_help(limbeck):
    status, printed = limbeck()
    assert status == 0
    assert "distill" in printed
    assert "error" not in printed


def test_report_command(limbeck, place, tmp_path):
    limbeck(*main_job(place, tmp_path / "run"))
    (tmp_path / "run" / "report.html").unlink()
    status, printed = limbeck("report", tmp_path / "run")
    assert status == 0
    assert "baseline" in printed
    assert (tmp_path / "run" / "report.html").is_file()


LISTED = {
    "presets": "a first answer in little time",
    "losses": "forward_kl",
    "transforms": "standardize",
    "temperatures": "flsw",
    "schedules": "warmup",
    "balances": "matched_scale",
    "projections": "linear",
    "tasks": "glue/rte",
    "metrics": "accuracy",
}


@pytest.mark.parametrize("what", cli.LISTS)
def test_list(limbeck, what):
    status, printed = limbeck("list", what)
    assert status == 0
    assert LISTED[what] in printed
    assert max(len(line) for line in printed.splitlines()) <= 100


# Bad input: one clear line, status 2, and nothing started.


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"task": "glue/rt"}, ["unknown", "'rte'"]),
        ({"task": "tabel"}, ["unknown task 'tabel'", "'table'"]),
        ({"text": "txt"}, ["no column 'txt'", "'text'"]),
        ({"label": "lable"}, ["no column 'lable'", "'label'"]),
        ({"text": "stars"}, ["'stars' holds", "no text"]),
        ({"label": "text"}, ["distinct values", "too many for classes"]),
        ({"data": "nowhere.csv"}, ["no file nowhere.csv"]),
        ({"student": "layers:0,7"}, ["7"]),
        ({"student": "layers:one"}, ["write layers:1,3,5"]),
        ({"student": "nowhere/at/all"}, ["cannot load a text model from 'nowhere/at/all'", "no such folder"]),
        ({"teacher": "./nowhere"}, ["there is no such folder"]),
        ({"teacher": "~/nowhere"}, ["~ is not read as the home folder"]),
        ({"student": "layer:0,1"}, ["did you mean 'layers:0,1'"]),
        ({"teacher": "nowhere.at:all"}, ["cannot import"]),
    ],
)
def test_bad_options(limbeck, place, tmp_path, changes, fragments):
    failed(limbeck(*main_job(place, tmp_path / "run", **changes)), *fragments)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ("terms.kd.loss=forwrd_kl", ["unknown loss 'forwrd_kl'", "'forward_kl'"]),
        ("terms.kd.temprature=2", ["terms.kd", "no option 'temprature'", "'temperature'"]),
        ("terms.kd.temperature=-1", ["temperature must be positive"]),
        ("terms.kd.tap=bert.encoder.layers.0", ["bert.encoder.layers.0", "did you mean"]),
        ("terms.kd.teacher_tap=lgits", ["the teacher has no 'lgits'", "'logits'"]),
        ("terms.kd.project=liner", ["unknown projection 'liner'", "'linear'"]),
        ("training.epoch=3", ["'training' has no key 'epoch'", "'epochs'"]),
        ("trainin.epochs=3", ["no key 'trainin'", "'training'"]),
        ("training.epochs=many", ["training.epochs", "many"]),
        ("training.batch_size=0", ["training.batch_size"]),
        ("training.best=true", ["task.holdout=0.1"]),
        ("student.layers=[5]", ["5"]),
        ("task.metric=pearson", ["judges numbers", "2 classes", "accuracy"]),
        ("task.metric=acuracy", ["unknown metric 'acuracy'", "'accuracy'"]),
        ("noequals", ["has no value"]),
        ("terms.kd.map=last", ["map and inside are for tap: layers"]),
        ("teacher.options={a: 1}", ["options ['a'] are for a package.module:function"]),
        ("student.path=encoder", ["has no 'encoder'", "'bert.encoder.layer'"]),
        ("training.optimizer_options={bets: 1}", ["optimizer 'adamw' has no option 'bets'", "'betas'"]),
        ("terms.kd.weigth=2", ["terms.kd", "no option 'weigth'", "'weight'"]),
        ("terms.kd.temperature=hot", ["terms.kd", "unknown temperature 'hot'; known: "]),
        ("terms.kd.weight=-1", ["terms.kd", "is -1, which pushes the student away"]),
        ("task.text=[text, text, text]", ["task.text", "one text column or two different ones", "3 are named"]),
    ],
)
def test_bad_recipe_values(limbeck, place, tmp_path, change, fragments):
    terms = "terms={kd: {loss: forward_kl}}"
    failed(limbeck(*main_job(place, tmp_path / "run"), "--set", terms, "--set", change), *fragments)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_texts_that_are_longer_than_a_model_can_read(limbeck, place, tmp_path):
    table = tiny.table()
    table["text"] = 20 * (table["text"] + " ")
    table.to_csv(tmp_path / "long.csv", index=False)
    command = main_job(place, tmp_path / "run", data=tmp_path / "long.csv")
    failed(limbeck(*command), "the teacher reads at most 64 tokens", "has 128; set task.max_length=64")
    small = tiny.save_classifier(tmp_path / "small", ["bad", "good"], max_position_embeddings=32)
    command = main_job(place, tmp_path / "run", data=tmp_path / "long.csv", student=small)
    failed(limbeck(*command, "--set", "task.max_length=64"), "the student reads at most 32 tokens")


def test_a_damaged_teacher_in_the_store(limbeck, place, tmp_path):
    command = [*main_job(place, tmp_path / "a"), "--set", f"store={tmp_path / 'store'}"]
    assert limbeck(*command)[0] == 0
    (teacher,) = (tmp_path / "store" / "teachers").iterdir()
    (teacher / "model.safetensors").write_bytes(b"damaged")
    command[command.index("--out") + 1] = str(tmp_path / "b")
    failed(limbeck(*command), f"teacher in {teacher} is damaged", "pass --retrain", "delete that folder")
    assert "to be fine-tuned" in limbeck(*command, "--retrain")[1]
    command[command.index("--out") + 1] = str(tmp_path / "c")
    assert "ready" in limbeck(*command)[1]


def test_retrain_is_for_teachers_that_are_fine_tuned(limbeck, place, tmp_path):
    teacher = tiny.save_classifier(tmp_path / "teacher", ["bad", "good"])
    command = [*main_job(place, tmp_path / "run", teacher=teacher), "--retrain"]
    failed(limbeck(*command), "is ready as it is", "set teacher.finetune=always")


def test_files_of_a_run_that_are_cut_off(limbeck, place, tmp_path):
    command = main_job(place, tmp_path / "run")
    limbeck(*command)
    for name, advice in (("report.json", "cannot read"), ("made-by.json", "is damaged")):
        file = tmp_path / "run" / name
        file.write_text(file.read_text()[:20])
        failed(limbeck(*command), str(file), advice)
    assert limbeck(*command, "--overwrite")[0] == 0


def test_unreadable_files(limbeck, place, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is no parquet")
    failed(limbeck(*main_job(place, tmp_path / "run", data=tmp_path / "broken.parquet")), "cannot read")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    failed(limbeck(*main_job(place, tmp_path / "run", data=tmp_path / "broken.jsonl")), "cannot read")
    (tmp_path / "table.xls").write_text("")
    failed(limbeck(*main_job(place, tmp_path / "run", data=tmp_path / "table.xls")), "unknown format")
    (tmp_path / "recipe.yaml").write_text("a: [")
    failed(limbeck("distill", tmp_path / "recipe.yaml"), "is no YAML")
    (tmp_path / "list.yaml").write_text("- a")
    failed(limbeck("distill", tmp_path / "list.yaml"), "holds no recipe")
    failed(limbeck("distill", tmp_path / "none.yaml"), "there is no recipe")
    failed(limbeck("report", tmp_path), "no report")


def test_missing_values_and_empty_splits(limbeck, place, tmp_path):
    table = tiny.table()
    table.loc[3, "label"] = None
    table.to_csv(tmp_path / "gap.csv", index=False)
    failed(limbeck(*main_job(place, tmp_path / "run", data=tmp_path / "gap.csv")), "no value in 1 of 80 rows")
    (tmp_path / "data").mkdir()
    tiny.table().to_csv(tmp_path / "data" / "train.csv", index=False)
    tiny.table().head(0).to_csv(tmp_path / "data" / "validation.csv", index=False)
    failed(limbeck(*main_job(place, tmp_path / "run", data=tmp_path / "data")), "validation.csv is empty")


@pytest.mark.parametrize("labels", [["bad", "good", "odd"], ["good", "bad"], ["no", "yes"]])
def test_label_mismatch_between_teacher_and_task(limbeck, place, tmp_path, labels):
    teacher = tiny.save_classifier(tmp_path / "teacher", labels)
    failed(limbeck(*main_job(place, tmp_path / "run", teacher=teacher)), "was trained for the labels", "'good'")


def test_usage_errors(limbeck):
    assert limbeck("distil")[0] == 2
    assert limbeck("distill", "--tsak", "x")[0] == 2
    failed(limbeck("distill"), "name a recipe")
    failed(limbeck("demo", "--task", "digit"), "'digits'")
    failed(limbeck("list", "loses"), "'losses'")


def test_nan_stops_and_keeps_the_last_good_checkpoint(limbeck, place, tmp_path):
    explode = ["--set", "training.learning_rate=1e30", "--set", "training.epochs=4", "--set", "training.warmup=0"]
    explode += ["--set", "training.clip=null", "--set", "training.optimizer=sgd", "--set", "training.log_every=1"]
    failed(limbeck(*main_job(place, tmp_path / "run"), *explode), "became", "step", "checkpoint")


def test_full_disk(limbeck, place, tmp_path):
    """Files that cannot grow, as on a full disk: one line, and the run goes on once there is room."""
    command = [sys.executable, "-m", "limbeck", *main_job(place, tmp_path / "run")]
    limit = 40_000  # bytes: enough for a recipe, too little for weights

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_room)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert not list((tmp_path / "run").rglob("*.partial"))
    status, printed = limbeck(*main_job(place, tmp_path / "run"))
    assert status == 0, printed


def test_debug_shows_the_traceback(limbeck, place, tmp_path):
    status, printed = limbeck(*main_job(place, tmp_path / "run", text="txt"), "--debug")
    assert status == 2
    assert "Traceback" in printed


def test_interrupt_and_resume(place, tmp_path):
    """Ctrl-C in the middle of a training: status 130, a checkpoint, and the same weights in the end."""
    long = ["--set", "training.epochs=60", "--set", "training.log_every=1"]
    command = [sys.executable, "-m", "limbeck", *main_job(place, tmp_path / "a"), *long]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "a" / "log.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.is_file() and '"student-0"' in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "interrupted at step" in complaint
    assert "Traceback" not in complaint
    subprocess.run(command, check=True, capture_output=True)
    command[command.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    subprocess.run(command, check=True, capture_output=True)
    first, second = (load_file(tmp_path / run / "student" / "model.safetensors") for run in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recipe_file_is_changed_by_options(limbeck, place, tmp_path):
    recipe = {
        "task": {"name": "table", "data": str(place / "reviews.csv"), "text": ["text"], "label": "label"},
        "teacher": {"model": str(place / "encoder"), "training": {"epochs": 1}},
        "student": {"layers": [0]},
        "terms": {"kd": {"loss": "forward_kl"}, "labels": {"tap": "labels", "loss": "cross_entropy"}},
        "training": {"epochs": 1},
        "store": str(place / "store"),
        "baseline": False,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    changes = ["--set", "student.layers=[1]", "--set", "terms.kd.temperature=4"]
    status, printed = limbeck("distill", tmp_path / "recipe.yaml", "--out", tmp_path / "run", *changes)
    assert status == 0, printed
    report = Report.load(tmp_path / "run")
    assert report.recipe["student"]["layers"] == [1]
    assert report.plan[0]["options"] == {"temperature": 4}
    assert report.baseline is None
    assert "not known" in report.verdict()
