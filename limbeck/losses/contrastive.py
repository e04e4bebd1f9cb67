"""Losses in which the teacher's view of the same example is told from its views of others.

Shape legend: B examples, D features, K negatives of each example.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from limbeck.losses.base import full_precision, loss
from limbeck.losses.features import paired_features, unit_vectors


class Memory(Protocol):
    """What `crd` keeps from one batch to the next: a bank of embeddings for each side, a row for each example.

    It is a module, so that it is saved with the student and moved with it. In training mode every call ends with
    an update of the rows of the batch's examples in both banks, ``row = momentum · row + (1 - momentum) · new``,
    scaled to length one. In eval mode nothing is updated and no random number is drawn.
    """

    examples: int
    """The number of examples in the training data; their ids are 0 to `examples` - 1."""

    def ratios(self, student: Tensor, teacher: Tensor, example_id: Tensor) -> tuple[Tensor, Tensor]:
        """How much likelier each pair is than a pair by chance: ``exp(cosine / temperature) / normalizer``.

        Both sides are scaled to length one, after an embedding where the memory has any; those of the teacher's
        side are the only way in which the second of the results can train anything. The two normalizers are
        estimated from the first training batch, ``examples · mean(exp(cosine / temperature))``, and stay fixed.
        Rows of the banks are read as they are before the batch, and carry no gradient.

        Args:
            student: (B, D) in float32 or better.
            teacher: (B, D') in float32 or better, without gradient.
            example_id: (B,), which rows of the banks belong to these examples.

        Returns:
            The student against the teacher's bank and the teacher against the student's, each (B, 1 + K): the
            example itself first, then K others, the same ones in both, drawn from torch's random generator.

        Raises:
            ValueError: an id that is no row of the banks.
        """
        ...


@loss
def infonce(
    student: Tensor,
    teacher: Tensor,
    *,
    scale: float = 20.0,
    temperature: float | None = None,
    similarity: Literal["cosine", "dot"] = "cosine",
    symmetric: bool = False,
) -> Tensor:
    r"""Cross-entropy of finding the teacher's embedding of the same example among those of the batch.

    .. math:: -\log \frac{\exp(\gamma \cos(s_i, t_i))}{\sum_j \exp(\gamma \cos(s_i, t_j))}

    Args:
        student: Embeddings (B, D), already projected to the teacher's width.
        teacher: Embeddings (B, D) of the same examples.
        scale: γ, the factor of the similarities.
        temperature: The other way to write the scale, 1/γ; it takes its place where it is given.
        similarity: ``"cosine"``, or ``"dot"`` for the dot product.
        symmetric: Average with the cross-entropy of finding the student's embedding given the teacher's.

    Returns:
        One value in nats per example, (B,). Not zero at equality; a batch of one gives 0.

    Raises:
        ValueError: the shapes differ, or an option has no meaning.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> [round(value, 4) for value in infonce(student, teacher, scale=1.0).tolist()]
        [0.5574, 0.4008]

    Reference:
        van den Oord et al. 2018, Contrastive Predictive Coding, arXiv:1807.03748. With the default scale,
        MultipleNegativesRankingLoss of sentence-transformers; ``symmetric=True`` is the loss of CLIP.
    """
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"unknown similarity {similarity!r}; known: cosine, dot")
    name, value = ("scale", scale) if temperature is None else ("temperature", temperature)
    if not value > 0:
        raise ValueError(f"the {name} must be positive, got {value}")
    sides = paired_features(student, teacher)
    if student.ndim != 2:
        raise ValueError(f"infonce compares embeddings (batch, features), got {tuple(student.shape)}; pool first")
    rows, columns = (unit_vectors(side) for side in sides) if similarity == "cosine" else sides
    scores = rows @ columns.mT * (scale if temperature is None else 1 / temperature)
    found = -torch.log_softmax(scores, dim=1).diagonal()
    return (found - torch.log_softmax(scores, dim=0).diagonal()) / 2 if symmetric else found


def noise_contrast(ratios: Tensor, examples: int, eps: float = 1e-7) -> Tensor:
    r"""Cross-entropy of telling the first of 1 + K candidates from K that are drawn by chance.

    .. math:: -\log \frac{x_0}{x_0 + K/N + \varepsilon} - \sum_{k=1}^{K} \log \frac{K/N}{x_k + K/N + \varepsilon}

    Args:
        ratios: How likely each candidate is, (B, 1 + K), the true one first; positive.
        examples: N, among so many the others are drawn.
        eps: Is added to the denominators.

    Returns:
        One value in nats per example, (B,).

    Example:
        >>> noise_contrast(torch.tensor([[1.0, 1.0]]), examples=1, eps=0.0).item()
        1.386...
    """
    chance = (ratios.shape[1] - 1) / examples
    truth, others = ratios[:, 0], ratios[:, 1:]
    missed = (truth / (truth + chance + eps)).log()
    mistaken = (chance / (others + chance + eps)).log().sum(dim=-1)
    return -(missed + mistaken)


@loss(learns={"memory": "contrastive_memory"})
def crd(student: Tensor, teacher: Tensor, *, example_id: Tensor, memory: Memory, eps: float = 1e-7) -> Tensor:
    r"""Contrastive representation distillation: both sides tell an example from many others, in each other's bank.

    .. math:: \mathrm{NCE}\big(e^{s \cdot T / \tau} / Z_s\big) + \mathrm{NCE}\big(e^{t \cdot S / \tau} / Z_t\big),
        \quad \mathrm{NCE}(x) = -\log \frac{x_0}{x_0 + K/N + \varepsilon}
        - \sum_{k=1}^{K} \log \frac{K/N}{x_k + K/N + \varepsilon}

    S and T are rows of the banks, x_0 belongs to the example itself and x_1 to x_K to others.

    Args:
        student: Features (B, D); the memory embeds them.
        teacher: Features (B, D') of the same examples.
        example_id: (B,), numbers from 0 to the number of training examples N less one.
        memory: The banks, see `Memory`; `limbeck.projectors.memory.ContrastiveMemory` is one.
        eps: Is added to the denominators.

    Returns:
        One value in nats per example, (B,). Not zero at equality.

    Raises:
        ValueError: shapes that do not fit, or an id that is not in the memory.

    Example:
        >>> from limbeck.projectors.memory import ContrastiveMemory
        >>> memory = ContrastiveMemory(examples=10, negatives=4, width=None).eval()
        >>> memory.size(torch.Size([2, 2]), torch.Size([2, 2]))
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> crd(embeddings, embeddings, example_id=torch.tensor([0, 1]), memory=memory).shape
        torch.Size([2])

    Reference:
        Tian et al. 2020, Contrastive Representation Distillation, arXiv:1910.10699; weight 0.8 in the authors'
        code, which draws the others from other classes.
    """
    if student.ndim != 2 or teacher.ndim != 2 or not len(student) == len(teacher) == example_id.numel():
        raise ValueError(
            f"crd compares features (batch, features) with one id each, got student {tuple(student.shape)}, "
            f"teacher {tuple(teacher.shape)} and ids {tuple(example_id.shape)}; tap one vector for each example"
        )
    sides = memory.ratios(full_precision(student), full_precision(teacher.detach()), example_id)
    ours, theirs = (noise_contrast(ratios, memory.examples, eps) for ratios in sides)
    return ours + theirs
