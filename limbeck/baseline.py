"""The baseline: the student's twin with as many updates, taught by the labels alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from limbeck.strict import Strict
from limbeck.terms import Term
from limbeck.train import Settings

STUDENT, PRETRAINED = "student", "pretrained"
"""Where a baseline begins: where the student does, or made likewise of the teacher before it was fine-tuned."""


class BaselineSpec(Strict):
    """The ``baseline_training:`` part: what of the baseline's training differs from the student's.

    What suits a student with a teacher need not suit one without: a baseline that is trained badly would make
    distillation look good. The number of updates is the student's, always.

    A student that begins with layers of a fine-tuned teacher has some of the teacher's knowledge from the start. A
    baseline with the same start measures what the training by the teacher adds to that; one that starts
    ``pretrained`` measures all that the fine-tuned teacher is worth.

    Example:
        >>> BaselineSpec(learning_rate=1e-4).of(Settings(learning_rate=5e-4)).learning_rate
        0.0001
    """

    start: str = Field(
        STUDENT,
        min_length=1,
        description="student: where the student begins; pretrained: made as the student is, but of the model that "
        "the teacher is fine-tuned from; or the folder or hub id of such a model",
    )
    learning_rate: float | None = Field(None, gt=0, description="by default the student's, as all of these")
    weight_decay: float | None = Field(None, ge=0, description="not applied to biases and norms")
    schedule: Literal["linear", "cosine", "constant"] | None = None
    warmup: float | None = Field(None, ge=0, description="share of the steps, or their number from 1 on")

    def of(self, settings: Settings) -> Settings:
        """The baseline's settings, from those of the student."""
        return settings.model_copy(update=self.model_dump(exclude_none=True, exclude={"start"}))


def plain_terms(terms: Iterable[Term], regression: bool) -> list[Term]:
    """The objective of plain training, for teacher and baseline: the labels, at full weight."""
    loss = "label_mse" if regression else "cross_entropy"
    own = next((t for t in terms if t.reads_labels), None)
    if own is None:
        return [Term("labels", loss=loss, name="labels")]
    return [Term("labels", loss=own.comparison.loss, name=own.name, mask=own.mask, **own.comparison.options)]
