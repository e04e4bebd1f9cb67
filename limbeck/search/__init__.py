"""Searches: many students on one ground, the one that answers, and its proof. `search` is the way in."""

from limbeck.search.searching import search as search
from limbeck.search.space import Space as Space
from limbeck.search.space import default_space as default_space

__all__ = ["Space", "default_space", "search"]
