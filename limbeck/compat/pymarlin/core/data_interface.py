"""``DataProcessor`` and ``DataInterface``: where a script prepares its data and hands it out."""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class DataProcessor(ABC):
    """One task of preparing data; override `process`.

    Example:
        >>> class Doubled(DataProcessor):
        ...     def process(self, numbers):
        ...         return [2 * n for n in numbers]
        >>> Doubled().process_data([1, 2])
        [2, 4]
    """

    @abstractmethod
    def process(self, *args: Any) -> Any:
        """Prepare the data."""

    def analyze(self) -> Any:
        """Look at what was prepared; called after `process`."""
        return None

    def process_data(self, *args: Any) -> Any:
        """Call `process`, then `analyze`, and give back what was prepared."""
        found = self.process(*args)
        self.analyze()
        return found

    def multi_process_data(self, *args: Any, process_count: int = 1) -> list[Any]:
        """Call `process` in several processes: once for each place of the lists among `args`.

        Args:
            *args: Lists of one length; what is no list, or a list of one, is given to every call.
            process_count: How many processes.

        Returns:
            The entries of what the calls gave, one call's behind the other's; None for each that gave nothing.

        Raises:
            ValueError: no list among the arguments, or lists of several lengths.
        """
        lengths = {len(value) for value in args if isinstance(value, list) and len(value) != 1}
        if len(lengths) > 1 or not any(isinstance(value, list) for value in args):
            raise ValueError(f"multi_process_data takes lists of one length, got lengths {sorted(lengths)}")
        calls = max(lengths, default=1)
        columns = [_column(value, calls) for value in args]
        with multiprocessing.Pool(process_count) as pool:
            found = pool.starmap(self.process, zip(*columns, strict=True))
        self.analyze()
        return found if all(each is None for each in found) else [one for each in found for one in each]


def _column(value: Any, calls: int) -> Sequence[Any]:
    if not isinstance(value, list):
        return [value] * calls
    return value * calls if len(value) == 1 else value


class DataInterface(ABC):
    """Hands out the data sets; they are asked for in every epoch, so prepare them before.

    Example:
        >>> class Numbers(DataInterface):
        ...     def get_train_dataset(self):
        ...         return [1, 2]
        ...     def get_val_dataset(self):
        ...         return [3]
        >>> Numbers().get_train_dataset()
        [1, 2]
    """

    def setup_datasets(self) -> None:  # noqa: B027  (there may be nothing to prepare)
        """Prepare the data sets."""

    @abstractmethod
    def get_train_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """The data to train on."""

    @abstractmethod
    def get_val_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """The data to validate on."""
