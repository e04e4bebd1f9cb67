"""The names of ``pymarlin.utils.stats``."""

from limbeck.compat.pymarlin.utils.stats.basic_stats import BasicStats, StatInitArguments, global_stats

__all__ = ["BasicStats", "StatInitArguments", "global_stats"]
