"""Projections from a student's tensors to the shapes of a teacher's, and what else a loss may learn.

They train with the student, live in the Distiller under their term's name and are gone after export. A
projection is sized from two sample shapes, on the first batch; its parameters exist before that (unsized), so
an optimizer may be built at any time.
"""

from limbeck.projectors.base import PROJECTORS, Features, PerPlace, Projector, Shapes, build_projector
from limbeck.projectors.dense import (
    MLP,
    BatchNormLinear,
    Identity,
    Linear,
    LinearWhereNeeded,
    linear_relu,
    linear_tanh,
)
from limbeck.projectors.fusion import AttentionFusion, Each
from limbeck.projectors.layers import ACTIVATIONS, Affine, BatchNorm, Convolution
from limbeck.projectors.learned import ChannelVariance
from limbeck.projectors.maps import Conv1x1, MaskedGenerator, Resize, VIDRegressor
from limbeck.projectors.memory import ContrastiveMemory
from limbeck.projectors.tokens import PoolTokens

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "PROJECTORS",
    "Affine",
    "AttentionFusion",
    "BatchNorm",
    "BatchNormLinear",
    "ChannelVariance",
    "ContrastiveMemory",
    "Conv1x1",
    "Convolution",
    "Each",
    "Features",
    "Identity",
    "Linear",
    "LinearWhereNeeded",
    "MaskedGenerator",
    "PerPlace",
    "PoolTokens",
    "Projector",
    "Resize",
    "Shapes",
    "VIDRegressor",
    "build_projector",
    "linear_relu",
    "linear_tanh",
]
