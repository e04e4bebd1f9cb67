"""ModelOpt and transformers' Trainer: a converted model in any Trainer, and `KDTrainer`."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator
from transformers.modeling_outputs import CausalLMOutputWithPast

import limbeck.compat.modelopt as mtd
from limbeck.compat.modelopt.plugins.huggingface import DistillArguments, KDTrainer, LMLogitsLoss
from tests.models import bert, text_batch


class TinyLM(nn.Module):
    """Next tokens of 8, from the present one alone; its loss is that of the next token."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(use_cache=False)
        self.embed = nn.Embedding(8, 6)
        self.lm_head = nn.Linear(6, 8, bias=False)

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embed(input_ids))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def rows(size=8, length=5):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 8, (size, length), generator=generator)
    labels = ids.clone()
    for row in range(size):
        labels[row, : 1 + row % 4] = -100
    return [{"input_ids": ids[i], "labels": labels[i]} for i in range(size)]


def arguments(folder, **changes):
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 1}
    return TrainingArguments(str(folder), **{**settings, **changes})


def trainer(folder, student, *, distill=None, data=None, **changes):
    distill = {"teacher_model": TinyLM(1), "temperature": 2.0, **(distill or {})}
    data = rows() if data is None else data
    args = arguments(folder, **changes)
    options = {"train_dataset": data, "eval_dataset": data, "data_collator": default_data_collator}
    return KDTrainer(model=student, args=args, distill_args=distill, **options)


def kd_by_hand(student, teacher, batch, temperature=2.0):
    """The mean over next tokens with a label, times T²."""
    with torch.no_grad():
        log_q = (student(batch["input_ids"]).logits / temperature).log_softmax(-1)
        p = (teacher(batch["input_ids"]).logits / temperature).softmax(-1)
    each = (p * (p.log() - log_q)).sum(-1)[:, :-1] * temperature**2
    known = batch["labels"][:, 1:] != -100
    return each[known].mean().item()


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_the_loss_is_of_next_tokens_and_a_share_of_the_labels(tmp_path, share):
    student, batch = TinyLM(0), default_data_collator(rows())
    made = trainer(tmp_path, student, distill={"kd_loss_weight": share})
    kd, ce = kd_by_hand(student, made.distiller.teacher.module, batch), student(**batch).loss.item()
    student.train()
    assert made.compute_loss(student, batch).item() == pytest.approx(share * kd + (1 - share) * ce, abs=1e-6)


def test_evaluation_reports_both_losses(tmp_path):
    student, batch = TinyLM(0), default_data_collator(rows())
    made = trainer(tmp_path, student, per_device_eval_batch_size=8)
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        kd_by_hand(student, made.distiller.teacher.module, batch), abs=1e-6
    )
    assert metrics["eval_ce_loss"] == pytest.approx(student(**batch).loss.item(), abs=1e-6)


def test_accumulation_changes_nothing(tmp_path):
    """Theirs multiplies the update by the number of micro-batches."""
    found = []
    for size in (8, 4, 2):
        student = TinyLM(0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        made = trainer(
            tmp_path, student, max_steps=2, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **options
        )
        made.train()
        found.append(student.lm_head.weight.detach().clone())
    assert (found[0] - TinyLM(0).lm_head.weight).abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)


def test_reverse_kl(tmp_path):
    student, batch = TinyLM(0), default_data_collator(rows())
    made = trainer(tmp_path, student, distill={"liger_jsd_beta": 1.0, "temperature": 1.0})
    expected = kd_by_hand(made.distiller.teacher.module, student, batch, 1.0)
    assert made.compute_loss(student, batch).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("distill", "kind", "message"),
    [
        ({"kd_loss_weight": 0.0}, ValueError, "kd_loss_weight"),
        ({"kd_loss_weight": 1.5}, ValueError, "kd_loss_weight"),
        ({"criterion": "logit_loss"}, ValueError, "did you mean 'logits_loss'"),
        ({"teacher_model": None}, ValueError, "teacher_model"),
        ({"temprature": 2.0}, TypeError, "did you mean 'temperature'"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, distill, kind, message):
    with pytest.raises(kind, match=message):
        trainer(tmp_path, TinyLM(0), distill=distill)


def test_arguments_of_the_command_line():
    found = HfArgumentParser(DistillArguments).parse_args_into_dataclasses(["--distill", "--temperature", "3"])[0]
    assert (found.distill, found.temperature, found.criterion) == (True, 3.0, "logits_loss")
    with pytest.raises(ValueError, match="distill_args"):
        KDTrainer(model=TinyLM(0))


def test_a_converted_model_as_in_older_scripts(tmp_path):
    student, teacher, batch = TinyLM(0), TinyLM(1), default_data_collator(rows())
    config = {"teacher_model": teacher, "criterion": LMLogitsLoss(temperature=2.0)}
    mtd.enable_huggingface_checkpointing()
    model = mtd.convert(student, mode=[("kd_loss", config)])
    made = KDTrainer(model, arguments(tmp_path), train_dataset=rows(), data_collator=default_data_collator)
    assert made.model is student
    assert made.compute_loss(student, batch).item() == pytest.approx(kd_by_hand(student, teacher, batch), abs=1e-6)
    other = mtd.convert(student, mode=[("kd_loss", {**config, "criterion": nn.MSELoss()})])
    with pytest.raises(ValueError, match="one LogitsDistillationLoss"):
        KDTrainer(other, arguments(tmp_path))


# A converted model in a Trainer of the user's own.


class OwnTrainer(Trainer):
    """As users of ModelOpt write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = self.accelerator.unwrap_model(model).compute_kd_loss(student_loss=outputs.loss)
        return (loss, outputs) if return_outputs else loss


def own(folder, **changes):
    batch = text_batch(16)
    data = [{**{key: value[i] for key, value in batch.items()}, "note": i} for i in range(16)]
    config = {
        "teacher_model": bert(width=24, seed=1),
        "criterion": mtd.LogitsDistillationLoss(),
        "loss_balancer": mtd.StaticLossBalancer([0.5]),
    }
    model = mtd.convert(bert(), mode=[("kd_loss", config)])
    args = arguments(
        folder,
        **{"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, **changes},
    )
    return OwnTrainer(model, args, train_dataset=data, eval_dataset=data)


@pytest.mark.filterwarnings("ignore:the weights do not sum to 1:UserWarning")
def test_a_converted_model_in_a_trainer_of_ones_own(tmp_path):
    """Columns, checkpoints, resuming, evaluation and the saved folder are those of the student."""
    whole = own(tmp_path)
    whole.train()
    assert whole.evaluate()["eval_loss"] > 0
    resumed = own(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
    whole.save_model(str(tmp_path / "final"))
    again = type(whole.model.student).from_pretrained(tmp_path / "final")
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


class NamedTrainer(KDTrainer):
    """As trl's SFTTrainer does, it reads the outputs by attribute, of training and of evaluations."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.widths.append((model.training, outputs.logits.shape[-1]))
        return (loss, outputs) if return_outputs else loss


def test_outputs_have_names(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    distill = {"teacher_model": TinyLM(1)}
    options = {"train_dataset": rows(), "eval_dataset": rows(), "data_collator": default_data_collator}
    made = NamedTrainer(model=TinyLM(0), args=args, distill_args=distill, **options)
    made.widths = []
    made.train()
    predictions = made.predict(rows()).predictions
    assert made.widths == [(True, 8), (False, 8)]
    assert predictions.shape == (8, 5, 8)
