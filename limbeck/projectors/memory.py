"""The memory of `limbeck.losses.contrastive.crd`.

Shape legend: N examples of the training data, B of a batch, D features, E features of an embedding, K negatives.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, distributed

from limbeck.projectors.base import PROJECTORS, Projector, Shapes, single
from limbeck.projectors.layers import Affine


@PROJECTORS.register_as("contrastive_memory")
class ContrastiveMemory(Projector):
    """Two banks of embeddings, the student's and the teacher's, a row for each training example.

    It has what `limbeck.losses.contrastive.Memory` asks for. Its own state is its banks and normalizers, buffers
    that are saved; with a `width` it also trains a linear embedding for each side. All ranks remember what any of
    them saw. What a batch meets depends on those before it, so micro-batches do not give the update of a whole.

    Args:
        examples: N; ids of examples are 0 to N - 1.
        negatives: K, how many others each example is told from; at most N - 1 are used.
        width: E, into so many features both sides are embedded. None for no embedding: the banks are then as wide
            as the features, and the teacher's view of the student's bank trains nothing.
        temperature: Divides the cosines.
        momentum: How much of a row is kept when its example is seen again, 0 to below 1.

    Example:
        >>> from torch import Size
        >>> memory = ContrastiveMemory(examples=5, negatives=2, width=4)
        >>> memory.size(Size([2, 3]), Size([2, 8]))
        >>> ours, theirs = memory.ratios(torch.ones(2, 3), torch.ones(2, 8), torch.tensor([0, 3]))
        >>> ours.shape, theirs.shape, memory.student_bank.shape
        (torch.Size([2, 3]), torch.Size([2, 3]), torch.Size([5, 4]))

    Reference:
        Tian et al. 2020, Contrastive Representation Distillation, arXiv:1910.10699.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    normalizers: Tensor

    def __init__(
        self,
        *,
        examples: int,
        negatives: int = 16384,
        width: int | None = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("examples", examples, 2),
            ("negatives", negatives, 1),
            ("width", 1 if width is None else width, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not temperature > 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"temperature must be positive and momentum from 0 to below 1, got {temperature} and {momentum}"
            )
        self.examples = examples
        self.negatives = min(negatives, examples - 1)
        self.width = width
        self.temperature = temperature
        self.momentum = momentum
        self.embed_student = None if width is None else Affine()
        self.embed_teacher = None if width is None else Affine()
        self.register_buffer("student_bank", torch.empty(0))
        self.register_buffer("teacher_bank", torch.empty(0))
        self.register_buffer("normalizers", torch.zeros(2))  # zero until the first batch

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Make embeddings and banks for features of these widths; rows begin at random, about one long.

        Raises:
            ValueError: the widths differ, and there is no embedding.
        """
        own, its = (shape[-1] for shape in single(student, teacher, "contrastive_memory"))
        if self.width is None and own != its:
            raise ValueError(f"the student has {own} features and the teacher {its}; give the memory a width")
        if self.width is not None and self.embed_student and self.embed_teacher:
            self.embed_student.size(own, self.width)
            self.embed_teacher.size(its, self.width)
        rows = (self.examples, self.width or own)
        self.shape(student_bank=rows, teacher_bank=rows)
        bound = math.sqrt(3 / rows[1])
        self.student_bank.uniform_(-bound, bound)
        self.teacher_bank.uniform_(-bound, bound)

    def ratios(self, student: Tensor, teacher: Tensor, example_id: Tensor) -> tuple[Tensor, Tensor]:
        """See `limbeck.losses.contrastive.Memory`."""
        self._check(example_id)
        ours = F.normalize(student if self.embed_student is None else self.embed_student(student), dim=-1)
        theirs = F.normalize(teacher if self.embed_teacher is None else self.embed_teacher(teacher), dim=-1)
        candidates = self.draw(example_id)
        likely = (
            (similarities(ours, self.teacher_bank, candidates) / self.temperature).exp(),
            (similarities(theirs, self.student_bank, candidates) / self.temperature).exp(),
        )
        normalizers = self._normalized(likely)
        if self.training:
            ids = everywhere(example_id)
            self._remember(self.student_bank, everywhere(ours.detach()), ids)
            self._remember(self.teacher_bank, everywhere(theirs.detach()), ids)
        return likely[0] / normalizers[0], likely[1] / normalizers[1]

    def draw(self, example_id: Tensor) -> Tensor:
        """Each example's own row and K others, (B, 1 + K); in eval mode others at equal steps, not drawn."""
        shape, others = (len(example_id), self.negatives), self.examples - 1
        if self.training:
            rows = torch.randint(others, shape, device=example_id.device)
        else:
            steps = torch.arange(self.negatives, device=example_id.device) * others // self.negatives
            rows = steps.expand(shape)
        own = example_id.view(-1, 1)
        return torch.cat([own, rows + (rows >= own)], dim=1)  # past the own row, which is no other

    def _check(self, example_id: Tensor) -> None:
        if not self.student_bank.numel():
            raise ValueError(
                "the memory has no size yet; call size with the widths of the student and the teacher"
            )
        if int(example_id.min()) < 0 or int(example_id.max()) >= self.examples:
            raise ValueError(
                f"example ids are from {int(example_id.min())} to {int(example_id.max())}, and the memory has "
                f"{self.examples} rows; set examples to the number of training examples"
            )

    def _normalized(self, likely: tuple[Tensor, Tensor]) -> Tensor:
        """The normalizers, from this batch where there are none yet; training fixes them."""
        fresh = torch.stack([self.examples * everywhere(values.detach()).mean() for values in likely])
        normalizers = torch.where(self.normalizers == 0, fresh.to(self.normalizers), self.normalizers)
        if self.training:
            self.normalizers.copy_(normalizers)
        return normalizers

    def _remember(self, bank: Tensor, new: Tensor, example_id: Tensor) -> None:
        mixed = self.momentum * bank[example_id] + (1 - self.momentum) * new.to(bank)
        bank[example_id] = F.normalize(mixed, dim=-1)


def similarities(rows: Tensor, bank: Tensor, candidates: Tensor) -> Tensor:
    """Dot products of each row (B, E) with its candidates (B, 1 + K) among the rows of a bank (N, E).

    The bank changes before the backward pass, so it has to be copied: all of it or the candidates, whichever is
    less.
    """
    if len(bank) < candidates.numel():
        return (rows @ bank.to(rows.dtype, copy=True).mT).gather(1, candidates)
    return torch.einsum("be,bke->bk", rows, bank[candidates].to(rows.dtype))


def everywhere(rows: Tensor) -> Tensor:
    """The rows (N, ...) of all ranks, one after the other; those of this process where it is alone."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows
    world = distributed.get_world_size()
    counts = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
