"""Losses between attention patterns, given or recomputed from queries, keys and values."""
