"""Losses between attention patterns."""

import math

import pytest
import torch

from limbeck.losses import attention_kl, attention_mse, qkv_relation, token_gram_kl
from limbeck.losses.call import evaluate
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import INPUTS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters

AS, AT, HS, HT = (INPUTS[name] for name in ("AS", "AT", "HS", "HT"))
WIDE = generate((2, 5, 12), 1.1, 1.3)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
FULL = torch.ones(2, 5)

GOLDEN = {
    "attention_mse": {
        "att_mse_fullmask": (AS, lambda x: masked_mean(attention_mse(x, AT, mask=FULL), FULL)),
    },
    "attention_kl": {
        "minilm_attention_kl": (AS, lambda x: masked_mean(attention_kl(x, AT))),
    },
    "qkv_relation": {
        "minilmv2_self_relation_A2": (HS, lambda x: masked_mean(qkv_relation(x, WIDE, relation_heads=2))),
    },
    "token_gram_kl": {
        "token_gram_kl_tau.07": (HS, lambda x: masked_mean(token_gram_kl(x, HT))),
    },
}


# ---- second implementations: loops over examples, heads, queries and keys -------------------------------------


def merged(pattern, heads):
    """The list of patterns (B, L, L) to compare."""
    each = [pattern[:, h] for h in range(pattern.shape[1])]
    if heads == "each":
        return each
    return [sum(each) / (len(each) if heads == "mean" else 1)]


def naive_attention_mse(student, teacher, *, heads="each", average="queries", zero_below=None, mask=None):
    batch, _, length, _ = student.shape
    valid = [[mask is None or bool(mask[b, i]) for i in range(length)] for b in range(batch)]
    ours, theirs = merged(student, heads), merged(teacher, heads)
    rows = [sum(example) for example in valid]
    keys = sum(n * n for n in rows) / sum(rows)
    values = torch.zeros(batch, length, dtype=student.dtype)
    for b in range(batch):
        for i in range(length):
            total = 0.0
            for j in range(length):
                if not (valid[b][i] and valid[b][j]):
                    continue
                for x, y in zip(ours, theirs, strict=True):
                    s, t = x[b, i, j], y[b, i, j]
                    if zero_below is not None:
                        s, t = s * (s > zero_below), t * (t > zero_below)
                    total = total + (s - t) ** 2 / len(ours)
            values[b, i] = total / (keys if average == "pairs" else rows[b])
    return values


def naive_attention_pattern(student, teacher, *, heads="each", mask=None):
    values = []
    for b in range(len(student)):
        kept = range(student.shape[-1]) if mask is None else [i for i, m in enumerate(mask[b]) if m]
        total, sides = 0.0, list(zip(merged(student, heads), merged(teacher, heads), strict=True))
        for sides_of_head in sides:
            s, t = ([x[b, i, j] for i in kept for j in kept] for x in sides_of_head)
            s_norm, t_norm = (sum(v * v for v in side) ** 0.5 for side in (s, t))
            total = total + sum((x / s_norm - y / t_norm) ** 2 for x, y in zip(s, t, strict=True)) / len(sides)
        values.append(total)
    return torch.stack(values)


def naive_row(student, teacher, valid, cross, renormalize, above=None):
    """Relative entropy of one row of scores, over the keys that are valid."""
    inside = [j for j in range(len(student)) if valid[j] or not renormalize]
    p_sum, q_sum = sum(teacher[j].exp() for j in inside), sum(student[j].exp() for j in inside)
    total = 0.0
    for j in range(len(student)):
        if valid[j] and (above is None or teacher[j] > above):
            p, q = teacher[j].exp() / p_sum, student[j].exp() / q_sum
            total = total - p * q.log() + (0.0 if cross else p * p.log())
    return total


def naive_attention_kl(
    student, teacher, *, of="scores", kind="kl", heads="each", renormalize=True, above=None, mask=None
):
    batch, _, length, _ = student.shape
    ours, theirs = merged(student, heads), merged(teacher, heads)
    if of == "probabilities":
        ours, theirs = [x.log() for x in ours], [x.log() for x in theirs]
    values = torch.zeros(batch, length, dtype=student.dtype)
    for b in range(batch):
        valid = [mask is None or bool(mask[b, j]) for j in range(length)]
        for i in range(length):
            if valid[i]:
                rows = [
                    naive_row(x[b, i], y[b, i], valid, kind == "cross_entropy", renormalize, above)
                    for x, y in zip(ours, theirs, strict=True)
                ]
                values[b, i] = sum(rows) / len(rows)
    return values


def naive_scores(first, second, relation_heads):
    """Scores (B, A, L, L) from dot products one by one."""
    batch, length, width = first.shape
    size = width // relation_heads
    scores = torch.zeros(batch, relation_heads, length, length, dtype=first.dtype)
    for a in range(relation_heads):
        part = slice(a * size, (a + 1) * size)
        for i in range(length):
            for j in range(length):
                scores[:, a, i, j] = (first[:, i, part] * second[:, j, part]).sum(-1) / size**0.5
    return scores


def naive_qkv_relation(student, teacher, *, relation_heads, pairs=None, mask=None):
    student = student if isinstance(student, tuple) else (student,)
    teacher = teacher if isinstance(teacher, tuple) else (teacher,)
    total = 0.0
    for pair in pairs or ["qq", "kk", "vv"][: len(student)]:
        first, second = ("qkv".index(letter) for letter in pair)
        sides = [naive_scores(side[first], side[second], relation_heads) for side in (student, teacher)]
        total = total + naive_attention_kl(*sides, mask=mask)
    return total


def naive_token_gram_kl(student, teacher, *, temperature=0.07, mask=None):
    grams = []
    for side in (student, teacher):
        length = side.shape[1]
        gram = torch.zeros(len(side), 1, length, length, dtype=side.dtype)
        for i in range(length):
            for j in range(length):
                x, y = side[:, i], side[:, j]
                gram[:, 0, i, j] = (x * y).sum(-1) / ((x * x).sum(-1) * (y * y).sum(-1)).sqrt() / temperature
        grams.append(gram)
    return naive_attention_kl(*grams, mask=mask)


MERGED = ["each", "mean", "sum"]
PS, PT = AS.softmax(-1), AT.softmax(-1)
FOUR_HEADS = generate((2, 4, 5, 5), 0.7, 2.0)
QKV_S = tuple(generate((2, 5, 8), b, 1.0) for b in (0.3, 0.9, 1.5))
QKV_T = tuple(generate((2, 5, 12), b, 1.3) for b in (1.1, 2.3, 3.5))

NAIVE = {
    "attention_pattern": [
        *[(naive_attention_pattern, PS, PT, {"heads": h}) for h in MERGED],
        *[(naive_attention_pattern, PS, PT, {"heads": h, "mask": MASK}) for h in MERGED],
        (naive_attention_pattern, AS, FOUR_HEADS, {"heads": "mean"}),
    ],
    "attention_mse": [
        *[(naive_attention_mse, AS, AT, {"heads": h}) for h in MERGED],
        *[(naive_attention_mse, AS, AT, {"heads": h, "mask": MASK}) for h in MERGED],
        (naive_attention_mse, AS, AT, {"average": "pairs", "mask": MASK}),
        (naive_attention_mse, AS, AT, {"zero_below": -0.5}),
        (naive_attention_mse, AS, FOUR_HEADS, {"heads": "mean"}),
        (naive_attention_mse, PS, PT, {"mask": MASK}),
    ],
    "attention_kl": [
        *[(naive_attention_kl, AS, AT, {"heads": h, "mask": MASK}) for h in MERGED],
        *[(naive_attention_kl, AS, AT, {"kind": "cross_entropy", "mask": m}) for m in (None, MASK)],
        (naive_attention_kl, AS, AT, {"kind": "cross_entropy", "renormalize": False, "mask": MASK}),
        (naive_attention_kl, AS, AT, {"renormalize": False, "mask": MASK}),
        *[(naive_attention_kl, AS, AT, {"above": 0.0, "mask": m}) for m in (None, MASK)],
        (naive_attention_kl, AS, AT, {"above": 0.1, "kind": "cross_entropy", "heads": "mean"}),
        (naive_attention_kl, AS, FOUR_HEADS, {"heads": "mean"}),
        *[(naive_attention_kl, PS, PT, {"of": "probabilities", "mask": m}) for m in (None, MASK)],
        (naive_attention_kl, PS, PT, {"of": "probabilities", "heads": "mean"}),
    ],
    "qkv_relation": [
        *[(naive_qkv_relation, HS, WIDE, {"relation_heads": a, "mask": MASK}) for a in (1, 2, 4)],
        (naive_qkv_relation, QKV_S, QKV_T, {"relation_heads": 2}),
        (naive_qkv_relation, QKV_S, QKV_T, {"relation_heads": 4, "pairs": ("qk", "vv"), "mask": MASK}),
    ],
    "token_gram_kl": [
        (naive_token_gram_kl, HS, HT, {}),
        (naive_token_gram_kl, HS, WIDE, {"temperature": 0.3, "mask": MASK}),
    ],
}


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


# ---- as other people's code computes it ------------------------------------------------------------------------


def test_textbrewers_masked_forms():
    """Sums over valid pairs, over the squared lengths; and of cross-entropies, over the lengths."""
    pairs = (MASK[:, :, None] * MASK[:, None, :]).double()
    squares = MASK.sum(-1).square().sum()
    mse = ((AS - AT).square() * pairs[:, None]).sum() / (3 * squares)
    summed = ((AS.sum(1) - AT.sum(1)).square() * pairs).sum() / squares
    how = {"average": "pairs", "mask": MASK}
    ours, ours_summed = attention_mse(AS, AT, **how), attention_mse(AS, AT, heads="sum", **how)
    torch.testing.assert_close(masked_mean(ours, MASK), mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(masked_mean(ours_summed, MASK), summed, rtol=1e-12, atol=0)
    ce = -((AT.softmax(-1) * AS.log_softmax(-1)) * pairs[:, None]).sum() / (3 * MASK.sum())
    ours_ce = attention_kl(AS, AT, kind="cross_entropy", renormalize=False, mask=MASK)
    torch.testing.assert_close(masked_mean(ours_ce, MASK), ce, rtol=1e-12, atol=0)


def test_attention_and_value_relation_of_a_model_with_heads():
    """The relation of queries with keys, with as many heads as the model has, is its attention."""
    queries, keys = QKV_S[0], QKV_S[1]
    scores = [
        q.view(2, 5, 4, -1).transpose(1, 2) @ k.view(2, 5, 4, -1).transpose(1, 2).mT / (q.shape[-1] / 4) ** 0.5
        for q, k in ((queries, keys), QKV_T[:2])
    ]
    ours = qkv_relation((queries, keys), QKV_T[:2], relation_heads=4, pairs=["qk"])
    torch.testing.assert_close(ours, attention_kl(*scores), rtol=1e-10, atol=1e-12)


# ---- contract --------------------------------------------------------------------------------------------------


class Masked:
    """The mask that reduces is the mask that the loss gets."""

    leading = ((3, 5),)

    def gradient(self, example, mask=None, count=None):
        return super().gradient(example if mask is None else {**example, "mask": mask}, mask, count)


class Patterns:
    """Patterns (B, 3, 5, 5) of scores."""

    leading = ((4,),)

    def example(self, *leading):
        return {
            "student": generate((*leading, 3, 5, 5), 0.3, 2.0),
            "teacher": generate((*leading, 3, 5, 5), 1.1, 2.0),
        }


class Positions(Masked):
    """Patterns made by adding a number of the query and one of the key, so that both can be cut and padded."""

    def example(self, *leading):
        return {"student": generate((*leading, 4), 0.3, 2.0), "teacher": generate((*leading, 4), 1.1, 2.0)}

    def cut(self, tensor):
        queries, keys = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).transpose(1, 2).chunk(2, 1)
        return queries.unsqueeze(-1) + keys.unsqueeze(-2)


class TestAttentionMSE(Patterns, LossContract):
    loss = "attention_mse"


class TestAttentionMSEOfPositions(Positions, LossContract):
    loss = attention_mse
    options = {"heads": "sum"}  # noqa: RUF012


class TestAttentionMSEOfPairs(Positions, LossContract):
    loss = attention_mse
    options = {"average": "pairs"}  # noqa: RUF012
    per_example = False  # over the pairs of the batch


class TestAttentionPattern(Patterns, LossContract):
    loss = "attention_pattern"


class TestAttentionKL(Patterns, LossContract):
    loss = "attention_kl"
    logits = shift_invariant = True


class TestAttentionKLOfPositions(Positions, LossContract):
    loss = attention_kl


class TestAttentionCrossEntropy(Positions, LossContract):
    loss = attention_kl
    options = {"kind": "cross_entropy", "heads": "mean"}  # noqa: RUF012
    identity = False


class TestAttentionKLOfProbabilities(Patterns, LossContract):
    loss = attention_kl
    options = {"of": "probabilities"}  # noqa: RUF012

    def example(self, *leading):
        return {side: pattern.softmax(-1) for side, pattern in super().example(*leading).items()}


class TestQKVRelation(Masked, LossContract):
    loss = "qkv_relation"
    options = {"relation_heads": 1}  # noqa: RUF012


class TestQKVRelationOfThree(Masked, LossContract):
    loss = qkv_relation
    options = {"relation_heads": 2, "pairs": ["qk", "kk", "vv"]}  # noqa: RUF012

    def example(self, *leading):
        return {"student": generate((*leading, 12), 0.3, 1.0), "teacher": generate((*leading, 12), 1.1, 1.0)}

    def cut(self, tensor):
        return tensor.chunk(3, -1)


class TestTokenGramKL(Masked, LossContract):
    loss = "token_gram_kl"


# ---- edges -----------------------------------------------------------------------------------------------------


def test_probabilities_at_masked_tokens_do_not_leak():
    for poison in (math.nan, math.inf):
        student = torch.where(MASK[:, None, None, :] != 0, PS, poison).requires_grad_()
        values = attention_kl(student, PT, of="probabilities", mask=MASK)
        clean = attention_kl(PS, PT, of="probabilities", mask=MASK)
        torch.testing.assert_close(values, clean, rtol=1e-12, atol=0)
        values.sum().backward()
        assert student.grad.isfinite().all()


def test_probabilities_are_their_scores():
    torch.testing.assert_close(attention_kl(PS, PT, of="probabilities"), attention_kl(AS, AT), rtol=1e-10, atol=0)
    thinned = PS * 0.9
    ours = attention_kl(thinned, PT, of="probabilities")
    torch.testing.assert_close(ours, attention_kl(AS, AT), rtol=1e-10, atol=0)


def test_a_probability_of_zero_stays_finite_in_half_precision():
    student = torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float16, requires_grad=True)
    values = attention_kl(student, torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float16), of="probabilities")
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [attention_mse, attention_kl])
def test_causal_patterns(loss):
    """Minus infinity above the diagonal, on both sides."""
    later = torch.ones(5, 5).triu(1).bool()
    student = AS.masked_fill(later, -math.inf).requires_grad_()
    values = loss(student, AT.masked_fill(later, -math.inf))
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.isfinite().all()
    assert values[:, 0].abs().max() == 0 or loss is attention_mse


@pytest.mark.parametrize("loss", [attention_mse, attention_kl])
def test_an_example_without_tokens(loss):
    empty = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    student = AS.clone().requires_grad_()
    values = loss(student, AT, mask=empty)
    values.sum().backward()
    assert values[0].tolist() == [0.0] * 5
    assert student.grad.isfinite().all()
    assert not student.grad[0].any()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", [attention_mse, attention_kl])
def test_nan_is_not_swallowed(loss, side):
    pair = {"student": AS.clone(), "teacher": AT.clone()}
    pair[side][1, 0, 3, 2] = math.nan
    assert loss(pair["student"], pair["teacher"], mask=MASK).isnan().nonzero().tolist() == [[1, 3]]


def test_tinybert_zeroes_what_is_masked():
    masked = torch.where(MASK[:, None, None, :] != 0, AS, AS - 10000.0)
    ours = attention_mse(masked, AT, zero_below=-100.0)
    assert ours[0].max() < 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_mse(AS[:, 0], AT[:, 0]), "attention is .batch, heads, queries, keys."),
        (lambda: attention_mse(AS, FOUR_HEADS), "differ in their heads; set heads='mean'"),
        (lambda: attention_kl(AS, AT[..., :4]), "differ in more than the heads"),
        (lambda: attention_kl(AS, AT, heads="max"), "unknown heads 'max'"),
        (lambda: attention_kl(AS, AT, of="logits"), "unknown content 'logits'"),
        (lambda: attention_kl(AS, AT, kind="js"), "unknown kind 'js'"),
        (lambda: attention_mse(AS, AT, average="rows"), "unknown average 'rows'"),
        (lambda: attention_mse(AS, AT, mask=FULL[:, :4]), r"mask \(2, 4\) does not fit attention \(2, 3, 5, 5\)"),
        (lambda: qkv_relation(HS, WIDE), r"relation_heads=48 does not divide the widths \[8, 12\]; use 4"),
        (lambda: qkv_relation(HS, WIDE, relation_heads=0), "relation_heads must be 1 or more, got 0"),
        (
            lambda: qkv_relation(QKV_S, QKV_T[:2], relation_heads=1),
            "3 tensors of the student and 2 of the teacher",
        ),
        (lambda: qkv_relation(HS, HT, relation_heads=1, pairs=["vv"]), r"pairs \['vv'\] of 1 tensors"),
        (lambda: qkv_relation(HS, HT[:, :4], relation_heads=1), "one batch and length on both sides"),
        (lambda: token_gram_kl(HS, HT, temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: token_gram_kl(HS, HT, mask=FULL[:1]), r"mask \(1, 5\) does not fit tokens \(2, 5, 8\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluate_passes_the_mask_on():
    ours = evaluate("attention_mse", AS, AT, mask=MASK)
    torch.testing.assert_close(ours, masked_mean(attention_mse(AS, AT, mask=MASK), MASK))
