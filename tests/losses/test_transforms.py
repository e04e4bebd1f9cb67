"""What is done to both sides before a loss, and temperatures of each example's own, with several losses."""

import math
import statistics

import pytest
import torch

from limbeck.losses import (
    cosine,
    cross_entropy,
    dist,
    dkd,
    forward_kl,
    js_divergence,
    logit_mse,
    reverse_kl,
    soft_cross_entropy,
)
from limbeck.losses.transforms import TEMPERATURES, TRANSFORMS, build_temperature, build_transform
from tests.golden_cases import CLASSES, INPUTS, TOKEN_LABELS, generate
from tests.losses.proofs import weighted_gradient
from tests.losses.test_labels import IGNORED
from tests.losses.test_logits import (
    naive_forward_kl,
    naive_js,
    naive_logit_mse,
    naive_reverse_kl,
    naive_soft_cross_entropy,
)
from tests.losses.test_ranking import naive_dist
from tests.losses.test_targets import naive_dkd

LS, LT, SS, ST = (INPUTS[name] for name in ("LS", "LT", "SS", "ST"))
PAIRS = [(LS, LT, CLASSES), (SS, ST, TOKEN_LABELS)]


def rows(tensor):
    return tensor.reshape(-1, tensor.shape[-1])


def naive_standardize(student, teacher, labels, epsilon=1e-7):
    """Row by row, from the definition, with the unbiased deviation."""

    def one(row):
        mean = sum(row) / len(row)
        deviation = (sum((z - mean) ** 2 for z in row) / (len(row) - 1)) ** 0.5
        return torch.stack([(z - mean) / (epsilon + deviation) for z in row])

    return tuple(torch.stack([one(r) for r in rows(side)]).view(side.shape) for side in (student, teacher))


def naive_probability_shift(student, teacher, labels):
    shifted = []
    for row, label in zip(rows(teacher).tolist(), labels.flatten().tolist(), strict=True):
        if label != IGNORED:
            best = row.index(max(row))
            row[best], row[label] = row[label], row[best]
        shifted.append(row)
    return student, torch.tensor(shifted, dtype=teacher.dtype).view(teacher.shape)


def naive_vocabulary(student, teacher, labels, size=None):
    """Nothing but minus infinity beyond the size, which has no probability."""
    size = min(student.shape[-1], teacher.shape[-1]) if size is None else size
    return tuple(torch.stack([side[..., c] for c in range(size)], -1) for side in (student, teacher))


SEVERAL = {  # a loss, its second implementation, options of both
    "forward_kl": (forward_kl, naive_forward_kl, {"temperature": 2.0}),
    "reverse_kl": (reverse_kl, naive_reverse_kl, {"temperature": 2.0}),
    "js_divergence": (js_divergence, naive_js, {"beta": 0.3, "temperature": 3.0}),
    "soft_cross_entropy": (soft_cross_entropy, naive_soft_cross_entropy, {"temperature": 2.0}),
    "logit_mse": (logit_mse, naive_logit_mse, {"temperature": 2.0}),
    "dkd": (dkd, naive_dkd, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}),
    "dist": (dist, naive_dist, {"beta": 1.0, "gamma": 2.0, "temperature": 2.0}),
}
SPECS = [
    ("standardize", naive_standardize),
    ({"kind": "standardize", "epsilon": 0.1}, naive_standardize),
    ("probability_shift", naive_probability_shift),
    ("vocabulary", naive_vocabulary),
    ({"kind": "vocabulary", "size": 10}, naive_vocabulary),
]


def options_of(spec):
    return {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "kind"}


def check(ours, theirs, student, teacher):
    """Values and gradients of two ways to compute the same."""
    (values, gradients), (expected, wanted) = (weighted_gradient(f, student, teacher, {}) for f in (ours, theirs))
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pair", PAIRS, ids=["predictions", "tokens"])
@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize(("spec", "reference"), SPECS, ids=[str(spec) for spec, _ in SPECS])
def test_a_transform_composes_with_a_loss(spec, reference, name, pair):
    (loss, naive, options), (student, teacher, labels) = SEVERAL[name], pair
    transform = build_transform(spec)
    extra = {**options, **({"labels": labels} if name == "dkd" else {})}
    check(
        lambda s, t: loss(*transform(s, t, labels), **extra),
        lambda s, t: naive(*reference(s, t, labels, **options_of(spec)), **extra),
        student,
        teacher,
    )


def cosine_of(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def naive_flsw(student, teacher, base=4.0, beta=1.0, gamma=1.0, minimum=0.1):
    pairs = zip(rows(student).tolist(), rows(teacher).tolist(), strict=True)
    weights = [(1 - cosine_of(s, t)) ** gamma for s, t in pairs]
    return around(weights, student, base, beta, minimum)


def naive_cwsm(student, teacher, base=4.0, beta=1.0, minimum=0.1):
    weights = []
    for row in rows(student).tolist():
        parts = [math.exp(z) for z in row]
        weights.append(1 / (max(parts) / sum(parts) + 1e-3))
    return around(weights, student, base, beta, minimum)


def around(weights, student, base, beta, minimum):
    mean = statistics.fmean(weights)
    values = [max(minimum, base + beta * (mean - w)) for w in weights]
    return torch.tensor(values, dtype=student.dtype).view(student.shape[:-1])


OWN_SPECS = [
    ("flsw", naive_flsw),
    ({"kind": "flsw", "base": 8.0, "beta": 2.0, "gamma": 2.0}, naive_flsw),
    ({"kind": "flsw", "base": 1.0, "beta": 5.0, "gamma": 0.5, "minimum": 0.5}, naive_flsw),
    ("cwsm", naive_cwsm),
    ({"kind": "cwsm", "base": 3.0, "beta": 0.5}, naive_cwsm),
    ({"kind": "cwsm", "base": 1.0, "beta": 3.0, "minimum": 0.7}, naive_cwsm),
]
own_specs = pytest.mark.parametrize(("spec", "reference"), OWN_SPECS, ids=[str(spec) for spec, _ in OWN_SPECS])


@pytest.mark.parametrize("pair", PAIRS, ids=["predictions", "tokens"])
@pytest.mark.parametrize("name", SEVERAL)
@own_specs
def test_an_own_temperature_composes_with_a_loss(spec, reference, name, pair):
    (loss, naive, options), (student, teacher, labels) = SEVERAL[name], pair
    extra = {k: v for k, v in options.items() if k != "temperature"}
    extra |= {"labels": labels} if name == "dkd" else {}
    own = build_temperature(spec)
    check(
        lambda s, t: loss(s, t, temperature=own(s, t), **extra),
        lambda s, t: naive(s, t, temperature=reference(s.detach(), t, **options_of(spec)), **extra),
        student,
        teacher,
    )


# ---- transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*TRANSFORMS, *(spec for spec, _ in SPECS[1::3])], ids=str)
@pytest.mark.parametrize("given", ["built", "bare"])
def test_no_gradient_reaches_the_teacher(spec, given):
    student, teacher = LS.clone().requires_grad_(), LT.clone().requires_grad_()
    if given == "built":
        sides = build_transform(spec)(student, teacher, CLASSES)
    else:
        sides = TRANSFORMS.get(spec if isinstance(spec, str) else spec["kind"])(student, teacher, labels=CLASSES)
    assert sides[0].requires_grad
    assert not sides[1].requires_grad


@pytest.mark.parametrize("spec", [*TRANSFORMS])
def test_nothing_is_changed_in_place(spec):
    student, teacher = LS.clone(), LT.clone()
    build_transform(spec)(student, teacher, CLASSES)
    assert torch.equal(student, LS)
    assert torch.equal(teacher, LT)


def test_standardize_is_differentiated_through():
    student = LS.clone().requires_grad_()
    torch.autograd.gradcheck(lambda s: build_transform("standardize")(s, LT, None)[0], (student,))


def test_standardized_logits_have_mean_zero_and_deviation_one():
    for side in build_transform("standardize")(LS, LT, None):
        torch.testing.assert_close(side.mean(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(side.std(-1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)


def test_standardize_makes_shift_and_scale_of_logits_irrelevant():
    standardize = build_transform({"kind": "standardize", "epsilon": 0.0})
    student, teacher = standardize(3 * LT + 5, LT, None)
    assert forward_kl(student, teacher).abs().max() < 1e-12


def test_standardize_leaves_out_a_class_that_cannot_occur():
    more = torch.full((6, 2), -math.inf, dtype=torch.float64)
    student = LS.clone().requires_grad_()
    sides = build_transform("standardize")(torch.cat([student, more], -1), torch.cat([LT, more], -1), None)
    expected = build_transform("standardize")(LS, LT, None)
    for ours, wanted in zip(sides, expected, strict=True):
        torch.testing.assert_close(ours[:, :10], wanted, rtol=1e-12, atol=0)
        assert ours[:, 10:].isneginf().all()
    forward_kl(*sides).sum().backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_that_do_not_vary_become_zero_without_a_gradient(dtype):
    student = torch.full((2, 4), 3.0, dtype=dtype, requires_grad=True)
    sides = build_transform("standardize")(student, torch.zeros(2, 4, dtype=dtype), None)
    assert sides[0].dtype == torch.float32
    assert not sides[0].any()
    assert not sides[1].any()
    forward_kl(sides[0], LT[:2, :4].float()).sum().backward()
    assert not student.grad.any()


@pytest.mark.parametrize("logits", [torch.tensor([[4.0]]), torch.full((1, 3), -math.inf)], ids=["one", "none"])
def test_standardize_with_hardly_a_class(logits):
    assert (
        build_transform("standardize")(logits, logits, None)[0].isfinite().tolist() == logits.isfinite().tolist()
    )


def test_huge_half_precision_logits_are_standardized():
    student, teacher = build_transform("standardize")((LS * 1e4).half(), (LT * 1e4).half(), None)
    expected = build_transform("standardize")(LS, LT, None)
    torch.testing.assert_close(student.double(), expected[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(teacher.double(), expected[1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("spec", ["standardize", "vocabulary"])
def test_nan_is_not_swallowed(spec):
    student = LS.clone()
    student[2, 3] = math.nan
    values = forward_kl(*build_transform(spec)(student, LT, None))
    assert values.isnan().tolist() == [False, False, True, False, False, False]


def test_probability_shift_puts_the_teacher_right():
    _, shifted = build_transform("probability_shift")(LS, LT, CLASSES)
    assert torch.equal(shifted.argmax(-1), CLASSES)
    assert torch.equal(shifted.sort(-1).values, LT.sort(-1).values)


def test_probability_shift_leaves_positions_without_a_label():
    _, shifted = build_transform("probability_shift")(SS, ST, TOKEN_LABELS)
    missing = TOKEN_LABELS == IGNORED
    assert torch.equal(shifted[missing], ST[missing])
    assert not torch.equal(shifted, ST)


def test_probability_shift_needs_labels():
    with pytest.raises(ValueError, match="probability_shift needs labels, and there are none"):
        build_transform("probability_shift")(LS, LT, None)
    with pytest.raises(ValueError, match="label 10 lies outside the 10 classes"):
        build_transform("probability_shift")(LS, LT, CLASSES + 1)
    with pytest.raises(ValueError, match=r"labels of shape \(5,\) do not fit"):
        build_transform("probability_shift")(LS, LT, CLASSES[:5])


@pytest.mark.parametrize(("wide", "narrow"), [(0, 1), (1, 0)])
def test_vocabulary_gives_padding_no_probability(wide, narrow):
    """It is as if the padding were at minus infinity, and not, as in some kernels, at a logit of zero."""
    sides = [LS, LT]
    sides[wide] = torch.cat([sides[wide], generate((6, 4), 0.3, 5.0)], -1)
    student, teacher = build_transform("vocabulary")(*sides, None)
    torch.testing.assert_close(forward_kl(student, teacher), forward_kl(LS, LT), rtol=1e-12, atol=0)
    cut = build_transform({"kind": "vocabulary", "size": 8})(*sides, None)
    torch.testing.assert_close(forward_kl(*cut), forward_kl(LS[:, :8], LT[:, :8]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_vocabulary_that_does_not_fit(size):
    with pytest.raises(ValueError, match=f"a vocabulary of size {size} does not fit a student with 10"):
        build_transform({"kind": "vocabulary", "size": size})(LS, LT, None)


def test_transforms_follow_each_other():
    """Cut, then put right, then standardised: the order in which they are applied."""
    student, teacher = torch.cat([LS, LS[:, :2] + 9], -1), LT
    for spec in ("vocabulary", "probability_shift", "standardize"):
        student, teacher = build_transform(spec)(student, teacher, CLASSES)
    expected = naive_standardize(LS, naive_probability_shift(LS, LT, CLASSES)[1], CLASSES)
    torch.testing.assert_close(student, expected[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(teacher, expected[1], rtol=1e-12, atol=1e-15)


# ---- temperatures ---------------------------------------------------------------------------------------------


@own_specs
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_own_temperatures_are_positive_and_have_no_gradient(spec, reference, scale):
    for dtype in (torch.float16, torch.float32, torch.float64):
        student, teacher = (scale * LS).to(dtype).requires_grad_(), (scale * LT).to(dtype)
        own = build_temperature(spec)(student, teacher)
        assert own.shape == (6,)
        assert not own.requires_grad
        assert (own >= options_of(spec).get("minimum", 0.1) * (1 - 1e-6)).all()
        assert own.isfinite().all()


@pytest.mark.parametrize("name", [*TEMPERATURES])
def test_a_large_beta_does_not_make_temperatures_negative(name):
    own = build_temperature({"kind": name, "base": 1.0, "beta": 100.0})(LS, LT)
    assert own.min().item() == pytest.approx(0.1)
    assert forward_kl(LS, LT, temperature=own).isfinite().all()


@pytest.mark.parametrize("name", [*TEMPERATURES])
def test_the_mean_of_own_temperatures_is_the_base(name):
    assert build_temperature({"kind": name, "base": 5.0})(LS, LT).mean().item() == pytest.approx(5.0)


@pytest.mark.parametrize("name", [*TEMPERATURES])
def test_masked_positions_do_not_count_in_the_mean(name):
    mask = TOKEN_LABELS != IGNORED
    own = build_temperature(name)(torch.where(mask[..., None], SS, math.nan), ST, mask)
    torch.testing.assert_close(own[mask], build_temperature(name)(SS[mask], ST[mask]))


@pytest.mark.parametrize("name", [*TEMPERATURES])
def test_a_class_that_cannot_occur_does_not_change_a_temperature(name):
    more = torch.full((6, 2), -math.inf, dtype=torch.float64)
    own = build_temperature(name)(torch.cat([LS, more], -1), torch.cat([LT, more], -1))
    torch.testing.assert_close(own, build_temperature(name)(LS, LT), rtol=1e-12, atol=0)


def test_flsw_of_equal_directions_survives_rounding():
    """A cosine may be rounded to more than 1, whose difference has no square root."""
    own = build_temperature({"kind": "flsw", "gamma": 0.5})(LS.float() * 3, LS.float())
    torch.testing.assert_close(own, torch.full((6,), 4.0), rtol=0, atol=2e-3)


def test_flsw_weighs_by_the_angle():
    own = build_temperature({"kind": "flsw", "beta": 2.0})(LS, LT)
    angles = cosine(LS, LT)
    torch.testing.assert_close(own, 4 + 2 * (angles.mean() - angles), rtol=1e-12, atol=0)


# ---- probabilities --------------------------------------------------------------------------------------------


def test_probabilities_become_logits_and_logits_stay():
    p, q = torch.softmax(LS, dim=-1), torch.softmax(LT, dim=-1)
    transform = build_transform("log_of_probabilities")
    expected = (q * (q.log() - p.log())).sum(dim=-1)
    for student, teacher in ((p, q), (LS, q), (p, LT), (LS, LT)):
        torch.testing.assert_close(forward_kl(*transform(student, teacher, None)), expected)
    assert transform(LS, LT, None)[0] is LS


@pytest.mark.parametrize(
    "rows",
    [[[0.5, 0.5], [0.5, 0.6]], [[1.5, -0.5], [0.5, 0.5]], [[0.2, 0.2], [0.5, 0.5]], [[2.0, 2.0], [0.0, 0.0]]],
)
def test_what_is_no_distribution_in_every_row_stays(rows):
    side = torch.tensor(rows)
    assert build_transform("log_of_probabilities")(side, LT, None)[0] is side


def test_probabilities_of_zero_and_of_masked_rows():
    side = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.25, 0.75]], requires_grad=True)
    student, _ = build_transform("log_of_probabilities")(side, torch.zeros(3, 2), None)
    assert student.isfinite().all()
    torch.testing.assert_close(student.softmax(dim=-1)[[0, 2]], side.detach()[[0, 2]])
    student[2].sum().backward()
    assert side.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_in_half_precision(dtype):
    side = torch.softmax(torch.randn(20, 50, generator=torch.Generator().manual_seed(0)), dim=-1)
    student, _ = build_transform("log_of_probabilities")(side.to(dtype), LT, None)
    torch.testing.assert_close(student.softmax(dim=-1), side, atol=0.005, rtol=0.02)


# ---- building -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [build_transform, build_temperature])
def test_unknown_kinds(build):
    with pytest.raises(ValueError, match=r"unknown (transform|temperature) 'zzz'; known: "):
        build("zzz")
    with pytest.raises(ValueError, match="needs the key 'kind'"):
        build({"size": 3})


def test_options_are_checked_when_built():
    with pytest.raises(TypeError, match=r"transform 'vocabulary' has no option 'sise'; did you mean 'size'\?"):
        build_transform({"kind": "vocabulary", "sise": 3})
    with pytest.raises(TypeError, match="transform 'probability_shift' has no option 'labels'"):
        build_transform({"kind": "probability_shift", "labels": CLASSES})
    with pytest.raises(TypeError, match="temperature 'cwsm' has no option 'gamma'"):
        build_temperature({"kind": "cwsm", "gamma": 2.0})


@pytest.mark.parametrize("options", [{"base": 0.0}, {"base": -4.0}, {"minimum": 0.0}, {"base": math.nan}])
@pytest.mark.parametrize("name", [*TEMPERATURES])
def test_a_temperature_is_positive(name, options):
    with pytest.raises(ValueError, match="a temperature must be positive, got base"):
        build_temperature({"kind": name, **options})(LS, LT)


def halved(student, teacher, *, labels=None, by=2.0):
    return student / by, teacher / by


def test_a_plugin_by_its_path():
    student, teacher = build_transform({"kind": f"{__name__}:halved", "by": 4.0})(
        LS, LT.clone().requires_grad_(), None
    )
    assert torch.equal(student, LS / 4)
    assert not teacher.requires_grad
    assert cross_entropy(student, CLASSES).shape == (6,)
