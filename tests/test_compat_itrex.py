"""Intel's two doors, Extension for Transformers and Neural Compressor: numbers written out, and corrections."""

import copy
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import IterableDataset
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import limbeck
from limbeck.compat import itrex
from limbeck.compat import neural_compressor as inc
from limbeck.train.hf import DistillationTrainer
from tests.hf_cases import arguments, language, padded, sequences, spans, texts, tokens
from tests.models import bert, pad, text_batch

LAYER = "bert.encoder.layer.0"
LINEAR = nn.Linear(1, 1)


def pair():
    return bert(1, 8, seed=1), bert(2, 16, seed=2)


def examples(count=24):
    return [{**text, "labels": text["input_ids"][0] % 3} for text in texts(count)]


def trainer_of(folder, student, data, kind=itrex.NLPTrainer, **options):
    settings = options.pop("args", {})
    evaluated = options.pop("eval_dataset", data)
    return kind(
        model=student,
        args=arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=evaluated,
        data_collator=padded,
        **options,
    )


def distilled(folder, student, teacher, data, criterion, **options):
    """The trainer after `distill`, and the losses of its steps."""
    trainer = trainer_of(folder, student, data, **options)
    config = itrex.DistillationConfig(criterion=criterion)
    assert trainer.distill(distillation_config=config, teacher_model=teacher) is student
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def by_hand(student, teacher, data, loss_of, steps=3):
    optimizer, found = torch.optim.SGD(student.parameters(), lr=0.05), []
    for step in range(steps):
        batch = padded(data[8 * step : 8 * step + 8])
        with torch.no_grad():
            said = teacher.eval()(**batch)
        loss = loss_of(student.train()(**batch), said, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def soft(student, teacher, kind, temperature):
    """Each position's distance, times the temperature squared."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    p = F.softmax(teacher / temperature, dim=-1)
    if kind == "MSE":
        return F.mse_loss(student, teacher, reduction="none").mean(dim=-1)
    own = (p * p.log()).sum(dim=-1) if kind == "KL" else 0.0
    return (own - (p * log_q).sum(dim=-1)) * temperature**2


def assert_same(one, other):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], atol=2e-6, rtol=2e-5, msg=name)


# ---- knowledge ----


@pytest.mark.parametrize(("kind", "weights"), [("CE", (0.5, 0.5)), ("KL", (1.0, 3.0)), ("MSE", (0.0, 1.0))])
def test_knowledge(tmp_path, kind, weights):
    """Weights need not sum to 1; the divergence is not divided by the number of classes."""
    (student, teacher), data = pair(), examples()
    other = copy.deepcopy(student)
    criterion = itrex.Criterion("knowledgeloss", 3.0, ["CE", kind], list(weights))
    _, losses = distilled(tmp_path, student, copy.deepcopy(teacher), data, criterion)

    def loss_of(out, said, _):
        return weights[0] * out.loss + weights[1] * soft(out.logits, said.logits, kind, 3.0).mean()

    assert losses == pytest.approx(by_hand(other, teacher, data, loss_of), abs=2e-6)
    assert_same(student, other)


def test_tokens_without_labels_do_not_count(tmp_path):
    """Theirs averages over padding as well."""
    student, teacher, data, _ = tokens()
    other = copy.deepcopy(student)
    criterion = itrex.Criterion(temperature=2.0, loss_types=["CE", "KL"], loss_weight_ratio=[0.4, 0.6])
    _, losses = distilled(tmp_path, student, copy.deepcopy(teacher), data, criterion)

    def loss_of(out, said, batch):
        known = batch["labels"] != -100
        assert not known.all()
        return 0.4 * out.loss + 0.6 * soft(out.logits, said.logits, "KL", 2.0)[known].mean()

    assert losses == pytest.approx(by_hand(other, teacher, data, loss_of), abs=2e-6)
    assert_same(student, other)


def test_questions_with_answers(tmp_path):
    student, teacher, data, _ = spans()
    other = copy.deepcopy(student)
    _, losses = distilled(tmp_path, student, copy.deepcopy(teacher), data, itrex.Criterion())

    def loss_of(out, said, _):
        start, end = (
            soft(getattr(out, n), getattr(said, n), "CE", 1.0).mean() for n in ("start_logits", "end_logits")
        )
        return 0.5 * out.loss + 0.5 * (start + end) / 2

    assert losses == pytest.approx(by_hand(other, teacher, data, loss_of), abs=2e-6)


def test_what_the_teacher_said_stands_in_a_column(tmp_path):
    (student, teacher), data = pair(), examples()
    other = copy.deepcopy(student)
    _, expected = distilled(tmp_path / "a", other, copy.deepcopy(teacher), data, itrex.Criterion())
    with torch.no_grad():
        said = [{**e, "teacher_logits": teacher.eval()(**padded([e])).logits[0].tolist()} for e in data]
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    _, losses = distilled(tmp_path / "b", student, teacher, said, itrex.Criterion(), eval_dataset=said)
    assert losses == pytest.approx(expected, abs=1e-6)


def test_that_column_for_questions_has_two_rows(tmp_path):
    student, teacher, data, _ = spans()
    other = copy.deepcopy(student)
    _, expected = distilled(tmp_path / "a", other, copy.deepcopy(teacher), data, itrex.Criterion())
    with torch.no_grad():
        outputs = [teacher.eval()(**padded([example])) for example in data]
    said = [
        {**e, "teacher_logits": torch.cat([o.start_logits, o.end_logits]).tolist()}
        for e, o in zip(data, outputs, strict=True)
    ]
    if len({len(e["input_ids"]) for e in data}) > 1:
        pytest.skip("the examples have different lengths")
    _, losses = distilled(tmp_path / "b", student, None, said, itrex.Criterion())
    assert losses == pytest.approx(expected, abs=1e-6)


# ---- layers ----


def layers(mappings, kinds=None, weights=None, **options):
    kinds = kinds or ["MSE"] * len(mappings)
    weights = weights or [1.0 / len(mappings)] * len(mappings)
    return itrex.Criterion(
        "IntermediateLayersLoss", 7.0, kinds, weights, layer_mappings=mappings, **options
    )  # the temperature does not count


def test_layers_of_one_width(tmp_path):
    """Names, indices, keys and functions pick; one layer of the student learns from two of the teacher."""
    student, teacher, data = bert(1, 8, seed=1), bert(2, 8, seed=2), examples()
    other = copy.deepcopy(student)
    mappings = [
        [LAYER, "bert.encoder.layer.1"],
        [(LAYER,), ("bert.encoder.layer.0",)],
        [("", "logits"), ("", lambda out: out["logits"])],
        ["classifier"],
        [("bert", "pooler_output")],
    ]
    kinds, weights = ["MSE", "L1", "L1", "MSE", "MSE"], [0.1, 0.2, 0.3, 0.4, 0.5]
    criterion = layers(mappings, kinds, weights, add_origin_loss=True)
    _, losses = distilled(tmp_path, student, copy.deepcopy(teacher), data, criterion)

    def loss_of(out, said, batch):
        hidden, first, second, pooled = read(other, teacher, batch)
        known = batch["attention_mask"].bool()
        parts = [
            F.mse_loss(hidden[known], second[known]),
            F.l1_loss(hidden[known], first[known]),
            F.l1_loss(out.logits, said.logits),
            F.mse_loss(out.logits, said.logits),
            F.mse_loss(*pooled),
        ]
        return out.loss + sum(w * part for w, part in zip(weights, parts, strict=True))

    assert losses == pytest.approx(by_hand(other, teacher, data, loss_of), abs=2e-6)
    assert_same(student, other)


def read(student, teacher, batch):
    own = {key: value for key, value in batch.items() if key != "labels"}
    mine = student.bert(**own, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher.bert(**own, output_hidden_states=True)
    return mine.hidden_states[1], *theirs.hidden_states[1:], (mine.pooler_output, theirs.pooler_output)


def test_divergence_of_features_is_per_position_and_takes_probabilities_as_they_are(tmp_path):
    student, teacher, data = bert(1, 8, seed=1), bert(2, 8, seed=2), examples()
    other = copy.deepcopy(student)
    mappings = [["classifier"], [("classifier", lambda out: out.softmax(dim=-1))]]
    _, losses = distilled(
        tmp_path, student, copy.deepcopy(teacher), data, layers(mappings, ["KL", "KL"], [0.3, 0.5])
    )

    def loss_of(out, said, _):
        return 0.8 * soft(out.logits, said.logits, "KL", 1.0).mean()

    assert losses == pytest.approx(by_hand(other, teacher, data, loss_of), abs=2e-6)


def test_matchers_learn(tmp_path):
    """Theirs are in no optimizer."""
    (student, teacher), data = pair(), examples()
    other = copy.deepcopy(student)
    criterion = layers([[LAYER, "bert.encoder.layer.1"]])
    trainer, losses = distilled(tmp_path, student, copy.deepcopy(teacher), data, criterion)
    learned = list(trainer.distiller.objective.parameters())
    assert [tuple(p.shape) for p in learned] == [(16, 8), (16,)]

    first = trainer_of(tmp_path / "again", other, data, args={"max_steps": 1})
    first.distill(itrex.DistillationConfig(criterion=criterion), teacher)
    assert not torch.equal(learned[0], next(first.distiller.objective.parameters()))
    assert losses[-1] < losses[0]


# ---- block by block ----


def test_block_by_block(tmp_path):
    """In each stage only what its block's name is in, and by its own layers."""
    student, teacher, data = bert(2, 8, seed=1), bert(2, 8, seed=2), examples()
    other = copy.deepcopy(student)
    blocks, steps = ["encoder.layer.0.", "encoder.layer.1.", "classifier"], [1, 2, 1]
    mappings = [[["bert.encoder.layer.0"]], [["bert.encoder.layer.1"]], [["classifier"]]]
    config = itrex.FlashDistillationConfig(
        blocks, mappings, [["MSE"], ["L1"], ["MSE"]], add_origin_loss=[False, False, True], train_steps=steps
    )
    trainer = trainer_of(tmp_path, student, data)
    trainer.distill(config, copy.deepcopy(teacher))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    optimizer, found = torch.optim.SGD(other.parameters(), lr=0.05), []
    stages = [stage for stage, count in enumerate(steps) for _ in range(count)]
    for step, stage in enumerate(stages):
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(blocks[stage] in name)
        batch = padded(data[8 * (step % 3) : 8 * (step % 3) + 8])
        own = {key: value for key, value in batch.items() if key != "labels"}
        out = other(**batch, output_hidden_states=True)
        with torch.no_grad():
            said = teacher.eval()(**own, output_hidden_states=True)
        known = batch["attention_mask"].bool()
        mine, theirs = (side.hidden_states[1:] for side in (out, said))
        loss = [
            F.mse_loss(mine[0][known], theirs[0][known]),
            F.l1_loss(mine[1][known], theirs[1][known]),
            F.mse_loss(out.logits, said.logits) + out.loss,
        ][stage]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert losses == pytest.approx(found, abs=2e-6)
    assert_same(student, other)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_block_by_block_has_defaults_and_refuses_other_lengths():
    mappings = [[["a"], ["b"]], [["c"]]]
    stages = itrex.FlashDistillationConfig(["x", "y"], mappings).criteria()
    assert [(block, steps) for block, _, steps in stages] == [("x", 500), ("y", 500)]
    _, terms = stages[0][1].terms()
    assert [(t.loss_name, t.weight) for t in terms] == [("mse", 0.5), ("mse", 0.5)]
    with pytest.raises(ValueError, match="block_names has 1 entries for 2 stages"):
        itrex.FlashDistillationConfig(["x"], mappings).criteria()


# ---- the best student ----


@pytest.mark.parametrize(("greater", "best"), [(True, 1), (False, 2)])
def test_the_best_student_by_a_metric(tmp_path, greater, best):
    """Of a metric that is better when lower, theirs keeps the worst."""
    (student, teacher), data, seen = pair(), examples(), []
    scores = iter([0.1, 0.5, 0.9, 0.2])  # the first before training

    def compute(_):
        seen.append(copy.deepcopy(student.state_dict()))
        return {"score": next(scores)}

    trainer = trainer_of(
        tmp_path, student, data, compute_metrics=compute, args={"max_steps": -1, "num_train_epochs": 3}
    )
    metric = itrex.metrics.Metric(name="eval_score", greater_is_better=greater)
    trainer.distill(itrex.DistillationConfig(metrics=metric), teacher)
    trained = seen[1:]
    assert len(trained) == 3
    place = 1 if greater else 2
    assert all(torch.equal(t, trained[place][n]) for n, t in student.state_dict().items())
    assert best == place
    assert trainer.args.eval_strategy == "no"  # the user's own arguments are as they were


def test_several_metrics_by_their_weights(tmp_path):
    """Theirs raises: it looks for ``weighted``."""
    (student, teacher), data, seen = pair(), examples(), []
    scores = iter([(0.0, 0.0), (0.9, 0.9), (0.5, 0.1), (0.9, 0.8)])

    def compute(_):
        seen.append(copy.deepcopy(student.state_dict()))
        return dict(zip(("f1", "error"), next(scores), strict=True))

    trainer = trainer_of(
        tmp_path, student, data, compute_metrics=compute, args={"max_steps": -1, "num_train_epochs": 3}
    )
    chosen = [
        itrex.metrics.Metric("eval_f1", weight_ratio=0.3),
        itrex.metrics.Metric("eval_error", greater_is_better=False, weight_ratio=0.7),
    ]
    trainer.distill(itrex.DistillationConfig(metrics=chosen), teacher)
    assert all(torch.equal(t, seen[2][n]) for n, t in student.state_dict().items())


def test_a_function_scores_in_place_of_metrics(tmp_path):
    (student, teacher), data, seen = pair(), examples(), []

    def judge(model):
        seen.append(copy.deepcopy(model.state_dict()))
        return [0.3, 0.8, 0.5][len(seen) - 1]

    trainer = trainer_of(tmp_path, student, data, eval_dataset=None, args={"max_steps": -1, "num_train_epochs": 3})
    trainer.distill(itrex.DistillationConfig(), teacher, provider="inc", eval_func=judge)
    assert all(torch.equal(t, seen[1][n]) for n, t in student.state_dict().items())


def test_a_metric_of_one_of_several_data_sets(tmp_path):
    (student, teacher), data = pair(), examples(8)
    sets = {"near": data, "far": data}
    trainer = trainer_of(tmp_path, student, data, eval_dataset=sets, args={"max_steps": -1, "num_train_epochs": 2})
    metric = itrex.metrics.Metric("eval_far_loss", greater_is_better=False)
    trainer.distill(itrex.DistillationConfig(metrics=metric), teacher)
    far = [line["eval_far_loss"] for line in trainer.state.log_history if "eval_far_loss" in line]
    assert trainer.evaluate()["eval_far_loss"] == pytest.approx(min(far[1:]))


def test_a_training_goes_on_from_a_checkpoint(tmp_path):
    data, criterion = examples(), layers([[LAYER, "bert.encoder.layer.1"]], add_origin_loss=True)
    found = []
    for resumed in (None, str(tmp_path / "checkpoint-2")):
        student, teacher = pair()
        trainer = trainer_of(tmp_path, student, data, args={"save_strategy": "steps", "save_steps": 2})
        trainer.resuming_checkpoint = resumed
        trainer.distill(itrex.DistillationConfig(criterion=criterion), teacher)
        found.append(student.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


# ---- what is left ----


def test_what_is_left_is_a_plain_student(tmp_path):
    (student, teacher), data = pair(), examples()
    trainer, _ = distilled(tmp_path / "out", student, teacher, data, layers([[LAYER, "bert.encoder.layer.1"]]))
    assert trainer.model is student
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = itrex.OptimizedModel.from_pretrained(str(tmp_path / "saved"))
    assert type(loaded) is type(student)
    assert_same(loaded, student)
    assert not (tmp_path / "saved" / "distiller.safetensors").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()  # theirs saves as well
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(trainer.predict(data).predictions) == len(data)


def test_own_training_in_the_trainer_and_without_one(tmp_path):
    data = examples()
    batch = padded(data)

    def train_with(owner):
        def train(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for epoch in range(3):
                owner.distiller.on_epoch_begin(epoch)
                owner.distiller.on_step_begin(0)
                output = model(**batch)
                loss = owner.component.on_after_compute_loss(batch, output, output.loss)
                losses.append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                owner.distiller.on_step_end()
                owner.distiller.on_epoch_end()

        return train

    for make in (
        lambda model: trainer_of(tmp_path, model, data),
        lambda model: itrex.NoTrainerOptimizer(model, str(tmp_path / "plain")),
    ):
        losses, scores = [], []
        student, teacher = pair()
        other = copy.deepcopy(student)

        def judge(model, scores=scores):
            scores.append(copy.deepcopy(model.state_dict()))
            return -len(scores)

        owner = make(student)
        config = itrex.DistillationConfig()
        owner.distill(config, copy.deepcopy(teacher), train_func=train_with(owner), eval_func=judge)
        with torch.no_grad():
            expected = 0.5 * other(**batch).loss + 0.5 * soft(
                other(**batch).logits, teacher.eval()(**batch).logits, "CE", 1
            )
        assert losses[0] == pytest.approx(expected.mean().item(), abs=1e-6)
        assert losses[2] < losses[0]
        assert all(torch.equal(t, scores[0][n]) for n, t in student.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert_same(type(student).from_pretrained(tmp_path / "plain"), student)


def test_the_teacher_gets_columns_that_the_student_does_not_take(tmp_path):
    settings = {"vocab_size": 40, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "num_labels": 3}
    student = DistilBertForSequenceClassification(DistilBertConfig(**settings))
    teacher, data = bert(2, 16, seed=2), [{**e, "token_type_ids": [1] * len(e["input_ids"])} for e in examples(8)]
    given = []
    teacher.register_forward_pre_hook(lambda *call: given.append(call[2].keys()), with_kwargs=True)
    trainer = trainer_of(tmp_path, student, Dataset.from_list(data), args={"max_steps": 1})
    trainer.distill(itrex.DistillationConfig(), teacher)
    assert given
    assert all("token_type_ids" in keys for keys in given)


@pytest.mark.parametrize("task", [language, sequences])
def test_language_models(tmp_path, task):
    """The next token, and encoder-decoder models, whose trainer is another."""
    student, teacher, data, _ = task()
    other = copy.deepcopy(student)
    options = (
        {"args": {"predict_with_generate": False}, "kind": itrex.NLPSeq2SeqTrainer} if task is sequences else {}
    )
    criterion = itrex.Criterion(loss_types=["CE", "KL"], temperature=2.0)
    _, losses = distilled(tmp_path, student, copy.deepcopy(teacher), data, criterion, **options)

    def loss_of(out, said, batch):
        labels, mine, theirs = batch["labels"], out.logits, said.logits
        if task is language:
            labels, mine, theirs = labels[:, 1:], mine[:, :-1], theirs[:, :-1]
        return 0.5 * out.loss + 0.5 * soft(mine, theirs, "KL", 2.0)[labels != -100].mean()

    assert losses == pytest.approx(by_hand(other, teacher, data, loss_of), abs=2e-6)


def test_neural_compressors_config_in_the_trainer(tmp_path):
    """As in their nightly test: the config holds the teacher, the trainer the metric."""
    (student, teacher), data = pair(), examples()
    trainer = trainer_of(tmp_path, student, data, tokenizer=None)
    trainer.metrics = itrex.metrics.Metric(name="eval_loss", greater_is_better=False)
    criterion = inc.KnowledgeDistillationLossConfig(loss_types=["CE", "KL"])
    before = copy.deepcopy(student.state_dict())
    model = trainer.distill(distillation_config=inc.DistillationConfig(teacher, criterion))
    assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())


# ---- wrong input ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: itrex.Criterion("KnowledgLoss").config(), "unknown criterion 'KnowledgLoss'; did you mean 'Know"),
        (lambda: itrex.Criterion(loss_types=["CE", "KLD"]).config().terms(), "unknown loss type 'KLD'"),
        (lambda: itrex.Criterion(loss_types=["CE"]).config().terms(), "as many, got 2, 1 and 2"),
        (lambda: layers([["a", "b", "c"]]).config().terms(), r"layer_mappings\[0\] is \[layer\] or"),
        (lambda: layers([["a"]], ["L2"]).config().terms(), "unknown loss type 'L2'"),
        (lambda: itrex.Criterion("IntermediateLayersLoss").config().terms(), "as many, got 0, 2 and 2"),
        (lambda: itrex.DistillationConfig(framework="tensorflow"), "framework 'tensorflow' is not here"),
        (lambda: itrex.TFOptimization(...), "TFOptimization trains TensorFlow models"),
        (
            lambda: itrex.NoTrainerOptimizer(nn.Linear(1, 1)).distill(itrex.DistillationConfig()),
            "pass train_func=",
        ),
        (
            lambda: inc.Callbacks(nn.Linear(1, 1), inc.DistillationConfig(None, None, {"LARS": {}})),
            "SGD, Adam, AdamW",
        ),
        (
            lambda: inc.Callbacks(nn.Linear(1, 1), inc.DistillationConfig(LINEAR, None, {})),
            "SGD, Adam, AdamW with its options, got {}",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_wrong_metrics_and_configs(tmp_path):
    (student, teacher), data = pair(), examples()
    wrong = itrex.DistillationConfig(metrics=itrex.metrics.Metric("eval_acuracy"))
    with pytest.raises(ValueError, match="evaluations have no metric 'eval_acuracy'"):
        trainer_of(tmp_path, student, data).distill(wrong, teacher)
    two = [itrex.metrics.Metric("eval_loss"), itrex.metrics.Metric("eval_runtime")]
    with pytest.raises(ValueError, match="each has a weight_ratio; 'eval_loss' has none"):
        itrex.DistillationConfig(metrics=two)
    with pytest.raises(ValueError, match="there is no eval_dataset"):
        trainer_of(tmp_path, student, data, eval_dataset=None).distill(wrong, teacher)
    stream = Stream([{**example, "teacher_logits": [0.0] * 3} for example in data])
    with pytest.raises(ValueError, match="teacher_logits are read from data with a length"):
        trainer_of(tmp_path, student, stream, eval_dataset=data).distill(itrex.DistillationConfig(), teacher)
    with pytest.raises(ValueError, match="there is no train_dataset"):
        trainer_of(tmp_path, student, None, eval_dataset=data).distill(itrex.DistillationConfig(), teacher)
    with pytest.raises(TypeError, match="distillation_config is a DistillationConfig, got 'KD'"):
        trainer_of(tmp_path, student, data).distill("KD", teacher)
    with pytest.raises(TypeError, match="one of this module's configs of losses, got 'KnowledgeLoss'"):
        inc.DistillationConfig(teacher, "KnowledgeLoss")
    with pytest.raises(TypeError, match="by one DistillationConfig"):
        inc.prepare_compression(student, itrex.DistillationConfig())


def test_without_a_criterion_it_is_knowledge(tmp_path):
    """As in their own test, which passes None for one of its modes."""
    (student, teacher), data = pair(), examples(8)
    before = copy.deepcopy(student)
    config = itrex.DistillationConfig(criterion=None)
    assert config.criterion == itrex.Criterion()
    trainer_of(tmp_path, student, data, args={"max_steps": 1}).distill(config, teacher)
    assert any(not torch.equal(t, before.state_dict()[name]) for name, t in student.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"criterion": "KnowledgeLoss"}, r"got 'KnowledgeLoss'; write Criterion\(name=...\)"),
        ({"metrics": "eval_accuracy"}, r"got 'eval_accuracy'; write metrics.Metric\(name=...\)"),
        ({"metrics": ["eval_accuracy"]}, r"got 'eval_accuracy'; write metrics.Metric\(name=...\)"),
    ],
)
def test_names_in_place_of_configs_are_refused(wrong, message):
    with pytest.raises(TypeError, match=message):
        itrex.DistillationConfig(**wrong)


def test_every_name_that_scripts_import_is_there_or_says_why_not():
    from limbeck.compat.itrex import DistillationCriterionMode, metric, objectives

    assert metric.Metric is itrex.metrics.Metric
    assert (objectives.performance.name, objectives.modelsize.greater_is_better) == ("performance", False)
    for mode in DistillationCriterionMode:  # their tests go through them
        itrex.Criterion(mode.name)
        assert hasattr(inc, f"{mode.value}Config")
    with pytest.raises(ImportError, match=r"itrex distils PyTorch models and has no QuantizationConfig; drop"):
        from limbeck.compat.itrex import QuantizationConfig  # noqa: F401
    with pytest.raises(ImportError, match=r"compressor distils PyTorch models and has no WeightPruningConfig"):
        from limbeck.compat.neural_compressor import WeightPruningConfig  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'Critrion'"):
        itrex.Critrion  # noqa: B018


# ---- Neural Compressor's loop ----


def compare(manager, batch, own=0.0):
    output = manager.model(**batch)
    return manager.callbacks.on_after_compute_loss(batch, output, torch.tensor(own) if own == 0.0 else output.loss)


def test_named_outputs_masks_and_two_managers():
    """Theirs takes plain tensors alone, averages over padding, and knows one criterion at a time."""
    student, teacher = (bert(1, 8, seed=1, kind="BertForTokenClassification"), bert(2, 8, seed=2))
    other = bert(2, 8, seed=2, kind="BertForTokenClassification")
    criterion = inc.IntermediateLayersKnowledgeDistillationLossConfig([[LAYER]])
    two = [inc.prepare_compression(student, inc.DistillationConfig(t, criterion)) for t in (teacher, other)]
    batch = text_batch()
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 3, -100)
    found = [compare(manager, batch) for manager in two]
    longer = [compare(manager, pad(batch, 3)) for manager in two]
    torch.testing.assert_close(torch.stack(found), torch.stack(longer))


def test_the_own_loss_counts_if_asked_for():
    student, teacher = pair()
    for adds in (False, True):
        criterion = inc.IntermediateLayersKnowledgeDistillationLossConfig([["classifier"]], add_origin_loss=adds)
        manager = inc.prepare_compression(student, inc.DistillationConfig(teacher, criterion))
        batch = text_batch()
        with torch.no_grad():
            sides = student(**batch), teacher.eval()(**batch)
        expected = F.mse_loss(sides[0].logits, sides[1].logits) + adds * sides[0].loss
        torch.testing.assert_close(compare(manager, batch, own=1.0), expected, rtol=1e-5, atol=1e-6)
        manager.callbacks.on_train_end()


def test_the_configs_optimizer_trains_the_matchers():
    student, teacher = pair()
    criterion = inc.IntermediateLayersKnowledgeDistillationLossConfig([[LAYER]])
    options = {"SGD": {"learning_rate": 0.5}}
    manager = inc.prepare_compression(student, inc.DistillationConfig(teacher, criterion, options))
    batch = text_batch()
    compare(manager, batch).backward()
    weight, _ = manager.callbacks.beside.parameters()
    expected = weight.detach() - 0.5 * weight.grad
    manager.callbacks.on_before_optimizer_step()
    torch.testing.assert_close(weight.detach(), expected)
    manager.callbacks.on_step_end()  # without a new gradient nothing moves
    torch.testing.assert_close(weight.detach(), expected)


def test_what_the_teacher_said_is_taken():
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    config = inc.DistillationConfig(None, inc.KnowledgeDistillationLossConfig(2.0, ["CE", "KL"], [0.0, 1.0]))
    manager, inputs = inc.prepare_compression(student, config), torch.randn(5, 4)
    said = teacher(inputs).detach()
    found = manager.callbacks.on_after_compute_loss(inputs, manager.model(inputs), 0.0, teacher_output=said)
    torch.testing.assert_close(found, soft(student(inputs), said, "KL", 2.0).mean())
    with pytest.raises(ValueError, match="no 'teacher_cache'"):
        manager.callbacks.on_after_compute_loss(inputs, manager.model(inputs), 0.0)


def test_several_positional_inputs():
    student, teacher = nn.Bilinear(3, 4, 2), nn.Bilinear(3, 4, 2)
    criterion = inc.KnowledgeDistillationLossConfig(1.0, ["CE", "MSE"], [0.0, 1.0])
    manager = inc.prepare_compression(student, inc.DistillationConfig(teacher, criterion))
    inputs = [torch.randn(5, 3), torch.randn(5, 4)]
    found = manager.callbacks.on_after_compute_loss(inputs, manager.model(*inputs), 0.0)
    torch.testing.assert_close(found, F.mse_loss(student(*inputs), teacher(*inputs)))


class Pair(nn.Module):
    """A layer that returns two tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.first(inputs), self.second(inputs)


def test_an_index_picks_of_what_a_module_returns():
    student, teacher, inputs = Pair(), Pair(), torch.randn(5, 4)
    criterion = inc.IntermediateLayersKnowledgeDistillationLossConfig([[("", "1"), ("", "0")]])
    manager = inc.prepare_compression(student, inc.DistillationConfig(teacher, criterion))
    found = manager.callbacks.on_after_compute_loss(inputs, manager.model(inputs), 0.0)
    torch.testing.assert_close(found, F.mse_loss(student(inputs)[1], teacher(inputs)[0]))


class Exits(nn.Module):
    """A model with an early and a last exit."""

    def __init__(self):
        super().__init__()
        self.stem, self.early, self.last = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = self.stem(inputs).tanh()
        self.early(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("by_key", [False, True])
def test_self_distillation_by_modules_and_by_outputs(by_key):
    """Each group counts once, softened by the temperature; the last exit is no target of the gradient."""
    model, inputs = Exits(), torch.randn(5, 4)
    names = ("early.fc", "last.fc") if by_key else ("early", "last")
    criterion = inc.SelfKnowledgeDistillationLossConfig(
        [[names], [names], [names]], 3.0, ["L2", "KL", "CE"], [0.5, 0.05, 0.02], add_origin_loss=True
    )
    manager = inc.prepare_compression(model, inc.DistillationConfig(model, criterion))
    output = manager.model(inputs)
    hidden = model.stem(inputs).tanh()
    features = {"early.fc": model.early(hidden), "last.fc": model.last(hidden)} if by_key else output
    found = manager.callbacks.on_after_compute_loss(inputs, features, output.square().mean(), features)
    early, last = model.early(hidden), output.detach()
    expected = 0.5 * (early - last).norm(dim=1).mean() + output.square().mean()
    expected = expected + sum(w * soft(early, last, kind, 3.0).mean() for w, kind in ((0.05, "KL"), (0.02, "CE")))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, model.last.weight, retain_graph=True) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    manager.callbacks.on_train_end()
    assert not model._forward_pre_hooks


def test_self_distillation_has_defaults():
    """Theirs fails for want of loss types."""
    own, (term,) = inc.SelfKnowledgeDistillationLossConfig([[["early", "last"]]]).terms()
    assert (own, term.loss_name, term.weight) == (0.0, "soft_cross_entropy", 1.0)


def test_options_can_be_reached_and_changed_as_before():
    criterion = inc.IntermediateLayersKnowledgeDistillationLossConfig([["a"], [["b", ""], ["b", "0"]]])
    criterion.config.IntermediateLayersKnowledgeDistillationLoss.layer_mappings[1][1][-1] = lambda out: out[0]
    _, terms = criterion.terms()
    assert [t.teacher_tap for t in terms] == ["a", "b#1.teacher"]


def test_saving_writes_a_state_dict_that_loads(tmp_path):
    student, teacher = pair()
    manager = inc.prepare_compression(student, inc.DistillationConfig(teacher))
    compare(manager, text_batch(), own=1.0).backward()
    manager.save(tmp_path / "saved")
    fresh = bert(1, 8, seed=5)
    fresh.load_state_dict(torch.load(Path(tmp_path) / "saved" / "best_model.pt", weights_only=True))
    assert_same(fresh, student)


# ---- what the document shows ----


def test_blocks_of_the_document_run(tmp_path, monkeypatch):
    """Those after the imports; what they leave open is filled in."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
    section = page.partition("## Intel Extension")[2].partition("\n## ")[0]
    _, *shown = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    data = examples(16)
    names = {"args": arguments(tmp_path, max_steps=2), "data": data, "collate": padded, "limbeck": limbeck}
    names |= {"DistillationTrainer": DistillationTrainer, "batches": [padded(data[:8]), padded(data[8:])]}
    names |= {"accuracy": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}}
    of_door = [{name: getattr(door, name) for name in door.__all__} for door in (itrex, inc)]
    for block in shown:
        names["student"], names["teacher"] = pair()
        before = copy.deepcopy(names["student"].state_dict())
        exec(block, {**names, **of_door["prepare_compression" in block], "torch": torch})
        moved = any(not torch.equal(t, before[n]) for n, t in names["student"].state_dict().items())
        assert moved != ("terms = [" in block)  # the last one is not run to its end
    assert len(shown) == 3
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"best_model.pt"}


def test_index_0_of_a_layer_that_gives_a_tensor():
    """Layers of transformers gave tuples until version 5, and old mappings take their first part."""
    old = inc.IntermediateLayersKnowledgeDistillationLossConfig([[["0", "0"], ["0", "0"]]])
    _, terms = old.terms()
    torch.manual_seed(0)
    student, teacher = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(2))
    inputs = torch.randn(6, 4)
    loss = limbeck.Distiller(student, teacher, terms).train()(inputs, torch.zeros(6)).loss
    assert loss.item() == pytest.approx((student[0](inputs) - teacher[0](inputs)).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("layers", "weights", "kind", "message"),
    [
        ([[0, 1]], [1.0], ValueError, r"a layer is a module's path or \(path, pick\), got 0"),
        ([["0", "0"]], ["a"], TypeError, "weights of losses are numbers, got 'a'"),
    ],
)
def test_mappings_that_name_no_layer_and_weights_that_are_no_numbers(layers, weights, kind, message):
    with pytest.raises(kind, match=message):
        inc.IntermediateLayersKnowledgeDistillationLossConfig(layers, ["MSE"], weights).terms()
