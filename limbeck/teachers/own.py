"""The student as its own teacher: earlier places of a model learn from its later ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from limbeck.types import Batch, Signal


class Self:
    """Stands where a Distiller expects a teacher, and means: read the teacher's taps from the student.

    The Distiller reads them in the student's own pass and detaches them; this object is never run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from limbeck import Distiller
        >>> from limbeck.terms import self_distillation
        >>> student = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
        >>> terms = self_distillation([["0", "2"]], temperature=3.0)
        >>> out = Distiller(student, Self(), terms)(torch.ones(2, 4), torch.zeros(2))
        >>> sorted(out.terms)
        ['self.0']

    Reference:
        Zhang et al. 2019, Be Your Own Teacher, arXiv:1905.08094.
    """

    def offers(self, tap: str) -> bool:
        """Anything; the student's own taps are checked when they are resolved."""
        return True

    def names(self) -> Iterable[str]:
        """Nothing to suggest."""
        return ()

    def signal(self, batch: Batch, wants: Sequence[str]) -> Signal:
        """Never asked: the signal comes out of the student's pass."""
        raise AssertionError("the student's own signal comes out of its pass")
