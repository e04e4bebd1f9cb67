"""What the suites have in common: how they run, and how they complain."""

from __future__ import annotations

from unittest import SkipTest

import torch
from torch import Tensor

EXACT = 1e-9
"""Relative and absolute tolerance of comparisons in float64."""


def run(contract: type) -> list[str]:
    """Run every test of a contract, without pytest.

    Args:
        contract: A subclass of `LossContract`, `TeacherContract` or `BackendContract`.

    Returns:
        The names of the tests that passed; those that do not apply are left out.

    Raises:
        AssertionError: a test failed.

    Example:
        >>> from limbeck.testing import LossContract
        >>> class TestForwardKL(LossContract):
        ...     loss = "forward_kl"
        ...     logits = shift_invariant = True
        >>> len(run(TestForwardKL))
        13
    """
    passed = []
    for name in sorted(n for n in dir(contract) if n.startswith("test_")):
        try:
            getattr(contract(), name)()
        except SkipTest:
            continue
        passed.append(name)
    return passed


def require(condition: bool | Tensor, message: str) -> None:
    """Assert, with nothing but our message, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def skip_unless(promised: bool, what: str) -> None:
    """Leave a test out that the contract does not promise to pass."""
    if not promised:
        raise SkipTest(f"the contract does not promise: {what}")


def close(ours: Tensor, expected: Tensor, when: str, tolerance: float = EXACT) -> None:
    """Compare two tensors, and say when they differ."""
    torch.testing.assert_close(
        ours, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"differs {when}: {text}"
    )


def is_floating(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that carry a gradient, and not indices or a mask."""
    return tensor.is_floating_point()
