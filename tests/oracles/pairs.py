"""What is compared: a loss of ours, the same loss of another project, and inputs for both.

A pair is made by a function that imports the other project, so that a missing one costs its own cases alone. It
returns ``(ours, theirs)``, each a function of the student and the teacher that gives one number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from limbeck.losses import LOSSES, compare_by, traits_of
from limbeck.reduce import fitting, reduce
from tests.golden_cases import generate

PAIRS = []

SHAPES = {  # what a pair is tried on: closed-form inputs of these shapes
    "logits": [(6, 10), (16, 100), (5, 2)],
    "tokens": [(2, 5, 11), (3, 16, 40)],
    "vectors": [(6, 12), (24, 32), (9, 5)],
    "hidden": [(2, 5, 8), (4, 16, 24)],
    "hidden pairs": [(2, 2, 5, 8), (2, 4, 16, 24)],
    "maps": [(6, 8, 6, 6), (4, 16, 9, 9), (3, 4, 5, 7)],
    "map pairs": [(2, 6, 8, 6, 6), (2, 4, 16, 9, 9)],
    "attention": [(2, 3, 5, 5), (4, 6, 16, 16)],
    "scores": [(6, 2), (9, 5)],
}


@dataclass(frozen=True)
class Pair:
    """A comparison.

    Attributes:
        loss: The name of our loss.
        oracle: The other project, by its name as a package.
        kind: Which of `SHAPES` it is for.
        make: Returns both functions.
        tolerance: How far the two may differ, relative to the largest number.
        deviates: Why the other project's number is another one, where it is; then it has to stay another one.
        timed: Whether theirs computes what ours does, and no more, so that the two can be timed.
    """

    loss: str
    oracle: str
    kind: str
    make: Callable
    tolerance: float
    deviates: str
    timed: bool

    @property
    def name(self) -> str:
        """The loss, the project and what is compared."""
        return f"{self.loss}-{self.oracle}-{self.make.__name__}"


def pair(loss, oracle, kind, *, tolerance=1e-9, deviates="", timed=True):
    """Register a function that makes ``(ours, theirs)``."""

    def add(make):
        PAIRS.append(Pair(loss, oracle, kind, make, tolerance, deviates, timed and not deviates))
        return make

    return add


def ours(loss, transforms=(), **options):
    """Our loss as one number, made ready once, as in a Distiller; what it needs beside is given at each call."""
    traits = traits_of(LOSSES.get(loss))
    comparison = compare_by(loss, transforms=transforms, given=(*traits.learns, *traits.borrows), **options)

    def reduced(student, teacher, *, mask=None, **supplied):
        values = comparison(student, teacher, mask=mask, **supplied)
        return reduce(values, fitting(mask, values))

    return reduced


def labels_for(logits):
    """Class indices for (..., C)."""
    count = logits[..., 0].numel()
    return (torch.arange(count) * 7 % logits.shape[-1]).view(logits.shape[:-1])


def mask_for(tokens):
    """(B, L): one position in three does not count, and each example has another number."""
    batch, length = tokens.shape[0], tokens.shape[-2]
    return (torch.arange(batch * length).view(batch, length) % 3 > 0).long()


def inputs(shape, dtype=torch.float64):
    """The student's and the teacher's tensor of a shape."""
    return generate(shape, 0.1, 1.5).to(dtype), generate(shape, 1.3, 1.2).to(dtype)


def measured(function, student, teacher):
    """The value and the gradient in the student; None for a gradient that does not exist."""
    student = student.clone().requires_grad_()
    value = function(student, teacher.clone())
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return float(value), None
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach().double().sum().item(), gradient.double()


def difference(mine, other):
    """How far two measurements are apart, relative to the larger value and to the gradient's largest entry."""
    values, gradients = (mine[0], other[0]), (mine[1], other[1])
    apart = abs(values[0] - values[1]) / max(*map(abs, values), 1e-300)
    if gradients[1] is None:
        return apart
    scale = max(gradients[0].abs().max().item(), gradients[1].abs().max().item(), 1e-300)
    return max(apart, (gradients[0] - gradients[1]).abs().max().item() / scale)


def version_of(package):
    """The version that is installed, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
