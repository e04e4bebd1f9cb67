"""What the suites have in common: how they run, and how they complain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from unittest import SkipTest

import torch
from torch import Tensor

EXACT = 1e-9
"""Relative and absolute tolerance of comparisons in float64."""


@dataclass(frozen=True)
class Verdict:
    """What came of one test of a contract.

    Attributes:
        check: The test's name in words.
        outcome: How it ended.
        reason: Why it failed or was skipped, in one line.
    """

    check: str
    outcome: Literal["passed", "failed", "skipped"]
    reason: str = ""


def verdicts(contract: type) -> Iterator[Verdict]:
    """Run every test of a contract, and go on where one fails.

    Args:
        contract: A subclass of `LossContract`, `TeacherContract` or `BackendContract`.

    Example:
        >>> class Contract:
        ...     def test_counts(self):
        ...         require(1 + 1 == 3, "it cannot count")
        >>> list(verdicts(Contract))
        [Verdict(check='counts', outcome='failed', reason='it cannot count')]
    """
    for name in _tests(contract):
        check = name.removeprefix("test_").replace("_", " ")
        try:
            getattr(contract(), name)()
        except SkipTest as skipped:
            yield Verdict(check, "skipped", str(skipped))
        except AssertionError as failure:
            yield Verdict(check, "failed", " ".join(str(failure).split()))
        except Exception as error:
            yield Verdict(check, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        else:
            yield Verdict(check, "passed")


def _tests(contract: type) -> list[str]:
    return sorted(name for name in dir(contract) if name.startswith("test_"))


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
        15
    """
    passed = []
    for name in _tests(contract):
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
