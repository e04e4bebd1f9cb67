"""PyMarlin's ``distill_utils``: layers taken from a teacher, and its losses of logits and of representations.

Shape legend: B examples, L positions, D features, H heads, C classes, k chosen layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.losses.attention import pairs_of
from limbeck.losses.features import mse, normalized_mse, unit_vectors
from limbeck.losses.logits import forward_kl
from limbeck.reduce import masked_mean, reduce
from limbeck.students import take_layers

Layers = Tensor | Sequence[Tensor]
Reduction = Literal["batchmean", "mean", "sum"]


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
    reduction: Reduction = "batchmean",
    scale_loss_by_temp: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence from the teacher to the student at a temperature, a scalar.

    .. math:: \frac{1}{N} \sum_n \sum_c p_{nc} (\log p_{nc} - \log q_{nc})

    over the N examples or, of token logits, the N valid tokens.

    Args:
        student_inputs: Logits (B, C) or (B, L, C).
        teacher_inputs: Logits of the same shape.
        temperature: Softens both distributions.
        reduction: ``"batchmean"``: the mean over positions, as above; ``"mean"`` divides it by C, as PyTorch's
            loss of this reduction does; ``"sum"``.
        scale_loss_by_temp: Multiply by the temperature squared, so that gradients keep their size.
        mask: (B,) or (B, L), positions where it is 0 do not count.

    Raises:
        ValueError: shapes that differ, another reduction, a temperature that is not positive.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> logits_loss(student, teacher).item(), logits_loss(student, teacher, temperature=2.0).item()
        (0.327..., 0.110...)
    """
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; known: batchmean, mean, sum")
    values = forward_kl(student_inputs, teacher_inputs, temperature=temperature)
    loss = reduce(values, mask, "sum") if reduction == "sum" else masked_mean(values, mask)
    if reduction == "mean":
        loss = loss / student_inputs.shape[-1]
    return loss if scale_loss_by_temp else loss / temperature**2


def representations_loss(
    student_inputs: Layers,
    teacher_inputs: Layers,
    student_layer_ids: Sequence[int],
    teacher_layer_ids: Sequence[int],
    loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    normalize: bool = True,
    scale_loss_by_rep: bool = True,
    mask: Tensor | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
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
        mask: (B, L), the attention mask: positions where it is 0 do not count.
        projection: Brings the student's states to the teacher's width. It is yours to train.

    Raises:
        ValueError: layers that are not there, or widths that differ without a projection.

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
    student = prepare_inputs(student_inputs, student_layer_ids, normalize, mask, projection)
    teacher = prepare_inputs(teacher_inputs, teacher_layer_ids, normalize, mask).detach()
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student's states have {student.shape[-1]} numbers and the teacher's {teacher.shape[-1]}; pass "
            "projection=nn.Linear(...), with its weights in your optimizer, or use DistillRecipe, which trains one"
        )
    if loss_function is not None:
        loss = loss_function(student, teacher)
    else:
        loss = reduce(mse(student, teacher), _of_positions(mask, student_inputs, student), reduction)
        loss = loss * student.shape[-1] if reduction == "sum" else loss
    return loss * student.shape[-1] if scale_loss_by_rep else loss


def prepare_inputs(
    inputs: Layers,
    layer_ids: Sequence[int],
    do_normalize: bool = True,
    mask: Tensor | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Some layers as rows of vectors: states (k * B, L, D), attention (k * B, H, L * L).

    Args:
        inputs: See `representations_loss`.
        layer_ids: Which layers.
        do_normalize: Divide each vector by its length.
        mask: (B, L), tokens that count; of attention, pairs with another one become zero.
        projection: Applied to the states first.

    Example:
        >>> prepare_inputs([torch.ones(2, 4, 3, 3)], [0]).shape
        torch.Size([2, 4, 9])
    """
    layers = concat_layers(inputs, layer_ids)
    if layers.ndim == 4 and mask is not None:
        layers = _within_text(layers, mask.repeat(len(layers) // len(mask), 1))
    layers = layers if projection is None else projection(layers)
    vectors = layers.flatten(2)
    return unit_vectors(vectors) if do_normalize else vectors


def concat_layers(layers: Layers, layer_ids: Sequence[int]) -> Tensor:
    """Some layers of one model behind one another, (k * B, ...).

    Raises:
        ValueError: a layer that is not there, or none at all.

    Example:
        >>> states = tuple(torch.full((1, 2, 3), float(i)) for i in range(3))  # the embeddings, two layers
        >>> concat_layers(states, [1])[0, 0]
        tensor([2., 2., 2.])
    """
    given = [layers] if isinstance(layers, Tensor) else list(layers)
    if not given:
        raise ValueError("the model gave no layers; of attentions, load it with attn_implementation='eager'")
    before = 0 if given[0].ndim == 4 or isinstance(layers, Tensor) else 1  # the embeddings are no layer
    count = len(given) - before
    for i in layer_ids:
        if not -count <= i < count:
            raise ValueError(f"there is no layer {i} among {count}, counted from 0; ask the model for all of them")
    return torch.cat([given[before:][i] for i in layer_ids])


def layer_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """What `representations_loss` computes of one layer, as the loss of a `limbeck.Term`.

    Args:
        student: Hidden states (B, L, D), or attention (B, H, L, L).
        teacher: The same of the teacher; heads are averaged where their numbers differ.
        mask: (B, L), tokens that count.

    Returns:
        One value for each position (B, L) of hidden states, or for each example (B,) of attention.

    Example:
        >>> layer_distance(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]))
        tensor([[2.]])
    """
    if student.ndim != 4:
        return normalized_mse(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    if mask is not None:
        student, teacher = _within_text(student, mask), _within_text(teacher, mask)
    return normalized_mse(student.flatten(2), teacher.flatten(2)).mean(dim=1)


def _within_text(pattern: Tensor, mask: Tensor) -> Tensor:
    """An attention pattern (B, H, L, L) with zeros where a query or a key is padding."""
    return torch.where(pairs_of(mask != 0), pattern, torch.zeros_like(pattern))


def _of_positions(mask: Tensor | None, layers: Layers, vectors: Tensor) -> Tensor | None:
    """The mask of all chosen layers' positions; of attention none, whose padding is zero on both sides."""
    first = layers if isinstance(layers, Tensor) else layers[0]
    return None if mask is None or first.ndim == 4 else mask.repeat(len(vectors) // len(mask), 1)
