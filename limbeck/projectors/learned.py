"""What losses learn beside a projection: modules that a loss names in `limbeck.losses.loss` (``learns=``).

They are built, sized, trained and saved as projections are, but are called by the loss.

Shape legend: B examples, L positions, D features, C channels, H and W a map's height and width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from limbeck.projectors.base import PROJECTORS, Projector, Shapes, single, unsized


@PROJECTORS.register_as("channel_variance")
class ChannelVariance(Projector):
    r"""A positive variance for each of the teacher's channels: no projection, but what a loss learns.

    .. math:: \sigma_c^2 = \log(1 + e^{a_c}) + \varepsilon

    Called without arguments it returns (C,), where C is dimension 1 of maps (B, C, H, W) and the last one of
    (B, L, D) and (B, D).

    Args:
        initial_variance: What every variance is at first.
        eps: The least that a variance can become.

    Example:
        >>> from torch import Size
        >>> variance = ChannelVariance()
        >>> variance.size(Size([2, 3, 8, 8]), Size([2, 3, 8, 8]))
        >>> [round(x, 4) for x in variance().tolist()]
        [5.0, 5.0, 5.0]

    Reference:
        Ahn et al. 2019, Variational Information Distillation, arXiv:1904.05835.
    """

    def __init__(self, *, initial_variance: float = 5.0, eps: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= eps < initial_variance:
            raise ValueError(
                f"initial_variance must exceed eps, and eps not be negative, got {initial_variance} and {eps}"
            )
        self.initial_variance = initial_variance
        self.eps = eps
        self.raw = unsized()

    def size(self, student: Shapes, teacher: Shapes) -> None:
        """Size from the teacher's channels."""
        _, teacher = single(student, teacher, "channel_variance")
        self.shape(raw=[teacher[1] if len(teacher) == 4 else teacher[-1]])
        above = self.initial_variance - self.eps
        with torch.no_grad():
            self.raw.fill_(above + math.log(-math.expm1(-above)))  # softplus, inverted

    def forward(self) -> Tensor:
        """Return the variances, (C,)."""
        return F.softplus(self.raw) + self.eps
