"""A distillation through PyMarlin's names on one or more ranks; rank 0 writes the student's weights."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from limbeck.compat.pymarlin import (
    DefaultCheckpointerArguments,
    DistillationArguments,
    DistillRecipe,
    ModuleInterfaceArguments,
    Trainer,
    TrainerArguments,
)
from tests.models import bert, text_batch


class Texts:
    """Without padding: the mean over the tokens of each part of a batch is then that over all."""

    def get_train_dataset(self):
        batch = text_batch(size=12)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        return [{k: v[i] for k, v in batch.items()} for i in range(12)]

    get_val_dataset = get_train_dataset


class Ordered(DistillRecipe):
    """Every update sees the same examples, however many ranks share them."""

    seen = 0

    def get_train_dataloader(self, sampler, batch_size):
        data = self.datamodule.get_train_dataset()
        share = sampler(data, shuffle=False) if sampler is DistributedSampler else SequentialSampler(data)
        return DataLoader(data, batch_size, sampler=share)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.1)], []  # Adam would make much of rounding

    def on_end_val_epoch(self, global_step, *outputs, key="default"):
        self.seen = len(outputs[2])


def trained(folder, ranks):
    distill = DistillationArguments(
        student_layers=[0], loss_types=["logits", "hidden_states"], loss_weights=[1, 1]
    )
    student = bert(layers=1, width=8, seed=3)
    torch.manual_seed(1)
    recipe = Ordered(ModuleInterfaceArguments(), distill, Texts(), teacher=bert(layers=2), student=student)
    checkpoints = DefaultCheckpointerArguments(save_dir=str(folder), model_state_save_dir=None)
    args = TrainerArguments(
        epochs=2, train_batch_size=4, val_batch_size=4, writers=[], backend="ddp", checkpointer_args=checkpoints
    )
    trainer = Trainer(recipe, args)
    assert trainer.accelerator.num_processes == ranks
    trainer.train()
    assert recipe.seen == 12  # validation gathers every example once
    assert [p.name for p in Path(folder).iterdir()] == ["model"]
    return recipe


if __name__ == "__main__":
    state = trained(sys.argv[2], int(sys.argv[-1])).state_dict()
    if torch.distributed.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in state.items()}, sys.argv[1])
