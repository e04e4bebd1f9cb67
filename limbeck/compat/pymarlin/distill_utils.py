"""PyMarlin's ``distill_utils``: layers taken from a teacher, and its losses of logits and of representations.

They are for train steps of a script's own; `DistillRecipe` trains by terms, which know of padding and of widths.

Shape legend: B examples, L positions, D features, H heads, C classes, k chosen layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.losses.features import unit_vectors
from limbeck.losses.logits import forward_kl
from limbeck.students import take_layers

Layers = Tensor | Sequence[Tensor]


def extract_layers(oldModuleList: nn.ModuleList, layer_ids: Sequence[int]) -> nn.ModuleList:
    """Copies of some layers, in the order given; negative ones count from the end.

    Args:
        oldModuleList: The teacher's layers, such as ``model.bert.encoder.layer``. It stays as it is.
        layer_ids: Which to take, counted from 0.

    Raises:
        ValueError: a layer that is not there, or that stands twice.

    Example:
        >>> layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
        >>> student = extract_layers(layers, [0, 6, 11])
        >>> len(student), torch.equal(student[1].weight, layers[6].weight)
        (3, True)
    """
    return take_layers(oldModuleList, layer_ids, path="")


def logits_loss(
    student_inputs: Tensor,
    teacher_inputs: Tensor,
    temperature: float = 1,
    reduction: Literal["batchmean", "mean", "sum"] = "batchmean",
    scale_loss_by_temp: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher to the student at a temperature, a scalar.

    .. math:: \frac{1}{N} \sum_n \sum_c p_{nc} (\log p_{nc} - \log q_{nc})

    over the N examples or, of token logits, the N tokens.

    Args:
        student_inputs: Logits (B, C) or (B, L, C).
        teacher_inputs: Logits of the same shape.
        temperature: Softens both distributions.
        reduction: ``"batchmean"``: the mean over positions, as above; ``"mean"`` divides it by C, as PyTorch's
            loss of this reduction does; ``"sum"``.
        scale_loss_by_temp: Multiply by the temperature squared, so that gradients keep their size.

    Raises:
        ValueError: shapes that differ, another reduction, a temperature that is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> logits_loss(student, teacher).item(), logits_loss(student, teacher, temperature=2.0).item()
        (0.327..., 0.110...)
    """
    values = forward_kl(student_inputs, teacher_inputs, temperature=temperature)
    losses = {"batchmean": values.mean(), "mean": values.mean() / student_inputs.shape[-1], "sum": values.sum()}
    if reduction not in losses:
        raise ValueError(f"unknown reduction {reduction!r}; known: batchmean, mean, sum")
    return losses[reduction] if scale_loss_by_temp else losses[reduction] / temperature**2


def representations_loss(
    student_inputs: Layers,
    teacher_inputs: Layers,
    student_layer_ids: Sequence[int],
    teacher_layer_ids: Sequence[int],
    loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    normalize: bool = True,
    scale_loss_by_rep: bool = True,
) -> Tensor:
    r"""Squared distance of unit vectors, over some layers of both models, a scalar.

    .. math:: \frac{1}{k N} \sum_{l n} \Big\lVert \frac{s_{ln}}{\lVert s_{ln} \rVert}
        - \frac{t_{ln}}{\lVert t_{ln} \rVert} \Big\rVert^2

    over the N positions of hidden states, or the N heads of attention, whose vectors are whole patterns.

    Args:
        student_inputs: ``hidden_states`` or ``attentions`` as a transformers model returns them, which means that
            the embeddings stand before the hidden states of the first layer. A label loss, (), is returned as it
            is, since a student has nothing to learn from the teacher's own.
        teacher_inputs: The same of the teacher.
        student_layer_ids: Which layers of the student are compared, counted from 0; layer i is the output of the
            i-th layer, both of hidden states and of attentions.
        teacher_layer_ids: The layers of the teacher that they are compared with, as many.
        loss_function: Compares (k * B, L or H, D) with the same of the teacher; by default the mean squared
            difference.
        reduction: Of the default loss: ``"mean"`` over all numbers, or their ``"sum"``.
        normalize: Divide each vector by its length.
        scale_loss_by_rep: Multiply by D, which makes of the mean over all numbers a mean over vectors.

    Raises:
        ValueError: layers that are not there, or widths that differ.

    Example:
        >>> states = tuple(torch.eye(3)[None] for _ in range(4))
        >>> representations_loss(states, tuple(2 * s for s in states), [0], [2]).item()
        0.0
    """
    if isinstance(student_inputs, Tensor) and student_inputs.ndim == 0:
        return student_inputs
    if len(student_layer_ids) != len(teacher_layer_ids):
        counts = f"{len(student_layer_ids)} layers of the student and {len(teacher_layer_ids)} of the teacher"
        raise ValueError(f"{counts} cannot be compared one by one; name as many of both")
    student = _vectors(student_inputs, student_layer_ids)
    teacher = _vectors(teacher_inputs, teacher_layer_ids).detach()
    size, wanted = student.shape[-1], teacher.shape[-1]
    if size != wanted:
        raise ValueError(
            f"the student's states have {size} numbers and the teacher's {wanted}; use DistillRecipe, which "
            "trains a projection"
        )
    loss_function = loss_function or nn.MSELoss(reduction=reduction)
    loss = loss_function(*map(unit_vectors, (student, teacher))) if normalize else loss_function(student, teacher)
    return loss * size if scale_loss_by_rep else loss


def _vectors(layers: Layers, layer_ids: Sequence[int]) -> Tensor:
    """Some layers behind one another: states (k * B, L, D), attention (k * B, H, L * L)."""
    given = [layers] if isinstance(layers, Tensor) else list(layers)
    if not given:
        raise ValueError("the model gave no layers; of attentions, load it with attn_implementation='eager'")
    own = given[1:] if given[0].ndim == 3 and len(given) > 1 else given  # the embeddings are no layer
    for i in layer_ids:
        if not -len(own) <= i < len(own):
            raise ValueError(
                f"there is no layer {i} among {len(own)}, counted from 0; ask the model for all of them"
            )
    return torch.cat([own[i] for i in layer_ids]).flatten(2)
