"""A teacher that follows the student: the running mean of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.taps import Read
from limbeck.teachers.module import ModuleTeacher, check_module
from limbeck.types import Batch, Signal

DECAY, BEHIND, WEIGHTS, BUFFERS = "decay", "behind", "weights", "buffers"

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""By their size in bytes."""


class Average:
    r"""The exponential moving average of the student's weights, as a teacher (mean teacher).

    .. math:: \bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta

    after each update of the student, whatever loop makes it: that one was made is seen from the parameters, when
    the teacher is asked next (one more reading of the weights, little beside a forward pass). Micro-batches of one
    update are one update, and one that a gradient scaler skips is none. Two updates without a question between
    them count as one. Loading weights into the student counts as an update; load them before.

    Running statistics and other buffers are the student's as of its last update. Half-precision weights are
    averaged in float32, where small changes do not get lost. `fit` keeps the mean in its checkpoints; it is in no
    state dict.

    Args:
        student: The student of the Distiller. The teacher is a copy of it.
        decay: :math:`\beta`, from 0 (the student after its last update) to 1 (the student as it is now).
        read: Names the model's outputs where they have no names.

    Attributes:
        student: The student.
        module: The mean, a frozen copy.

    Raises:
        TypeError: no module.
        ValueError: a decay outside of 0 to 1.

    Example:
        >>> student = nn.Linear(2, 1)
        >>> before = student.bias.item()
        >>> teacher = Average(student, decay=0.9)
        >>> with torch.no_grad():
        ...     _ = student.bias.add_(1.0)  # an update
        >>> _ = teacher.signal({"input": torch.zeros(1, 2)}, ["logits"])
        >>> round(teacher.module.bias.item() - before, 4)
        0.1

    Reference:
        Tarvainen and Valpola 2017, Mean teachers are better role models, arXiv:1703.01780.
    """

    def __init__(self, student: nn.Module, decay: float = 0.999, read: Read | None = None) -> None:
        check_module(student, "a student")
        if not (isinstance(decay, (int, float)) and 0 <= decay <= 1):
            raise ValueError(f"a decay is a share from 0 to 1, got {decay!r}; change it")
        self.student = student
        self.decay = decay
        self._teacher = ModuleTeacher(copy.deepcopy(student), read)
        self.module = self._teacher.module
        # Of half-precision weights the mean itself, which the module holds rounded.
        self._exact = {n: p.float() for n, p in self.module.named_parameters() if p.dtype.itemsize < 4}
        self._seen = _marks(student)

    def offers(self, tap: str) -> bool:
        """Whether the student has this tap."""
        return self._teacher.offers(tap)

    def names(self) -> Iterable[str]:
        """The student's paths and the known output names."""
        return self._teacher.names()

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Take in the student's last update, if there was one, and run the mean on the batch."""
        self.follow()
        return self._teacher.signal(batch, wants)

    @torch.no_grad()
    def follow(self) -> None:
        """Take in the student's last update, if there was one.

        Raises:
            ValueError: the student has other weights than when this was made.
        """
        marks = _marks(self.student)
        if marks == self._seen:
            return
        theirs, means = dict(self.student.named_parameters()), dict(self.module.named_parameters())
        if theirs.keys() != means.keys():
            changed = sorted(theirs.keys() ^ means.keys())[0]
            raise ValueError(
                f"the student has changed since its average was made ({changed!r}); make the Average after that"
            )
        for name, mean in means.items():
            exact = self._exact.get(name, mean)
            exact.lerp_(theirs[name].to(exact), 1 - self.decay)
            if exact is not mean:
                mean.copy_(exact)
        self._put(dict(self.module.named_buffers()), dict(self.student.named_buffers()))
        self._seen = marks

    def state(self) -> dict[str, Any]:
        """The mean as it is, and whether it lags behind the student by an update.

        That update is not taken in here: with several ranks the buffers are still to be made the same.
        """
        weights = {name: self._exact.get(name, mean) for name, mean in self.module.named_parameters()}
        behind = _marks(self.student) != self._seen
        buffers = dict(self.module.named_buffers())
        return {DECAY: self.decay, BEHIND: behind, WEIGHTS: weights, BUFFERS: buffers}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, with the student as it was then.

        Raises:
            ValueError: it was made with another decay.
        """
        if state[DECAY] != self.decay:
            raise ValueError(
                f"the teacher's average was made with decay {state[DECAY]:g} and goes on with {self.decay:g}; "
                "take that one, or begin in another folder"
            )
        self._put(self._exact, {name: state[WEIGHTS][name] for name in self._exact})
        self._put(dict(self.module.named_parameters()), state[WEIGHTS])
        self._put(dict(self.module.named_buffers()), state[BUFFERS])
        self._seen = [] if state[BEHIND] else _marks(self.student)

    def _put(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def _marks(module: nn.Module) -> list[int]:
    """Numbers that differ once the weights were updated.

    PyTorch counts changes in place, but not those by its fused optimizers; these show in the weights' bits.
    """
    parameters = list(module.parameters())
    bits = [_sum_of_bits(parameter.detach().reshape(-1)) for parameter in parameters]
    here = [total.to(bits[0].device) for total in bits]
    return [*(parameter._version for parameter in parameters), *(torch.stack(here).tolist() if here else ())]


def _sum_of_bits(flat: Tensor) -> Tensor:
    """The sum of a vector's bytes, read as whole numbers; eight at a time where PyTorch can, which is faster."""
    size = flat.element_size()
    together = max(1, 8 // size)
    if flat.storage_offset() % together:
        return flat.view(INTEGERS[size]).sum()
    end = len(flat) - len(flat) % together
    return flat[:end].view(torch.int64).sum() + flat[end:].view(INTEGERS[size]).sum()
