"""Losses between feature maps, point by point."""

import math

import pytest
import torch

from limbeck.losses import LOSSES, ab, factor_transfer, mgd, ofd, traits_of
from limbeck.losses.activations import ofd_margin
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import INPUTS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters

FS, FT, ES, ET = (INPUTS[name] for name in ("FS", "FT", "ES", "ET"))
MARGIN = -torch.linspace(0.1, 1, 8, dtype=torch.float64)

GOLDEN = {
    "mgd": {"mgd_mse_sum_over_N": (FS, lambda x: masked_mean(mgd(x, FT)))},
    "ab": {"ab_margin1": (FS, lambda x: 3 / 1000 * masked_mean(ab(x, FT)))},  # as its authors' code scales it
    "ofd": {"ofd_partial_l2": (FS, lambda x: masked_mean(ofd(x, FT, margin=MARGIN)))},
    "factor_transfer": {"ft_factor_l1": (FS, lambda x: masked_mean(factor_transfer(x, FT)))},
}


def point_by_point(function):
    """A loss that sums a function of (student, teacher, channel) over all points of an example."""

    def loss(student, teacher, **options):
        examples = []
        for s, t in zip(student, teacher, strict=True):
            values = [
                function(a, b, c, **options)
                for c in range(len(s))
                for a, b in zip(s[c].reshape(-1), t[c].reshape(-1), strict=True)
            ]
            examples.append(sum(values))
        return torch.stack(examples)

    return loss


@point_by_point
def naive_mgd(s, t, _, alpha=2e-5):
    return alpha * (s - t) ** 2


@point_by_point
def naive_ab(s, t, _, margin=1.0):
    """As in the paper: the teacher's sign is to be reached with a margin."""
    sign = 1 if t > 0 else -1
    return (margin - sign * s) ** 2 if sign * s < margin else 0 * s


@point_by_point
def naive_ofd(s, t, c, margin):
    lowest = margin if isinstance(margin, float) else margin[c]
    target = t if t > lowest else lowest
    return 0 * s if s <= target and target <= 0 else (s - target) ** 2


def naive_factor_transfer(student, teacher, p=1.0, p1=None):
    examples = []
    for s, t in zip(student, teacher, strict=True):
        if p1 is not None:
            s, t = (sum(abs(c) ** p1 for c in x) / len(x) for x in (s, t))
        lengths = [sum(a**2 for a in x.reshape(-1)) ** 0.5 for x in (s, t)]
        powers = [
            abs(a / lengths[0] - b / lengths[1]) ** p for a, b in zip(s.reshape(-1), t.reshape(-1), strict=True)
        ]
        examples.append(sum(powers) / len(powers) if p == 1 else sum(powers) ** (1 / p))
    return torch.stack(examples)


SMALL, SMALL_TEACHER = generate((3, 8, 3, 2), 0.4, 1.2), generate((3, 8, 3, 2), 1.6, 0.9)
NAIVE = {
    "mgd": [(naive_mgd, SMALL, SMALL_TEACHER, o) for o in ({}, {"alpha": 1.0})],
    "ab": [(naive_ab, *pair, o) for pair in ((SMALL, SMALL_TEACHER), (ES, ET)) for o in ({}, {"margin": 0.3})],
    "ofd": [(naive_ofd, SMALL, SMALL_TEACHER, {"margin": m}) for m in (MARGIN, -0.4, 0.0)],
    "factor_transfer": [
        (naive_factor_transfer, *pair, o)
        for pair in ((SMALL, SMALL_TEACHER), (ES, ET))
        for o in ({}, {"p": 2.0}, {"p": 3.0})
    ]
    + [(naive_factor_transfer, SMALL, SMALL_TEACHER, o) for o in ({"p1": 2.0}, {"p1": 1.0, "p": 2.0})],
}


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


class TestMGD(LossContract):
    loss = "mgd"
    options = {"alpha": 0.01}  # noqa: RUF012
    leading = ((4,),)

    def example(self, *leading):
        return {
            "student": generate((*leading, 3, 4, 4), 0.3, 1.0),
            "teacher": generate((*leading, 3, 4, 4), 1.1, 2.0),
        }


class TestAB(LossContract):
    loss = "ab"
    identity = False
    leading = ((4,),)
    example = TestMGD.example


class TestOFD(LossContract):
    loss = "ofd"
    options = {"margin": -0.5}  # noqa: RUF012
    identity = False  # where the teacher is below the margin, the student is pulled up to it
    leading = ((4,),)
    example = TestMGD.example


class TestFactorTransfer(LossContract):
    loss = "factor_transfer"
    identity = False  # zero, but with a corner: see below
    leading = ((4,),)
    example = TestMGD.example


class TestFactorTransferByTheTwoNorm(LossContract):
    loss = "factor_transfer"
    options = {"p": 2.0, "p1": 2.0}  # noqa: RUF012
    leading = ((4,),)
    example = TestMGD.example


@pytest.mark.parametrize("loss", [lambda s, t: factor_transfer(s, t), lambda s, t: ofd(s, t, margin=-1e9)])
def test_is_zero_at_equality(loss):
    student = FT.clone().requires_grad_()
    value = loss(student, FT).sum()
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["mgd", "ab", "ofd", "factor_transfer"])
def test_nan_is_not_swallowed(name, side):
    pair = {"student": FS.clone(), "teacher": FT.clone()}
    pair[side][2, 3, 1, 1] = math.nan
    values = LOSSES.get(name)(pair["student"], pair["teacher"], **({"margin": MARGIN} if name == "ofd" else {}))
    assert values.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("name", ["mgd", "ab", "ofd", "factor_transfer"])
def test_other_channels_are_refused_with_a_cure(name):
    options = {"margin": -1.0} if name == "ofd" else {}
    with pytest.raises(ValueError, match=r"\(6, 8, 6, 6\) and teacher \(6, 5, 6, 6\).*add project='conv1x1'"):
        LOSSES.get(name)(FS, FT[:, :5], **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ab(FS, FT, margin=-1.0), "the margin must not be negative, got -1.0"),
        (lambda: ofd(FS, FT, margin=MARGIN[:5]), r"\(5,\) values do not fit .* one for each of the 8 channels"),
        (lambda: factor_transfer(FS, FT, p=0.5), "a power must be at least 1, got 0.5"),
        (lambda: factor_transfer(FS, FT, p1=0.0), "a power must be at least 1, got 0.0"),
    ],
)
def test_options_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_student_that_is_less_active_than_an_inactive_teacher_is_left_alone():
    student = torch.full((1, 1, 2, 2), -5.0, requires_grad=True)
    value = ofd(student, torch.full((1, 1, 2, 2), -2.0), margin=-3.0)
    value.backward()
    assert value.item() == 0.0
    assert not student.grad.any()


def test_ofd_pools_the_larger_map():
    small = torch.nn.functional.adaptive_avg_pool2d(FT, 3)
    torch.testing.assert_close(
        ofd(FS[:, :, :3, :3], FT, margin=MARGIN), ofd(FS[:, :, :3, :3], small, margin=MARGIN)
    )


def test_a_zero_factor_gives_no_nan():
    student = torch.zeros_like(FS).requires_grad_()
    values = factor_transfer(student, FT)
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.abs().max() < 1


def test_margins_are_the_mean_of_what_is_negative():
    """Against sampled numbers, and far from zero as the authors do it."""
    norm = torch.nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.4, -1.0, 10.0]))
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(1_000_000, 3, generator=generator) * norm.weight[:3] + norm.bias[:3]
    sampled = torch.stack([column[column < 0].mean() for column in numbers.T])
    torch.testing.assert_close(ofd_margin(norm)[:3], sampled.detach(), rtol=0, atol=5e-3)
    assert ofd_margin(norm)[3].item() == -3.0
    maps = [x[:, :4] for x in (FS, FT)]
    assert torch.equal(ofd(*maps, margin=norm), ofd(*maps, margin=ofd_margin(norm)))
    with pytest.raises(ValueError, match="without weights does not know its margins"):
        ofd(*maps, margin=torch.nn.BatchNorm2d(4, affine=False))


def test_mgd_brings_its_generator_along():
    assert traits_of(mgd).project == "masked_generator"
