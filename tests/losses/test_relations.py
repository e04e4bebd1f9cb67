"""Losses between the relations of examples."""

import math

import pytest
import torch

from limbeck.losses import correlation_congruence, pkt, relations, rkd_angle, rkd_distance, similarity_preserving
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import INPUTS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters

ES, ET, FS, FT, LT = (INPUTS[name] for name in ("ES", "ET", "FS", "FT", "LT"))
ALL = [rkd_distance, rkd_angle, similarity_preserving, pkt, correlation_congruence]


def rkd(student):
    return 25 * masked_mean(rkd_distance(student, ET)) + 50 * masked_mean(rkd_angle(student, ET))


GOLDEN = {
    "rkd_distance": {
        "rkd_distance_only_w1": (ES, lambda x: masked_mean(rkd_distance(x, ET))),
        "rkd_25_50": (ES, rkd),
    },
    "rkd_angle": {"rkd_25_50": (ES, rkd)},
}


# ---- second implementations: loops over examples ---------------------------------------------------------------


def huber(x, y):
    gap = abs(x - y)
    return 0.5 * gap**2 if gap < 1 else gap - 0.5


def length(vector):
    return (vector * vector).sum().sqrt()


def summed(sides, compare):
    """The sum over each row of what two matrices, lists of lists, give at one place, over the number of rows."""
    ours, theirs = sides
    rows = zip(ours, theirs, strict=True)
    return torch.stack([sum(compare(*pair) for pair in zip(*row, strict=True)) / len(ours) for row in rows])


def flat(features, normalize):
    rows = [row.reshape(-1) for row in features]
    return [row / length(row) for row in rows] if normalize else rows


def naive_rkd_distance(student, teacher, *, normalize=False):
    sides = []
    for features in (student, teacher):
        rows = flat(features, normalize)
        count = range(len(rows))
        between = [[length(rows[i] - rows[j]) if i != j else 0.0 for j in count] for i in count]
        mean = sum(sum(row) for row in between) / (len(rows) * (len(rows) - 1))
        sides.append([[d / mean for d in row] for row in between])
    return summed(sides, huber)


def naive_cosine(rows, i, j, k):
    if i in (j, k):
        return 0.0
    first, second = rows[j] - rows[i], rows[k] - rows[i]
    return (first * second).sum() / (length(first) * length(second))


def naive_rkd_angle(student, teacher, *, normalize=False):
    ours, theirs = flat(student, normalize), flat(teacher, normalize)
    count = range(len(ours))
    return torch.stack(
        [
            sum(huber(naive_cosine(ours, i, j, k), naive_cosine(theirs, i, j, k)) for j in count for k in count)
            / len(ours) ** 2
            for i in count
        ]
    )


def products(rows):
    return [[(x * y).sum() for y in rows] for x in rows]


def naive_similarity_preserving(student, teacher, *, norm=2):
    sides = []
    for features in (student, teacher):
        gram = products(flat(features, False))
        sides.append([[g / sum(abs(h) ** norm for h in row) ** (1 / norm) for g in row] for row in gram])
    return summed(sides, lambda x, y: (x - y) ** 2)


def naive_pkt(student, teacher, *, eps=1e-7):
    sides = []
    for features in (student, teacher):
        rows = [row / (length(row) + eps) for row in flat(features, False)]
        close = [[(c + 1) / 2 for c in row] for row in products(rows)]
        sides.append([[c / sum(row) for c in row] for row in close])
    return summed(sides, lambda q, p: p * ((p + eps) / (q + eps)).log())


def naive_correlation_congruence(student, teacher, *, kernel="gaussian", gamma=0.4, order=2, normalize=True):
    ours, theirs = flat(student, normalize), flat(teacher, normalize)
    if kernel == "neighbors":
        gaps = [abs(x - y) for x, y in zip(ours, theirs, strict=True)]
        dots = [(gaps[i] * gaps[i + 1]).sum() for i in range(len(gaps) - 1)]
        return torch.stack([*dots, torch.zeros_like(dots[0])]) * len(gaps) / (len(gaps) - 1)

    def value(product):
        if kernel == "bilinear":
            return product
        return sum(
            math.exp(-2 * gamma) * (2 * gamma) ** p * product**p / math.factorial(p) for p in range(order + 1)
        )

    sides = [products(ours), products(theirs)]
    return summed(sides, lambda x, y: (value(x) - value(y)) ** 2)


PAIRS = [(ES, ET), (ES, LT), (FS, FT)]
CUBES = [(ES, ET), (generate((4, 3), 0.4, 1.0), generate((4, 2, 2), 1.7, 1.5))]
NAIVE = {
    "rkd_distance": [
        *[(naive_rkd_distance, *pair, {}) for pair in PAIRS],
        (naive_rkd_distance, ES, ET, {"normalize": True}),
        (naive_rkd_distance, 1e4 * ES, ET, {}),
    ],
    "rkd_angle": [
        *[(naive_rkd_angle, *pair, {}) for pair in CUBES],
        (naive_rkd_angle, ES, ET, {"normalize": True}),
    ],
    "similarity_preserving": [
        *[(naive_similarity_preserving, *pair, {}) for pair in PAIRS],
        (naive_similarity_preserving, ES, ET, {"norm": 1}),
    ],
    "pkt": [(naive_pkt, *pair, {"eps": eps}) for pair in PAIRS for eps in (1e-7, 1e-3, 0.0)],
    "correlation_congruence": [
        *[(naive_correlation_congruence, *pair, {}) for pair in PAIRS],
        (naive_correlation_congruence, ES, ET, {"normalize": False}),
        (naive_correlation_congruence, ES, ET, {"gamma": 1.5, "order": 4}),
        (naive_correlation_congruence, ES, ET, {"kernel": "bilinear"}),
        (naive_correlation_congruence, ES, ET, {"kernel": "neighbors", "normalize": False}),
    ],
}


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


@pytest.mark.parametrize("angles", [1, 36, 36 * 4, 10**6])
def test_chunks_of_angles_do_not_matter(angles, monkeypatch):
    monkeypatch.setattr(relations, "ANGLES_AT_ONCE", angles)
    check_naive(NAIVE, "rkd_angle", 0)


def test_the_gaussian_series_nears_the_gaussian():
    rows = torch.nn.functional.normalize(ES, dim=-1)
    gaussian = (-0.4 * torch.cdist(rows, rows).square()).exp()
    torch.testing.assert_close(relations.gaussian_series(rows @ rows.mT, 0.4, 12), gaussian, rtol=1e-10, atol=0)


# ---- contract --------------------------------------------------------------------------------------------------


class Whole:
    """Relations within the batch: an example's value depends on the others."""

    per_example = False
    leading = ((4,),)


class TestRKDDistance(Whole, LossContract):
    loss = "rkd_distance"


class TestRKDAngle(Whole, LossContract):
    loss = "rkd_angle"


class TestRKDAngleNormalized(Whole, LossContract):
    loss = rkd_angle
    options = {"normalize": True}  # noqa: RUF012


class TestSimilarityPreserving(Whole, LossContract):
    loss = "similarity_preserving"


class TestPKT(Whole, LossContract):
    loss = "pkt"
    identity = False  # its eps leaves a gradient of about its size


class TestPKTWithoutEps(Whole, LossContract):
    loss = pkt
    options = {"eps": 0.0}  # noqa: RUF012


class TestCorrelationCongruence(Whole, LossContract):
    loss = "correlation_congruence"


class TestCorrelationCongruenceBilinear(Whole, LossContract):
    loss = correlation_congruence
    options = {"kernel": "bilinear", "normalize": False}  # noqa: RUF012


# ---- edges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL)
def test_maps_of_other_widths_are_flattened(loss):
    torch.testing.assert_close(loss(FS, ET), loss(FS.flatten(1), ET), rtol=0, atol=0)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["equal points", "all equal", "zeros", "one", "large"])
def test_degenerate_batches_are_finite(loss, dtype, case):
    student, teacher = (x.to(dtype).clone() for x in (ES, ET))
    if case == "equal points":
        student[1], teacher[2] = student[0], teacher[0]
    elif case == "all equal":
        student[:] = student[:1].clone()
    elif case == "zeros":
        student[2], teacher[3] = 0, 0
    elif case == "one":
        student, teacher = student[:1], teacher[:1]
    else:
        student, teacher = 1e4 * student, 1e4 * teacher
    student.requires_grad_()
    values = loss(student, teacher)
    values.sum().backward()
    assert values.shape == (len(teacher),)
    assert values.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_a_batch_of_one_has_no_relations(loss):
    student = ES[:1].clone().requires_grad_()
    value = loss(student, ET[:1])
    value.sum().backward()
    assert value.tolist() == [0.0]
    assert not student.grad.any()


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_close_points_far_from_the_origin_keep_their_relations(loss):
    """In float32 the distances of such points would be lost in squared lengths."""
    near = (generate((6, 12), 0.4, 1e-2) + 10.0).float()
    values, exact = loss(near, ET.float()), loss(near.double(), ET)
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_moving_turning_and_scaling_change_nothing(loss):
    turn = torch.linalg.qr(generate((12, 12), 0.2, 1.0))[0]
    torch.testing.assert_close(loss(3.0 * ES @ turn + 5.0, ET), loss(ES, ET), rtol=1e-9, atol=1e-12)
    assert loss(3.0 * ET @ turn + 5.0, ET).abs().max() < 1e-20


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", ALL)
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": ES.clone(), "teacher": ET.clone()}
    pair[side][2, 3] = math.nan
    assert loss(pair["student"], pair["teacher"]).isnan().any()


def test_pkt_is_zero_at_equality():
    student = ET.clone().requires_grad_()
    values = pkt(student, ET)
    values.mean().backward()
    assert values.abs().max() == 0
    assert student.grad.abs().max() < 1e-7


def test_angles_need_no_cubic_memory():
    """The saved tensors are matrices of distances and the rows."""
    saved = []
    student = generate((40, 3), 0.4, 1.0).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        rkd_angle(student, generate((40, 5), 1.7, 1.0))
    assert max(saved) <= 40 * 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[(lambda loss=loss: loss(ES, ET[:4]), r"student \(6, 12\) and teacher \(4, 12\)") for loss in ALL],
        *[(lambda loss=loss: loss(ES[:, 0], ET[:, 0]), "relations are between examples") for loss in ALL],
        (lambda: similarity_preserving(ES, ET, norm=3), "norm must be 1 or 2, got 3"),
        (lambda: pkt(ES, ET, eps=-1.0), "eps must not be negative, got -1.0"),
        (lambda: correlation_congruence(ES, ET, kernel="poly"), "unknown kernel 'poly'"),
        (lambda: correlation_congruence(ES, ET, gamma=0.0), "gamma must be positive"),
        (lambda: correlation_congruence(ES, LT, kernel="neighbors"), "differ in shape; add project='linear'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
