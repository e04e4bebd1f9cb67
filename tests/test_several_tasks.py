"""One student of several tasks: terms, teachers, heads, data and scores for each."""

import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForSequenceClassification

from limbeck import Callback, Distiller, Examples, Settings, Term, fit
from limbeck.cache import Store, example_keys
from limbeck.students import Heads
from limbeck.teachers import ByTask, Cached, ModuleTeacher, Self, as_teacher
from limbeck.testing import TeacherContract
from limbeck.train import JsonLog, Mixed, predict, read_log
from limbeck.train.checkpoint import load_weights, save_weights
from limbeck.train.data import as_batches
from limbeck.train.mixing import MixedBatches
from limbeck.train.scoring import Scoring
from tests import tiny
from tests.workers import tasks as small

WORKER = Path(small.__file__)
SETTINGS = Settings(
    batch_size=8,
    steps=14,
    learning_rate=0.05,
    warmup=0,
    schedule="constant",
    weight_decay=0.0,
    clip=None,
    evaluate_every=5,
    log_every=4,
)


def batch(task, count=4):
    points = small.examples(task, count)
    return {
        "input": torch.stack([p["input"] for p in points]),
        "labels": torch.stack([p["labels"] for p in points]),
        "task": task,
    }


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# A whole training


def steps_by_hand(settings, data, tau):
    """Which examples each step sees, from the description of `Mixed` alone: the tasks' draws, and their orders."""
    sizes = [-(-len(items) // settings.batch_size) for items in data.values()]
    shares = np.array([size**tau for size in sizes], dtype=float)
    used, orders = Counter(), {}
    for epoch in range(100):
        generator = np.random.default_rng((settings.seed, epoch, 2))
        for place in generator.choice(len(sizes), size=sum(sizes), p=shares / shares.sum()):
            task = list(data)[place]
            own_epoch, number = divmod(used[task], sizes[place])
            used[task] += 1
            if number == 0:
                seed = int(np.random.SeedSequence((settings.seed, *task.encode())).generate_state(1)[0])
                generator_of_order = np.random.default_rng((seed, own_epoch))
                order = generator_of_order.permutation(len(data[task]))
                cuts = range(0, len(order), settings.batch_size)
                batches = [order[i : i + settings.batch_size].tolist() for i in cuts]
                generator_of_order.shuffle(batches)
                orders[task] = batches
            yield task, [data[task][i] for i in orders[task][number]]


def train_by_hand(settings, data, tau):
    """The same objective and updates in plain PyTorch: nothing of limbeck but the models."""
    model, teachers = small.student(), small.teachers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    for step, (task, items) in enumerate(steps_by_hand(settings, data, tau)):
        if step == settings.steps:
            break
        x, y = (torch.stack([item[key] for item in items]) for key in ("input", "labels"))
        logits = model(x, task=task)
        with torch.no_grad():
            theirs = teachers[task](x)
        loss = 0.5 * nn.functional.cross_entropy(logits, y)
        if task == "two":
            log_p, log_q = (theirs / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
            loss = loss + 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        else:
            log_p, log_q = theirs.log_softmax(-1), logits.log_softmax(-1)
            loss = loss + 0.7 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_a_training_equals_a_loop_written_out_by_hand(tau):
    data = small.data()
    terms = [term for term in small.terms() if term.name != "hidden"]
    trained = Distiller(small.student(), small.teachers(), terms)
    fit(trained, Mixed(data, tau=tau), settings=SETTINGS)
    by_hand = train_by_hand(SETTINGS, data, tau)
    assert largest_difference(weights(trained.export()), weights(by_hand)) < 1e-6
    assert largest_difference(weights(by_hand), weights(small.student())) > 1e-2
    seen = Counter(task for (task, _), _ in zip(steps_by_hand(SETTINGS, data, tau), range(14), strict=False))
    assert min(seen["two"], seen["three"]) >= 3  # both were trained, one beyond the end of its data
    assert seen["three"] > 3 or seen["two"] > 5


class InterruptAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def train(folder, callbacks=(), settings=SETTINGS):
    trained = small.distiller(dropout=0.3)
    folder.mkdir(exist_ok=True)
    log = JsonLog(folder / "log.jsonl")
    data, held_out = Mixed(small.data(), tau=0.5), small.data(30, 30)
    result = fit(trained, data, held_out, settings, callbacks=[log, *callbacks], folder=folder / "checkpoints")
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(log.path)]
    return result, weights(trained), lines


def test_an_interruption_changes_nothing(tmp_path):
    """Neither the weights bit for bit, nor scores, nor the log, at steps within and at the end of an epoch."""
    settings = SETTINGS.model_copy(update={"steps": 19, "best": True})
    expected, whole, lines = train(tmp_path / "whole", settings=settings)
    for step in (1, 5, 8, 9, 13, 18):
        with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {step}"):
            train(tmp_path / f"{step}", [InterruptAt(step)], settings)
        result, resumed, its_lines = train(tmp_path / f"{step}", settings=settings)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        assert (result.history, result.scores, result.best_score) == (
            expected.history,
            expected.scores,
            expected.best_score,
        )
        assert its_lines == lines
    again, _, _ = train(tmp_path / "whole", settings=settings)
    assert again.scores == expected.scores


def test_another_mixture_is_refused(tmp_path):
    train(tmp_path)
    trained = small.distiller(dropout=0.3)
    with pytest.raises(ValueError, match=r"tau is 0.5 there and 1.0 here"):
        fit(trained, Mixed(small.data()), settings=SETTINGS, folder=tmp_path / "checkpoints")
    swapped = dict(reversed(small.data().items()))
    with pytest.raises(ValueError, match=r"two \(5\), three \(3\)' there and 'three \(3\), two \(5\)' here"):
        fit(trained, Mixed(swapped, tau=0.5), settings=SETTINGS, folder=tmp_path / "checkpoints")


def test_a_term_for_another_task_is_another_training(tmp_path):
    def with_task(task):
        kd = Term("logits", loss="forward_kl", task=task, name="kd")
        return Distiller(small.student(), small.teachers(), [kd, Term("labels", loss="cross_entropy")])

    fit(with_task("two"), Mixed(small.data()), settings=SETTINGS, folder=tmp_path)
    with pytest.raises(ValueError, match=r"term kd is .*task='two'.* there and .*task='three'.* here"):
        fit(with_task("three"), Mixed(small.data()), settings=SETTINGS, folder=tmp_path)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulation_changes_nothing(accumulation):
    one, cut = small.distiller(), small.distiller()
    fit(one, Mixed(small.data()), settings=SETTINGS)
    fit(cut, Mixed(small.data()), settings=SETTINGS.model_copy(update={"accumulation": accumulation}))
    assert largest_difference(weights(one), weights(cut)) < 1e-6


def launch(out, *arguments):
    """Run the worker on two ranks, and give back what each of them printed."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    flags = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = str(random.Random().randint(20000, 50000))
    command = [*accelerate, *flags, "--num_processes", "2", "--main_process_port", port, str(WORKER), str(out)]
    root = str(WORKER.parent.parent.parent)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": root}
    command += map(str, arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_ranks_change_nothing(tmp_path):
    """Both ranks draw the same tasks, and the heads of other tasks get no gradient, as on one."""
    one, two, more = small.distiller(), small.distiller(), small.distiller()
    result = small.train(one, steps=7)
    said = launch(tmp_path / "two.safetensors", "--accumulation", 2, "--kept")
    load_weights(two, tmp_path / "two.safetensors")
    assert largest_difference(weights(one), weights(two)) < 1e-6
    assert said == [f"{sorted(result.scores)} {result.history}"] * 2
    small.train(more, steps=8)
    assert largest_difference(weights(one), weights(more)) > 1e-4  # the comparison can fail


# Data


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tasks_are_drawn_by_their_size_to_the_power_of_tau(tau):
    sizes = {"a": 40, "b": 10, "c": 2}  # in batches of 4
    data = {task: [{"x": i} for i in range(4 * size)] for task, size in sizes.items()}
    batches = MixedBatches(Mixed(data, tau), Settings(batch_size=4))
    assert len(batches) == 52
    epochs = 200
    drawn = Counter(place for epoch in range(epochs) for place in batches.draws(epoch))
    total = sum(size**tau for size in sizes.values())
    for place, size in enumerate(sizes.values()):
        share, count = size**tau / total, 52 * epochs
        error = (count * share * (1 - share)) ** 0.5
        assert abs(drawn[place] - count * share) < 4 * error


def numbered(task, count):
    return [{"x": torch.tensor(i), "of": task} for i in range(count)]


def test_a_task_uses_all_its_batches_before_it_begins_anew():
    """Also where a round of it ends within an epoch, and one of it lasts over several."""
    data = {"big": numbered("big", 23), "small": numbered("small", 5)}
    batches = MixedBatches(Mixed(data, tau=0.3), Settings(batch_size=4))
    seen = {"big": [], "small": []}
    for epoch in range(12):
        for step in batches.epoch(epoch):
            (one,) = step.micro_batches
            assert one["of"] == [one["task"]] * len(one["x"])
            seen[one["task"]] += one["x"].tolist()
    for task, count in (("big", 23), ("small", 5)):
        rounds = [seen[task][i : i + count] for i in range(0, len(seen[task]) - count + 1, count)]
        assert len(rounds) > 2
        assert all(sorted(numbers) == list(range(count)) for numbers in rounds)
        assert rounds[0] != rounds[1]


@pytest.mark.parametrize("loaders", [False, True])
def test_a_step_depends_on_the_seed_and_its_number_alone(loaders):
    def fresh():
        data = {"a": numbered("a", 17), "b": numbered("b", 9)}
        if loaders:
            data = {task: DataLoader(items, batch_size=4, shuffle=True) for task, items in data.items()}
        return MixedBatches(Mixed(data, tau=0.5), Settings(batch_size=4, seed=3))

    def shown(steps):
        return [(s.micro_batches[0]["task"], s.micro_batches[0]["x"].tolist()) for s in steps]

    through = fresh()
    whole = [shown(through.epoch(epoch)) for epoch in range(4)]
    assert shown(fresh().epoch(3, skip=2)) == whole[3][2:]
    assert shown(through.epoch(1)) == whole[1]  # also backwards
    assert whole[0] != whole[1]


def test_examples_are_augmented_by_what_they_draw_in_their_own_epoch():
    def augment(item, generator):
        return {**item, "drawn": torch.tensor(generator.integers(1 << 30))}

    data = {"a": Examples(numbered("a", 8), augment=augment), "b": Examples(numbered("b", 8), augment=augment)}
    batches = MixedBatches(Mixed(data, tau=0.0), Settings(batch_size=8))
    drawn = [
        tuple(sorted(s.micro_batches[0]["drawn"].tolist())) for epoch in range(4) for s in batches.epoch(epoch)
    ]
    assert len(set(drawn)) == len(drawn) == 8  # neither twice in a task, nor in two tasks


def test_ranks_draw_the_same_tasks_and_share_their_batches():
    data = {"a": numbered("a", 17), "b": numbered("b", 9)}
    alone = list(MixedBatches(Mixed(data), Settings(batch_size=4)).epoch(0))
    ranks = [list(MixedBatches(Mixed(data), Settings(batch_size=4), rank, 2).epoch(0)) for rank in range(2)]
    for step, *parts in zip(alone, *ranks, strict=True):
        assert {part.micro_batches[0]["task"] for part in parts} == {step.micro_batches[0]["task"]}
        together = [n for part in parts if part.share for n in part.micro_batches[0]["x"].tolist()]
        assert together == step.micro_batches[0]["x"].tolist()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mixed([1, 2]), TypeError, "is {task: data}, got a list"),
        (lambda: Mixed({}), ValueError, "is empty; pass"),
        (lambda: Mixed({1: [1]}), TypeError, "is {task: data}"),
        (lambda: Mixed({"a": [1]}, tau=-1), ValueError, "tau is a number from 0 .*, got -1"),
        (lambda: Mixed({"a": [1]}, tau="size"), ValueError, "tau is a number from 0 .*, got 'size'"),
        (lambda: Mixed({"a": [1]}, tau=float("nan")), ValueError, "tau is a number from 0 .*, got nan"),
        (lambda: MixedBatches(Mixed({"a": []}), Settings()), ValueError, "task 'a': the training data is empty"),
        (lambda: MixedBatches(Mixed({"a": 3}), Settings()), TypeError, "task 'a': cannot batch a int"),
        (
            lambda: as_batches({"a": [1]}, Settings()),
            TypeError,
            "dict of 'a' is no training data; .*Mixed",
        ),
    ],
)
def test_wrong_data_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_task_with_terms_and_no_data_is_refused_before_the_training():
    terms = [Term("logits", loss="forward_kl", task=name) for name in ("two", "three")]
    distiller = Distiller(small.student(), small.teachers(), terms)
    with pytest.raises(ValueError, match="terms are for task 'three', which has no data"):
        fit(distiller, Mixed({"two": small.data()["two"]}), settings=Settings(steps=1))


def test_a_loader_that_ends_early_is_refused():
    class Once(IterableDataset):
        def __init__(self):
            self.items = iter(numbered("a", 6))

        def __len__(self):
            return 8

        def __iter__(self):
            return self.items

    batches = MixedBatches(Mixed({"a": DataLoader(Once(), batch_size=2)}), Settings())
    with pytest.raises(ValueError, match="the data of task 'a' ended early; pass data that can be read again"):
        list(batches.epoch(0))


# Terms


def test_only_the_terms_of_the_task_count():
    trained = small.distiller()
    values = {task: trained(**batch(task)) for task in ("two", "three")}
    assert list(values["two"].terms) == ["kd", "cross_entropy"]
    assert list(values["three"].terms) == ["three.reverse_kl", "hidden", "cross_entropy"]
    for out in values.values():
        total = sum(out.weights[name] * value for name, value in out.terms.items())
        assert out.loss.item() == pytest.approx(total.item(), rel=1e-6)
    trained.zero_grad()
    trained(**batch("two")).loss.backward()
    without = {name for name, p in trained.named_parameters() if p.grad is None}
    assert without == {
        "student.models.three.1.weight",
        "student.models.three.1.bias",
        "objective.projections.hidden.affine.weight",
        "objective.projections.hidden.affine.bias",
    }


def test_a_term_says_its_task():
    term = Term("logits", loss="forward_kl", task="rte")
    assert (term.name, term.task) == ("rte.forward_kl", "rte")
    assert "task='rte'" in repr(term)
    with pytest.raises(ValueError, match="a term's task is a name, or None for all tasks, got 3"):
        Term("logits", loss="forward_kl", task=3)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({}, "the batch has no 'task', only .*'input'"),
        ({"task": ["two", "two"]}, "is one name for all its examples, got "),
        ({"task": "tow"}, "no term is for the batch's task 'tow'; did you mean 'two'"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_no_known_task_is_refused(task, message, training):
    terms = [Term("logits", loss="forward_kl", task=name) for name in ("two", "three")]
    trained = Distiller(small.student(), small.teachers(), terms)
    wrong = {**{k: v for k, v in batch("two").items() if k != "task"}, **task}
    with pytest.raises(ValueError, match=message):
        trained(**wrong) if training else trained.count(wrong)


def test_a_task_without_terms_of_its_own_has_those_of_all():
    terms = [
        Term("logits", loss="forward_kl", name="kd"),
        Term("logits", loss="logit_mse", task="two", name="more"),
    ]
    trained = Distiller(small.student(), small.teachers(), terms)
    assert list(trained(**batch("three")).terms) == ["kd"]
    assert list(trained(**batch("two")).terms) == ["kd", "more"]


def test_batches_may_name_a_task_where_terms_do_not():
    """One term for all; the teacher is still that of the task."""
    trained = Distiller(small.student(), small.teachers(), [Term("logits", loss="forward_kl")])
    teachers = small.teachers()
    for task in ("two", "three"):
        one = batch(task)
        with torch.no_grad():
            log_p = teachers[task](one["input"]).log_softmax(-1)
            log_q = trained.student(one["input"], task=task).log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert trained(**one).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("balance", ["matched_scale", {"kind": "gradient_norm", "every": 2}])
def test_a_balance_that_needs_all_terms_is_refused(balance):
    name = balance if isinstance(balance, str) else balance["kind"]
    with pytest.raises(
        ValueError, match=f"balance '{name}' needs all terms in each step, and some are for task 'two'"
    ):
        small.distiller(balance=balance)


def test_uncertainty_weighs_the_terms_of_the_task():
    trained = small.distiller(balance="uncertainty")
    trained.preflight(batch("three"))
    learned = trained.objective.balance.log_variances
    s = [0.3, -0.2, 0.5, 0.1]
    with torch.no_grad():
        learned.copy_(torch.tensor(s))
    for task, places in (("two", [0, 3]), ("three", [1, 2, 3])):
        learned.grad = None
        out = trained(**batch(task))
        out.loss.backward()
        weights = [term.weight for term in trained.terms]
        values = [value.item() for value in out.terms.values()]
        by_place = dict(zip(places, values, strict=True))
        weighted = {i: weights[i] * value * math.exp(-s[i]) for i, value in by_place.items()}
        assert out.loss.item() == pytest.approx(sum(weighted[i] + s[i] for i in places), rel=1e-5)
        expected = [1 - weighted[i] if i in places else 0.0 for i in range(4)]
        assert learned.grad.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_log_has_the_mean_of_each_term_over_its_own_steps(tmp_path):
    def lines(every):
        log = JsonLog(tmp_path / f"{every}.jsonl")
        settings = SETTINGS.model_copy(update={"log_every": every, "gradients_every": 3})
        fit(small.distiller(), Mixed(small.data(), tau=0.0), settings=settings, callbacks=[log])
        return [line for line in read_log(log.path) if "terms" in line], read_log(log.path)

    each, everything = lines(1)
    (first, *_), _ = lines(7)
    for name, mean in first["terms"].items():
        values = [line["terms"][name] for line in each[:7] if name in line["terms"]]
        assert 0 < len(values) < 7 or name == "cross_entropy"
        assert mean == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert first["loss"] == pytest.approx(sum(line["loss"] for line in each[:7]) / 7, rel=1e-5)
    gradients = [line["gradients"]["share"] for line in everything if "gradients" in line]
    assert {frozenset(g) for g in gradients} == {
        frozenset({"kd", "cross_entropy"}),
        frozenset({"three.reverse_kl", "hidden", "cross_entropy"}),
    }


def test_labels_of_different_kinds_are_counted_by_task():
    """Numbers to predict in one task, classes with an index to ignore in the other."""
    terms = [
        Term("labels", loss="label_mse", task="number"),
        Term("labels", loss="cross_entropy", task="class", ignore_index=1),
    ]
    models = {"number": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))}
    models["class"] = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    trained = Distiller(Heads(models, "0"), None, terms)
    x = torch.ones(4, 3)
    number = {"input": x, "labels": torch.rand(4), "task": "number"}
    classes = {"input": x, "labels": torch.tensor([0, 1, 1, 0]), "task": "class"}
    assert trained.count(number) == {"examples": 4.0, "labels": 4.0}
    assert trained.count(classes) == {"examples": 4.0, "labels": 4.0, "labels but 1": 2.0}
    assert trained(**number).terms.keys() != trained(**classes).terms.keys()


# Teachers


class Counting:
    """A teacher that says what it was asked."""

    def __init__(self, classes):
        self.teacher = as_teacher(nn.Sequential(nn.Linear(small.FEATURES, 7), nn.Linear(7, classes)))
        self.asked = []

    def offers(self, tap):
        return self.teacher.offers(tap)

    def names(self):
        return self.teacher.names()

    def signal(self, batch, wants):
        self.asked.append((sorted(batch), tuple(wants)))
        return self.teacher.signal(batch, wants)


def test_only_the_teacher_of_the_task_is_asked_and_for_what_its_terms_read():
    teachers = {task: Counting(classes) for task, classes in small.CLASSES.items()}
    trained = Distiller(small.student(), teachers, small.terms())
    trained(**batch("three"))
    trained(**batch("three"))
    assert teachers["two"].asked == []
    assert teachers["three"].asked == [(["input", "labels"], ("logits", "0"))] * 3  # once by the preflight
    trained(**batch("two"))
    assert teachers["two"].asked == [(["input", "labels"], ("logits",))] * 2
    assert len(teachers["three"].asked) == 3


def test_a_task_of_labels_alone_needs_no_teacher():
    terms = [Term("logits", loss="forward_kl", task="two"), Term("labels", loss="cross_entropy", task="three")]
    trained = Distiller(small.student(), {"two": small.teachers()["two"]}, terms)
    assert list(trained(**batch("three")).terms) == ["three.cross_entropy"]
    assert list(trained(**batch("two")).terms) == ["two.forward_kl"]


class TestByTask(TeacherContract):
    wants = ("logits", "0")

    def teacher(self):
        return ByTask(small.teachers())

    def batch(self):
        return batch("three")


def test_wrong_teachers_are_refused():
    terms = [Term("logits", loss="forward_kl", task="two")]
    with pytest.raises(ValueError, match=r"no teacher for task 'two'; .*three"):
        Distiller(small.student(), {"three": small.teachers()["three"]}, terms)
    terms = [Term("models.two.1", "1.1", loss="mse", task="two")]
    with pytest.raises(ValueError, match=r"term 'two.mse\[models.two.1\]' .*the teacher has no '1.1'"):
        Distiller(small.student(), small.teachers(), terms)
    with pytest.raises(ValueError, match="no teacher for task 'one'"):
        ByTask(small.teachers()).signal({**batch("two"), "task": "one"}, ["logits"])
    with pytest.raises(ValueError, match="a teacher for each task needs a task"):
        ByTask({})
    shared = small.student()
    with pytest.raises(ValueError, match="student and teacher share weights"):
        Distiller(shared, {"two": shared.models["two"], "three": small.teachers()["three"]}, small.terms())


def test_each_task_borrows_from_its_own_teacher():
    teachers = small.teachers()
    terms = [
        Term("body", "0", loss="softmax_regression", project="linear", head="1", task=task) for task in teachers
    ]
    trained = Distiller(small.student(), teachers, terms)
    for task, teacher in teachers.items():
        one = batch(task)
        (value,) = trained(**one).terms.values()
        key = f"{task}/softmax_regression[body]"
        ours = trained.objective.projections[key].affine(trained.student.body(one["input"]))
        expected = (teacher[1](ours) - teacher(one["input"])).square().mean(-1).mean()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_teachers_that_remember_run_once():
    trained = small.distiller(kept=True)
    settings = SETTINGS.model_copy(update={"steps": 40})
    result = fit(trained, Mixed(small.data()), settings=settings)
    assert result.examples > 200  # of 58
    assert result.teacher_examples == 37 + 21
    teachers = trained.teacher.teachers
    assert [teachers[task].computed for task in ("two", "three")] == [37, 21]


def test_remembering_a_resume_goes_on_counting(tmp_path):
    settings = SETTINGS.model_copy(update={"steps": 9})
    for _ in range(2):
        trained = small.distiller(kept=True)
        result = fit(trained, Mixed(small.data()), settings=settings, folder=tmp_path)
        assert result.teacher_examples == trained.teacher_examples > 0


def test_what_is_remembered_of_a_teacher_of_all_tasks_is_kept_by_task():
    """The same input in two tasks; of a teacher of one task it does not depend on the task."""
    x = torch.ones(3, small.FEATURES)
    kept = Cached(ByTask({t: nn.Linear(small.FEATURES, 2) for t in ("a", "b")}), Store({}))
    a, b = (kept.signal({"input": x, "task": task}, ["logits"])["logits"] for task in ("a", "b"))
    assert not torch.equal(a, b)
    assert (example_keys({"input": x, "task": "a"}) != example_keys({"input": x, "task": "b"})).all()
    alone = Cached(ModuleTeacher(nn.Linear(small.FEATURES, 2)), Store({}))
    alone.signal({"input": x}, ["logits"])
    ByTask({"a": alone}).signal({"input": x, "task": "a"}, ["logits"])
    assert alone.computed == 1


def test_a_cache_that_stands_for_several_tasks_is_counted_once():
    one = Cached(nn.Linear(small.FEATURES, 2))
    terms = [Term("logits", loss="forward_kl", task=task) for task in ("a", "b")]
    distiller = Distiller(nn.Linear(small.FEATURES, 2), {"a": one, "b": one}, terms)
    distiller.distil({"input": torch.ones(3, small.FEATURES), "task": "b"})
    assert distiller.teacher_examples == one.computed == 1


def test_one_teacher_may_know_all_tasks():
    """A module that takes the task, as the student is one; remembered, too."""
    terms = [Term("logits", loss="forward_kl"), Term("body", "body", loss="mse", project="linear", task="two")]
    by_task = Distiller(small.student(), small.teachers(), terms[:1])
    theirs = small.teachers()
    nn.init.zeros_(theirs["two"][0][0].weight)
    theirs["three"][0].load_state_dict(theirs["two"][0].state_dict())
    several = Heads(theirs, "0")
    expected = {t: ByTask(theirs).signal(batch(t), ["logits"])["logits"] for t in theirs}
    kept = Cached(several)
    for teacher in (several, kept):
        trained = Distiller(small.student(), teacher, terms)
        for task in ("two", "three"):
            log_p, one = expected[task].log_softmax(-1), batch(task)
            log_q = trained.student(one["input"], task=task).log_softmax(-1)
            value = trained(**one).terms["forward_kl"]
            assert value.item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-5)
    assert kept.computed == 8
    assert by_task(**one).terms["forward_kl"].item() != pytest.approx(value.item(), rel=1e-3)


def test_a_student_may_be_its_own_teacher_in_one_task():
    exits = Term("body.0", "body.0", loss="mse", task="two", name="own")
    trained = Distiller(small.student(), Self(), [exits, Term("labels", loss="cross_entropy", task="three")])
    assert trained(**batch("two")).terms["own"].item() == 0
    assert list(trained(**batch("three")).terms) == ["three.cross_entropy"]


def test_an_identity_is_that_of_all_teachers():
    teacher = ByTask(small.teachers())
    found = teacher.identity()
    assert found == ByTask(small.teachers()).identity()
    assert json.loads(json.dumps(found)) == found
    assert {key.split(":")[0] for key in found} == {"two", "three"}
    other = small.teachers()
    nn.init.zeros_(other["three"][1].weight)
    assert ByTask(other).identity() != found
    with pytest.raises(TypeError, match="the teacher of task 'two', a Counting, cannot say"):
        ByTask({"two": Counting(2)}).identity()


# Students


def test_heads_share_their_body_and_nothing_else():
    student = small.student()
    assert student.models["two"][0] is student.models["three"][0] is student.body
    sizes = {name: p.numel() for name, p in student.named_parameters()}
    assert list(sizes) == [
        "body.0.weight",
        "body.0.bias",
        *(f"models.{task}.1.{part}" for task in ("two", "three") for part in ("weight", "bias")),
    ]
    x = torch.randn(4, small.FEATURES)
    for task in ("two", "three"):
        alone = student.export_task(task)
        assert type(alone) is nn.Sequential
        assert torch.equal(alone(x), student(x, task=task))
        ours = {id(p) for p in student.parameters()}
        assert ours.isdisjoint(id(p) for p in alone.parameters())


def test_heads_are_saved_with_one_body(tmp_path):
    student, path = small.student(), tmp_path / "w.safetensors"
    save_weights(student, path)
    assert sum(t.numel() for t in load_file(path).values()) == sum(p.numel() for p in student.parameters())
    other = Heads({task: small.network(task, 5, 99) for task in small.CLASSES}, "0")
    load_weights(other, path)
    assert largest_difference(weights(other), weights(student)) == 0
    assert other.models["two"][0] is other.models["three"][0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heads({}, "0"), "needs a model for each"),
        (lambda: Heads({"a.b": nn.Sequential(nn.Linear(1, 1))}, "0"), "cannot be called 'a.b'"),
        (lambda: Heads({"keys": nn.Sequential(nn.Linear(1, 1))}, "0"), "cannot be called 'keys'"),
        (lambda: Heads({"a": nn.Sequential(nn.Linear(1, 1))}, "body"), "of task 'a' has no part 'body' to share"),
        (
            lambda: Heads({"a": nn.Sequential(nn.Linear(1, 1)), "b": nn.Sequential(nn.Linear(2, 1))}, "0"),
            r"the bodies of tasks 'a' and 'b' differ: weight is \(1, 1\) and \(1, 2\)",
        ),
        (lambda: small.student()(torch.ones(1, 6)), "has to know the task, one of two, three; pass task="),
        (lambda: small.student()(torch.ones(1, 6), task="tow"), "has no task 'tow'; did you mean 'two'"),
    ],
)
def test_wrong_heads_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Own(nn.Module):
    """A user's own student of several tasks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.two, self.three = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, points, task):
        hidden = self.body(points).tanh()
        return self.two(hidden) if task == "two" else self.three(hidden)


def test_any_module_that_takes_the_task_is_a_student():
    def renamed(items):
        return [{"points": i["input"], "input": i["input"], "labels": i["labels"]} for i in items]

    data = {task: renamed(items) for task, items in small.data().items()}
    terms = [Term("labels", loss="cross_entropy"), Term("two", "1", loss="mse", task="two", weight=0.01)]
    trained = Distiller(Own(), small.teachers(), terms)
    result = fit(trained, Mixed(data), data, SETTINGS.model_copy(update={"steps": 60, "learning_rate": 0.02}))
    assert result.history[-1][1] > result.history[0][1]
    out = trained.eval()(data["two"][0]["points"][None], task="two")
    assert out.shape == (1, 2)


def test_a_student_of_a_pretrained_encoder(tmp_path):
    """Each task's model is then one that transformers loads alone, and says the same."""
    source = tiny.save_encoder(tmp_path / "encoder")
    student = Heads.from_pretrained(source, {"sentiment": ["bad", "good"], "stars": []})
    assert student.models["sentiment"].bert is student.models["stars"].bert is student.body
    teacher = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    terms = [
        Term("hidden_states.1", loss="mse", task="sentiment"),
        Term("models.sentiment.classifier#input", "classifier#input", loss="mse", task="sentiment", name="pooled"),
        Term("labels", loss="label_mse", task="stars"),
    ]
    trained = Distiller(student, {"sentiment": teacher}, terms)
    ids = torch.randint(5, 20, (4, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = trained(**inputs, labels=torch.zeros(4, dtype=torch.long), task="sentiment", example_id=torch.arange(4))
    assert sorted(out.terms) == ["pooled", "sentiment.mse[hidden_states.1]"]
    trained(**inputs, labels=torch.rand(4), task="stars").loss.backward()
    assert student.models["sentiment"].classifier.weight.grad is None
    student.eval()
    for task, count in (("sentiment", 2), ("stars", 1)):
        student.export_task(task).save_pretrained(tmp_path / task)
        alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / task).eval()
        with torch.no_grad():
            logits = alone(**inputs).logits
            assert logits.shape == (4, count)
            assert torch.equal(logits, trained.eval()(**inputs, task=task).logits)
    assert alone.config.problem_type == "regression"


# Scores


def test_each_task_has_a_score_and_their_mean_is_the_main_one():
    trained = small.distiller()
    held_out = small.data(50, 40)
    result = fit(trained, Mixed(small.data()), held_out, SETTINGS, metric={"two": "f1", "three": "accuracy"})
    by_task = {}
    for task, metric in (("two", "f1"), ("three", "accuracy")):
        found = predict(trained.student, held_out[task], task=task)
        chosen = found.logits.argmax(-1)
        if metric == "accuracy":
            by_task[f"{task}/{metric}"] = float((chosen == found.labels).mean())
        else:
            hits = ((chosen == 1) & (found.labels == 1)).sum()
            by_task[f"{task}/{metric}"] = float(2 * hits / ((chosen == 1).sum() + (found.labels == 1).sum()))
    by_task["mean"] = sum(by_task.values()) / 2
    assert result.scores == pytest.approx(by_task)
    assert result.history[-1] == (14, pytest.approx(by_task["mean"]))


def test_the_best_model_is_that_of_the_best_mean():
    trained = small.distiller(dropout=0.5)
    held_out = small.data(30, 30)
    settings = SETTINGS.model_copy(update={"steps": 30, "best": True, "evaluate_every": 2, "learning_rate": 0.5})
    result = fit(trained, Mixed(small.data()), held_out, settings)
    assert result.best_score == max(score for _, score in result.history) > result.history[-1][1]
    scores = Scoring(held_out, "accuracy").scores(trained, 8, torch.device("cpu"))
    assert scores["mean"] == pytest.approx(result.best_score)


def test_one_task_may_have_several_evaluations():
    """Matched and mismatched data of a plain student: no task is trained, so all names are free."""
    items = small.examples("two", 30)
    trained = Distiller(small.network("two", 5, 0), None, [Term("labels", loss="cross_entropy")])
    result = fit(trained, items, {"matched": items, "other": small.examples("two", 12)}, SETTINGS)
    assert sorted(result.scores) == ["matched/accuracy", "mean", "other/accuracy"]


@pytest.mark.parametrize(
    ("eval_data", "metric", "error", "message"),
    [
        (small.data(), {"two": "accuracy"}, ValueError, "there is no metric for task 'three'"),
        (
            small.data(),
            {"two": "f1", "three": "f1", "x": "f1"},
            ValueError,
            "a metric for 'x' and no evaluation data",
        ),
        (
            small.data(),
            {"two": "mse", "three": "accuracy"},
            ValueError,
            "higher is better for 'accuracy' of 'three'",
        ),
        (small.data(), "acuracy", ValueError, "unknown metric 'acuracy'"),
        (small.examples("two", 3), {"two": "f1"}, TypeError, "need evaluation data by task"),
        (
            small.examples("two", 3),
            "accuracy",
            ValueError,
            "has to know the task of evaluation data; .* two, three",
        ),
        (
            {"tow": []},
            "accuracy",
            ValueError,
            "evaluation data is for 'tow', which is not trained; did you mean 'two'",
        ),
        ({}, "accuracy", ValueError, "there is no evaluation data"),
    ],
)
def test_wrong_evaluations_are_refused_before_the_training(eval_data, metric, error, message):
    trained = small.distiller()
    before = weights(trained.student)
    with pytest.raises(error, match=message):
        fit(trained, Mixed(small.data()), eval_data, SETTINGS, metric=metric)
    assert largest_difference(weights(trained.student), before) == 0


def test_signals_are_those_of_the_batch_where_it_brings_them():
    trained = small.distiller()
    one = batch("two")
    given = {"logits": torch.randn(4, 2)}
    found = trained(**one, teacher_cache=given)
    log_p, log_q = (given["logits"] / 2).log_softmax(-1), (found.logits / 2).log_softmax(-1)
    assert found.terms["kd"].item() == pytest.approx(
        4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-5
    )


def test_the_example_runs():
    example = runpy.run_path(str(WORKER.parent.parent.parent / "examples" / "several_tasks.py"))
    scores = example["main"]()
    assert scores["tone/accuracy"] > 0.9
    assert scores["topic/accuracy"] > 0.9
