"""What a run is about to do, and who watches it."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.objective import PlannedTerm
from limbeck.train import Callback


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, as the preflight found it.

    Attributes:
        task: The task's name.
        examples: Number of examples by split.
        terms: What each term reads and is worth.
        parameters: Number of parameters of teacher and student.
        steps: Updates of the student's training, and of the teacher's where it is fine-tuned.
        teacher: What happens with the teacher, in words.
    """

    task: str
    examples: dict[str, int]
    terms: list[PlannedTerm]
    parameters: dict[str, int]
    steps: dict[str, int]
    teacher: str


class Observer:
    """Watches a run; the command line's draws bars. Override what you need."""

    def on_plan(self, plan: Plan) -> None:
        """The preflight is done; training begins."""

    def on_note(self, text: str) -> None:
        """Something worth knowing that is no error."""

    def on_stage(self, name: str) -> None:
        """A stage begins: teacher, baseline-0, student-0, evaluation."""

    def on_count(self, name: str, done: int, total: int) -> None:
        """So many examples are done, of something that is no training."""

    def callbacks(self, stage: str) -> list[Callback]:
        """What watches the training of this stage."""
        return []
