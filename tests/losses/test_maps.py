"""Losses between the statistics of feature maps, and between pairs of layers."""

import math

import pytest
import torch

from limbeck.losses import LOSSES, attention_transfer, channel_similarity, cwd, fsp, hcl, mmd, nst, pearson
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import CASES, INPUTS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters

FS, FT, FS2, FT2, HS, HT = (INPUTS[name] for name in ("FS", "FT", "FS2", "FT2", "HS", "HT"))
MASK = torch.tensor(CASES["hid_mse_masked"]["params"]["mask"])

GOLDEN = {
    "attention_transfer": {
        "at_p2_mean": (FS, lambda x: masked_mean(attention_transfer(x, FT))),
        "at_p2_paper": (FS, lambda x: masked_mean(attention_transfer(x, FT, mode="paper"))),
    },
    "fsp": {"fsp_mse": (FS, lambda x: masked_mean(fsp((x, FS2), (FT, FT2))))},
    "mmd": {"mmd_hidden": (HS, lambda x: masked_mean(mmd((x, x * 0.5), (HT, HT * 0.5))))},
    "channel_similarity": {  # ICKD's code divides by the batch size twice
        "ickd_chsim": (FS, lambda x: masked_mean(channel_similarity(x, FT)) / 6)
    },
}

# ---- second implementations, by loops over examples, channels and places --------------------------------------

SMALL, SMALL_TEACHER = generate((2, 3, 5, 4), 0.4, 1.2), generate((2, 3, 5, 4), 1.6, 0.9)
LARGE, LARGE_TEACHER = generate((2, 3, 8, 9), 2.4, 1.2), generate((2, 3, 8, 9), 0.6, 0.9)
OTHER, OTHER_TEACHER = generate((2, 4, 5, 4), 2.2, 1.0), generate((2, 4, 5, 4), 3.1, 1.1)


def pooled(features, height, width, combine=torch.mean):
    """Adaptive pooling: bin i of n covers from floor(i·size/n) to ceil((i+1)·size/n)."""

    def bins(size, count):
        return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]

    rows = []
    for h in bins(features.shape[2], height):
        row = [combine(features[:, :, h, w].flatten(2), dim=2) for w in bins(features.shape[3], width)]
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def to_one_size(student, teacher, combine=torch.mean):
    size = [min(student.shape[d], teacher.shape[d]) for d in (2, 3)]
    return pooled(student, *size, combine), pooled(teacher, *size, combine)


def per_example(function):
    """A loss of whole batches from one of single examples."""

    def loss(student, teacher, **options):
        return torch.stack([function(s, t, **options) for s, t in zip(student, teacher, strict=True)])

    return loss


def of_one_size(function):
    return lambda student, teacher, **options: function(*to_one_size(student, teacher), **options)


def places(maps):
    """The vectors over channels at all places of one example, as a list."""
    return [maps[:, h, w] for h in range(maps.shape[1]) for w in range(maps.shape[2])]


@of_one_size
@per_example
def naive_attention_transfer(student, teacher, p=2.0, mode="code"):
    energies = [[sum(abs(a) ** p for a in place) for place in places(x)] for x in (student, teacher)]
    lengths = [sum(e**2 for e in energy) ** 0.5 for energy in energies]
    squares = sum((s / lengths[0] - t / lengths[1]) ** 2 for s, t in zip(*energies, strict=True))
    return squares**0.5 if mode == "paper" else squares / len(energies[0])


@of_one_size
@per_example
def naive_nst(student, teacher, kernel="poly", degree=2, offset=0.0, bandwidth=None):
    points, targets = ([c.flatten() / (c**2).sum() ** 0.5 for c in x] for x in (student, teacher))
    if bandwidth is None:
        bandwidth = sum(((a - b) ** 2).sum() for a in targets for b in targets) / len(targets) ** 2

    def similarity(a, b):
        if kernel == "gaussian":
            return math.e ** (-((a - b) ** 2).sum() / (2 * bandwidth))
        return (a * b).sum() if kernel == "linear" else ((a * b).sum() + offset) ** degree

    def mean(left, right):
        return sum(similarity(a, b) for a in left for b in right) / (len(left) * len(right))

    return mean(points, points) + mean(targets, targets) - 2 * mean(points, targets)


@per_example
def naive_cwd(student, teacher, temperature=1.0):
    total = 0
    for s, t in zip(student, teacher, strict=True):
        q, p = ((x.flatten() / temperature).exp() for x in (s, t))
        q, p = q / q.sum(), p / p.sum()
        total = total + sum(b * (b / a).log() for a, b in zip(q, p, strict=True))
    return total * temperature**2 / len(student)


def naive_pearson(student, teacher):
    totals = [0.0] * len(student)
    for c in range(student.shape[1]):
        sides = [side[:, c] for side in (student, teacher)]
        means = [x.sum() / x.numel() for x in sides]
        deviations = [(((x - m) ** 2).sum() / (x.numel() - 1)) ** 0.5 for x, m in zip(sides, means, strict=True)]
        s, t = ((x - m) / (d + 1e-6) for x, m, d in zip(sides, means, deviations, strict=True))
        totals = [total + ((s[b] - t[b]) ** 2).sum() for b, total in enumerate(totals)]
    return torch.stack(totals) / 2 / student[0].numel()


def resized(maps, height, width):
    """Bilinear, pixel centres at half integers."""
    out = []
    for i in range(height):
        for j in range(width):
            y = max((i + 0.5) * maps.shape[2] / height - 0.5, 0)
            x = max((j + 0.5) * maps.shape[3] / width - 0.5, 0)
            top, left = int(y), int(x)
            low, right = min(top + 1, maps.shape[2] - 1), min(left + 1, maps.shape[3] - 1)
            upper = maps[:, :, top, left] * (1 - x + left) + maps[:, :, top, right] * (x - left)
            lower = maps[:, :, low, left] * (1 - x + left) + maps[:, :, low, right] * (x - left)
            out.append(upper * (1 - y + top) + lower * (y - top))
    return torch.stack(out, dim=-1).unflatten(-1, (height, width))


def naive_resized_pearson(student, teacher):
    return naive_pearson(resized(student, *teacher.shape[2:]), teacher)


def naive_hcl(student, teacher, output_sizes=(4, 2, 1)):
    if isinstance(student, tuple):
        return sum(naive_hcl(s, t, output_sizes) for s, t in zip(student, teacher, strict=True))
    student, teacher = to_one_size(student, teacher)
    total, weight, weights = ((student - teacher) ** 2).flatten(1).mean(1), 1.0, 1.0
    for size in output_sizes:
        if size < student.shape[2] and size < student.shape[3]:
            weight = weight / 2
            weights += weight
            squares = (pooled(student, size, size) - pooled(teacher, size, size)) ** 2
            total = total + weight * squares.flatten(1).mean(1)
    return total / weights


@of_one_size
@per_example
def naive_channel_similarity(student, teacher):
    total = 0
    channels = range(len(student))
    for c in channels:
        rows = [[(x[c] * x[k]).sum() for k in channels] for x in (student, teacher)]
        lengths = [sum(a**2 for a in row) ** 0.5 for row in rows]
        total = total + sum((rows[0][k] / lengths[0] - rows[1][k] / lengths[1]) ** 2 for k in channels)
    return total / len(student)


def naive_flow(first, second, mask, pool):
    if first.ndim == 4:
        first, second = to_one_size(first, second, torch.mean if pool == "avg" else torch.amax)
        pairs = [list(zip(places(a), places(b), strict=True)) for a, b in zip(first, second, strict=True)]
    else:
        mask = torch.ones(first.shape[:2]) if mask is None else mask
        pairs = [
            [(first[b, i], second[b, i]) for i in range(first.shape[1]) if mask[b, i]] for b in range(len(first))
        ]
    return torch.stack([sum(a[:, None] * b[None, :] for a, b in example) / len(example) for example in pairs])


def naive_fsp(student, teacher, mask=None, distance="mse", pool="avg"):
    difference = naive_flow(*student, mask, pool) - naive_flow(*teacher, mask, pool)
    if distance == "mse":
        return (difference**2).flatten(1).mean(1)
    return sum((difference[:, :, c] ** 2).sum(1) ** 0.5 for c in range(difference.shape[2]))


def naive_mmd(student, teacher, mask=None):
    batch, length = student[0].shape[:2]
    mask = torch.ones(batch, length) if mask is None else mask
    values = []
    for b in range(batch):
        valid = [j for j in range(length) if mask[b, j]]
        for i in range(length):
            squares = []
            for j in valid:
                ours, theirs = ((x[b, i] * mask[b, i] * y[b, j]).mean() for x, y in (student, teacher))
                squares.append((ours - theirs) ** 2)
            values.append(sum(squares) / len(squares))
    return torch.stack(values).view(batch, length)


MAPS = [(SMALL, SMALL_TEACHER), (LARGE, SMALL_TEACHER), (SMALL, LARGE_TEACHER)]
WIDE, WIDE_TEACHER = generate((2, 5, 6), 0.8, 1.1), generate((2, 5, 6), 1.9, 0.7)
NAIVE = {
    "attention_transfer": [
        (naive_attention_transfer, *pair, o)
        for pair in (*MAPS, (OTHER, SMALL_TEACHER))
        for o in ({}, {"p": 1.0}, {"p": 3.0}, {"mode": "paper"})
    ],
    "nst": [
        (naive_nst, *pair, o)
        for pair in (*MAPS, (OTHER, SMALL_TEACHER))
        for o in (
            {},
            {"degree": 3, "offset": 0.5},
            {"kernel": "linear"},
            {"kernel": "gaussian"},
            {"kernel": "gaussian", "bandwidth": 0.3},
        )
    ],
    "cwd": [(naive_cwd, SMALL, SMALL_TEACHER, o) for o in ({}, {"temperature": 4.0}, {"temperature": 0.5})],
    "pearson": [(naive_pearson, SMALL, SMALL_TEACHER, {}), (naive_pearson, FS, FT, {})]
    + [(naive_resized_pearson, *pair, {}) for pair in MAPS[1:]],
    "hcl": [(naive_hcl, *pair, o) for pair in MAPS for o in ({}, {"output_sizes": [3, 1]})]
    + [(naive_hcl, FS, FT, {}), (naive_hcl, (SMALL, LARGE), (SMALL_TEACHER, LARGE_TEACHER), {})],
    "channel_similarity": [(naive_channel_similarity, *pair, {}) for pair in MAPS],
    "fsp": [
        (naive_fsp, (SMALL, other), (SMALL_TEACHER, OTHER_TEACHER), {"distance": distance, "pool": pool})
        for other in (OTHER, generate((2, 4, 9, 8), 0.7, 1.0), generate((2, 4, 2, 3), 0.7, 1.0))
        for distance in ("mse", "columns")
        for pool in ("avg", "max")
    ]
    + [(naive_fsp, (HS, WIDE), (HT, WIDE_TEACHER), {"mask": mask}) for mask in (None, MASK)],
    "mmd": [
        (naive_mmd, (HS, 0.5 * HT), teacher, {"mask": mask})
        for teacher in ((HT, HS), (WIDE, WIDE_TEACHER))
        for mask in (None, MASK)
    ],
}


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


# ---- contracts ------------------------------------------------------------------------------------------------


class TestAttentionTransfer(LossContract):
    loss = "attention_transfer"
    leading = ((4,),)

    def example(self, *leading):
        return {
            "student": generate((*leading, 3, 5, 5), 0.3, 1.0),
            "teacher": generate((*leading, 3, 5, 5), 1.1, 2.0),
        }


class TestAttentionTransferOfThePaper(LossContract):
    loss = "attention_transfer"
    options = {"mode": "paper", "p": 1.0}  # noqa: RUF012
    leading = ((4,),)
    example = TestAttentionTransfer.example


class TestAttentionTransferOfSmallerMaps(LossContract):
    loss = "attention_transfer"
    leading = ((4,),)

    def example(self, *leading):
        return {
            "student": generate((*leading, 2, 3, 4), 0.3, 1.0),
            "teacher": generate((*leading, 3, 5, 5), 1.1, 2.0),
        }

    def at_equality(self, example):
        return {**example, "teacher": example["student"].clone()}


class TestNST(LossContract):
    loss = "nst"
    leading = ((4,),)
    example = TestAttentionTransfer.example


class TestNSTGaussian(LossContract):
    loss = "nst"
    options = {"kernel": "gaussian"}  # noqa: RUF012
    leading = ((4,),)
    example = TestAttentionTransfer.example


class TestCWD(LossContract):
    loss = "cwd"
    options = {"temperature": 4.0}  # noqa: RUF012
    leading = ((4,),)
    example = TestAttentionTransfer.example


class TestPearson(LossContract):
    loss = "pearson"
    per_example = False
    leading = ((4,),)
    example = TestAttentionTransfer.example


class TestHCL(LossContract):
    loss = "hcl"
    leading = ((4,),)
    example = TestAttentionTransfer.example


class TestHCLOfTwoMaps(LossContract):
    loss = "hcl"
    leading = ((4,),)

    def example(self, *leading):
        return {
            "student": generate((*leading, 2, 3, 5, 5), 0.3, 1.0),
            "teacher": generate((*leading, 2, 3, 5, 5), 1.1, 2.0),
        }

    def cut(self, tensor):
        return tensor.unbind(1)


class TestChannelSimilarity(LossContract):
    loss = "channel_similarity"
    leading = ((4,),)
    example = TestAttentionTransfer.example


class TestFSP(LossContract):
    loss = "fsp"
    leading = ((4,),)
    example, cut = TestHCLOfTwoMaps.example, TestHCLOfTwoMaps.cut


class TestFSPByColumns(LossContract):
    loss = "fsp"
    options = {"distance": "columns"}  # noqa: RUF012
    leading = ((4,),)
    example, cut = TestHCLOfTwoMaps.example, TestHCLOfTwoMaps.cut


class TestMMD(LossContract):
    loss = "mmd"
    leading = ((3, 5),)

    def example(self, *leading):
        return {
            "student": generate((*leading, 2, 7), 0.3, 1.0),
            "teacher": generate((*leading, 2, 7), 1.1, 1.3),
            "mask": torch.arange(math.prod(leading)).view(leading) % 3 > 0,
        }

    def cut(self, tensor):
        return tensor.unbind(2)


# ---- edges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["attention_transfer", "nst", "cwd", "pearson", "hcl", "channel_similarity"])
def test_nan_is_not_swallowed(name, side):
    pair = {"student": FS.clone(), "teacher": FT.clone()}
    pair[side][2, 3, 1, 1] = math.nan
    expected = [name == "pearson" or b == 2 for b in range(6)]  # a statistic of the batch
    assert LOSSES.get(name)(pair["student"], pair["teacher"]).isnan().tolist() == expected


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("loss", [fsp, mmd])
def test_nan_is_not_swallowed_in_pairs(loss, side):
    sides = [(HS.clone(), HS.clone()), (HT, HT)]
    sides[side] = tuple(x.clone() for x in sides[side])
    sides[side][0][1, 0, 3] = math.nan
    assert loss(*sides).isnan().flatten(1).any(1).tolist() == [False, True] if loss is mmd else True
    assert loss(*sides)[1].isnan().any()
    assert not loss(*sides)[0].isnan().any()


@pytest.mark.parametrize("name", ["cwd", "pearson", "hcl", "channel_similarity"])
def test_other_channels_are_refused_with_a_cure(name):
    with pytest.raises(ValueError, match=r"\(6, 8, 6, 6\) and teacher \(6, 5, 6, 6\).*add project='conv1x1'"):
        LOSSES.get(name)(FS, FT[:, :5])


def test_cwd_refuses_another_size():
    with pytest.raises(ValueError, match="differ in shape; add project='conv1x1'"):
        cwd(FS, FT[:, :, :3])


@pytest.mark.parametrize("name", ["attention_transfer", "nst", "cwd", "pearson", "hcl", "channel_similarity"])
def test_maps_of_the_same_examples_are_needed(name):
    loss = LOSSES.get(name)
    with pytest.raises(ValueError, match=r"feature maps are \(B, C, H, W\), got .* tap a convolutional layer"):
        loss(HS, HT)
    with pytest.raises(ValueError, match="differ in shape before the last dimension"):
        loss(FS, FT[:4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_transfer(FS, FT, p=0.5), "p must be at least 1, got 0.5"),
        (lambda: attention_transfer(FS, FT, mode="sum"), "unknown mode 'sum'; known: code, paper"),
        (lambda: nst(FS, FT, kernel="rbf"), "unknown kernel 'rbf'; known: poly, linear, gaussian"),
        (lambda: nst(FS, FT, degree=0), "degree must be at least 1"),
        (lambda: nst(FS, FT, bandwidth=0.0), "bandwidth positive, got 2 and 0.0"),
        (lambda: cwd(FS, FT, temperature=0.0), "the temperature must be positive, got 0.0"),
        (lambda: hcl((FS, FS2), FT), "hcl got 2 student maps for 1 of the teacher; tap as many"),
        (lambda: hcl((), ()), "hcl got 0 student maps"),
        (lambda: hcl(FS, FT, output_sizes=[4, 0]), "output_sizes must be positive, got 4, 0"),
        (lambda: fsp((FS, FS2), (FT, FT2), distance="l2"), "unknown distance 'l2'; known: mse, columns"),
        (lambda: fsp((FS, FS2), (FT, FT2), pool="sum"), "unknown pool 'sum'; known: avg, max"),
        (lambda: fsp(FS, FT), "fsp compares two layers of each model, got 1; tap two of each"),
        (lambda: mmd((HS,) * 3, (HT,) * 3), "mmd compares two layers of each model, got 3"),
        (lambda: fsp((FS, HS), (FT, HT)), r"two maps .* or two hidden states"),
        (lambda: fsp((FS, FS2), (FT[:, :5], FT2)), r"teacher \(6, 5, 6, 6\) .* add project='conv1x1'"),
        (lambda: fsp((FS, FS2), (FT, FT2[:, :5])), r"teacher \(6, 5, 6, 6\) .* add project='conv1x1'"),
        (lambda: fsp((FS, FS2), (FT[:4], FT2[:4])), "differ in shape"),
        (lambda: mmd((HS, WIDE), (HT, HT)), "tap two layers of the same width"),
        (lambda: mmd((FS, FS2), (FT, FT2)), "two hidden states"),
        (lambda: mmd((HS, HS), (HT[:, :4], HT[:, :4])), "tap other places"),
        (lambda: mmd((HS, HS), (HT, HT), mask=MASK[:, :4]), r"a mask of shape \(2, 4\) does not fit"),
        (lambda: fsp((HS, HS), (HT, HT), mask=MASK[:, :4]), r"a mask of shape \(2, 4\) does not fit"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_power_of_one_counts_absolute_values():
    assert attention_transfer(FS, -FS, p=1.0).abs().max() < 1e-15


def test_pearson_is_one_minus_the_correlation():
    rows = torch.stack([FS.movedim(1, 0).flatten(1), FT.movedim(1, 0).flatten(1)], dim=1)
    correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in rows]).mean()
    count = rows.shape[-1]
    expected = (1 - correlation) * (count - 1) / count
    assert pearson(FS, FT).mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_pearson_ignores_scale_and_shift_of_a_channel():
    moved = 3 * FS + torch.arange(8.0, dtype=torch.float64).view(8, 1, 1)
    assert pearson(moved, FS).max() < 1e-10


def test_a_constant_channel_is_no_infinity_for_pearson():
    student = torch.ones_like(FS).requires_grad_()
    values = pearson(student, FT)
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.isfinite().all()
    assert pearson(FS[:1, :, :1, :1], FT[:1, :, :1, :1]).item() == 0.0  # one place has nothing to correlate


def test_small_maps_have_fewer_levels():
    small = [x[:, :, :2, :2] for x in (FS, FT)]
    weighed = (small[0] - small[1]).square().mean((1, 2, 3)) + 0.5 * (
        small[0].mean((2, 3)) - small[1].mean((2, 3))
    ).square().mean(1)
    torch.testing.assert_close(hcl(*small), weighed / 1.5)


@pytest.mark.parametrize("loss", [fsp, mmd])
def test_masked_positions_of_pairs_do_not_leak(loss):
    def value_and_gradient(student, teacher):
        student = student.clone().requires_grad_()
        values = loss((student, 2 * student), (teacher, teacher), mask=MASK)
        value = masked_mean(values, MASK if values.shape == MASK.shape else None)
        value.backward()
        return value, student.grad

    poisoned = [torch.where(MASK.unsqueeze(-1) == 1, x, math.inf) for x in (HS, HT)]
    (value, gradient), (expected, its_gradient) = value_and_gradient(*poisoned), value_and_gradient(HS, HT)
    assert value == expected
    assert not gradient[MASK == 0].any()
    torch.testing.assert_close(gradient[MASK == 1], its_gradient[MASK == 1])


def test_padding_does_not_change_a_flow():
    short = fsp((HS[:, :3], WIDE[:, :3]), (HT[:, :3], WIDE_TEACHER[:, :3]))
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    torch.testing.assert_close(fsp((HS, WIDE), (HT, WIDE_TEACHER), mask=mask), short)


def test_a_mask_of_examples_is_left_to_the_reduction():
    whole = torch.ones(2)
    assert torch.equal(fsp((HS, HS), (HT, HT), mask=whole), fsp((HS, HS), (HT, HT)))
    assert torch.equal(mmd((HS, HS), (HT, HT), mask=whole), mmd((HS, HS), (HT, HT)))


@pytest.mark.parametrize("loss", [fsp, mmd])
def test_an_example_without_valid_positions_is_finite(loss):
    assert loss((HS, HS), (HT, HT), mask=torch.zeros(2, 5)).isfinite().all()


@pytest.mark.parametrize("name", ["attention_transfer", "nst", "cwd", "pearson", "hcl", "channel_similarity"])
def test_memory_layout_does_not_matter(name):
    loss = LOSSES.get(name)
    moved = FS.to(memory_format=torch.channels_last), FT.to(memory_format=torch.channels_last)
    torch.testing.assert_close(loss(*moved), loss(FS, FT))


def test_channel_similarity_ignores_the_size_of_an_example():
    assert channel_similarity(5 * FS, FS).max() < 1e-12
