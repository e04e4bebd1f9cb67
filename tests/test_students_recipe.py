"""Students of a recipe: with fewer layers, narrower, of the teacher's kind, in a run."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import limbeck
from limbeck.building import build_cache
from limbeck.cli import app
from limbeck.recipe import Recipe
from limbeck.report.tables import comparison_facts
from limbeck.stage import Stage
from limbeck.students import narrower_sizes, shrink, take_layers
from limbeck.students.spec import StudentSpec
from limbeck.train import read_log
from tests import models, tiny

torch.set_num_threads(1)


@pytest.fixture
def place(tmp_path):
    return tiny.place_of(tmp_path)


def test_a_student_is_what_its_functions_make():
    teacher = models.bert(layers=3)
    made = StudentSpec(layers=[0, 2], shrink={"hidden_size": 8, "intermediate_size": 20}).made_of(teacher, 0)
    expected = shrink(take_layers(teacher, [0, 2]), hidden_size=8, intermediate_size=20)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in expected.state_dict().items())
    made = StudentSpec(shrink={"share": 0.5, "init": "low_rank"}).made_of(teacher, 0)
    expected = shrink(teacher, **narrower_sizes(teacher, 0.5), init="low_rank")
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in expected.state_dict().items())
    changes = {"num_hidden_layers": 1, "hidden_size": 8}
    made = [StudentSpec(config=changes).made_of(teacher, seed) for seed in (0, 0, 1)]
    first, same, other = (model.bert.pooler.dense.weight for model in made)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    frozen = models.bert().requires_grad_(False)
    assert all(p.requires_grad for p in StudentSpec(shrink={"share": 0.5}).made_of(frozen, 0).parameters())


@pytest.mark.parametrize(
    ("student", "sizes"),
    [
        ({"layers": [1], "shrink": {"hidden_size": 8, "intermediate_size": 16}}, (1, 8, 1, 16)),
        ({"config": {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}}, (1, 8, 2, 8)),
    ],
)
def test_a_run_distils_into_it(place, student, sizes):
    report = limbeck.distill(Recipe.parse(tiny.recipe(place, student=student)), place / "run")
    assert report.student.parameters < report.teacher.parameters
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(place / "run" / "student")
    config = loaded.config
    found = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size
    assert found == sizes


def trained(run, role):
    """The weights with which a role's training ended."""
    return load_file(run / "checkpoints" / f"{role}-0" / "final.safetensors")


WORDS = "bert.embeddings.word_embeddings.weight"


def test_a_student_is_set_up_to_be_taught_and_its_twin_is_not(place):
    source = tiny.recipe(place, student={"layers": [0], "freeze_embeddings": True})
    limbeck.distill(Recipe.parse(source), place / "run")
    (teacher,) = (place / "store").rglob("model.safetensors")
    start = load_file(teacher)[WORDS]
    assert torch.equal(trained(place / "run", "student")[WORDS], start)
    assert not torch.equal(trained(place / "run", "baseline")[WORDS], start)


def test_without_dropout_a_lesson_draws_nothing(place):
    """The student's forward pass is the same twice where it has no dropout, and is not where it has."""
    student = transformers.BertForSequenceClassification(tiny.config()).train()
    ids = torch.tensor([[2, 5, 6, 3]])
    drawn = [student(input_ids=ids).logits for _ in range(2)]
    assert not torch.equal(*drawn)
    StudentSpec(layers=[0], dropout=0.0).set_up(student)
    drawn = [student(input_ids=ids).logits for _ in range(2)]
    assert torch.equal(*drawn)
    source = tiny.recipe(place, student={"layers": [0], "dropout": 0.0}, baseline=False)
    limbeck.distill(Recipe.parse(source), place / "none")
    source = tiny.recipe(place, student={"layers": [0]}, baseline=False)
    limbeck.distill(Recipe.parse(source), place / "usual")
    weights = (trained(place / name, "student") for name in ("none", "usual"))
    assert not all(torch.equal(*pair) for pair in zip(*(w.values() for w in weights), strict=True))


def test_token_vectors_that_are_not_there_cannot_be_frozen():
    with pytest.raises(ValueError, match="Linear has no table of token vectors"):
        StudentSpec(layers=[0], freeze_embeddings=True).set_up(torch.nn.Linear(2, 2))


def test_token_vectors_are_frozen_where_they_are_the_teachers_own():
    def frozen(student, **parts):
        made = StudentSpec(freeze_embeddings="auto", **parts)
        made.set_up(student)
        return any(not parameter.requires_grad for parameter in student.parameters())

    assert frozen(models.bert(layers=1), layers=[0])
    assert not frozen(models.bert(layers=1), layers=[0], shrink={"hidden_size": 8})
    assert not frozen(models.bert(layers=1), config={"num_hidden_layers": 1})
    assert not frozen(torch.nn.Linear(2, 2), layers=[0])


def test_the_baseline_may_be_trained_otherwise_with_as_many_updates(place):
    source = tiny.recipe(place, baseline_training={"learning_rate": 1e-5})
    source["training"] = {"epochs": 1, "least_steps": 7, "batch_size": 16, "learning_rate": 1e-3, "log_every": 1}
    limbeck.distill(Recipe.parse(source), place / "run")
    lines = [line for line in read_log(place / "run" / "log.jsonl") if "terms" in line]
    rates = {
        role: [n["learning_rate"] for n in lines if n["stage"] == f"{role}-0"] for role in ("student", "baseline")
    }
    assert len(rates["student"]) == len(rates["baseline"]) == 7
    assert rates["student"] == pytest.approx([100 * rate for rate in rates["baseline"]])


def beginnings(monkeypatch):
    """The weights that each stage begins with, by its name."""
    kept, run = {}, Stage.run

    def noted(stage, distiller, *others):
        kept[stage.name] = {k: v.clone() for k, v in distiller.student.state_dict().items()}
        return run(stage, distiller, *others)

    monkeypatch.setattr(Stage, "run", noted)
    return kept


@pytest.mark.parametrize("start", ["pretrained", "folder"])
def test_a_baseline_may_begin_with_the_model_from_before(place, monkeypatch, start):
    kept = beginnings(monkeypatch)
    named = str(place / "teacher") if start == "folder" else start
    source = tiny.recipe(place, baseline_training={"start": named})
    source["training"] = {"steps": 1, "batch_size": 16}
    report = limbeck.distill(Recipe.parse(source), place / "run")
    before = transformers.BertForSequenceClassification.from_pretrained(place / "teacher").state_dict()
    layer = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(kept["baseline-0"][layer], before[layer])
    assert not torch.equal(kept["student-0"][layer], before[layer])
    gain = next(fact for fact in comparison_facts(report) if fact.name == "Gain")
    assert "fine-tuned teacher's weights counts as added" in gain.meaning
    assert limbeck.distill(Recipe.parse(source), place / "run").student.score == report.student.score


@pytest.mark.parametrize(
    ("student", "start", "message"),
    [
        ({"config": {"num_hidden_layers": 1}}, "pretrained", "made of the teacher's weights, and this one is not"),
        ({"layers": [0]}, "nowhere", "nowhere"),
    ],
)
def test_a_start_that_means_nothing_is_refused_before_any_training(place, student, start, message):
    source = tiny.recipe(place, student=student, baseline_training={"start": start})
    with pytest.raises(ValueError, match=message):
        limbeck.distill(Recipe.parse(source), place / "run")
    assert not (place / "run").exists()


def test_a_ready_teacher_does_not_know_what_it_was_before(place):
    limbeck.distill(Recipe.parse(tiny.recipe(place, baseline=False)), place / "first")
    teacher = str(place / "first" / "student")
    source = tiny.recipe(place, teacher=teacher, baseline_training={"start": "pretrained"})
    with pytest.raises(ValueError, match="is fine-tuned already; set it to the folder or hub id"):
        limbeck.distill(Recipe.parse(source), place / "run")


def test_the_command_line_says_a_share(place):
    words = ["distill", "--task", "table", "--data", str(place / "data.csv"), "--text", "text", "--label", "label"]
    words += ["--teacher", str(place / "teacher"), "--student", "shrink:0.5", "--out", str(place / "run")]
    changes = [
        f"store={place / 'store'}",
        "training.steps=2",
        "teacher.training.steps=2",
        "training.batch_size=16",
    ]
    found = CliRunner().invoke(app, [*words, *(word for change in changes for word in ("--set", change))])
    assert found.exit_code == 0, found.output
    config = json.loads((place / "run" / "student" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]) == (8, 2, 16)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({}, "either layers=.* of the teacher or a model of its own, or shrink .*, or config"),
        ({"layers": [0], "config": {}}, "the student needs either"),
        ({"shrink": {"share": 0.5}, "model": "x"}, "the student needs either"),
        ({"shrink": {}}, "shrink needs either share, or sizes"),
        ({"shrink": {"share": 0.5, "heads": 1}}, "shrink needs either share, or sizes"),
        ({"shrink": {"share": 1.0}}, "less than 1"),
        ({"shrink": {"hiden_size": 8}}, "'hiden_size'; did you mean 'hidden_size'"),
        ({"config": {"hidden_size": 8}, "path": "x"}, "path says where the teacher keeps its layers"),
    ],
)
def test_what_makes_no_student_is_refused(place, student, message):
    with pytest.raises(ValueError, match=message):
        Recipe.parse(tiny.recipe(place, student=student))


@pytest.mark.parametrize("student", [{"layers": [0], "shrink": {"share": 0.5}}, {"config": {"hidden_size": 8}}])
def test_a_teacher_that_is_not_here_makes_no_student(place, student):
    build_cache(tiny.recipe(place, student=student), place / "signals")
    kept = {"model": f"cache:{place / 'signals'}"}
    with pytest.raises(ValueError, match="made of the teacher, which is not here"):
        limbeck.distill(tiny.recipe(place, student=student, teacher=kept), place / "run")
