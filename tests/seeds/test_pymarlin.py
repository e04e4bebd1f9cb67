"""PyMarlin's page on distillation: both of its blocks, as they stand, inside the smallest complete script."""

import copy
import os
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from limbeck.compat.pymarlin import (
    DefaultCheckpointerArguments,
    Recipe,
    SingleProcess,
    Trainer,
    TrainerArguments,
    distill_utils,
)
from tests import tiny
from tests.models import text_batch

SEED = (Path(__file__).parent / "pymarlin.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", SEED, flags=re.DOTALL)]


class Texts:
    """A data module with a few encoded texts."""

    def get_train_dataset(self):
        batch = text_batch(size=12)
        return [{k: v[i] for k, v in batch.items()} for i in range(12)]

    get_val_dataset = get_train_dataset


def seed_recipe():
    """The methods of the page's blocks, in a subclass of Recipe."""
    names = {
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "copy": copy,
        "distill_utils": distill_utils,
        "os": os,
        "torch": torch,
    }
    methods = {}
    for block in BLOCKS:
        exec(compile(block, "pymarlin.md", "exec"), names, methods)

    class DistillRecipe(Recipe):
        def __init__(self, args, distill_args, datamodule):
            super().__init__(args, datamodule)
            self.distill_args = distill_args
            self.loss_types = distill_args.loss_types
            self.loss_weights = distill_args.loss_weights
            self.student_layers = distill_args.student_layers

        setup_models = methods["setup_models"]
        train_step = methods["train_step"]

        def on_end_train(self, global_step):
            self.save_model(self.args.output_dir)

    return DistillRecipe


def teacher_folder(folder):
    made = tiny.config(num_hidden_layers=4, vocab_size=40, num_labels=3, initializer_range=0.3)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    return folder


def test_the_page_has_two_blocks():
    assert len(BLOCKS) == 2
    assert "def setup_models(self)" in BLOCKS[0]
    assert "def train_step(self, global_step, batch, device)" in BLOCKS[1]


@pytest.mark.parametrize(
    "loss_types", [["logits"], ["labels"], ["hidden_states"], ["logits", "labels", "hidden_states", "attentions"]]
)
def test_the_page_distils(tmp_path, loss_types):
    folder = str(teacher_folder(tmp_path / "teacher"))
    model_args = SimpleNamespace(
        model_wts_path=folder,
        model_file="",
        model_config_path=folder,
        model_config_file="config.json",
        encoder_key="bert",
        num_labels=None,
    )
    args = SimpleNamespace(
        model_args=model_args, max_lr=1e-3, warmup_prop=0.1, output_dir=str(tmp_path / "student")
    )
    distill_args = SimpleNamespace(
        loss_types=loss_types,
        loss_weights=[1.0] * len(loss_types),
        student_layers=[0, 3],
        temperature=2.0,
        width_shrinkage=0,
    )
    recipe = seed_recipe()(args, distill_args, Texts())
    student, teacher = recipe.setup_models()
    assert student is recipe.model
    assert teacher is recipe.teacher
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    first = student.bert.encoder.layer[0].output.dense.weight.clone()
    trainer = Trainer(
        recipe,
        TrainerArguments(
            epochs=2,
            train_batch_size=4,
            val_batch_size=4,
            writers=[],
            checkpointer_args=DefaultCheckpointerArguments(
                save_dir=str(tmp_path / "checkpoints"), model_state_save_dir=None
            ),
        ),
        trainer_backend=SingleProcess(),
    )
    trainer.train()
    assert trainer.global_steps_finished == 6
    assert not torch.equal(first, student.bert.encoder.layer[0].output.dense.weight)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert saved.config.num_hidden_layers == 2
    assert all(torch.equal(p, saved.state_dict()[name]) for name, p in student.state_dict().items())
