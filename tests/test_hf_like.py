"""A distillation made of a Trainer that is there, and data that say what the teacher said."""

import copy

import pytest
import torch
import transformers
from torch.utils.data import IterableDataset

from limbeck import Term
from limbeck.teachers import Given
from limbeck.train.hf import DistillationTrainer
from limbeck.train.hf_data import GivenIn
from limbeck.train.hf_terms import END, START, read_spans
from tests.hf_cases import arguments, assert_same_weights, classes, padded, spans

KD = [Term("logits", loss="forward_kl")]


class Steps(transformers.TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **_):
        self.steps.append(state.global_step)


def test_a_trainer_like_another_trains_as_one_made_at_once(tmp_path):
    student, teacher, data, _ = classes()
    other, steps = copy.deepcopy(student), Steps()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    options = {"train_dataset": data, "eval_dataset": data, "data_collator": padded}
    optimizers = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    plain = transformers.Trainer(student, arguments(tmp_path), callbacks=[steps], optimizers=optimizers, **options)
    made = DistillationTrainer.like(plain, teacher=copy.deepcopy(teacher), terms=KD)
    made.args.max_steps = 2
    made.train()
    args = arguments(tmp_path, learning_rate=0.5, max_steps=2)
    whole = DistillationTrainer(other, args, teacher=teacher, terms=KD, **options)
    whole.train()
    assert_same_weights(student, other)
    assert (steps.steps, plain.args.max_steps) == ([1, 2], 3)  # its own arguments are as they were
    assert made.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"])
    with pytest.raises(TypeError, match="has no option 'term'; did you mean 'terms'"):
        DistillationTrainer.like(plain, term=KD)


def said(data, teacher, of):
    with torch.no_grad():
        return [{**e, "said": of(teacher.eval()(**padded([e]))).tolist()} for e in data]


@pytest.mark.parametrize("task", [classes, spans])
def test_what_the_teacher_said_stands_in_a_column(tmp_path, task):
    student, teacher, data, _ = task()
    other, options, terms = copy.deepcopy(student), {}, KD
    of = lambda out: out.logits[0]  # noqa: E731
    if task is spans:
        terms, options = [Term(tap, loss="forward_kl") for tap in (START, END)], {"teacher_read": read_spans}
        of = lambda out: torch.cat([out.start_logits, out.end_logits])  # noqa: E731
        data = [example for example in data if len(example["input_ids"]) == len(data[0]["input_ids"])]
    args = arguments(tmp_path, max_steps=2)
    given = GivenIn(said(data, teacher, of), "said")
    made = DistillationTrainer(
        student, args, train_dataset=given, data_collator=padded, teacher=Given(), terms=terms, **options
    )
    made.train()
    whole = DistillationTrainer(
        other, args, train_dataset=data, data_collator=padded, teacher=teacher, terms=terms
    )
    whole.train()
    assert_same_weights(student, other)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"said": [0.0]}])


def test_a_column_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="said are read from data with a length, not from a stream; load it"):
        GivenIn(Stream(), "said")
    with pytest.raises(
        ValueError, match="the first example has no 'teacher_logits'; write there what the teacher"
    ):
        GivenIn([{"said": [0.0]}])
