"""How a loss is proven, for all families alike.

A module ``test_<family>.py`` next to this one lists its losses in

- ``GOLDEN``: loss -> {case of golden/losses.json: (the student's input, a function of it that gives the case's
  number from our loss, in the case's own convention)};
- ``NAIVE``: loss -> [(a second implementation written from the paper, student, teacher, options)]; it is called
  like the loss, in float64, and written with plain loops or NumPy-like steps that share no code with ours;

and has a `LossContract` for each. `tests/losses/test_all.py` sees that no loss lacks any of it.
"""

import torch

from limbeck.losses import LOSSES
from tests.golden_cases import CASES, generate, measure, tolerance

NUMBERS = ("value", "grad_l1", "grad_dot")


def golden_parameters(golden):
    """``[(loss, case), ...]`` for `pytest.mark.parametrize`."""
    return [(loss, case) for loss, cases in golden.items() for case in cases]


def check_golden(golden, loss, case, rtol=None):
    """Value and gradient agree with every oracle of a golden case, to `rtol` (by default the oracle's own)."""
    student, function = golden[loss][case]
    ours = measure(function, student)
    for result in CASES[case]["results"]:
        allowed = rtol or tolerance(result["oracle"])
        for number in NUMBERS:
            off = abs(ours[number] - result[number]) / max(abs(result[number]), 1e-300)
            assert off <= allowed, f"{number} is {ours[number]}, {result['oracle']} has {result[number]}"


def naive_parameters(naive):
    """``[(loss, index), ...]`` for `pytest.mark.parametrize`."""
    return [(loss, index) for loss, cases in naive.items() for index in range(len(cases))]


def check_naive(naive, loss, index, rtol=1e-10, atol=1e-12):
    """Values per position, and the gradient of a random weighting of them, agree with a second implementation."""
    reference, student, teacher, options = naive[loss][index]
    ours, gradients = weighted_gradient(LOSSES.get(loss), student, teacher, options)
    theirs, expected = weighted_gradient(reference, student, teacher, options)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=atol)


def weighted_gradient(function, student, teacher, options):
    """The values, and the gradient in the student (or in each of its parts) of their sum with fixed weights."""
    parts = student if isinstance(student, tuple) else (student,)
    leaves = tuple(part.detach().clone().requires_grad_() for part in parts)
    values = function(leaves if isinstance(student, tuple) else leaves[0], teacher, **options)
    weights = generate(values.shape, 5.0, 1.0).to(values.dtype) if values.ndim else torch.ones_like(values)
    gradients = torch.autograd.grad((values * weights).sum(), leaves, allow_unused=True)
    return values.detach(), [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)
    ]
