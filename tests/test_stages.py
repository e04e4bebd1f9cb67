"""Stages: what trains when is a function of progress, and nothing else moves."""

import copy

import pytest
import torch
from torch import nn

from limbeck import Callback, Distiller, Settings, Term, fit
from limbeck.stages import Stage, Stages, block_by_block
from tests.models import bert, perceptron, points, text_batch
from tests.test_taps import replicas

PAIRS = [("bert.encoder.layer.0", "bert.encoder.layer.1"), ("bert.encoder.layer.1", "bert.encoder.layer.3")]
LAST = [Term("logits", loss="forward_kl", name="kd"), Term("labels", loss="cross_entropy", name="labels")]


def examples(count=12):
    return [{key: value[i] for key, value in text_batch(size=count).items()} for i in range(count)]


def blockwise(**options):
    terms, stages = block_by_block(PAIRS, last=LAST, **options)
    return Distiller(bert(layers=2), bert(layers=4, seed=5), terms, stages=stages)


class Watch(Callback):
    """Which parameters each step moved, and which terms it computed."""

    def __init__(self, distiller):
        self.distiller, self.moved, self.terms = distiller, [], []

    def on_start(self, state):
        self.before = self.now()

    def now(self):
        return {name: p.detach().clone() for name, p in self.distiller.named_parameters()}

    def on_step(self, state):
        after = self.now()
        self.moved.append({n for n in after if not torch.equal(after[n], self.before[n])})
        self.before = after

    def on_log(self, state):
        self.terms.append(sorted(state.terms))


def of(names, *parts):
    return all(any(part in name for part in parts) for name in names)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_only_what_is_named_moves(optimizer):
    """Neither weight decay nor momentum of an earlier stage moves what rests, nor does its gradient count."""
    distiller = blockwise(project="linear")
    watch = Watch(distiller)
    options = {"optimizer_options": {"momentum": 0.9}} if optimizer == "sgd" else {}
    settings = Settings(
        steps=9, batch_size=4, learning_rate=1e-2, optimizer=optimizer, weight_decay=0.1, log_every=1, **options
    )
    fit(distiller, examples(), None, settings, callbacks=[watch])
    first, second, last = watch.moved[:3], watch.moved[3:6], watch.moved[6:]
    for step in first:
        assert any("layer.0" in name for name in step)
        assert of(step, "student.bert.encoder.layer.0", "projections.block/0")
    for step in second:
        assert any("layer.1" in name for name in step)
        assert of(step, "student.bert.encoder.layer.1", "projections.block/1")
    for step in last:
        assert any("embeddings" in name for name in step)
        assert not any("projections" in name for name in step)
    assert watch.terms == [["block.0"]] * 3 + [["block.1"]] * 3 + [["kd", "labels"]] * 3


def output_of(model, path, inputs):
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, given, output: seen.append(output))
    model(**inputs)
    handle.remove()
    return seen[0]


def by_hand(student, teacher, batches, pairs, rate=0.1):
    """Two stages in plain code: gradients of one block alone, plain descent, clipped by their own norm."""
    for number, batch in enumerate(batches):
        path, teacher_path = pairs[0 if number < len(batches) / 2 else 1]
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        target = output_of(teacher, teacher_path, inputs).detach()
        squares = (output_of(student, path, inputs) - target).square().mean(-1)
        loss = squares[batch["attention_mask"].bool()].mean()
        own = list(student.get_submodule(path).parameters())
        grads = torch.autograd.grad(loss, own)
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = min(1.0, 1.0 / (float(norm) + 1e-6))
        with torch.no_grad():
            for parameter, grad in zip(own, grads, strict=True):
                parameter -= rate * scale * grad
    return student


def test_blocks_in_turn_equal_plain_code():
    terms, stages = block_by_block(PAIRS)
    batches = [text_batch(seed=seed) for seed in range(6)]
    student, teacher = bert(layers=2), bert(layers=4, seed=5).eval()
    expected = by_hand(copy.deepcopy(student), teacher, batches, PAIRS)
    distiller = Distiller(student, teacher, terms, stages=stages).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step, batch in enumerate(batches):
        distiller(**batch, progress=step / 5).loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_zeros_in_the_place_of_no_gradient_move_nothing():
    """A loop of one's own that keeps gradients of zeros, with weight decay and momentum."""
    distiller = Distiller(
        perceptron(),
        perceptron(seed=1),
        [Term("logits", loss="mse")],
        stages=[Stage(0.5, trains=["0"]), Stage(trains=["3"])],
    ).train()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(4):
        before = copy.deepcopy(distiller.student.state_dict())
        optimizer.zero_grad(set_to_none=False)
        distiller(*points(), progress=step / 3).loss.backward()
        optimizer.step()
        after = distiller.student.state_dict()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == ({"0.weight", "0.bias"} if step < 2 else {"3.weight", "3.bias"})


def test_terms_of_a_stage_alone_are_asked_of_the_teacher():
    asked = []

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = perceptron(seed=1)

        def forward(self, input):
            asked.append(1)
            return self.inner(input)

    terms = [Term("logits", loss="mse", name="kd"), Term("labels", loss="cross_entropy", name="labels")]
    stages = [Stage(0.5, terms=["labels"]), Stage()]
    distiller = Distiller(perceptron(), Asking(), terms, stages=stages).train()
    distiller.preflight(points())
    before = len(asked)
    assert list(distiller(*points(), progress=0.0).terms) == ["labels"]
    assert len(asked) == before
    assert list(distiller(*points(), progress=0.5).terms) == ["kd", "labels"]
    assert len(asked) == before + 1


def test_export_lets_all_train_again():
    terms, stages = block_by_block(PAIRS, last=LAST, project="linear")
    student = bert(layers=2)
    student.classifier.requires_grad_(False)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    distiller = Distiller(student, bert(layers=4, seed=5), terms, stages=stages).train()
    distiller.preflight(text_batch())
    distiller(**text_batch(), progress=0.0)
    resting = {name for name, p in distiller.named_parameters() if not p.requires_grad}
    assert "student.bert.embeddings.word_embeddings.weight" in resting
    assert any("projections.block/1" in name for name in resting)
    assert distiller.export() is student
    assert {name: p.requires_grad for name, p in student.named_parameters()} == before
    assert all(p.requires_grad for p in distiller.objective.parameters())


def test_tied_weights_train_by_any_of_their_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, input):
            return self.second(torch.tanh(self.first(input)))

    student = Tied()
    stages = Stages([Stage(0.5, trains=["second"]), Stage()], student, [Term("labels", loss="label_mse")])
    stages.enter(0.0, {})
    assert student.first.weight.requires_grad


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([Stage(terms=["kdd"])], ValueError, "a stage names the term 'kdd', and there is none; did you mean 'kd'"),
        (
            [Stage(trains=["3.wieght"])],
            ValueError,
            "no module and no parameter of the student; did you mean '3.weight'",
        ),
        ([Stage(trains=["1.*"])], ValueError, "of which nothing trains; set requires_grad"),
        ([Stage(0.5), Stage(0.5)], ValueError, r"stages end one after the other, got until=\[0.5, 0.5\]"),
        ([Stage(0.5)], ValueError, "the last stage ends at 0.5, and a training at 1"),
        ([0.5], TypeError, r"stages are a list of Stage, got \[0.5\]"),
    ],
)
def test_wrong_stages(stages, error, message):
    student = perceptron()
    student[1].requires_grad_(False)
    with pytest.raises(error, match=message):
        Distiller(student, perceptron(seed=1), [Term("logits", loss="mse", name="kd")], stages=stages)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"until": 0.0}, ValueError, "lasts until a progress above 0 and up to 1, got 0.0"),
        ({"terms": "kd"}, TypeError, r"terms of a stage is a list of names, got 'kd'; write \['kd'\]"),
        ({"trains": []}, ValueError, "trains of a stage is empty; name some"),
    ],
)
def test_a_wrong_stage(options, error, message):
    with pytest.raises(error, match=message):
        Stage(**options)


@pytest.mark.parametrize(
    "options", [{"share": 0.5}, {"share": 1.0, "last": LAST}, {"pairs": []}, {"pairs": ["0", "2"]}]
)
def test_wrong_blocks(options):
    with pytest.raises(
        ValueError,
        match=r"pairs are \[\(student's module, teacher's|block_by_block needs pairs|is the part of a last stage",
    ):
        block_by_block(**{"pairs": PAIRS, **options})


def test_the_last_stage_takes_its_share():
    _, stages = block_by_block(PAIRS, last=LAST, share=0.4)
    assert [stage.until for stage in stages] == pytest.approx([0.3, 0.6, 1.0])


@pytest.mark.parametrize("pattern", ["mse[0]", "mse[*]", "mse*"])
def test_terms_that_were_given_no_name(pattern):
    terms = [Term("0", loss="mse"), Term("logits", loss="forward_kl")]
    stages = [Stage(0.5, terms=[pattern]), Stage(terms=["forward_kl"])]
    distiller = Distiller(perceptron(), perceptron(seed=1), terms, stages=stages).train()
    assert list(distiller(*points(), progress=0.0).terms) == ["mse[0]"]


def test_a_loop_of_ones_own_says_where_it_is():
    distiller = Distiller(perceptron(), perceptron(seed=1), [Term("logits", loss="mse")], stages=[Stage()]).train()
    with pytest.raises(ValueError, match=r"what trains follows stages; pass progress=step / \(steps - 1\)"):
        distiller(*points())


def test_a_stage_that_trains_nothing_that_counts():
    terms = [Term("0", loss="mse", name="first")]
    distiller = Distiller(perceptron(), perceptron(seed=1), terms, stages=[Stage(trains=["3"])]).train()
    with pytest.raises(ValueError, match=r"stage 1 of 1 \(until 1\) trains nothing that its terms depend on"):
        distiller(*points(), progress=0.0)


def test_a_balance_that_needs_all_terms():
    terms = [Term("logits", loss="mse", name="a"), Term("0", loss="mse", name="b")]
    with pytest.raises(
        ValueError, match="balance 'matched_scale' needs all terms in each step, and stages choose"
    ):
        Distiller(perceptron(), perceptron(seed=1), terms, balance="matched_scale", stages=[Stage(terms=["a"])])


def test_layer_by_layer_in_stages():
    """Each block learns alone, on the teacher's input, and in its own time."""
    terms, stages = block_by_block(PAIRS)
    distiller = Distiller(bert(layers=2), bert(layers=4, seed=5), terms, stages=stages, layerwise=True)
    watch = Watch(distiller)
    fit(distiller, examples(), None, Settings(steps=4, batch_size=4, learning_rate=1e-2), callbacks=[watch])
    assert [of(step, f"layer.{i}") and bool(step) for step, i in zip(watch.moved, (0, 0, 1, 1), strict=True)] == [
        1
    ] * 4
    assert all(p.requires_grad for p in distiller.export().parameters())


def test_replicas_cannot_follow_stages():
    terms = [Term("logits", loss="mse")]
    distiller = Distiller(perceptron(), perceptron(seed=1), terms, stages=[Stage()], sample=points())
    with pytest.raises(ValueError, match=r"stages cannot tell torch.nn.DataParallel what trains"):
        replicas(distiller, 2)


def test_a_training_in_other_stages_is_another_one(tmp_path):
    settings = Settings(steps=4, batch_size=4)
    fit(blockwise(), examples(), None, settings, folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"belongs to another training: stage 0 is .*until=0.33.* there and .*0.25"
    ):
        fit(blockwise(share=0.5), examples(), None, settings, folder=tmp_path)


def test_gradients_can_be_measured_in_a_stage():
    distiller = blockwise()
    fit(distiller, examples(), None, Settings(steps=6, batch_size=4, gradients_every=1))
    assert distiller.student is distiller.export()
