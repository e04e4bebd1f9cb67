"""Losses against targets of a few entries: exact over K + 1 classes, a lower bound, or right on average."""

import math

import pytest
import torch
from torch import nn

from limbeck import Distiller, Term, sparse
from limbeck.losses import LOSSES, compare_by, evaluate, loss, traits_of
from limbeck.losses.sparse import Parted, bucketed, over_buckets, parted
from limbeck.losses.transforms import TEMPERATURES, TRANSFORMS
from limbeck.sparse import sample, top_k
from limbeck.types import Signal, TopK

V, T = 9, (1.0, 2.0, 0.5)
NEEDS_LABELS = {"dkd", "wsld", "mft", "ofa"}
ACCEPTING = {
    "forward_kl": {},
    "reverse_kl": {},
    "js_divergence": {"beta": 0.3},
    "skewed_forward_kl": {"alpha": 0.2},
    "skewed_reverse_kl": {"alpha": 0.2},
    "total_variation": {},
    "soft_cross_entropy": {},
    "listwise_kl": {},
    "hard_label": None,
    "dkd": {},
    "wsld": {},
    "mft": {},
    "ofa": {},
}
CASES = [
    (name, {} if options is None else {**options, "temperature": t})
    for name, options in ACCEPTING.items()
    for t in (T if options is not None else (1.0,))
]
DIVERGENCES = [
    case
    for case in CASES
    if case[0] not in NEEDS_LABELS | {"hard_label"}  # the bound is of sums over classes
]
over = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def sides(*leading, **options):
    return logits(*leading, V, seed=1, **options), logits(*leading, V, seed=2, **options)


def asked(name, leading):
    """Labels where a loss asks for them; one position has none."""
    if name not in NEEDS_LABELS:
        return {}
    labels = torch.randint(V, leading, generator=torch.Generator().manual_seed(3))
    labels.view(-1)[0] = -100
    return {"labels": labels}


def value_and_gradient(name, student, teacher, weights=None, **options):
    student = student.detach().clone().requires_grad_()
    function = LOSSES.get(name) if isinstance(name, str) else name
    values = function(student, teacher, **options)
    weights = (
        torch.arange(1, values.numel() + 1, dtype=values.dtype).view_as(values) if weights is None else weights
    )
    (gradient,) = torch.autograd.grad((values * weights).sum(), student)
    return values.detach(), gradient


def test_the_list_here_is_the_list_there():
    own = {n for n in LOSSES if LOSSES.get(n).__module__.startswith("limbeck.losses")}
    assert {n for n in own if traits_of(LOSSES.get(n)).sparse is True} == set(ACCEPTING)


@over
@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_all_entries_give_the_dense_value_and_gradient(name, options, leading):
    student, teacher = sides(*leading)
    more = asked(name, leading)
    dense = value_and_gradient(name, student, teacher, **options, **more)
    whole = value_and_gradient(name, student, top_k(teacher, V, T), **options, **more)
    torch.testing.assert_close(whole, dense)


@pytest.mark.parametrize(("name", "options"), DIVERGENCES, ids=str)
def test_few_entries_give_a_lower_bound_that_grows_with_them(name, options):
    student, teacher = sides(200)
    before = torch.full((200,), -torch.inf, dtype=torch.float64)
    for k in range(1, V + 1):
        values = LOSSES.get(name)(student, top_k(teacher, k, T), **options)
        assert (values >= before - 1e-12).all()
        before = values
    dense = LOSSES.get(name)(student, teacher, **options)
    torch.testing.assert_close(before, dense)
    one = LOSSES.get(name)(student, top_k(teacher, 1, T), **options)
    assert (one < dense - 1e-3).any()


def coarse(z, ids, t):
    """Probabilities of kept entries and all others at a temperature, one position, in plain Python floats."""
    e = [math.exp(v / t) for v in z]
    total = sum(e)
    return [e[i] / total for i in ids] + [sum(v for i, v in enumerate(e) if i not in ids) / total]


def naive(name, p, q):
    pairs = list(zip(p, q, strict=True))
    if name == "forward_kl":
        return sum(a * math.log(a / b) for a, b in pairs)
    if name == "reverse_kl":
        return sum(b * math.log(b / a) for a, b in pairs)
    if name == "total_variation":
        return sum(abs(a - b) for a, b in pairs) / 2
    if name == "soft_cross_entropy":
        return -sum(a * math.log(b) for a, b in pairs)
    mix = [(a + b) / 2 for a, b in pairs]
    return (naive("forward_kl", p, mix) + naive("forward_kl", q, mix)) / 2


@pytest.mark.parametrize("t", T)
@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "total_variation", "soft_cross_entropy", "js_divergence"]
)
def test_values_are_those_of_the_coarser_distributions(name, t):
    student, teacher = sides(8)
    kept = top_k(teacher, 3, T)
    values = LOSSES.get(name)(student, kept, temperature=t)
    for b, value in enumerate(values.tolist()):
        ids = kept.ids[b].tolist()
        p, q = coarse(teacher[b].tolist(), ids, t), coarse(student[b].tolist(), ids, t)
        assert value == pytest.approx(t * t * naive(name, p, q))


@pytest.mark.parametrize("name", ["forward_kl", "soft_cross_entropy"])
@pytest.mark.parametrize("t", T)
@pytest.mark.parametrize("k", [1, 3, V])
def test_the_gradient_moves_mass_within_the_rest_as_the_student_has_it(name, t, k):
    """It is T (q - target), where an entry that is not kept has the target P_rest q_j / Q_rest."""
    student, teacher = sides(8)
    kept = top_k(teacher, k, T)
    _, gradient = value_and_gradient(name, student, kept, torch.ones(8, dtype=torch.float64), temperature=t)
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    known = torch.zeros_like(p, dtype=torch.bool).scatter(-1, kept.ids, True)
    rest_p, rest_q = (side.masked_fill(known, 0.0).sum(-1, keepdim=True) for side in (p, q))
    target = torch.where(known, p, rest_p * q / rest_q)
    torch.testing.assert_close(gradient, t * (q - target))


@pytest.mark.parametrize(
    ("name", "options"),
    [c for c in CASES if c[0] not in {"soft_cross_entropy", "wsld", "ofa", "hard_label", "mft"}],
    ids=str,
)
def test_zero_where_the_student_says_the_same(name, options):
    teacher = logits(6, V)
    values, gradient = value_and_gradient(name, teacher, top_k(teacher, 3, T), **options, **asked(name, (6,)))
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-9, rtol=0)
    if name != "total_variation":  # whose gradient jumps there
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


def test_the_decision_is_known_from_a_single_entry():
    student, teacher = sides(50)
    kept = top_k(teacher, 1)  # "all others" hold more than the best entry in many positions
    assert (kept.log_rest > 0).any()
    dense = value_and_gradient("hard_label", student, teacher)
    torch.testing.assert_close(value_and_gradient("hard_label", student, kept), dense)


def test_the_correction_of_a_wrong_teacher_is_exact_where_the_label_is_kept():
    """How far the label is raised follows from the largest class, not from the sum of all others."""
    student, teacher = sides(300)
    kept = top_k(teacher, 3)
    labels = kept.ids[torch.arange(300), torch.arange(300) % 3]
    t = 1.0
    p, q = teacher.softmax(-1), student.softmax(-1)
    own, best = p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), p.amax(-1)
    wrong = (best - own + 0.2) / (1 + best - own + 1e-7)
    right = ((own + 0.2).clamp(max=1) - own) / (1 - own + 1e-7)
    share = torch.where(own < best, wrong, right).unsqueeze(-1)
    corrected = p * (1 - share) + share * nn.functional.one_hot(labels, V)
    pairs = [
        torch.cat([side.gather(-1, kept.ids), 1 - side.gather(-1, kept.ids).sum(-1, keepdim=True)], -1)
        for side in (corrected, q)
    ]
    expected = (pairs[0] * (pairs[0] / pairs[1]).log()).sum(-1)
    found = LOSSES.get("mft")(student, kept, labels=labels, temperature=t)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(NEEDS_LABELS))
def test_a_label_that_is_not_kept_is_one_of_all_others(name):
    """The value is the same for any such label, and that of K + 1 classes with the last one as the label."""
    student, teacher = sides(40)
    kept = top_k(teacher, 3)
    lowest, next_lowest = teacher.topk(2, largest=False).indices.unbind(-1)
    values = [LOSSES.get(name)(student, kept, labels=at, temperature=1.0) for at in (lowest, next_lowest)]
    torch.testing.assert_close(*values)
    assert values[0].isfinite().all()
    if name != "mft":  # which takes the label for less likely than "all others"
        last = torch.full((40,), 3)
        expected = LOSSES.get(name)(*bucketed(student, kept), labels=last, temperature=1.0)
        torch.testing.assert_close(values[0], expected)


@over
def test_ties_make_no_difference_to_a_bound(name, options):
    student, teacher = logits(5, V), torch.zeros(5, V, dtype=torch.float64)
    values = LOSSES.get(name)(student, top_k(teacher, 4, T), **options, **asked(name, (5,)))
    assert values.isfinite().all()


@over
@pytest.mark.parametrize("k", [1, 4, V])
def test_large_logits_and_vanishing_tails_stay_finite(name, options, k):
    """Within one position logits are up to 10,000 apart."""
    student, teacher = sides(5, scale=1e3)
    values, gradient = value_and_gradient(name, student, top_k(teacher, k, T), **options, **asked(name, (5,)))
    assert values.isfinite().all()
    assert gradient.isfinite().all()


def test_a_tail_that_no_probability_could_hold_has_its_share_in_the_reverse_divergence():
    """The teacher's rest has probability exp(-200), and the student half: T² Σ q log(q/p) is about 100 nats."""
    teacher, student = torch.tensor([[0.0, -200.0]]), torch.zeros(1, 2)
    found = LOSSES.get("reverse_kl")(student, top_k(teacher, 1))
    assert found.item() == pytest.approx(100 - math.log(2), rel=1e-6)


@over
@pytest.mark.parametrize("k", [2, 5, V])
def test_classes_that_cannot_occur_on_both_sides_are_not_there(name, options, k):
    """The same value and gradient as without them, k counting those that are there."""
    student, teacher = sides(6)
    more = asked(name, (6,))
    never = torch.full((6, 3), -torch.inf, dtype=torch.float64)
    wide = [torch.cat([side, never], dim=-1) for side in (student, teacher)]
    values, gradient = value_and_gradient(name, student, top_k(teacher, k, T), **options, **more)
    for kept in (k, k + 2) if k == V else (k,):
        padded = value_and_gradient(name, wide[0], top_k(wide[1], kept, T), **options, **more)
        torch.testing.assert_close(padded[0], values)
        torch.testing.assert_close(padded[1][:, :V], gradient)
        assert (padded[1][:, V:] == 0).all()


@over
def test_half_precision_stays_close(name, options):
    student, teacher = (side.to(torch.bfloat16) for side in sides(20))
    more = asked(name, (20,))
    exact = value_and_gradient(name, student.double(), top_k(teacher.double(), 4, T), **options, **more)
    kept = top_k(teacher, 4, T)
    values, gradient = value_and_gradient(name, student, kept, **options, **more)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=2e-2, atol=2e-2)
    stored = TopK(kept.ids.int().long(), V, T, kept.values.half(), kept.log_rest)
    close = LOSSES.get(name)(student.float(), stored, **options, **more)
    torch.testing.assert_close(close.double(), exact[0], rtol=2e-2, atol=2e-2)


def test_no_positions_and_any_layout_are_fine():
    student, teacher = logits(0, V).requires_grad_(), logits(0, V)
    for name, kept in (("forward_kl", top_k(teacher, 2)), ("soft_cross_entropy", sample(teacher, 2, head=1))):
        LOSSES.get(name)(student, kept).sum().backward()
    assert student.grad.shape == (0, V)
    turned, teacher = logits(2, 3, V).transpose(0, 1), logits(3, 2, V, seed=2)
    found = value_and_gradient("forward_kl", turned, top_k(teacher, V))
    torch.testing.assert_close(found, value_and_gradient("forward_kl", turned, teacher))


def test_gradients_agree_with_finite_differences():
    student, kept = logits(3, V).requires_grad_(), top_k(logits(3, V, seed=2), 4, T)
    assert torch.autograd.gradcheck(lambda z: LOSSES.get("forward_kl")(z, kept, temperature=2.0), student)
    assert torch.autograd.gradcheck(lambda z: bucketed(z, kept, 0.5)[0], student)


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("apart", [True, False])
def test_the_gradient_is_that_of_automatic_differentiation_block_by_block(k, apart, monkeypatch):
    monkeypatch.setattr(sparse, "BLOCK", 2 * V)
    z, ids = logits(7, V), logits(7, V, seed=2).topk(k).indices
    for t in T:
        ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
        out = ids if apart else ids[:, :0]
        found, expected = Parted.apply(ours, ids, out, t), parted(theirs, ids, out, t)
        torch.testing.assert_close(found, expected)
        for kept, rest in (found, expected):
            (kept.sin().sum() + rest.masked_fill(rest.isneginf(), 0.0).cos().sum()).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_compiler_does_the_same():
    student, kept = logits(3, V).requires_grad_(), top_k(logits(3, V, seed=2), 4, T)
    compiled = torch.compile(LOSSES.get("forward_kl"), backend="eager", fullgraph=True)
    found = value_and_gradient(compiled, student, kept, temperature=2.0)
    torch.testing.assert_close(found, value_and_gradient("forward_kl", student, kept, temperature=2.0))


@pytest.mark.parametrize("head", [0, 2])
@pytest.mark.parametrize("t", [2.0, 1.0, 3.0])
def test_sampled_cross_entropy_is_the_dense_one_on_average(head, t):
    """Value and gradient over 30,000 draws of each position, within five standard errors."""
    student, teacher, repeats = logits(2, V, seed=1), logits(2, V, seed=2, scale=1.5), 30_000
    drawn = sample(teacher.repeat(repeats, 1), 4, (2.0, 1.0, 3.0), torch.Generator().manual_seed(0), head=head)
    each = torch.ones(2 * repeats, dtype=torch.float64)
    values, gradients = value_and_gradient(
        "soft_cross_entropy", student.repeat(repeats, 1), drawn, each, temperature=t
    )
    dense = value_and_gradient("soft_cross_entropy", student, teacher, each[:2], temperature=t)
    own = value_and_gradient("forward_kl", student, teacher, each[:2], temperature=t)
    torch.testing.assert_close(own[1], dense[1])  # so it is forward_kl's gradient, too
    for found, expected in ((values.view(repeats, 2), dense[0]), (gradients.view(repeats, 2, V), dense[1])):
        error = found.std(dim=0) / repeats**0.5
        assert (error > 1e-4).any()
        assert (error < 0.05).all()  # the mean says something
        assert ((found.mean(dim=0) - expected).abs() < 5 * error + 1e-9).all()  # of a head it is exact


def test_sampled_weights_of_nothing_do_not_touch_what_cannot_occur():
    student = torch.tensor([[-torch.inf, 0.0, 0.0]])
    drawn = sample(torch.tensor([[-torch.inf, 5.0, -5.0]]), 8, generator=torch.Generator().manual_seed(0))
    values, gradient = value_and_gradient("soft_cross_entropy", student, drawn)
    assert values.item() == pytest.approx(math.log(2))
    assert gradient.isfinite().all()


def others():
    return sorted(set(ACCEPTING) - {"soft_cross_entropy"})


@pytest.mark.parametrize("name", others())
def test_drawn_entries_are_for_soft_cross_entropy(name):
    student, teacher = sides(4)
    with pytest.raises(ValueError, match="soft_cross_entropy"):
        LOSSES.get(name)(student, sample(teacher, 3), **asked(name, (4,)))


REFUSING = [
    "logit_mse",
    "margin_mse",
    "binary_kl",
    "dist",
    "class_correlation",
    "batch_correlation",
    "mse",
    "cosine",
]


@pytest.mark.parametrize("name", [*REFUSING, "cka", "cwd", "rkd_distance", "pkt"])
def test_other_losses_say_why_not(name):
    student, teacher = sides(4)
    with pytest.raises(ValueError, match=r"hold only some of the teacher's logits .* since .*; use forward_kl"):
        evaluate(name, student, top_k(teacher, 3))


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("make", [lambda z: top_k(z, 3), lambda z: sample(z, 3)])
def test_so_do_they_when_called_directly(name, make):
    student, teacher = sides(4)
    with pytest.raises(ValueError, match="only some of the teacher's logits"):
        LOSSES.get(name)(student, make(teacher))


@pytest.mark.parametrize("t", [4.0, 1.1])
def test_a_temperature_that_was_not_kept_is_refused(t):
    student, teacher = sides(4)
    with pytest.raises(ValueError, match=rf"known at temperature 1, 2, 0\.5, and not at {t:g}"):
        LOSSES.get("forward_kl")(student, top_k(teacher, 3, T), temperature=t)


def test_a_temperature_of_each_position_is_refused():
    student, teacher = sides(4)
    with pytest.raises(ValueError, match="not at one for each position"):
        LOSSES.get("forward_kl")(student, top_k(teacher, 3, T), temperature=torch.ones(4))
    for name in TEMPERATURES:
        with pytest.raises(ValueError, match=f"{name} needs all of the teacher's logits"):
            evaluate("forward_kl", student, top_k(teacher, 3, T), temperature=name)


def test_a_temperature_that_is_not_positive_is_refused():
    student, teacher = sides(4)
    with pytest.raises(ValueError, match="must be positive"):
        LOSSES.get("forward_kl")(student, top_k(teacher, 3, T), temperature=0.0)


def test_targets_of_other_inputs_or_vocabularies_are_refused():
    kept = top_k(logits(4, V), 3)
    with pytest.raises(ValueError, match="of other inputs"):
        LOSSES.get("forward_kl")(logits(5, V), kept)
    with pytest.raises(ValueError, match=r"transforms=\['vocabulary'\]"):
        LOSSES.get("forward_kl")(logits(4, V + 1), kept)
    for name in ("hard_label", "soft_cross_entropy"):
        with pytest.raises(ValueError, match="differ in shape"):
            LOSSES.get(name)(logits(4, V + 1), kept)


@pytest.mark.parametrize("name", ["standardize", "probability_shift"])
def test_transforms_that_need_all_logits_say_so(name):
    student, teacher = sides(4)
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{name} needs all of the teacher's logits"):
        evaluate("forward_kl", student, top_k(teacher, 3), transforms=name, labels=labels)


SIZES = [(151_936, 152_064), (152_064, 151_936)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", ["dense", "top_k", "sampled"])
def test_padded_vocabularies_align(sizes, form):
    """As if both had the smaller size, where the teacher keeps nothing of its padding among "all others"."""
    student, teacher = (logits(2, size, seed=size, dtype=torch.float32) for size in sizes)
    common = min(sizes)
    make = {
        "dense": lambda z: z,
        "top_k": lambda z: top_k(z, 8, T),
        "sampled": lambda z: sample(z, 8, T, torch.Generator().manual_seed(0)),
    }[form]
    name = "soft_cross_entropy" if form == "sampled" else "forward_kl"
    inside = teacher.index_fill(-1, torch.arange(common, sizes[1]), -torch.inf)  # no padding beyond, if any
    aligned = compare_by(name, transforms=["vocabulary"], temperature=2.0)
    found = value_and_gradient(lambda z, t: aligned(z, t), student, make(inside))
    expected = value_and_gradient(name, student[:, :common], make(teacher[:, :common]), temperature=2.0)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][:, :common], expected[1])
    assert (found[1][:, common:] == 0).all()
    with pytest.raises(ValueError, match=r"add transforms=\['vocabulary'\]"):
        evaluate(name, student, make(teacher), temperature=2.0)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_kept_entries_of_the_padding_lose_their_probability(k):
    """The teacher's two largest logits lie in its padding: the rest is compared as if they had never been."""
    student, teacher = logits(5, 7), torch.cat([logits(5, 7, seed=2), torch.full((5, 2), 20.0)], dim=-1).double()
    kept = top_k(teacher, k + 2, T)
    for name, options in DIVERGENCES:
        found = value_and_gradient(compare_by(name, transforms=["vocabulary"], **options), student, kept)
        without = value_and_gradient(name, student, top_k(teacher[:, :7], k, T), **options)
        torch.testing.assert_close(found, without)
    found = value_and_gradient(compare_by("hard_label", transforms=["vocabulary"]), student, kept)
    torch.testing.assert_close(found, value_and_gradient("hard_label", student, teacher[:, :7]))


def test_targets_of_padding_alone_say_nothing():
    student, teacher = logits(5, 7), torch.cat([logits(5, 7), torch.full((5, 2), 20.0)], dim=-1).double()
    function = compare_by("forward_kl", transforms=["vocabulary"])
    values, gradient = value_and_gradient(function, student, top_k(teacher, 2))
    assert (values.abs() < 1e-12).all()
    assert (gradient.abs() < 1e-12).all()


def brier(student, teacher, *, labels=None, temperature=1.0):
    p, q = ((side / temperature).softmax(-1) for side in (teacher, student))
    values = (p - q).square().sum(-1)
    if labels is None:
        return values
    return (values - q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)) * (labels >= 0)


@pytest.mark.parametrize("t", T)
def test_a_loss_of_ones_own_takes_them_over_buckets(t):
    function = over_buckets(brier)
    assert function.__name__ == "brier"
    student, teacher = sides(6)
    labels = torch.tensor([-100, 0, 1, 2, 3, 4])
    dense = value_and_gradient(brier, student, teacher, labels=labels, temperature=t)
    comparison = compare_by(function, temperature=t)
    whole = value_and_gradient(comparison, student, top_k(teacher, V, T), labels=labels)
    torch.testing.assert_close(whole, dense)
    torch.testing.assert_close(value_and_gradient(comparison, student, teacher, labels=labels), dense)
    few = function(student, top_k(teacher, 2, T), temperature=t)
    p, q = (side.softmax(-1) for side in bucketed(student, top_k(teacher, 2, T), t))
    torch.testing.assert_close(few, (p - q).square().sum(-1))


def test_a_registered_loss_keeps_what_over_buckets_says(monkeypatch):
    monkeypatch.setattr(LOSSES, "register", lambda function: function)
    assert traits_of(loss(over_buckets(brier))).sparse is True
    assert traits_of(loss(project="linear")(over_buckets(brier))).sparse is True
    student, teacher = sides(2)
    with pytest.raises(ValueError, match="compares all entries"):
        compare_by(brier)(student, top_k(teacher, 2))


def test_transforms_are_the_two_kinds():
    assert set(TRANSFORMS) >= {"standardize", "probability_shift", "vocabulary"}


class Kept:
    """A teacher that says what is left of another's logits."""

    def __init__(self, module, keep):
        self.module, self.keep = module, keep

    def offers(self, tap):
        return tap == "logits"

    def names(self):
        return ["logits"]

    def signal(self, batch, wants):
        with torch.no_grad():
            return Signal({"logits": self.keep(self.module(*batch["inputs"]))})


def models():
    torch.manual_seed(0)
    return nn.Linear(4, V).double(), nn.Linear(4, V).double()


def outcome(keep, terms, batches, counts=None):
    """The loss and the student's gradient over some batches."""
    student, teacher = models()
    distiller = Distiller(student, Kept(teacher, keep), terms)
    total = 0.0
    for batch in batches:
        value = distiller(batch, counts=counts).loss
        value.backward()
        total += value.item()
    return torch.tensor(total), student.weight.grad, student.bias.grad


TERMS = [
    Term("logits", loss="forward_kl", temperature=2.0, weight=0.5),
    Term("logits", loss="dkd", temperature=1.0, beta=2.0, name="dkd"),
    Term("logits", loss="hard_label", name="hard"),
]


def batch(*leading, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*leading, 4, generator=g, dtype=torch.float64)
    labels = torch.randint(V, leading, generator=g)
    labels[..., 0] = -100
    return {"inputs": (inputs,), "labels": labels}


@pytest.mark.parametrize("leading", [(6, 5), (6,)])
def test_a_distiller_learns_the_same_from_all_entries(leading):
    data = batch(*leading) if len(leading) == 2 else {**batch(6, 1), "inputs": (logits(6, 4),)}
    data["labels"] = data["labels"] if len(leading) == 2 else torch.arange(6)
    if len(leading) == 2:
        data["attention_mask"] = (torch.arange(5) < torch.arange(1, 7).unsqueeze(-1)).long()
    dense = outcome(lambda z: z, TERMS, [data])
    whole = outcome(lambda z: top_k(z, V, T), TERMS, [data])
    torch.testing.assert_close(whole, dense)


def test_a_mask_of_examples_leaves_them_out():
    terms = [Term("logits", loss="forward_kl", temperature=2.0, mask="known")]
    data = {"inputs": (logits(6, 4),), "labels": torch.arange(6), "known": torch.tensor([1, 0, 1, 1, 0, 0])}
    dense = outcome(lambda z: z, terms, [data])
    whole = outcome(lambda z: top_k(z, V, T), terms, [data])
    torch.testing.assert_close(whole, dense)


def test_masked_positions_may_hold_anything():
    """Even targets that are not finite get into no value and no gradient; drawn ones neither."""
    data = batch(4, 5)
    data["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0]] * 4)

    def spoilt(z):
        kept = top_k(z, 3, T)
        values, log_rest = kept.values.clone(), kept.log_rest.clone()
        values[:, 3:], log_rest[:, 3:] = torch.nan, torch.inf
        return TopK(kept.ids, V, T, values, log_rest)

    term = [Term("logits", loss="forward_kl", temperature=2.0, mask="attention_mask")]
    clean, dirty = (outcome(keep, term, [data]) for keep in (lambda z: top_k(z, 3, T), spoilt))
    torch.testing.assert_close(dirty, clean)

    def drawn(z, spoil):
        found = sample(z, 3, T, torch.Generator().manual_seed(0))  # as many entries as temperatures
        if spoil:
            found.weights[:, 3:] = torch.nan
        return found

    term = [Term("logits", loss="soft_cross_entropy", temperature=2.0, mask="attention_mask")]
    clean, dirty = (outcome(lambda z, s=spoil: drawn(z, s), term, [data]) for spoil in (False, True))
    assert clean[0].isfinite()
    torch.testing.assert_close(dirty, clean)


def test_a_step_in_parts_is_the_step():
    data = batch(6, 5)
    whole = {"inputs": data["inputs"], "labels": data["labels"]}
    student, teacher = models()
    counts = Distiller(student, teacher, TERMS).count(whole)
    parts = [
        {"inputs": (data["inputs"][0][rows],), "labels": data["labels"][rows]}
        for rows in (slice(0, 2), slice(2, 6))
    ]
    keep = lambda z: top_k(z, 3, T)  # noqa: E731
    torch.testing.assert_close(outcome(keep, TERMS, parts, counts), outcome(keep, TERMS, [whole]))


def test_the_plan_knows_the_shape_of_the_logits():
    student, teacher = models()
    distiller = Distiller(student, Kept(teacher, lambda z: top_k(z, 3, T)), TERMS)
    plan = distiller.preflight(batch(6, 5))
    assert [p.teacher_shape for p in plan] == [(2, 5, V)] * 3


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (Term("logits", loss="forward_kl", project="linear"), "drop project='linear'"),
        (Term("logits", loss="mse"), "compares all entries"),
        (Term("logits", loss="forward_kl", temperature=7.0), "and not at 7"),
        (Term("logits", loss="dist"), "keeps other classes"),
    ],
)
def test_the_preflight_refuses_what_cannot_be(term, said):
    student, teacher = models()
    distiller = Distiller(student, Kept(teacher, lambda z: top_k(z, 3, T)), [term])
    with pytest.raises(ValueError, match=said):
        distiller.preflight(batch(6, 5))


def test_autocast_changes_nothing():
    student, teacher = (model.float() for model in models())
    data = {"inputs": (logits(6, 4, dtype=torch.float32),), "labels": torch.arange(6)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Distiller(student, Kept(teacher, lambda z: top_k(z, V, T)), TERMS)(data).loss
        dense = Distiller(student, Kept(teacher, lambda z: z), TERMS)(data).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense)
