import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from limbeck.matching import layer_flow, match_layers, pool, regex_pairs, similarity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layers(widths, examples=20, seed=0, **options):
    random = generator(seed)
    return [torch.randn(examples, width, generator=random, **options) for width in widths]


def alike(students, teachers, seed=0):
    return torch.rand(students, teachers, generator=generator(seed), dtype=torch.float64)


# ---- similarity ------------------------------------------------------------------------------------------------


def naive_cka(x, y):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with Gram matrices and an explicit centring matrix, in loops."""
    x, y = x.double().tolist(), y.double().tolist()
    n = len(x)
    centre = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]

    def gram(rows):
        return [[sum(a * b for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]

    def product(a, b):
        return [[sum(a[i][k] * b[k][j] for k in range(n)) for j in range(n)] for i in range(n)]

    def hsic(k, other):
        whole = product(product(k, centre), product(other, centre))
        return sum(whole[i][i] for i in range(n)) / (n - 1) ** 2

    k, other = gram(x), gram(y)
    return hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))


@pytest.mark.parametrize("examples", [3, 12, 40])
def test_cka_is_the_ratio_of_hsic(examples):
    """With few examples it is computed over examples, with many over features."""
    students, teachers = layers([5, 9], examples), layers([4, 9, 30], examples, seed=1)
    expected = [[naive_cka(x, y) for y in teachers] for x in students]
    ours = similarity(students, teachers)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("examples", "width"), [(40, 6), (6, 40)])
def test_cka_knows_no_rotation_scale_nor_shift(examples, width):
    (layer,) = layers([width], examples, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator(3), dtype=torch.float64))
    moved = 1e-3 * layer @ rotation + 7.0
    torch.testing.assert_close(similarity([layer], [layer, moved]), torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cka_of_extreme_sizes(scale):
    students, teachers = layers([4], dtype=torch.float64), layers([5], seed=1, dtype=torch.float64)
    expected = similarity(students, teachers)
    torch.testing.assert_close(similarity([students[0] * scale], teachers), expected)


def test_a_constant_layer_is_like_no_other():
    constant, layer = torch.full((20, 3), 0.1), layers([4])[0]
    assert similarity([constant, layer], [layer, constant]).tolist() == [[0, 0], [pytest.approx(1), 0]]


def test_a_layer_finds_itself_among_noisy_ones():
    teachers = layers([8] * 5, examples=200)
    students = [teachers[i] + 0.3 * torch.randn(200, 8, generator=generator(9)) for i in (1, 3, 4)]
    assert match_layers(similarity(students, teachers)) == [(0, 1), (1, 3), (2, 4)]


@pytest.mark.parametrize(
    ("students", "teachers", "message"),
    [
        ([], layers([3]), "nothing to compare: 0 student and 1 teacher layers"),
        (layers([3]), [], "nothing to compare: 1 student and 0 teacher layers"),
        (layers([3]), [torch.zeros(20, 4, 3)], r"teacher layer 0 are \(20, 4, 3\), not \(N, D\); pool them"),
        (layers([3]), layers([3, 3], examples=19), "teacher layer 0 has 19 examples and student layer 0 has 20"),
        (layers([3]), [torch.full((20, 2), math.nan)], "teacher layer 0 are not all finite"),
    ],
)
def test_layers_that_cannot_be_compared(students, teachers, message):
    with pytest.raises(ValueError, match=message):
        similarity(students, teachers)


def test_unknown_similarity():
    with pytest.raises(ValueError, match="unknown similarity 'cosine'; known: cka"):
        similarity(layers([3]), layers([3]), kind="cosine")


def test_pool():
    hidden, mask = torch.randn(3, 4, 2, generator=generator()), torch.tensor([[1, 1, 0, 0], [1] * 4, [0] * 4])
    hidden[0, 3] = math.inf  # padding may hold anything
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0), torch.zeros(2)])
    torch.testing.assert_close(pool(hidden, mask), expected)
    torch.testing.assert_close(pool(hidden[1:]), hidden[1:].mean(1))
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pool(maps), maps.flatten(2).mean(2))
    vectors = hidden[1]
    assert pool(vectors) is vectors
    with pytest.raises(ValueError, match=r"pool takes .*, got \(3,\)"):
        pool(torch.zeros(3))


# ---- matching --------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 4), (2, 2), (2, 5), (3, 4), (4, 4), (4, 7)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES)
def test_the_best_of_all_monotone_maps(size, seed):
    matrix = alike(*size, seed=seed)
    maps = itertools.combinations(range(size[1]), size[0])
    best = max(maps, key=lambda chosen: sum(matrix[i, j].item() for i, j in enumerate(chosen)))
    assert match_layers(matrix) == list(enumerate(best))


@pytest.mark.parametrize("size", SIZES)
def test_the_best_of_all_maps(size):
    matrix = alike(*size, seed=5)
    maps = itertools.permutations(range(size[1]), size[0])
    best = max(maps, key=lambda chosen: sum(matrix[i, j].item() for i, j in enumerate(chosen)))
    assert match_layers(matrix, monotone=False) == list(enumerate(best))


def test_ties_go_to_the_shallower_layer():
    assert match_layers(torch.ones(2, 4)) == [(0, 0), (1, 1)]


def test_negative_similarities_are_matched_too():
    assert match_layers(torch.tensor([[-1.0, -2.0], [-3.0, -1.0]])) == [(0, 0), (1, 1)]


def whole_flows(rows, columns):
    """All matrices of whole numbers with these sums of rows and columns."""
    if not rows:
        if not any(columns):
            yield []
        return
    for row in itertools.product(*(range(c + 1) for c in columns)):
        if sum(row) == rows[0]:
            for rest in whole_flows(rows[1:], [c - r for c, r in zip(columns, row, strict=True)]):
                yield [row, *rest]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (2, 3), (3, 3), (3, 2), (2, 4)])
def test_the_cheapest_of_all_flows(size, seed):
    """The corners of a transport problem with whole supplies are whole, so trying these is enough."""
    matrix, (students, teachers) = alike(*size, seed=seed), size
    units = math.lcm(*size)
    flows = whole_flows([units // students] * students, [units // teachers] * teachers)
    cheapest = min(
        flows,
        key=lambda flow: sum(
            (1 - matrix[i, j]) * flow[i][j] for i, j in itertools.product(range(students), range(teachers))
        ),
    )
    expected = torch.tensor(cheapest, dtype=torch.float64) / units
    assert torch.equal(layer_flow(matrix), expected)
    assert match_layers(matrix, kind="emd") == [tuple(pair) for pair in expected.nonzero().tolist()]


@pytest.mark.parametrize("size", [(3, 4), (4, 12), (6, 5)])
def test_flow_against_another_solver(size):
    """The same cost as an interior-point solution of the problem in fractions, written as inequalities."""
    matrix, (students, teachers) = alike(*size, seed=7), size
    rows = np.kron(np.eye(students), np.ones((1, teachers)))
    columns = np.kron(np.ones((1, students)), np.eye(teachers))
    bounds = np.array([1 / students] * students + [1 / teachers] * teachers)
    everything = np.ones((1, students * teachers))
    cost = (1 - matrix).flatten().numpy()
    solved = linprog(cost, np.vstack([rows, columns]), bounds, everything, [1.0], method="highs-ipm")
    flow = layer_flow(matrix)
    assert (flow * (1 - matrix)).sum().item() == pytest.approx(solved.fun, rel=1e-9)
    torch.testing.assert_close(flow.sum(1), torch.full((students,), 1 / students, dtype=torch.float64))
    torch.testing.assert_close(flow.sum(0), torch.full((teachers,), 1 / teachers, dtype=torch.float64))
    assert (flow > 0).sum() <= students + teachers - 1


def test_a_student_deeper_than_its_teacher():
    with pytest.raises(
        ValueError, match="3 student layers cannot each have one of 2 teacher layers; use kind='emd'"
    ):
        match_layers(alike(3, 2))
    assert {s for s, _ in match_layers(alike(3, 2), kind="emd")} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["cka", "emd"])
@pytest.mark.parametrize("wrong", [torch.ones(3), torch.zeros(0, 3), torch.tensor([[1.0, math.nan]])])
def test_no_matrix_of_similarities(kind, wrong):
    with pytest.raises(ValueError, match="similarity must be a finite matrix"):
        match_layers(wrong, kind=kind)


def test_unknown_matching():
    with pytest.raises(ValueError, match="unknown matching 'best'; known: cka, emd"):
        match_layers(alike(2, 2), kind="best")


# ---- names -----------------------------------------------------------------------------------------------------

STUDENT = ["", "embed", "blocks.0", "blocks.0.mlp", "blocks.1", "blocks.1.mlp"]
TEACHER = ["", "embed", *(f"encoder.layer.{i}" for i in range(4)), *(f"blocks.{i}.mlp.out" for i in range(4))]


def test_names_by_back_reference():
    pairs = regex_pairs(STUDENT, TEACHER, r"^blocks\.(\d+)$", r"encoder.layer.\1")
    assert pairs == [("blocks.0", "encoder.layer.0"), ("blocks.1", "encoder.layer.1")]


def test_what_the_pattern_does_not_cover_is_kept():
    assert regex_pairs(STUDENT, TEACHER, r"mlp$", "mlp.out") == [
        ("blocks.0.mlp", "blocks.0.mlp.out"),
        ("blocks.1.mlp", "blocks.1.mlp.out"),
    ]


def test_names_by_arithmetic():
    pairs = regex_pairs(STUDENT, TEACHER, r"^blocks\.(\d+)$", lambda m: f"encoder.layer.{2 * int(m[1]) + 1}")
    assert pairs == [("blocks.0", "encoder.layer.1"), ("blocks.1", "encoder.layer.3")]


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"^blocks\.(\d+)$", r"encoder.layers.\1", "which the teacher has not; did you mean 'encoder.layer.0'"),
        (
            r"^blocks\.(\d+)$",
            r"encoder.layer.{2*\1+1}",
            r"becomes 'encoder.layer.\{2\*0\+1\}', which the teacher has",
        ),
        (r"^block\.(\d+)$", r"encoder.layer.\1", "no module of the student matches"),
        (r"^blocks\.(\d+$", r"\1", "cannot replace"),
        (r"^blocks\.(\d+)$", r"\2", "cannot replace .* invalid group reference 2"),
        (r"^blocks\.(\d+)$", lambda match: match[3], "cannot replace"),
    ],
)
def test_names_that_do_not_fit(pattern, replacement, message):
    with pytest.raises(ValueError, match=message):
        regex_pairs(STUDENT, TEACHER, pattern, replacement)
