"""Students: functions that make a smaller model from a trained one, and one model for several tasks."""

from limbeck.students.depth import take_layers
from limbeck.students.heads import Heads

__all__ = ["Heads", "take_layers"]
