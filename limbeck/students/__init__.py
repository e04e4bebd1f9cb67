"""Students: functions that make a smaller model from a trained one, and one model for several tasks."""

from limbeck.students.depth import take_layers
from limbeck.students.heads import Heads
from limbeck.students.width import shrink

__all__ = ["Heads", "shrink", "take_layers"]
