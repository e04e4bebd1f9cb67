"""More data for the student: what is made, what is left out, what a loss makes of it, and what a run reports."""

import json
import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

from limbeck import Distiller, Examples, Settings, Term, fit
from limbeck.enlarging import Wanted
from limbeck.plan import Observer
from limbeck.recipe import Recipe
from limbeck.report import Report
from limbeck.report.report import ExtraData, Interval, example
from limbeck.report.tables import comparison_facts
from limbeck.run import Run, distill
from limbeck.tasks import EXTRA, Rows, TaskOptions, make_task
from limbeck.tasks.extra import ExtraSpec, make_extra, read_unlabelled
from limbeck.tasks.text import TextTask

from . import tiny


def task(train=(("a fine film",), ("a dull book",)), held=(("the room was warm",),), labels=("bad", "good")):
    splits = {"train": Rows(list(train), [0] * len(train)), "validation": Rows(list(held), [0] * len(held))}
    return TextTask("table", labels, ("accuracy",) if labels else ("pearson",), splits)


OPTIONS = TaskOptions(name="table", text=("text",))


def made(spec, own=None, **sources):
    return make_extra(ExtraSpec(**spec), own or task(), OPTIONS, sources, "[MASK]")


def written(folder, *lines):
    path = folder / "more.txt"
    path.write_text("\n".join(lines))
    return str(path)


# ---- what is made ---------------------------------------------------------------------------------------------


def test_unlabelled_texts_of_a_file_have_no_label(tmp_path):
    extra = made({"data": written(tmp_path, "quite nice", "", "  very cold ")})
    assert extra.rows.inputs == [("quite nice",), ("very cold",)]
    assert extra.rows.labels == [-100, -100]
    assert extra.origins == {"unlabelled": 2}


def test_of_a_number_to_predict_the_label_is_nan(tmp_path):
    extra = made({"data": written(tmp_path, "quite nice")}, task(labels=()))
    assert math.isnan(extra.rows.labels[0])


def test_evaluation_texts_are_left_out_however_they_are_written(tmp_path):
    lines = [
        "The room was WARM.",
        "the  room was warm",
        "A fine film",
        "a fine film",
        "it was grim",
        "it was grim",
    ]
    extra = made({"data": written(tmp_path, *lines)})
    assert extra.rows.inputs == [("A fine film",), ("it was grim",)]
    assert extra.dropped == {"in the evaluation data": 2, "there already": 2}
    assert "left out: 2 in the evaluation data, 2 there already" in extra.in_words()


def test_evaluation_pairs_are_left_out_in_either_order(tmp_path):
    pairs = task(train=[("a", "b")], held=[("warm room", "cold hall")])
    extra = made({"data": written(tmp_path, "Cold hall!\twarm room", "warm room\tgrim hall")}, pairs)
    assert extra.rows.inputs == [("warm room", "grim hall")]


def test_a_part_of_the_texts_is_drawn_by_the_seed(tmp_path):
    data = written(tmp_path, *(f"text {n}" for n in range(50)))
    first, again, other = (made({"data": data, "examples": 5, "seed": s}).rows.inputs for s in (0, 0, 1))
    assert len(first) == 5
    assert first == again
    assert first != other
    assert set(first) <= {(f"text {n}",) for n in range(50)}


def test_columns_are_the_task_s_own_or_the_only_ones_of_text(tmp_path):
    frame = pd.DataFrame({"text": ["one"], "note": ["x"], "stars": [3]})
    frame.to_csv(tmp_path / "own.csv", index=False)
    frame[["note", "stars"]].to_json(tmp_path / "only.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "part.parquet")
    assert read_unlabelled(ExtraSpec(data=str(tmp_path)), 1, OPTIONS) == [("x",), ("one",), ("one",)]
    pairs = read_unlabelled(ExtraSpec(data=str(tmp_path / "own.csv"), text=["note", "text"]), 2, OPTIONS)
    assert pairs == [("x", "one")]


def test_copies_differ_from_what_is_there_and_repeat_by_the_seed():
    spec = {"augment": ["delete", {"mask": {"p": 0.5}}], "copies": 6}
    first, again = made(spec), made(spec)
    assert first.rows == again.rows
    assert sum(first.origins.values()) == len(first.rows)
    assert set(first.origins) == {"delete", "mask"}
    assert len(set(first.rows.inputs)) == len(first.rows)
    assert ("a fine film",) not in first.rows.inputs
    assert first.rows != made({**spec, "seed": 1}).rows


def test_one_text_of_a_pair_is_altered():
    rows = [("a b c d", "e f g h")] * 1
    extra = made({"augment": {"delete": {"p": 0.5}}, "copies": 20}, task(train=rows))
    same = [[new == old for new, old in zip(row, rows[0], strict=True)] for row in extra.rows.inputs]
    assert [True, False] in same
    assert [False, True] in same
    assert [False, False] not in same


def test_words_are_replaced_by_candidates_alone():
    near = lambda asked: [("x", "y") if at.core == "fine" else () for at in asked]  # noqa: E731
    extra = made({"augment": {"replace": {"p": 1.0}}, "copies": 4}, replace=near)
    assert set(extra.rows.inputs) == {("a x film",), ("a y film",)}
    only = made({"augment": {"replace": {"p": 1.0, "k": 1}}, "copies": 4}, replace=near)
    assert only.rows.inputs == [("a x film",)]


def test_only_words_that_are_drawn_are_asked_about_and_each_once():
    asked = []

    def near(words):
        asked.extend(words)
        return [[f"other{n}" for n in range(9)] for _ in words]

    rows = [("word " * 40,)] * 5
    made({"augment": {"replace": {"p": 0.1}}, "copies": 2}, task(train=rows), replace=near)
    assert len(set(asked)) == len(asked)
    assert 0 < len(asked) < 40  # some 26 of the 40 places are drawn for ten copies


def test_candidates_take_the_signs_and_capitals_of_a_word():
    near = lambda asked: [["grim"]] * len(asked)  # noqa: E731
    extra = made({"augment": {"replace": {"p": 1.0}}}, task(train=[("Fine, (FILM)!",)]), replace=near)
    assert extra.rows.inputs == [("Grim, (GRIM)!",)]


def test_what_copies_are_left_out_for_is_counted_by_its_reason():
    extra = made({"augment": {"ngram": {"lengths": [1], "probabilities": [1]}}, "copies": 40},
                 task(train=[("fine film",)], held=[("Fine!",)]))  # fmt: skip
    assert extra.rows.inputs == [("film",)]
    assert extra.dropped["in the evaluation data"] > 0
    assert sum(extra.dropped.values()) == 39


def test_a_text_is_the_same_however_its_accents_are_encoded(tmp_path):
    held = [("caf\u00e9 na\u00efve",)]
    extra = made({"data": written(tmp_path, "Cafe\u0301 nai\u0308ve", "a cafe")}, task(held=held))
    assert extra.rows.inputs == [("a cafe",)]


def test_copies_say_how_many_are_done():
    said = []
    rows = [(f"text number {n} of many",) for n in range(700)]
    spec = ExtraSpec(augment="delete", copies=2)
    make_extra(spec, task(train=rows), OPTIONS, {}, tell=lambda done, total: said.append((done, total)))
    assert said == [(512, 1400), (1024, 1400), (1400, 1400)]


# ---- what the loss makes of it --------------------------------------------------------------------------------


def half_labelled(regression):
    torch.manual_seed(1)
    features = torch.randn(13, 4)
    if regression:
        labels = torch.randn(13)
        labels[[1, 2, 3, 4, 5, 6, 11]] = math.nan
    else:
        labels = torch.randint(0, 3, (13,))
        labels[[1, 2, 3, 4, 5, 6, 11]] = -100
    return features, labels


def naive(student, teacher, features, labels, regression):
    """Both terms and their sum, example by example."""
    told, said = [], []
    for x, y in zip(features, labels, strict=True):
        ours, theirs = student(x), teacher(x).detach()
        if regression:
            said.append((ours - theirs).square().mean())
            told += [] if y.isnan() else [(ours[0] - y).square()]
        else:
            said.append(
                functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum")
            )
            told += [] if y == -100 else [-ours.log_softmax(-1)[y]]
    return sum(said) / len(said) + 0.5 * (sum(told) / len(told) if told else 0.0)


@pytest.mark.parametrize("accumulation", [1, 2, 5])
@pytest.mark.parametrize("regression", [False, True])
def test_a_step_over_labelled_and_unlabelled_examples(regression, accumulation):
    """Micro-batches 1 to 6 of 13 hold no label at all where they are small; the step's mean is over all labels."""
    features, labels = half_labelled(regression)
    outputs = 1 if regression else 3
    student, teacher, twin = nn.Linear(4, outputs), nn.Linear(4, outputs), nn.Linear(4, outputs)
    twin.load_state_dict(student.state_dict())
    kd, plain = ("mse", "label_mse") if regression else ("forward_kl", "cross_entropy")
    terms = [Term("logits", loss=kd, name="kd"), Term("labels", loss=plain, weight=0.5, name="labels")]
    data = Examples([{"input": x, "labels": y} for x, y in zip(features, labels, strict=True)])
    settings = Settings(
        steps=1, batch_size=13, accumulation=accumulation, optimizer="sgd", learning_rate=0.1, warmup=0, clip=None,
        weight_decay=0, schedule="constant",
    )  # fmt: skip
    fit(Distiller(student, teacher, terms), data, None, settings)
    naive(twin, teacher, features, labels, regression).backward()
    expected = [p - 0.1 * p.grad for p in twin.parameters()]
    torch.testing.assert_close(list(student.parameters()), expected)


@pytest.mark.parametrize("regression", [False, True])
def test_a_batch_without_any_label_trains_by_the_teacher_alone(regression):
    features, labels = half_labelled(regression)
    labels[:] = math.nan if regression else -100
    outputs = 1 if regression else 3
    student, teacher = nn.Linear(4, outputs), nn.Linear(4, outputs)
    kd, plain = ("mse", "label_mse") if regression else ("forward_kl", "cross_entropy")
    output = Distiller(
        student,
        teacher,
        [Term("logits", loss=kd, name="kd"), Term("labels", loss=plain, name="labels", weight=0.5)],
    )(features, labels)
    output.loss.backward()
    torch.testing.assert_close(output.loss, naive(student, teacher, features, labels, regression))
    assert output.terms["labels"] == 0
    assert student.weight.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["dkd", "wsld", "mft", "ofa"])
def test_a_loss_that_needs_each_label_is_a_mean_over_those_that_have_one(loss):
    features, labels = half_labelled(regression=False)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    distiller, known = Distiller(student, teacher, [Term("logits", loss=loss)]), labels != -100
    torch.testing.assert_close(distiller(features, labels).loss, distiller(features[known], labels[known]).loss)


def test_a_number_that_is_ignored_and_one_that_is_none_both_count_nothing():
    features, labels = half_labelled(regression=True)
    labels[0] = -1.0
    student = nn.Linear(4, 1)
    known = ~labels.isnan() & (labels != -1.0)
    loss = Distiller(student, None, [Term("labels", loss="label_mse", ignore_index=-1.0)])(features, labels).loss
    torch.testing.assert_close(loss, (student(features)[:, 0] - labels)[known].square().mean())


# ---- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tiny.place_of(tmp_path_factory.mktemp("extra"))
    seen = tiny.table(seed=5)["text"].tolist()
    (folder / "more.txt").write_text("\n".join(seen))
    return folder


@pytest.fixture(scope="module")
def run(place):
    extra = {"data": str(place / "more.txt"), "augment": ["replace", "delete"], "copies": 2, "compare": True}
    recipe = tiny.recipe(place, extra=extra, cache=str(place / "signals"))
    return recipe, distill(recipe, place / "run"), place / "run"


def test_the_report_says_what_the_extra_data_gave(run):
    _, report, folder = run
    extra = report.extra
    assert set(extra.origins) == {"unlabelled", "replace", "delete"}
    assert min(extra.origins.values()) > 0
    assert report.examples["extra"] == sum(extra.origins.values())
    assert extra.gain.low <= extra.gain.value <= extra.gain.high
    assert extra.gain.value == pytest.approx(report.student.score.value - extra.score.value)
    assert Report.load(folder) == report
    for page in ("report.html", "README.md"):
        assert "Gain of extra data" in (folder / page).read_text()


def test_all_are_trained_for_as_many_updates(run):
    _, report, folder = run
    results = {role: json.loads((folder / "checkpoints" / role / "result.json").read_text())
               for role in ("baseline-0", "student-0", "without_extra-0")}  # fmt: skip
    examples = report.examples["train"] + report.examples["extra"]
    assert {result["steps"] for result in results.values()} == {3 * math.ceil(examples / 16)}
    assert len({len(result["history"]) for result in results.values()}) == 1
    teacher = json.loads((folder / "checkpoints" / "teacher" / "result.json").read_text())
    assert teacher["examples"] == 2 * 32  # of the labelled examples


def test_the_same_run_is_found_again_and_another_file_is_another_run(run, place):
    recipe, report, folder = run
    assert distill(recipe, folder) == report
    (place / "other.txt").write_text("a warm hall")
    with pytest.raises(ValueError, match="holds another run"):
        distill({**recipe, "extra": {**recipe["extra"], "data": str(place / "other.txt")}}, folder)


def test_extra_examples_are_made_once(run):
    recipe = Recipe.parse(run[0])
    own = make_task(recipe.task)
    processor = own.load(recipe.teacher.model).processor
    first = Wanted.by(recipe, own, processor).make()
    (file,) = (run[2].parent / "store" / "extra").glob("*.json")
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "texts": [["kept here"]]}))
    assert Wanted.by(recipe, own, processor).make().rows.inputs == [("kept here",)]
    file.write_text("{")  # torn
    assert Wanted.by(recipe, own, processor).make().rows.inputs == first.rows.inputs


def test_the_student_alone_sees_them(run, place):
    recipe = Recipe.parse(run[0])
    own = make_task(recipe.task)
    watched = Run(recipe, own, place / "plan", Observer())
    watched.teach(lambda _: None)
    data, count = watched.data, len(own.splits["train"])
    assert len(watched.stage("student-0").train) == count + len(data.student[EXTRA])
    assert len(watched.stage("baseline-0").train) == len(watched.stage("teacher").train) == count
    assert EXTRA not in watched.stage("student-0").evaluate
    assert EXTRA not in own.splits
    ids = data.training.batch(range(len(data.training)))["example_id"].tolist()
    assert ids == list(range(len(data.training)))
    assert data.labelled.batch([0, 1])["labels"].tolist() == own.splits["train"].labels[:2]


def test_a_cache_stands_for_the_teacher_of_the_same_extra_examples(run, place, command):
    recipe = {**run[0], "cache": "memory"}
    path = place / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert command("cache", "build", path, "--out", place / "kept")[0] == 0
    kept = {**recipe, "teacher": {"model": f"cache:{place / 'kept'}"}, "store": str(place / "empty")}
    report = distill(kept, place / "from-cache")
    assert report.extra.origins == run[1].extra.origins
    assert report.student.score == run[1].student.score
    with pytest.raises(ValueError, match="was not built with these extra examples"):
        distill({**kept, "extra": {"augment": "replace", "seed": 9}}, place / "other")


def test_another_model_that_fills_words_in_makes_another_run(place, tmp_path):
    """The recipe names it by its folder alone, in which another one may stand when a run goes on."""
    spec = {"augment": "masked_lm", "masked_lm": str(tmp_path)}
    recipe = Recipe.parse(tiny.recipe(place, extra=spec))
    own, made_by = make_task(recipe.task), []
    for text in ("{}", '{"other": 1}'):
        (tmp_path / "config.json").write_text(text)
        made_by.append(Run(recipe, own, place / "new", Observer()).made_by)
    assert made_by[0] != made_by[1]


def test_two_tokenizers_read_the_extra_texts_each_by_its_own(place, tmp_path):
    tokenizer = tiny.train_tokenizer(["a film was very fine and it"], vocabulary=60)
    config = tiny.config(vocab_size=len(tokenizer))
    tiny.BertModel(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    recipe = tiny.recipe(place, student={"model": str(tmp_path / "student")}, extra={"augment": "mask"})
    recipe["terms"] = {"kd": {"loss": "forward_kl"}, "labels": {"tap": "labels", "loss": "cross_entropy"}}
    recipe["training"] = {"steps": 2, "batch_size": 64}
    report = distill(recipe, tmp_path / "run")
    assert report.extra.origins["mask"] > 0
    assert report.extra.gain is None


def test_facts_without_and_with_a_comparison():
    base = example()
    plain = comparison_facts(base.__class__(**{**base.__dict__, "extra": ExtraData({"delete": 1200}, {})}))
    assert plain[0].name == "Extra data"
    assert plain[0].value == "1,200 examples"
    gain = ExtraData({"delete": 3}, {"there already": 2}, Interval(0.8, 0.7, 0.9), Interval(0.1, 0.05, 0.2))
    facts = comparison_facts(base.__class__(**{**base.__dict__, "extra": gain}))
    assert facts[1].name == "Gain of extra data"
    assert facts[1].value.startswith("+10")
    assert "Left out: 2 there already" in facts[0].meaning


# ---- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "names no examples"),
        ({"augment": "delte"}, "unknown augmentation 'delte'; did you mean 'delete'"),
        ({"augment": {"mask": {"p": 1.5}}}, "p is a probability from 0 to 1, got 1.5"),
        ({"augment": {"mask": {"q": 0.5}}}, "has no option 'q'"),
        ({"augment": {"replace": {"k": 0}}}, "k is the number of candidates"),
        ({"augment": {"replace": {"k": 2.5}}}, "k is the number of candidates"),
        ({"augment": {"mask": {"mask": 5}}}, "augment: mask: .*expected str"),
        ({"augment": ["mask", "mask"]}, "mask stands twice"),
        ({"copies": 3, "data": "x.txt"}, "set it, or drop copies"),
        ({"augment": "masked_lm"}, "set extra.masked_lm"),
        ({"augment": "mask", "masked_lm": "bert"}, "extra.masked_lm is for augment: masked_lm"),
        ({"augment": "mask", "examples": 3}, "set extra.data"),
        ({"augment": "mask", "copise": 3}, "did you mean 'copies'"),
    ],
)
def test_what_does_not_belong_together_is_refused(spec, message):
    recipe = {"task": "docstrings", "teacher": "x", "student": "layers:0", "extra": spec}
    with pytest.raises(ValueError, match=message) as error:
        Recipe.parse(recipe)
    assert "\n" not in str(error.value)


def test_a_recipe_names_extra_data_by_one_word_and_the_command_line_changes_it():
    recipe = {"task": "docstrings", "teacher": "x", "student": "layers:0"}
    assert Recipe.parse({**recipe, "extra": "more.txt"}).extra.data == ("more.txt",)
    changed = Recipe.parse(
        {**recipe, "extra": None}, ["extra.augment=[delete, {mask: {p: 0.2}}]", "extra.copies=4"]
    )
    assert changed.extra.augment == {"delete": {}, "mask": {"p": 0.2}}
    assert changed.extra.copies == 4


def test_extra_data_on_the_command_line(command, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("limbeck.cli_distill._run", lambda recipe, *_: made.append(recipe))
    whole = ["distill", "--task", "docstrings", "--teacher", "x", "--student", "layers:0"]
    assert command(*whole, "--extra", "a.txt", "--extra", "b", "--augment", "delete", "--copies", "3")[0] == 0
    assert command(*whole)[0] == 0
    path = tmp_path / "recipe.yaml"
    path.write_text(made[0].to_yaml())
    assert command("distill", path, "--copies", "5")[0] == 0
    first, without, changed = (recipe.extra for recipe in made)
    assert (first.data, first.augment, first.copies) == (("a.txt", "b"), {"delete": {}}, 3)
    assert without is None
    assert changed == first.model_copy(update={"copies": 5})
    status, printed = command(*whole, "--copies", "3")
    assert (status, "names no examples; set extra.data" in printed) == (2, True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, "there is no file or folder"),
        ("more.doc", "x", "unknown format"),
        ("more.txt", " \n\n", "is empty"),
        ("more.csv", "text\n", "is empty"),
        ("more.csv", "stars\n3\n", r"text columns none \(all columns: \['stars'\]\)"),
        ("more.csv", "a,b\nx,y\n", r"text columns \['a', 'b'\]"),
        ("more.txt", "a fine film\nThe room was warm", "extra leaves no example"),
    ],
)
def test_files_that_hold_nothing_of_use_are_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        made({"data": str(tmp_path / name)})


def test_columns_and_texts_must_fit_the_task(tmp_path):
    with pytest.raises(ValueError, match=r"line 1 of .* has 1 texts, and an example of the task has 2"):
        made({"data": written(tmp_path, "one")}, task(train=[("a", "b")], held=[("c", "d")]))
    (tmp_path / "more.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"has no column 'txt'; did you mean 'text'"):
        made({"data": str(tmp_path / "more.csv"), "text": "txt"})
    with pytest.raises(ValueError, match=r"extra\.text names 2 columns"):
        made({"data": str(tmp_path / "more.csv"), "text": ["a", "b"]})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file of text"):
        made({"data": str(tmp_path / "empty")})


def test_images_have_no_extra_texts(tmp_path):
    network = "limbeck.tasks.image:fresh_resnet"
    recipe = {"task": "digits", "teacher": network, "student": {"model": network}, "extra": {"augment": "mask"}}
    with pytest.raises(ValueError, match="extra is for texts"):
        distill(recipe, tmp_path / "run")


def test_a_teacher_without_an_embedding_has_no_neighbours(place, tmp_path):
    teacher = {"model": "tests.test_extra:bare"}
    student = {"model": "tests.test_extra:bare"}
    with pytest.raises(ValueError, match="leave replace out"):
        distill(
            tiny.recipe(place, teacher=teacher, student=student, extra={"augment": "replace"}), tmp_path / "run"
        )


def bare(task):
    """A model that is none of transformers."""
    return nn.Linear(2, 2)
