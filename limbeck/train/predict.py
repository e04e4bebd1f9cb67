"""Predictions of a model over a data set; each rank makes all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from limbeck.batch import as_batch, to_device, view
from limbeck.metrics import Array
from limbeck.taps import Read, read_output
from limbeck.teachers import ModuleInputs
from limbeck.train.data import Examples, Indexed
from limbeck.types import LABELS, STUDENT, TASK, Batch


@dataclass(frozen=True)
class Predictions:
    """What a model says of each example, and what is true.

    Attributes:
        logits: (N, C).
        labels: (N,).
    """

    logits: Array
    labels: Array


def eval_batches(data: Any, batch_size: int) -> Iterator[Batch]:
    """Batches of a data set in order, of `Examples`, a loader, or anything with a length and an index.

    Raises:
        TypeError: none of these.
    """
    if isinstance(data, (Examples, Indexed)):
        examples = data if isinstance(data, Examples) else Examples(data)
        for start in range(0, len(examples), batch_size):
            yield examples.batch(range(start, min(start + batch_size, len(examples))))
        return
    if not isinstance(data, Iterable):
        raise TypeError(
            f"cannot predict on a {type(data).__name__}; pass a data set with a length and an index, "
            "a loader or limbeck.Examples"
        )
    for batch in data:
        yield as_batch(batch)


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 32,
    read: Read | None = None,
    device: torch.device | None = None,
    side: str = STUDENT,
    task: str | None = None,
    run: Callable[..., Any] | None = None,
) -> Predictions:
    """Run a model over a data set in eval mode.

    Args:
        model: The model; its training mode is restored afterwards.
        data: `Examples`, a DataLoader, or a data set with a length and an index.
        batch_size: Examples at a time, where `data` is not batched.
        read: Names the model's outputs where they have no names.
        device: Where the batches go; by default where the model is.
        side: Whose inputs the model is given, where a batch has some for ``"student"`` and ``"teacher"`` each.
        task: The task that the data belongs to, for a model that has several.
        run: What is called in the model's place, with what the model would be given.

    Returns:
        Logits and labels, float64 and the labels' own type, in the order of the data.

    Raises:
        ValueError: there are no examples, or they carry no labels.

    Example:
        >>> items = [{"input": torch.ones(2), "labels": torch.tensor(1)}] * 3
        >>> predict(nn.Linear(2, 4), items).logits.shape
        (3, 4)
    """
    call = ModuleInputs(model)
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for whole in eval_batches(data, batch_size):
        batch = view(whole, side)
        placed = to_device(batch, device)
        output = call(placed if task is None else {**placed, TASK: task}, run)
        logits.append(read_output(output, read)["logits"].float().cpu().numpy())
        if LABELS not in batch:
            raise ValueError(f"the evaluation data has no labels, only {sorted(batch)}")
        labels.append(batch[LABELS].cpu().numpy())
    model.train(was_training)
    if not logits:
        raise ValueError("the evaluation data is empty; check the split and the file")
    return Predictions(np.concatenate(logits).astype(np.float64), np.concatenate(labels))
