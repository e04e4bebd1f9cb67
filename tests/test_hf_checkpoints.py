"""DistillationTrainer: what is saved, what a resumed training ends with, what goes to the hub."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from limbeck import Distiller, Term
from limbeck.teachers import Average, Cached
from limbeck.train.checkpoint import WEIGHTS
from limbeck.train.hf import DistillationTrainer
from tests.hf_cases import arguments, classes, padded
from tests.models import bert, hooks

KD = Term("logits", loss="forward_kl", temperature=2.0, name="kd")
LABELS = Term("labels", loss="cross_entropy", name="labels")
HIDDEN = Term("bert.encoder.layer.0", "bert.encoder.layer.1", loss="mse", project="linear", name="hidden")
SETTINGS = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 9,
    "train_sampling_strategy": "random",
    "save_strategy": "steps",
    "save_steps": 2,
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_training_stop = True


def trainer(folder, *, terms=(KD, HIDDEN, LABELS), student=None, teacher=None, stop=None, **options):
    known = transformers.TrainingArguments.__dataclass_fields__
    settings = {**SETTINGS, **{k: options.pop(k) for k in list(options) if k in known}}
    student = student or bert(1, 8, seed=1, hidden_dropout_prob=0.2)
    return DistillationTrainer(
        student,
        arguments(folder, **settings),
        data_collator=padded,
        train_dataset=classes()[2],
        eval_dataset=classes()[2],
        teacher=teacher or bert(2, 16, seed=2),
        terms=list(terms),
        callbacks=[StopAt(stop)] if stop else [],
        **options,
    )


def assert_identical(one, other):
    a, b = one.distiller.state_dict(), other.distiller.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    ("balance", "step"),  # the epoch has six updates
    [
        ("uncertainty", 2),
        ("uncertainty", 6),
        ("matched_scale", 4),
        ({"kind": "gradient_norm", "every": 2}, 4),
    ],
)
def test_a_resumed_training_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, balance, step):
    whole = trainer(tmp_path / "whole", balance=balance)
    whole.train()
    first = trainer(tmp_path / "cut", balance=balance, stop=step)
    first.train()
    assert first.state.global_step == step
    resumed = trainer(tmp_path / "cut", balance=balance)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 9
    assert_identical(resumed, whole)
    assert any("projections.hidden" in name for name in whole.distiller.state_dict())


def test_a_teacher_that_changes_goes_on_where_it_was(tmp_path):
    def own(folder, **options):
        student = bert(1, 8, seed=1)
        return trainer(folder, terms=(KD, LABELS), student=student, teacher=Average(student), **options)

    whole, first = own(tmp_path / "whole"), own(tmp_path / "cut", stop=4)
    whole.train()
    first.train()
    resumed = own(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert_identical(resumed, whole)
    assert (tmp_path / "cut" / "checkpoint-4" / "teachers-0.safetensors").is_file()


def test_a_checkpoint_is_a_students_folder_and_one_more_file(tmp_path):
    made = trainer(tmp_path, balance="uncertainty", max_steps=2)
    made.train()
    folder = tmp_path / "checkpoint-2"
    saved, beside = load_file(folder / "model.safetensors"), load_file(folder / WEIGHTS)
    assert saved.keys() == dict(made.model.named_parameters()).keys()
    assert beside.keys() == made.distiller.objective.state_dict().keys()
    assert {name.split(".")[0] for name in beside} == {"projections", "balance"}
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(p, saved[name]) for name, p in loaded.named_parameters())


def test_the_final_folder_is_a_plain_student(tmp_path):
    made = trainer(tmp_path / "run", save_strategy="no")
    made.train()
    made.save_model(str(tmp_path / "final"))
    files = {path.name for path in (tmp_path / "final").iterdir()}
    assert files == {"config.json", "model.safetensors", "training_args.bin"}
    assert not any(name.startswith("student.") for name in load_file(tmp_path / "final" / "model.safetensors"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    batch = padded(classes()[2])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, made.model.eval()(**batch).logits)
    assert hooks(made.model) == 0
    assert not any("forward" in vars(module) for module in made.model.modules())


class Worse(TrainerCallback):
    """Spoils the student after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                model.classifier.weight.mul_(-50)


def test_the_best_student_comes_back_with_its_projections(tmp_path):
    made = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=6,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    made.add_callback(Worse(3))
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in made.model.named_parameters())
    beside = load_file(tmp_path / "checkpoint-2" / WEIGHTS)
    assert all(torch.equal(p, beside[name]) for name, p in made.distiller.objective.named_parameters())


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    plain = Trainer(bert(1, 8), arguments(tmp_path / "plain", save_strategy="epoch"), padded, classes()[2])
    plain.train()
    with pytest.raises(ValueError, match=r"has no distiller.safetensors: it is no checkpoint of a distillation"):
        trainer(tmp_path / "x").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))
    trainer(tmp_path / "one", max_steps=2).train()
    with pytest.raises(ValueError, match="belongs to another model"):
        trainer(tmp_path / "one", terms=[KD]).train(resume_from_checkpoint=True)


def test_a_remembered_teacher_is_brought_to_disk_with_each_checkpoint(tmp_path):
    def cached():
        return Cached(bert(2, 16, seed=2), tmp_path / "store")

    teacher = cached()
    trainer(tmp_path / "one", teacher=teacher, max_steps=12).train()
    assert teacher.computed == len({tuple(e["input_ids"]) for e in classes()[2]})
    again = cached()
    trainer(tmp_path / "two", teacher=again, max_steps=6).train()
    assert again.computed == 0


class Hub:
    """What would be uploaded."""

    def __init__(self):
        self.uploads, self.created = [], []

    def create_repo(self, name, **_):
        self.created.append(name)
        return type("Url", (), {"repo_id": f"me/{name}"})()

    def upload_folder(self, *, folder_path, repo_id, run_as_future=False, **_):
        folder = Path(folder_path)
        self.uploads.append((repo_id, {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}))
        return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()


def test_what_goes_to_the_hub_is_a_student(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    made = trainer(tmp_path / "tiny-student", push_to_hub=True, max_steps=2)
    made.train()
    made.push_to_hub()
    assert hub.created == ["tiny-student"]
    repository, files = hub.uploads[-1]
    assert repository == "me/tiny-student"
    assert {"README.md", "config.json", "model.safetensors"} <= files.keys()
    assert WEIGHTS not in files
    assert b"tiny-student" in files["README.md"]
    assert json.loads(files["config.json"])["architectures"] == ["BertForSequenceClassification"]


def test_a_distiller_of_ones_own_is_trained_as_it_is(tmp_path):
    student = bert(1, 8, seed=1)
    own = Distiller(student, bert(2, 16, seed=2), [KD, LABELS])
    made = DistillationTrainer(own, arguments(tmp_path), padded, classes()[2])
    assert made.distiller is own
    assert made.model is student
    before = copy.deepcopy(student.state_dict())
    made.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_of_a_student_with_adapters_they_alone_are_kept(tmp_path):
    def made(folder, **options):
        torch.manual_seed(0)
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], lora_dropout=0.1)
        return trainer(folder, terms=(KD, LABELS), student=get_peft_model(bert(1, 8, seed=1), lora), **options)

    whole = made(tmp_path / "whole")  # a Trainer seeds where it is made
    whole.train()
    made(tmp_path / "cut", stop=4).train()
    kept = {path.name for path in (tmp_path / "cut" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in kept
    assert "model.safetensors" not in kept
    resumed = made(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert_identical(resumed, whole)
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
