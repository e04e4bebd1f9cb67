"""What ModelOpt keeps on the modules themselves, under the names that it has there, for scripts that look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.witness import Witness


@dataclass(frozen=True, eq=False)
class Layer:
    """A module that is compared, and what was seen of it since the last loss; all else is the module's own."""

    module: nn.Module
    path: str
    side: str
    witness: Witness
    partner: Layer | None = None

    @property
    def _intermediate_output(self) -> Any:
        seen = self.witness.seen(self.side)
        return None if seen is None else seen.outputs.get(self.path)

    @property
    def _intermediate_input(self) -> Any:
        if not self.witness.teacher.watch.inputs:
            raise AttributeError("_intermediate_input")  # the module is asked instead, and has none
        seen = self.witness.seen(self.side)
        return None if seen is None else seen.inputs.get(self.path)

    @property
    def _teacher_layer(self) -> list[Layer | None]:
        return [self.partner]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def layers_of(witness: Witness, student: nn.Module, pair: tuple[str, str]) -> tuple[Layer, Layer]:
    """Both modules of a pair of paths."""
    ours, theirs = pair
    teacher = Layer(witness.teacher.module.get_submodule(theirs), theirs, "teacher", witness)
    return Layer(student.get_submodule(ours), ours, "student", witness, teacher), teacher
