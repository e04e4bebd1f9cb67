"""The best student of a transformers Trainer is what a training ends with."""

import pytest
import torch
from torch import nn

from limbeck.train.best import BestWeights
from limbeck.train.hf import DistillationTrainer
from limbeck.train.hf_best import KeepBest
from tests.hf_cases import arguments, classes, padded


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("by_judge", [True, False])
def test_the_best_epoch_is_what_stays(tmp_path, by_judge):
    student, teacher, data, _ = classes()
    scores, seen = iter([0.5, 0.9, 0.9, 0.7]), []

    def score(_):
        seen.append(weights(student))
        return next(scores)

    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=-1, num_train_epochs=4, eval_strategy="no" if by_judge else "epoch"),
        data_collator=padded,
        train_dataset=data,
        eval_dataset=data,
        teacher=teacher,
        callbacks=[KeepBest(student, **{"judge" if by_judge else "score": score})],
    )
    trainer.train()
    assert len(seen) == 4
    assert equal(weights(student), seen[1])
    assert not equal(seen[1], seen[2])


def test_a_judge_sees_the_student_in_eval_mode_and_leaves_it_as_it_was():
    student = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5).eval()).train(mode=True)
    student[1].eval()
    modes = []
    callback = KeepBest(student, judge=lambda module: modes.append(module.training) or 1.0)
    callback.on_epoch_end(None, None, None)
    assert modes == [False]
    assert [part.training for part in student.modules()] == [True, True, False]


def test_a_score_that_is_none_keeps_nothing():
    module = nn.Linear(2, 2)
    best, before = BestWeights(module), weights(module)
    assert not best.offer(float("nan"))
    best.restore()
    assert equal(weights(module), before)


def test_kept_weights_are_no_view():
    module = nn.Linear(2, 2)
    best, before = BestWeights(module), weights(module)
    assert best.offer(1.0)
    nn.init.zeros_(module.weight)
    best.restore()
    assert equal(weights(module), before)


@pytest.mark.parametrize("options", [{}, {"score": min, "judge": min}])
def test_one_way_to_score(options):
    with pytest.raises(ValueError, match="pass one of them"):
        KeepBest(nn.Linear(1, 1), **options)


def test_several_metrics_count_by_their_weights():
    module = nn.Linear(1, 1)
    callback = KeepBest(module, {"eval_f1": 0.25, "eval_loss": -0.5})
    for f1, loss, expected in ((0.8, 1.0, -0.3), (0.4, 0.2, 0.0), (1.0, 0.6, 0.0)):
        callback.on_evaluate(None, None, None, metrics={"eval_f1": f1, "eval_loss": loss, "more": 9.0})
        assert callback.best.score == pytest.approx(expected)
    callback.on_evaluate(None, None, None, metrics={"eval_f1": 9.0})  # of other data
    assert callback.best.score == pytest.approx(0.0)
    callback.check({"eval_f1": 0.0, "eval_loss": 0.0})
    with pytest.raises(ValueError, match="evaluations have no metric 'eval_f1'; did you mean 'eval_f2'"):
        callback.check({"eval_f2": 0.0, "eval_loss": 0.0})
