"""Conformance suites: what every loss, teacher and training backend has to do, for authors to run on their own.

Subclass a contract in a test file, say what the object promises, and pytest runs the inherited tests. They are
plain methods with plain assertions, so that `run` works where pytest is not installed.
"""

from limbeck.testing.backend import BackendContract
from limbeck.testing.checks import Verdict, run, verdicts
from limbeck.testing.loss import LossContract
from limbeck.testing.promise import contract_of
from limbeck.testing.teacher import TeacherContract

__all__ = ["BackendContract", "LossContract", "TeacherContract", "Verdict", "contract_of", "run", "verdicts"]
