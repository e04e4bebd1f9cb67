"""Students: functions that make a smaller model from a trained one."""

from limbeck.students.depth import take_layers

__all__ = ["take_layers"]
