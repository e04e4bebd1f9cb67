"""Value and gradient of each loss agree with other projects' code, and known deviations are still there."""

from types import SimpleNamespace

import pytest
import torch

from tests.oracles import from_language, from_others, from_torchdistill  # noqa: F401  (they register their pairs)
from tests.oracles.conftest import RESULTS
from tests.oracles.pairs import PAIRS, SHAPES, difference, inputs, measured, version_of

CASES = [(found, shape) for found in PAIRS for shape in SHAPES[found.kind]]
APART = 1e-3
"""A deviation is no rounding."""


@pytest.mark.parametrize(("found", "shape"), CASES, ids=[f"{f.name}-{'x'.join(map(str, s))}" for f, s in CASES])
def test_pair(found, shape):
    if version_of(found.oracle) is None:
        pytest.skip(f"{found.oracle} is not installed")
    try:
        functions = found.make()
    except ImportError as error:
        pytest.skip(f"{found.oracle} cannot be imported: {error}")
    off = difference(*(measured(function, *inputs(shape)) for function in functions))
    if found.deviates:
        assert off > APART, f"{found.oracle} agrees now; it did not before: {found.deviates}"
    else:
        assert off <= found.tolerance, f"{found.oracle} differs by {off:.1e}"
    RESULTS.append({"loss": found.loss, "oracle": found.oracle, "deviates": found.deviates, "difference": off})


def test_crd_of_torchdistill_cannot_draw():
    """Its sampler reads ``prob`` where it keeps ``probs``; ours draws in `ContrastiveMemory`."""
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    sampler = SimpleNamespace(probs=torch.ones(4), alias=torch.zeros(4, dtype=torch.long))
    with pytest.raises(AttributeError, match="'prob'"):
        mid_level.CRDLoss.draw(sampler, 4)
