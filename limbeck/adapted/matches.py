"""What is learned of entries: matches between layers, and the sum of all that counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.adapted.entries import Entries, paired_logits, total_of
from limbeck.losses.base import full_precision

Layers = int | Sequence[int]


def listed(layers: Layers) -> Sequence[int]:
    """One layer or more as a list."""
    return layers if isinstance(layers, Sequence) else [layers]


@dataclass(frozen=True)
class Match:
    """One layer of each model, or some of each at once, and how they are compared.

    Args:
        entry: The entry that both adaptors give the layers in, such as ``"hidden"``.
        student: The student's layer, by its number there; or several, for losses that read them together.
        teacher: The teacher's.
        loss: ``(student, teacher, student's mask, teacher's mask) -> a number``; sides are tensors, or lists of
            them where the layers are lists; the masks are the ``inputs_mask`` (B, L), or None.
        weight: The factor on the loss.
        project: What is done to each of the student's layers first; see `limbeck.adapted.also_train`.
        name: What the loss is called.
    """

    entry: str
    student: Layers
    teacher: Layers
    loss: Callable[..., Tensor]
    weight: float = 1.0
    project: Callable[[Tensor], Tensor] | None = None
    name: str = "match"

    def __str__(self) -> str:
        layers = ("-".join(map(str, listed(side))) for side in (self.student, self.teacher))
        return f"{self.entry}_{self.name}_{'_'.join(layers)}"

    def __call__(self, student: Entries, teacher: Entries) -> Tensor:
        """The loss between the layers, without the weight.

        Raises:
            ValueError: the adaptors gave no such layers.

        Example:
            >>> first = Match("hidden", 0, 0, lambda ours, theirs, *masks: (ours - theirs).sum())
            >>> first({"hidden": [torch.ones(2)]}, {"hidden": [torch.zeros(2)]})
            tensor(2.)
        """
        ours = self._layers(student, self.student, "student")
        theirs = self._layers(teacher, self.teacher, "teacher")
        if self.project is not None:
            ours = [self.project(state) for state in ours]
        sides = (ours, theirs) if isinstance(self.student, Sequence) else (ours[0], theirs[0])
        return self.loss(*sides, student.get("inputs_mask"), teacher.get("inputs_mask"))

    def _layers(self, entries: Entries, layers: Layers, model: str) -> list[Tensor]:
        try:
            return [full_precision(entries[self.entry][layer]) for layer in listed(layers)]
        except (KeyError, IndexError):
            raise ValueError(
                f"{self.name} reads {self.entry} {layers} of the {model}, and its adaptor gave "
                f"{len(entries.get(self.entry, ()))} of them"
            ) from None


@dataclass(frozen=True)
class AdaptedObjective:
    """The weighted sum of all that a student learns, of its own entries and its teacher's.

    Args:
        weights: The factors on ``"logits"`` and ``"losses"``; what has none does not count.
        logits: The loss of one pair of logits (N, C) and its labels, or None, where there are none.
        matches: Matches between layers.
        device: Where the models are: there it is computed without autocast.

    Example:
        >>> objective = AdaptedObjective(weights={"losses": 0.5})
        >>> objective({"losses": [torch.tensor(3.0)]}, {})
        (tensor(1.5000), {'losses': tensor(3.)})
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    logits: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    matches: Sequence[Match] = ()
    device: Any = "cpu"

    def __call__(self, student: Entries, teacher: Entries) -> tuple[Any, dict[str, Tensor]]:
        """The sum, 0 where nothing counts, and each part without its weight.

        Raises:
            ValueError: a part that counts, and that an adaptor did not give.
        """
        total: Any = 0
        parts = {}
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for name, weight, value in self._parts(student, teacher):
                parts[name] = value
                total = total + value * weight
        return total, parts

    def _parts(self, student: Entries, teacher: Entries) -> Iterator[tuple[str, float, Any]]:
        for name in self.weights:
            for model, entries in {
                "student": student,
                "teacher": teacher if name == "logits" else student,
            }.items():
                if name not in entries:
                    raise ValueError(
                        f"{name!r} counts, and the adaptor of the {model} gave only {sorted(entries)}"
                    )
        if "logits" in self.weights:
            value = sum(self._of_logits(*pair) for pair in paired_logits(student, teacher))
            yield "logits", self.weights["logits"], value
        for match in self.matches:
            yield str(match), match.weight, match(student, teacher)
        if "losses" in self.weights:
            yield "losses", self.weights["losses"], total_of(student["losses"])

    def _of_logits(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        if self.logits is None:
            raise ValueError("logits count, and the objective has no loss for them; pass logits=")
        if not student.numel():
            return student.sum()  # no token counts: nothing, with a gradient of nothing
        return self.logits(student, teacher, labels)
