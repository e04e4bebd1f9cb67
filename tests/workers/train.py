"""A small training in a process of its own, to be launched on several ranks or killed.

python train.py OUT.safetensors --ranks N [--folder DIR] [--accumulation N] [--dropout P] [--steps N]
    [--examples N] [--kill-at STEP] [--stop-at STEP] [--interrupt-at STEP RANK] [--best] [--cache DIR] [--stages]
"""

import argparse
import os
import signal
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForSequenceClassification

from limbeck import Callback, Distiller, Examples, Settings, Term, fit
from limbeck.cache import Store
from limbeck.stages import Stage
from limbeck.tasks.text import Padding
from limbeck.teachers import Cached, ModuleTeacher
from limbeck.train.checkpoint import save_weights

WORDS, CLASSES = 60, 3


def examples(count=37):
    """Texts of many lengths, so that every batch is padded and the last one is short."""
    generator = np.random.default_rng(3)
    items = []
    for i in range(count):
        tokens = generator.integers(5, WORDS, generator.integers(3, 17))
        mask = np.ones(len(tokens), dtype=np.int64)
        label = int(tokens[0]) % CLASSES
        items.append({"input_ids": tokens, "attention_mask": mask, "labels": label, "example_id": i})
    return Examples(items, Padding(0), [len(item["input_ids"]) for item in items])


def model(layers, hidden, dropout, seed):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


STAGES = [
    Stage(0.4, terms=["hidden"], trains=["bert.encoder.layer.0"]),
    Stage(0.7, terms=["kd", "cross_entropy"]),
    Stage(trains=["classifier.*"]),
]
"""A block alone; then all, and what did not train before; then the head alone, which some terms do not read."""


def distiller(dropout=0.0, cache=None, stages=()):
    terms = [
        Term("logits", loss="forward_kl", temperature=2.0, name="kd"),
        Term("bert.encoder.layer.0", "bert.encoder.layer.1", loss="mse", project="linear", name="hidden"),
        Term("labels", loss="cross_entropy", weight=0.5),
    ]
    teacher = model(2, 24, 0.0, seed=2)
    source = teacher if cache is None else Cached(ModuleTeacher(teacher), Store({}, cache))
    return Distiller(model(1, 16, dropout, seed=1), source, terms, stages=stages)


class StopAt(Callback):
    """Stops the training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            state.stop = "enough"


class TellCut(Callback):
    """Says whether this rank keeps only its share of the weights."""

    def on_start(self, state):
        if all(isinstance(p, DTensor) for p in state.distiller.parameters()):
            say("weights are cut")


class KillAt(Callback):
    """Ends the process without any warning after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def say(text):
    """Print on every rank, in one piece."""
    os.write(1, f"rank {os.environ.get('RANK', '0')}: {text}\n".encode())


def interrupt_at(trained, step, rank):
    """Press Ctrl-C on one rank in the middle of an update."""
    calls = [0]

    def count(*arguments):
        calls[0] += trained.training
        if calls[0] == step and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGINT)

    trained.register_forward_pre_hook(count)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--stop-at", type=int, default=0)
    parser.add_argument("--interrupt-at", type=int, nargs=2, default=None)
    parser.add_argument("--examples", type=int, default=37)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--gradients-every", type=int)
    parser.add_argument("--stages", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        batch_size=16,
        steps=arguments.steps,
        accumulation=arguments.accumulation,
        learning_rate=1e-2,
        warmup=2,
        checkpoint_every=3,
        evaluate_every=4,
        log_every=2,
        best=arguments.best,
        gradients_every=arguments.gradients_every,
    )
    trained = distiller(arguments.dropout, arguments.cache, STAGES if arguments.stages else ())
    callbacks = [TellCut(), *([KillAt(arguments.kill_at)] if arguments.kill_at else [])]
    callbacks += [StopAt(arguments.stop_at)] if arguments.stop_at else []
    if arguments.interrupt_at:
        interrupt_at(trained, *arguments.interrupt_at)
    data = examples(arguments.examples)
    try:
        result = fit(trained, data, data, settings, callbacks=callbacks, folder=arguments.folder)
    except KeyboardInterrupt as error:
        say(str(error))
        return
    assert Accelerator().num_processes == arguments.ranks
    assert type(trained.export()) is BertForSequenceClassification
    say(f"{result.stopped} after {result.steps}")
    if int(os.environ.get("RANK", "0")) == 0:
        save_weights(trained, arguments.out)


if __name__ == "__main__":
    main()
