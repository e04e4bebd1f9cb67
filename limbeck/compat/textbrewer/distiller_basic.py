"""Where TextBrewer has its BasicDistiller."""

from limbeck.compat.textbrewer.distillers import BasicDistiller

__all__ = ["BasicDistiller"]
