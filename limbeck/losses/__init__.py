"""The losses, by name: ``LOSSES.get("forward_kl")``. A new one is a decorated function in its family's file."""

from limbeck.losses.base import FAMILIES, LOSSES, SUPPLIED, Loss, full_precision, loss, same_shape
from limbeck.losses.features import cosine, mse
from limbeck.losses.labels import cross_entropy, label_mse
from limbeck.losses.logits import forward_kl, soft_cross_entropy

__all__ = [
    "FAMILIES",
    "LOSSES",
    "SUPPLIED",
    "Loss",
    "cosine",
    "cross_entropy",
    "forward_kl",
    "full_precision",
    "label_mse",
    "loss",
    "mse",
    "same_shape",
    "soft_cross_entropy",
]
