"""What the documents show runs: README blocks, shipped recipes, commands."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import limbeck
from limbeck.cli import app
from limbeck.recipe import Places, Recipe
from limbeck.search import Space

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OBJECTIVES = (ROOT / "docs" / "objectives.md").read_text()
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
TEACHERS = (ROOT / "docs" / "teachers.md").read_text()
LOOPS = (ROOT / "docs" / "loops.md").read_text()
DATA_PAGE = (ROOT / "docs" / "data.md").read_text()
STUDENTS = (ROOT / "docs" / "students.md").read_text()
SEARCH = (ROOT / "docs" / "search.md").read_text()
"""Blocks of these build on one another."""
RECIPES = sorted(p for p in (ROOT / "limbeck" / "recipes").glob("*.yaml") if not p.stem.startswith("preset-"))
DATA = {"cifar10": ROOT.parent / "shared" / "data" / "cifar10"}
"""Data of the recipes that name none, where this machine has it."""


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning's, of a newer torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, of a newer transformers
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval.*")
@pytest.mark.parametrize(
    "code",
    [
        *(*blocks("python"), *blocks("python", OBJECTIVES), *blocks("python", DATA_PAGE)),
        *("".join(blocks("python", t)) for t in (TEACHERS, LOOPS, STUDENTS)),
        *blocks("python", SEARCH),
    ],
)
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "a document", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", blocks("yaml", OBJECTIVES))
def test_terms_of_the_document_are_terms(text):
    """They are checked against a model with layers and modules of these names, found maps apart."""
    recipe = {"task": {"name": "glue/rte"}, "teacher": {"model": "x"}, "student": {"layers": [0]}}
    found = {"pairs": [[0, 1]], "shares": [1.0]}
    modules = ("stages.0", "stages.1")
    places = Places(
        student_path="encoder.layer",
        teacher_path="encoder.layer",
        student=2,
        teacher=6,
        student_modules=modules,
        teacher_modules=modules,
        matches={"cka": found, "emd": found},
    )
    specs = yaml.safe_load(text)["terms"]
    terms = Recipe.parse({**recipe, "terms": specs}).build_terms(places, regression=False)
    assert {term.name.split(".")[0] for term in terms} == set(specs)


@pytest.mark.parametrize("text", blocks("yaml", STUDENTS))
def test_students_of_the_document_are_students(text):
    recipe = {"task": {"name": "glue/rte"}, "teacher": {"model": "x"}, **yaml.safe_load(text)}
    student = Recipe.parse(recipe).student
    assert student.from_weights
    assert student.shrink is None or student.shrink.hidden_size == 256


@pytest.mark.parametrize("text", blocks("yaml", SEARCH))
def test_spaces_of_the_document_are_spaces(text):
    content = yaml.safe_load(text)
    space = Space.parse(content["search"])
    space.check(Recipe.parse(content).resolved(regression=False))
    assert space.combinations is None


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_recipes(text):
    recipe = Recipe.parse(yaml.safe_load(text))
    assert recipe.build_terms is not None
    assert set(recipe.terms) == {"kd", "hidden", "labels"}


def commands():
    text = "\n".join(re.findall(r"```\n(.*?)```", README + DEPLOY, flags=re.DOTALL))
    return [line for line in text.splitlines() if line.startswith("limbeck ")]


@pytest.mark.parametrize("command", commands())
def test_commands_have_the_options_that_they_show(command):
    words = shlex.split(command)
    shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.output)
    for word in words:
        assert not word.startswith("--") or word in plain


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_run_on_small_data(path, tmp_path):
    data = DATA.get(path.stem)
    if data is not None and not data.is_dir():
        pytest.skip(f"the data of {path.name} is not on this machine ({data})")
    changes = [
        *([] if data is None else [f"task.data={data}"]),
        *("task.train_examples=48", "task.eval_examples=24", f"store={tmp_path / 'store'}"),
        *("training.steps=2", "teacher.training.steps=2", "training.batch_size=16"),
    ]
    report = limbeck.distill(Recipe.load(path, changes), tmp_path / "run")
    assert report.student.parameters < report.teacher.parameters
    assert (tmp_path / "run" / "report.html").is_file()


def test_links_and_pictures_are_there():
    for folder, text in (
        (ROOT, README),
        *((ROOT / "docs", text) for text in (OBJECTIVES, LOOPS, STUDENTS, DEPLOY)),
    ):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (folder / target).exists(), target


def test_the_two_commands_stand_in_the_first_screen():
    first = README.splitlines()[:25]
    assert any("make demo" in line for line in first)
    assert any("make test" in line for line in first)


def test_the_page_on_data_names_every_augmentation_and_a_recipe_takes_its_part():
    from limbeck.tasks.noise import AUGMENTATIONS

    for name in AUGMENTATIONS:
        assert f"| `{name}` |" in DATA_PAGE
    (part,) = blocks("yaml", DATA_PAGE)
    recipe = Recipe.parse({"task": "docstrings", "teacher": "x", "student": "layers:0", **yaml.safe_load(part)})
    assert recipe.extra.copies == 4
