"""Trainings with transformers' Trainer on several ranks: python hf.py FOLDER. Each one's weights go to a file."""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from limbeck import Term
from limbeck.train.checkpoint import save_weights
from limbeck.train.hf import DistillationTrainer
from tests.hf_cases import arguments, padded, tokens

TERMS = [
    Term("logits", loss="forward_kl", temperature=2.0, name="kd"),
    Term("bert.encoder.layer.0", "bert.encoder.layer.1", loss="mse", project="linear", name="hidden"),
    Term("labels", loss="cross_entropy", name="labels"),
]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def trained(folder, size, parts=1, stop=None, resume=False, **changes):
    """Token labels of different lengths, 8 examples in each update."""
    student, teacher, data, _ = tokens()
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 5}
    made = DistillationTrainer(
        student,
        arguments(folder, **cut, **changes),
        padded,
        data,
        data[:7],
        teacher=teacher,
        terms=TERMS,
        balance="matched_scale",
        callbacks=[StopAt(stop)] if stop else [],
    )
    made.train(resume_from_checkpoint=resume)
    return made


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo"}
    made = {
        "whole": trained(folder / "whole", 4, ddp_backend="gloo"),
        "cut": trained(folder / "cut", 2, 2, ddp_backend="gloo"),
    }
    trained(folder / "resumed", 4, stop=2, **saving)
    made["resumed"] = trained(folder / "resumed", 4, resume=True, **saving)
    assert made["whole"].args.world_size == 2
    found = made["whole"].predict(tokens()[2][:7])
    for name, trainer in made.items():
        if trainer.is_world_process_zero():
            save_weights(trainer.distiller, folder / f"{name}.safetensors")
            (folder / f"{name}.txt").write_text("\n".join(map(str, losses(trainer))))
    if made["whole"].is_world_process_zero():
        np.save(folder / "predictions.npy", found.predictions)


if __name__ == "__main__":
    main()
