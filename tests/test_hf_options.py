"""DistillationTrainer: the options and events of transformers' Trainer, and what is refused."""

import copy
import warnings

import datasets
import numpy as np
import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback

from limbeck import Distiller, Examples, Settings, Term, fit
from limbeck.stages import block_by_block
from limbeck.tasks.builtin import train_tokenizer
from limbeck.teachers import ModuleTeacher
from limbeck.train.hf import DistillationTrainer, Seq2SeqDistillationTrainer
from limbeck.train.hf_terms import label_terms
from limbeck.types import Signal
from tests.hf_cases import arguments, assert_same_weights, classes, padded, sequences, spans, texts
from tests.models import bert, hooks, perceptron
from tests.tiny import BAD, FILLER, GOOD
from tests.tiny import table as tiny_table

KD = Term("logits", loss="forward_kl", temperature=2.0, name="kd")
LABELS = Term("labels", loss="cross_entropy", name="labels")
EPSILON = 1e-3
"""Of Adam: with the usual one, gradients that are nothing but rounding would count, as those of keys' biases."""
HIDDEN = Term("bert.encoder.layer.0", "bert.encoder.layer.1", loss="mse", project="linear", name="hidden")


def trainer(folder, student=None, *, terms=(KD, LABELS), teacher="", data=None, callbacks=None, **options):
    known = transformers.TrainingArguments.__dataclass_fields__
    settings = {k: options.pop(k) for k in list(options) if k in known}
    return DistillationTrainer(
        student or bert(1, 8, seed=1),
        arguments(folder, **settings),
        **{"data_collator": padded, **options},
        train_dataset=classes()[2] if data is None else data,
        eval_dataset=classes()[2] if data is None else data,
        teacher=bert(2, 16, seed=2) if teacher == "" else teacher,
        terms=None if terms is None else list(terms),
        callbacks=callbacks,
    )


# ---- the loop ---------------------------------------------------------------------------------------------------


def test_it_trains_as_limbeck_fit_does(tmp_path):
    """All examples in each update, since the two shuffle in ways of their own; the projection begins the same."""
    data = classes()[2]
    for settings in (Settings(), Settings(seed=7)):
        own = Distiller(bert(1, 8, seed=1), bert(2, 16, seed=2), [KD, HIDDEN, LABELS], balance="uncertainty")
        options = {"epochs": 20, "batch_size": 24, "learning_rate": 1e-2, "schedule": "constant", "warmup": 0}
        options |= {"weight_decay": 0.1, "optimizer_options": {"eps": EPSILON}}
        fit(own, Examples(data, padded), None, settings.model_copy(update={**options}))
        made = trainer(
            tmp_path,
            terms=[KD, HIDDEN, LABELS],
            balance="uncertainty",
            seed=settings.seed,
            max_steps=20,
            per_device_train_batch_size=24,
            optim="adamw_torch",
            adam_epsilon=EPSILON,
            learning_rate=1e-2,
            weight_decay=0.1,
            max_grad_norm=1.0,
        )
        torch.randn(3)  # whatever a user draws in between
        made.train()
        assert_same_weights(made.distiller, own, 1e-6)


def test_plain_training_is_that_of_a_plain_trainer(tmp_path):
    """Shuffled, with dropout: the look at two examples before the first step draws no random number."""
    options = {"train_sampling_strategy": "random", "max_steps": 9}
    student, expected = (bert(1, 8, seed=1, hidden_dropout_prob=0.3) for _ in range(2))
    data, terms = classes()[2], [Term("labels", loss="cross_entropy")]
    made = DistillationTrainer(student, arguments(tmp_path, **options), padded, data, terms=terms)
    torch.randn(3)
    made.train()
    plain = Trainer(expected, arguments(tmp_path, **options), padded, data)
    torch.randn(3)
    plain.train()
    assert_same_weights(made.model, plain.model, 1e-6)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (made, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_weights_follow_progress(tmp_path):
    kd = Term("logits", loss="forward_kl", weight=lambda progress: 1.0 - progress, name="kd")
    made = trainer(tmp_path, terms=[kd, LABELS], max_steps=3)
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    weights = [(line["loss"] - line["terms/labels"]) / line["terms/kd"] for line in lines]
    assert weights == pytest.approx([1.0, 0.5, 0.0], abs=1e-4)


def test_projections_and_balance_are_in_the_optimizer_without_decay_of_what_is_no_matrix(tmp_path):
    made = trainer(tmp_path, terms=[KD, HIDDEN], balance="uncertainty", weight_decay=0.1)
    optimizer = made.create_optimizer()
    names = {id(p): name for name, p in made.distiller.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | plain == set(names.values())
    assert "objective.balance.log_variances" in plain
    assert {name for name in decayed if name.startswith("objective")} == {
        "objective.projections.hidden.affine.weight"
    }
    own = Trainer(bert(1, 8, seed=1), arguments(tmp_path, weight_decay=0.1)).get_decay_parameter_names(made.model)
    assert {name for name in decayed if name.startswith("student")} == {f"student.{name}" for name in own}


def test_callbacks_see_the_student_and_the_usual_events(tmp_path):
    events, models = [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
            events.append("begin")
            models.append(model)
            assert optimizer is not None

        def on_step_end(self, args, state, control, model=None, **_):
            events.append(state.global_step)
            models.append(model)

        def on_log(self, args, state, control, logs=None, **_):
            events.append(sorted(k for k in logs if k.startswith("terms/")))

        def on_evaluate(self, *_, **__):
            events.append("evaluate")

        def on_save(self, *_, **__):
            events.append("save")

        def on_train_end(self, *_, model=None, **__):
            events.append("end")
            models.append(model)

    made = trainer(tmp_path, callbacks=[Watch()], max_steps=2, eval_strategy="epoch", save_strategy="epoch")
    made.train()
    terms = ["terms/kd", "terms/labels"]
    assert events == ["begin", 1, terms, 2, terms, [], "evaluate", "save", [], "end"]
    assert all(model is made.model for model in models)
    assert made.model.config.num_labels == 3


def test_terms_are_logged_without_weights_as_means_since_the_last_line(tmp_path):
    one = trainer(tmp_path / "one", terms=[KD, LABELS], balance="uncertainty", max_steps=4)
    two = trainer(tmp_path / "two", terms=[KD, LABELS], balance="uncertainty", max_steps=4, logging_steps=2)
    for made in (one, two):
        made.train()
    each = [line["terms/kd"] for line in one.state.log_history if "loss" in line]
    pairs = [line["terms/kd"] for line in two.state.log_history if "loss" in line]
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2])
    first = one.state.log_history[0]
    assert first["loss"] == pytest.approx(first["terms/kd"] + first["terms/labels"])  # the first step is static


def test_tensorboard_has_the_terms(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer(tmp_path, report_to=["tensorboard"], max_steps=2).train()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"train/loss", "train/terms/kd", "train/terms/labels"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/terms/kd")] == [1, 2]


def test_a_student_that_is_made_anew(tmp_path):
    made = []

    def student():
        made.append(bert(1, 8, seed=1))
        return made[-1]

    found = DistillationTrainer(
        None,
        arguments(tmp_path),
        padded,
        classes()[2],
        model_init=student,
        teacher=bert(2, 16, seed=2),
        terms=[KD, HIDDEN],
    )
    for _ in range(2):
        found.train()
        assert found.model is made[-1]
        assert found.distiller.student is made[-1]
    assert len(made) == 3
    assert_same_weights(made[-1], made[-2], 0.0)
    assert not torch.equal(made[0].classifier.weight, made[1].classifier.weight)


def test_a_batch_that_is_too_large_is_cut_and_begun_again(tmp_path):
    class Full(TrainerCallback):
        times = 0

        def on_step_end(self, *_, **__):
            self.times += 1
            if self.times == 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate more")

    made = trainer(tmp_path, terms=[KD, HIDDEN], auto_find_batch_size=True, callbacks=[Full()])
    made.train()
    assert made._train_batch_size < 8
    assert made.state.global_step == 3
    assert made.model is made.distiller.student


def test_a_second_training_goes_on_with_the_same_projections(tmp_path):
    made = trainer(tmp_path, terms=[KD, HIDDEN])
    made.train()
    distiller, weight = made.distiller, made.distiller.objective.projections["hidden"].affine.weight
    before = weight.detach().clone()
    made.train()
    assert made.distiller is distiller
    assert made.distiller.objective.projections["hidden"].affine.weight is weight
    assert not torch.equal(weight, before)


def test_gradient_checkpointing_goes_with_taps(tmp_path):
    def run(folder, **options):
        made = trainer(folder, bert(2, 8, seed=1), terms=[KD, HIDDEN], **options)
        made.train()
        return made.model

    plain = run(tmp_path / "a")
    saving = run(tmp_path / "b", activation_checkpointing=True)
    assert_same_weights(saving, plain, 1e-7)
    assert hooks(saving) == 0
    reentrant = {"use_reentrant": True}
    again = run(tmp_path / "c", activation_checkpointing=True, activation_checkpointing_kwargs=reentrant)
    assert_same_weights(again, plain, 1e-7)


def test_bf16_trains_and_evaluates_in_bf16(tmp_path):
    seen = {}
    student = bert(1, 8, seed=1)
    layer = student.bert.encoder.layer[0].output.dense
    layer.register_forward_hook(lambda module, _, out: seen.update({student.training: out.dtype}))
    made = trainer(
        tmp_path, student, bf16=True, compute_metrics=lambda p: {"kind": float(p.predictions.dtype.itemsize)}
    )
    made.train()
    made.evaluate()
    assert seen == {True: torch.bfloat16, False: torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in made.model.parameters())
    assert "forward" not in vars(made.model)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_the_student_is_compiled_and_comes_back_as_it_was(tmp_path):
    plain = trainer(tmp_path / "plain", terms=[KD, HIDDEN])
    plain.train()
    made = trainer(tmp_path / "made", terms=[KD, HIDDEN], torch_compile=True, torch_compile_backend="eager")
    during = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, model=None, **__):
            during.append(model._compiled_call_impl is not None)

    made.add_callback(Watch())
    made.train()
    assert during == [True] * 3
    assert_same_weights(made.model, plain.model, 1e-6)
    assert made.model._compiled_call_impl is None
    assert hooks(made.model) == 0


def test_blocks_learn_in_stages_layer_by_layer(tmp_path):
    """Half of the updates for each block; compared with plain descent on one block after the other."""
    pairs = [(f"bert.encoder.layer.{i}", f"bert.encoder.layer.{2 * i + 1}") for i in range(2)]
    terms, stages = block_by_block(pairs)
    student, teacher = bert(2, seed=1), bert(4, seed=2)
    by_hand = copy.deepcopy(student)
    made = trainer(tmp_path, student, teacher=teacher, terms=terms, stages=stages, layerwise=True, max_steps=4)
    made.train()
    for step in range(4):
        batch = padded(classes()[2][8 * (step % 3) : 8 * (step % 3) + 8])
        mask = batch["attention_mask"].bool()
        place = step // 2
        with torch.no_grad():
            said = teacher(**batch, output_hidden_states=True).hidden_states
        block = by_hand.bert.encoder.layer[place]
        out = block(said[2 * place + 1], attention_mask=mask[:, None, None, :])
        loss = (out - said[2 * place + 2]).pow(2)[mask].mean()
        for parameter, gradient in zip(
            block.parameters(), torch.autograd.grad(loss, tuple(block.parameters())), strict=True
        ):
            parameter.data -= 0.05 * gradient
    assert_same_weights(made.model, by_hand, 1e-6)
    assert all(p.requires_grad for p in made.model.parameters())
    assert hooks(made.model) == 0


# ---- evaluation -------------------------------------------------------------------------------------------------


def test_an_evaluation_is_that_of_a_plain_trainer(tmp_path):
    def metrics(p):
        return {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean()), "inputs": len(p.inputs)}

    options = {"label_smoothing_factor": 0.1, "include_for_metrics": ["inputs"], "per_device_eval_batch_size": 5}
    data = classes()[2]
    made = trainer(tmp_path, compute_metrics=metrics, **options)
    plain = Trainer(made.model, arguments(tmp_path, **options), padded, eval_dataset=data, compute_metrics=metrics)
    found, expected = made.evaluate(), plain.evaluate()
    for name in ("eval_loss", "eval_accuracy", "eval_inputs"):
        assert found[name] == pytest.approx(expected[name])
    assert np.array_equal(made.predict(data).predictions, plain.predict(data).predictions)


def test_the_default_terms_smooth_labels_as_asked(tmp_path):
    made = trainer(tmp_path, terms=None, label_smoothing_factor=0.1)
    assert [t.comparison.options.get("label_smoothing") for t in made.distiller.terms] == [None, 0.1]


def test_evaluations_may_generate(tmp_path):
    student, teacher, data, _ = sequences()
    options = {"predict_with_generate": True, "generation_max_length": 6, "max_steps": 2}
    made = Seq2SeqDistillationTrainer(
        student, arguments(tmp_path, **options), padded, data, data[:5], teacher=teacher
    )
    made.train()
    plain = transformers.Seq2SeqTrainer(student, arguments(tmp_path, **options), padded, eval_dataset=data[:5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = made.predict(data[:5]), plain.predict(data[:5])
    assert np.array_equal(found.predictions, expected.predictions)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"])


# ---- the data ---------------------------------------------------------------------------------------------------


class Wide(torch.nn.Module):
    """A teacher that reads an entry of its own."""

    def __init__(self):
        super().__init__()
        self.inner = bert(2, 16, seed=2)
        self.seen = []

    def forward(self, input_ids, attention_mask, kinds):
        self.seen.append(kinds.tolist())
        return self.inner(input_ids, attention_mask)


def table(**columns):
    rows = [
        {**text, "label": text["input_ids"][0] % 3, "kinds": i, "text": "a text", **columns}
        for i, text in enumerate(texts())
    ]
    return datasets.Dataset.from_list(rows)


def collated(examples):
    assert "text" not in examples[0]
    return padded([{("labels" if k == "label" else k): v for k, v in example.items()} for example in examples])


@pytest.mark.parametrize("kind", [datasets.Dataset, list])
def test_columns_stay_that_the_teacher_or_a_term_reads(tmp_path, kind):
    data = table(weight=1, other=2)
    data = data if kind is datasets.Dataset else list(data)
    teacher, seen = Wide(), []

    def watched(examples):
        seen.append(sorted(examples[0]))
        return collated(examples)

    kd = Term("logits", loss="forward_kl", name="kd", mask="weight")
    made = trainer(tmp_path, terms=[kd, LABELS], teacher=teacher, data=data, data_collator=watched, max_steps=1)
    made.train()
    made.evaluate()
    assert {tuple(names) for names in seen} == {("attention_mask", "input_ids", "kinds", "label", "weight")}
    assert teacher.seen[-1] == list(range(8))


def test_a_script_as_people_write_it(tmp_path):
    """A tokenizer's entries for a BERT, a teacher that reads them all, and a DistilBERT that does not."""
    tokenizer = train_tokenizer([" ".join(GOOD + BAD + FILLER)], vocabulary=200)
    rows = tiny_table(24)
    data = datasets.Dataset.from_dict(
        {"text": list(rows["text"]), "label": [int(x == "good") for x in rows["label"]]}
    )
    data = data.map(lambda row: tokenizer(row["text"], return_token_type_ids=True), batched=True)
    teacher, seen = bert(2, 16, labels=2, seed=2, vocab_size=len(tokenizer)), []

    def watch(module, args, named):
        seen.append(sorted(named))

    teacher.register_forward_pre_hook(watch, with_kwargs=True)
    sizes = {"dim": 8, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64}
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), **sizes)
    made = DistillationTrainer(
        transformers.DistilBertForSequenceClassification(config),
        arguments(tmp_path, eval_strategy="epoch"),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        teacher=teacher,
    )
    made.train()
    assert {tuple(names) for names in seen} == {("attention_mask", "input_ids", "token_type_ids")}
    assert made.predict(data.remove_columns("label")).predictions.shape == (24, 2)


@pytest.mark.parametrize("kind", [datasets.Dataset, list])
def test_texts_that_share_a_name_with_what_a_distillation_may_read_are_left_out(tmp_path, kind):
    """As of question answering (``example_id``) and of instructions (``inputs``, ``task``), a plain Trainer's."""
    names = [
        "example_id",
        "task",
        "inputs",
        *(["teacher", "student", "teacher_cache"] if kind is not list else []),
    ]
    data, seen = table(**dict.fromkeys(names, "some text")), []

    def watched(examples):
        seen.append(sorted(examples[0]))
        return collated(examples)

    made = trainer(
        tmp_path, data=data if kind is datasets.Dataset else list(data), data_collator=watched, max_steps=1
    )
    made.train()
    made.evaluate()
    assert {tuple(found) for found in seen} == {("attention_mask", "input_ids", "label")}


def test_the_numbers_of_examples_stay_for_a_loss_that_asks_for_them(tmp_path):
    def nearest_of_each(student, teacher, *, example_id):
        numbers.append(example_id.tolist())
        return (student - teacher).square().mean(-1)

    numbers = []
    data = table().add_column("example_id", list(range(24)))
    own = Term("logits", loss=nearest_of_each, name="own")
    trainer(tmp_path, terms=[own], data=data, data_collator=collated, max_steps=1).train()
    assert numbers[-1] == list(range(8))


def test_all_columns_stay_for_a_teacher_of_an_unknown_kind(tmp_path):
    class Oracle:
        def offers(self, tap):
            return tap == "logits"

        def names(self):
            return ["logits"]

        def signal(self, batch, wants):
            return Signal({"logits": torch.nn.functional.one_hot(batch["other"], 3).float()})

    made = trainer(
        tmp_path,
        teacher=Oracle(),
        data=table(other=2).remove_columns("text"),
        data_collator=collated,
        max_steps=1,
    )
    made.train()
    assert made.evaluate()["eval_loss"] > 0


def test_each_model_may_have_inputs_of_its_own(tmp_path):
    def both(examples):
        batch = padded(examples)
        labels = batch.pop("labels")
        return {"student": batch, "teacher": {k: v[:, :2] for k, v in batch.items()}, "labels": labels}

    made = trainer(tmp_path, data_collator=both, max_steps=1)
    made.train()
    plain = Trainer(made.model, arguments(tmp_path), padded, eval_dataset=classes()[2])
    assert made.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_several_tasks_each_with_batches_of_its_own(tmp_path):
    """The projections of both are there before the first update, although it is of one task alone."""
    data = [{**e, "task": "ab"[i // 8 % 2]} for i, e in enumerate(classes()[2])]

    def of_one_task(examples):
        (task,) = {example["task"] for example in examples}
        return {**padded([{k: v for k, v in e.items() if k != "task"} for e in examples]), "task": task}

    taps = ("bert.encoder.layer.0", "bert.encoder.layer.1")
    terms = [Term(*taps, loss="mse", project="linear", task=task, name=task) for task in "ab"]
    teachers = {"a": bert(2, 16, seed=2), "b": bert(2, 24, seed=3)}
    made = trainer(tmp_path, terms=terms, teacher=teachers, data=data, data_collator=of_one_task)
    assert not any(projection.sized for projection in made.distiller.objective.projections.values())
    made.train()
    logged = [sorted(k for k in line if k in ("terms/a", "terms/b")) for line in made.state.log_history[:3]]
    assert logged == [["terms/a"], ["terms/b"], ["terms/a"]]
    covered = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert covered == {id(p) for p in made.distiller.parameters()}
    assert len({p.shape for name, p in made.distiller.named_parameters() if "affine.weight" in name}) == 2


def test_data_without_a_length(tmp_path):
    data = datasets.Dataset.from_list(classes()[2]).to_iterable_dataset()
    made = trainer(tmp_path, terms=[KD, HIDDEN], data=data)
    made.train()
    assert made.state.global_step == 3


# ---- what is refused --------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused_up_front(tmp_path):
    own = Distiller(bert(1, 8), bert(2, 16), [KD])
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="the model is a Distiller already, and terms was given too"):
        DistillationTrainer(own, args, terms=[KD])
    with pytest.raises(ValueError, match="the model is a Distiller already, and balance was given too"):
        DistillationTrainer(own, args, balance="uncertainty")
    with pytest.raises(ValueError, match="there is no student; pass model= or model_init="):
        DistillationTrainer(None, args)
    with pytest.raises(TypeError, match="has no option 'train_data'; did you mean 'train_dataset'"):
        DistillationTrainer(bert(1, 8), args, train_data=[])
    with pytest.raises(TypeError, match=r"has no option 'techer'; did you mean 'teacher'"):
        DistillationTrainer(bert(1, 8), args, techer=bert(2, 8))
    with pytest.raises(
        TypeError, match=r"after the student come TrainingArguments, got a BertFor.*; pass the teacher"
    ):
        DistillationTrainer(bert(1, 8), bert(2, 8), args)
    for terms in (None, [KD]):
        with pytest.raises(ValueError, match="the training data is empty"):
            trainer(tmp_path, data=[], terms=terms).train()
    with pytest.raises(ValueError, match=r"nothing of the student \(BertForSequenceClassification\) trains"):
        trainer(tmp_path, bert(1, 8).requires_grad_(False)).train()
    with pytest.raises(ValueError, match=r"term 'kd' .* needs a teacher, and there is none"):
        DistillationTrainer(bert(1, 8), args, terms=[KD])
    with pytest.raises(ValueError, match=r"did you mean 'bert\.encoder\.layer\.0'"):
        DistillationTrainer(
            bert(1, 8), args, terms=[Term("bert.encoder.layer.00", loss="mse")], teacher=bert(2, 8)
        )
    with pytest.raises(ValueError, match="compute_loss_func and the terms both say what the loss is"):
        trainer(tmp_path, compute_loss_func=lambda *_: 0)
    with pytest.raises(TypeError, match="a Sequential has no config that names its task"):
        DistillationTrainer(perceptron(), args, teacher=perceptron(seed=1))


def test_data_without_labels_is_refused_before_the_first_update(tmp_path):
    made = trainer(tmp_path, data=texts())
    with pytest.raises(ValueError, match=r"term 'labels' .*: the batch has no labels, only \['attention_mask'"):
        made.train()
    assert made.state.global_step == 0


def test_an_optimizer_that_leaves_something_out_is_refused(tmp_path):
    student = bert(1, 8, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    made = trainer(tmp_path, student, terms=[KD, HIDDEN], optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"leaves out 'objective.projections.hidden.* and 1 more of what trains"):
        made.train()
    trainer(tmp_path, student, optimizers=(optimizer, None)).train()


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process are DataParallel"):
        DistillationTrainer(bert(1, 8), args, padded, classes()[2], teacher=bert(2, 16), terms=[KD])


def test_any_module_may_be_the_student(tmp_path):
    data = [{"input": torch.eye(4)[i % 4], "labels": i % 3} for i in range(16)]
    made = DistillationTrainer(
        perceptron(),
        arguments(tmp_path),
        train_dataset=data,
        eval_dataset=data,
        teacher=ModuleTeacher(perceptron(seed=1)),
        terms=[KD, LABELS],
    )
    made.train()
    assert made.predict(data).predictions.shape == (16, 3)


def test_answers_beyond_the_text_do_not_count(tmp_path):
    """As of features that were cut; the student's own loss leaves them out, too."""
    student, _, data, _ = spans()
    data[0]["end_positions"] = data[1]["start_positions"] = 40
    expected = student(**padded(data[:8])).loss.item()
    trained = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=1),
        train_dataset=data,
        data_collator=padded,
        terms=label_terms(student),
    )
    trained.train()
    assert trained.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-6)
