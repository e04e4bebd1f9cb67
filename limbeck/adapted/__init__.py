"""Distilling by adaptors: functions that name what a model returned, for odd models in loops of one's own.

A `limbeck.Distiller` reads models by taps, and feeds them by the names of a batch. Where batches are tuples,
outputs have no names, or one model is fed otherwise than the other, an adaptor ``(batch, outputs) -> entries``
says what is what, and `limbeck.train.plain.Loop` trains:

    >>> import torch
    >>> from torch import nn
    >>> from limbeck.losses import evaluate
    >>> from limbeck.train.plain import Loop
    >>> class Layers(nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.body, self.head = nn.Linear(2, width), nn.Linear(width, 3)
    ...     def forward(self, inputs, labels):
    ...         hidden = self.body(inputs).tanh()
    ...         return [hidden], self.head(hidden)
    >>> def adaptor(batch, outputs):
    ...     return {"hidden": outputs[0], "logits": outputs[1], "labels": batch[1]}
    >>> def close(student, teacher, mask, teacher_mask):
    ...     return evaluate("mse", student, teacher, mask=mask)
    >>> torch.manual_seed(0) and None
    >>> student, teacher, width = Layers(2), Layers(4), nn.Linear(2, 4)
    >>> objective = AdaptedObjective(
    ...     weights={"logits": 1.0},
    ...     logits=lambda ours, theirs, labels: evaluate("forward_kl", ours, theirs, temperature=2.0),
    ...     matches=[Match("hidden", 0, 0, close, weight=0.5, project=width)],
    ... )
    >>> def step(batch, state):
    ...     total, parts = objective(*read_both(batch, student, teacher, adaptor, adaptor))
    ...     return total
    >>> data, trained = [(torch.randn(8, 2), torch.randint(3, (8,)))] * 30, nn.ModuleList([student, width])
    >>> optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    >>> also_train(optimizer, [(width, {"lr": 0.1})])
    >>> first = step(data[0], None).item()
    >>> with teaching(student, teacher):
    ...     state = Loop(step, trained, data, optimizer, epochs=1).run()
    >>> step(data[0], None).item() < 0.5 * first
    True
"""

from limbeck.adapted.entries import (
    Entries,
    entries_of,
    mean_of_teachers,
    paired_logits,
    select_by_masks,
    total_of,
)
from limbeck.adapted.matches import AdaptedObjective, Match
from limbeck.adapted.models import Memory, also_train, call, each, outputs_of_both, read_both, teaching

__all__ = [
    "AdaptedObjective",
    "Entries",
    "Match",
    "Memory",
    "also_train",
    "call",
    "each",
    "entries_of",
    "mean_of_teachers",
    "outputs_of_both",
    "paired_logits",
    "read_both",
    "select_by_masks",
    "teaching",
    "total_of",
]
