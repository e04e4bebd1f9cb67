"""How several terms become one number to minimise.

Each kind gives a factor for every term, on top of its weight, and may add a penalty of its own. What it learns or
remembers is saved with the Distiller, so that a resumed training goes on exactly.

The factors of a step come from what earlier steps showed, over all their micro-batches and ranks. Gradients alone
are measured on a part: the first micro-batch of each rank, averaged over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.registry import Registry, check_options, nearest

BALANCES: Registry[type[Balance]] = Registry("balance")

HALF_SCALE = 2.0**10
"""A power of two on measured gradients, which may pass through float16, where small numbers vanish."""


class Balance(nn.Module):
    """Factors on the terms, beside their weights; all of them 1 unless a kind says otherwise.

    Args:
        names: The terms' names.
    """

    observes = False
    """Whether `observe` wants to be told of each step."""

    every_term = False
    """Whether it needs all terms in each step, and thus one task for all batches."""

    every: int | None = None
    """Steps between the measurements of gradients that it needs, or None where it needs none."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def factors(self) -> Tensor | None:
        """One factor per term, (terms,), or None where all are 1."""
        return None

    def penalty(self, places: Sequence[int]) -> Tensor | None:
        """What is added to the loss once per step, for the terms that the step has."""
        return None

    def observe(self, values: Tensor, norms: Tensor | None = None) -> None:
        """Take notice of a step.

        Args:
            values: The unweighted terms of the whole step; (terms,).
            norms: The norm of each unweighted term's gradient, where it was measured; (terms,).
        """


@BALANCES.register_as("static")
class Static(Balance):
    """The weights as they are."""


@BALANCES.register_as("uncertainty")
class Uncertainty(Balance):
    r"""Learned factors :math:`e^{-s_i}`, with the penalty :math:`\sum_i s_i` against giving all terms up.

    The :math:`s_i` begin at 0, so that the first step is the static one. It is for terms that are never negative:
    of one that is, the loss has no lower bound.

    Reference:
        Kendall et al. 2018, Multi-Task Learning Using Uncertainty to Weigh Losses, arXiv:1705.07115 (there with a
        factor of 1/2 on both parts).
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.log_variances = nn.Parameter(torch.zeros(len(self.names)))

    def factors(self) -> Tensor:
        """One factor per term, with gradient."""
        return torch.exp(-self.log_variances)

    def penalty(self, places: Sequence[int]) -> Tensor:
        """The sum of the logarithms."""
        return chosen(self.log_variances, places).sum()


class _Matching(Balance):
    """Brings a running size of every term to that of a reference term."""

    observes = True
    every_term = True

    def __init__(self, names: Sequence[str], *, reference: str | None = None, momentum: float = 0.9) -> None:
        super().__init__(names)
        if reference is not None and reference not in self.names:
            raise ValueError(f"the balance's reference {reference!r} is no term; {nearest(reference, self.names)}")
        if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ValueError(f"the momentum of a balance lies in [0, 1), got {momentum!r}")
        self.place = 0 if reference is None else self.names.index(reference)
        self.momentum = momentum
        self.register_buffer("sizes", torch.zeros(len(self.names)))
        self.sizes: Tensor

    def factors(self) -> Tensor:
        """The reference's size over each term's own; 1 as long as nothing was seen of both."""
        known = (self.sizes > 0) & (self.sizes[self.place] > 0)
        return torch.where(
            known, self.sizes[self.place] / self.sizes.clamp_min(1e-30), torch.ones_like(self.sizes)
        )

    def _remember(self, sizes: Tensor) -> None:
        sizes = sizes.detach().to(self.sizes)
        mixed = self.momentum * self.sizes + (1 - self.momentum) * sizes
        mixed = torch.where(self.sizes > 0, mixed, sizes)
        self.sizes.copy_(torch.where(sizes.isfinite(), mixed, self.sizes))


@BALANCES.register_as("matched_scale")
class MatchedScale(_Matching):
    """Every term is brought to the value of a reference term; the weights then say how much each counts of it.

    Args:
        names: The terms' names.
        reference: The term that the others follow; by default the first.
        momentum: How slowly the running values follow.
    """

    def observe(self, values: Tensor, norms: Tensor | None = None) -> None:
        """Follow the values."""
        self._remember(values.abs())


@BALANCES.register_as("gradient_norm")
class GradientNorm(_Matching):
    """Every term is brought to the gradient norm that a reference term has in the student; weights come after.

    Each measurement costs one backward pass per term.

    Args:
        names: The terms' names.
        reference: The term that the others follow; by default the first.
        momentum: How slowly the running norms follow.
        every: Steps between measurements.

    Reference:
        In the spirit of Chen et al. 2018, GradNorm, arXiv:1711.02257, with equal norms as the aim and without its
        learned weights.
    """

    def __init__(
        self, names: Sequence[str], *, reference: str | None = None, momentum: float = 0.9, every: int = 20
    ) -> None:
        super().__init__(names, reference=reference, momentum=momentum)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"gradients are measured every so many steps, a whole number, got every={every!r}")
        self.every = every

    def observe(self, values: Tensor, norms: Tensor | None = None) -> None:
        """Follow the norms, where they were measured."""
        if norms is not None:
            self._remember(norms)


def chosen(values: Tensor, places: Sequence[int]) -> Tensor:
    """Some entries of a vector, in order; all of them cost nothing.

    Example:
        >>> chosen(torch.tensor([1.0, 2.0, 3.0]), [0, 2])
        tensor([1., 3.])
    """
    return values if len(places) == len(values) else values[list(places)]


def build_balance(spec: str | Mapping[str, Any], names: Sequence[str]) -> Balance:
    """Make a balance from its name, or from ``{"kind": name, **options}``.

    Raises:
        ValueError: an unknown kind, or a reference that is no term.
        TypeError: an option that the kind does not have.

    Example:
        >>> build_balance({"kind": "matched_scale", "reference": "kd"}, ["kd", "hidden"]).factors()
        tensor([1., 1.])
    """
    if not isinstance(spec, (str, Mapping)):
        raise ValueError(f"a balance is a name or {{kind: name, ...}}, got {spec!r}; {nearest('', BALANCES)}")
    options = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = options.pop("kind", "static")
    make = BALANCES.get(kind)
    check_options(make, options, (), f"balance {kind!r}")
    return make(names, **options)


def gradient_products(terms: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The dot products of the terms' gradients with each other.

    Args:
        terms: Scalars of one graph, which is kept.
        parameters: What the gradients are taken in.

    Returns:
        (terms, terms), float32, without gradient.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> gradient_products([w.sum(), (w * torch.tensor([1.0, -1.0])).sum()], [w])
        tensor([[2., 0.],
                [0., 2.]])
    """
    trained = [p for p in parameters if p.requires_grad]
    gradients = [
        torch.autograd.grad(HALF_SCALE * term, trained, retain_graph=True, allow_unused=True)
        if term.requires_grad
        else ()
        for term in terms
    ]
    device = terms[0].device
    products = torch.zeros(len(terms), len(terms), device=device)
    for i, ours in enumerate(gradients):
        for j, theirs in enumerate(gradients[: i + 1]):
            pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
            dots = [((a.float() / HALF_SCALE) * (b.float() / HALF_SCALE)).sum() for a, b in pairs]
            products[i, j] = products[j, i] = sum(dots, torch.zeros((), device=device))
    return products


def interference(products: Tensor, weights: Sequence[float] | None = None) -> tuple[list[float], list[float]]:
    """What each term does to a step, from `gradient_products`.

    Args:
        products: Of the unweighted terms.
        weights: What each is multiplied by, schedules and balance included; by default 1.

    Returns:
        Each weighted term's share of the summed gradient norms; and the cosine between its gradient and the sum of
        all others', below 0 where they pull against each other (0 where one of the two is zero).

    Example:
        >>> interference(torch.tensor([[4.0, -2.0], [-2.0, 4.0]]))
        ([0.5, 0.5], [-0.5, -0.5])
    """
    factors = torch.ones(len(products)) if weights is None else torch.tensor(list(weights))
    factors = factors.to(products.device, torch.float64)
    products = products.double() * factors[:, None] * factors
    own = products.diagonal()
    norms = own.clamp_min(0).sqrt()
    with_others = products.sum(dim=1) - own
    others = (products.sum() - 2 * products.sum(dim=1) + own).clamp_min(0).sqrt()
    lengths = norms * others
    cosines = torch.where(lengths > 0, with_others / lengths.clamp_min(1e-300), torch.zeros_like(lengths))
    return (norms / norms.sum().clamp_min(1e-300)).tolist(), cosines.tolist()
