"""Losses between the relations that the examples of a batch have to each other."""
