"""Data that is prepared in processes of its own; they import this file, so it is light."""

from limbeck.compat.pymarlin.core.data_interface import DataProcessor


class Squares(DataProcessor):
    """Powers of numbers."""

    def process(self, number, power):
        """A list of one."""
        return [number**power]
