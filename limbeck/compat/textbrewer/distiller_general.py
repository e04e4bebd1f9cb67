"""Where TextBrewer has its GeneralDistiller."""

from limbeck.compat.textbrewer.distillers import GeneralDistiller

__all__ = ["GeneralDistiller"]
