"""Does an exported model say what the PyTorch model says? On real inputs, before anybody serves it.

Shape legend: N examples, C classes.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from limbeck.deploy.manifest import Parity
from limbeck.metrics import Array, get_metric
from limbeck.train import Examples, predict

TOLERANCE = 1e-4
"""By how much fp32 logits may differ."""

ALLOWANCE = 0.01
"""What int8 may cost: points of the score, or where there are no labels, of agreement."""

ALONE, BATCH = 16, 16
"""How many examples go in one by one, and how many go together after that: two shapes at least are tried."""


def first(examples: Examples, count: int) -> Examples:
    """The first examples, all where there are fewer.

    Example:
        >>> len(first(Examples([1, 2, 3]), 2)), len(first(Examples([1, 2, 3]), 9))
        (2, 3)
    """
    kept = range(min(count, len(examples)))
    lengths = None if examples.lengths is None else [examples.lengths[i] for i in kept]
    return Examples([examples.items[i] for i in kept], examples.collate, lengths)


def greatest_difference(model: nn.Module, exported: nn.Module, examples: Examples) -> float:
    """The greatest difference between the logits of two models; infinite where one has a value that is none.

    Args:
        model: The PyTorch model.
        exported: What came of it.
        examples: On which they are compared, alone and in padded batches.

    Example:
        >>> import torch
        >>> data = Examples([{"input": torch.zeros(2), "labels": torch.tensor(0)}] * 3)
        >>> model = nn.Linear(2, 2)
        >>> greatest_difference(model, model, data)
        0.0
    """
    worst = 0.0
    for part, size in ((first(examples, ALONE), 1), (examples, BATCH)):
        ours, theirs = (predict(each, part, batch_size=size).logits for each in (model, exported))
        if ours.shape != theirs.shape or not np.isfinite(theirs).all():
            return float("inf")
        worst = max(worst, float(np.abs(ours - theirs).max()))
    return worst


def check_close(difference: float, what: str, tolerance: float = TOLERANCE) -> None:
    """Refuse an exported model that says something else.

    Raises:
        ValueError: the difference is beyond the tolerance.
    """
    if not difference <= tolerance:
        raise ValueError(
            f"{what} differs from PyTorch by {difference:.2g} in a logit, more than {tolerance:g}; nothing was "
            "exported. Another --opset may help; else this model cannot be exported faithfully"
        )


def compared(
    model: nn.Module, exported: nn.Module, examples: Examples, inputs: str, metric: str | None, difference: float
) -> Parity:
    """Compare the decisions of two models, and their scores where the examples have labels.

    Args:
        model: The PyTorch model.
        exported: What came of it.
        examples: On which they are compared.
        inputs: What the examples are, in words.
        metric: The metric of their labels; None where they have none.
        difference: The greatest between their logits.
    """
    ours, theirs = (predict(each, examples, batch_size=BATCH) for each in (model, exported))
    judge = None if metric is None else get_metric(metric)
    return Parity(
        examples=len(examples),
        inputs=inputs,
        greatest_difference=difference,
        agreement=alike(ours.logits, theirs.logits),
        metric=metric,
        score_before=None if judge is None else judge(ours.logits, ours.labels),
        score_after=None if judge is None else judge(theirs.logits, theirs.labels),
    )


def alike(ours: Array, theirs: Array) -> float:
    """How often two models decide alike, of logits (N, C); for numbers (N, 1), how they correlate.

    Example:
        >>> alike(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [0.0, 1.0]]))
        0.5
    """
    if ours.shape[1] == 1:
        return get_metric("pearson")(theirs, ours.reshape(-1))
    return float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1)))


def check_kept(parity: Parity, allowance: float = ALLOWANCE) -> None:
    """Refuse an int8 model that lost too much.

    Raises:
        ValueError: its score is worse by more than the allowance; without labels, it decides otherwise on more
            than this share.

    Example:
        >>> check_kept(Parity(100, "texts", 0.1, agreement=0.98))
        Traceback (most recent call last):
        ValueError: the int8 model agrees with PyTorch on 98.0% of the texts, which is less than 99.0%; ...
    """
    cure = "; nothing was exported. Allow more with --allowance, or leave --int8 out"
    if parity.metric is None or parity.score_before is None or parity.score_after is None:
        if not parity.agreement >= 1 - allowance:
            raise ValueError(
                f"the int8 model agrees with PyTorch on {parity.agreement:.1%} of the {parity.inputs}, which is "
                f"less than {1 - allowance:.1%}{cure}"
            )
        return
    sign = 1 if get_metric(parity.metric).higher_is_better else -1
    lost = sign * (parity.score_before - parity.score_after)
    if not lost <= allowance + 1e-12:
        raise ValueError(
            f"the int8 model's {parity.metric} is {parity.score_after:.4f} and PyTorch's is "
            f"{parity.score_before:.4f}, which is worse by more than {allowance:g}{cure}"
        )
