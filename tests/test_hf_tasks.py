"""DistillationTrainer: each task against a loop by hand, however an update is cut."""

import copy

import pytest
import torch

from limbeck.train.hf import DistillationTrainer
from tests.hf_cases import TASKS, arguments, assert_same_weights, naive, padded


def trained(folder, student, data, *, collate=padded, evaluate=False, **options):
    args = {k: options.pop(k) for k in list(options) if k in ("per_device_train_batch_size", "max_steps")}
    args |= options.pop("args", {})
    trainer = DistillationTrainer(
        student,
        arguments(folder, **args),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data if evaluate else None,
        **options,
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_as_by_hand(tmp_path, task):
    student, teacher, data, loss_of = task()
    by_hand = copy.deepcopy(student)
    trainer = trained(tmp_path, student, data, teacher=copy.deepcopy(teacher))
    assert losses(trainer) == pytest.approx(naive(by_hand, teacher, data, loss_of), abs=2e-6)
    assert_same_weights(trainer.model, by_hand)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_every_task_trains_the_same_however_an_update_is_cut(tmp_path, task, parts):
    student, teacher, data, loss_of = task()
    by_hand = copy.deepcopy(student)
    cut = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    trainer = trained(tmp_path, student, data, teacher=copy.deepcopy(teacher), args=cut)
    assert losses(trainer) == pytest.approx(naive(by_hand, teacher, data, loss_of), abs=2e-6)
    assert_same_weights(trainer.model, by_hand)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_evaluated_by_the_student_alone(tmp_path, task):
    student, teacher, data, _ = task()
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = trained(tmp_path, student, data, teacher=teacher, evaluate=True, max_steps=1)
    before = len(calls)
    metrics, found = trainer.evaluate(), trainer.predict(data)
    assert len(calls) == before > 0
    batch = padded(data)
    with torch.no_grad():
        own = student.eval()(**batch)
    first = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    logits = own.logits if "logits" in own else own.start_logits
    torch.testing.assert_close(torch.tensor(first), logits, atol=1e-5, rtol=1e-4)
    named = trainer.label_names
    labels = found.label_ids if len(named) > 1 else (found.label_ids,)
    assert all((batch[name].numpy() == given).all() for name, given in zip(named, labels, strict=True))
    assert found.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
