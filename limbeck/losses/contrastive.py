"""Losses that tell an example's own partner from others."""
