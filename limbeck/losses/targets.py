"""Losses between logits that also know the right class.

Shape legend: B examples, L positions, C classes; ``(..., C)`` stands for (B, C) or (B, L, C).
"""
