"""Losses that tell the teacher's view of an example from its views of others, and the memory of one of them."""

import math

import pytest
import torch

from limbeck.losses import crd, infonce
from limbeck.losses.contrastive import noise_contrast
from limbeck.projectors.memory import ContrastiveMemory
from limbeck.reduce import masked_mean
from limbeck.testing import LossContract
from tests.golden_cases import INPUTS, generate
from tests.losses.proofs import check_golden, check_naive, golden_parameters, naive_parameters

ES, ET = INPUTS["ES"], INPUTS["ET"]
IDS = torch.tensor([4, 0, 7, 2, 9, 5])
RATIOS = generate((6, 17), 0.3, 1.0).exp() / 50

GOLDEN = {
    "crd": {"crd_nce_term": (RATIOS, lambda x: masked_mean(noise_contrast(x, examples=100, eps=1e-7)))},
}


class FixedMemory:
    """Banks that stay as they are, in which the others of an example are those that follow it."""

    examples = 11
    normalizers = (30.0, 50.0)

    def __init__(self):
        self.banks = [torch.nn.functional.normalize(generate((11, 12), b, 1.0), dim=-1) for b in (0.8, 2.6)]

    def ratios(self, student, teacher, example_id):
        candidates = (example_id[:, None] + torch.arange(4)) % self.examples
        sides = zip((student, teacher), self.banks, self.normalizers, strict=True)
        return tuple(self.one_side(*side, candidates) for side in sides)

    def one_side(self, features, bank, normalizer, candidates):
        rows = torch.nn.functional.normalize(features, dim=-1)
        return (torch.einsum("bd,bkd->bk", rows, bank.to(rows)[candidates]) / 0.5).exp() / normalizer


# ---- second implementations ------------------------------------------------------------------------------------


def cosine(x, y):
    return (x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt()


def naive_infonce(student, teacher, *, scale=20.0, temperature=None, similarity="cosine", symmetric=False):
    scale = scale if temperature is None else 1 / temperature
    alike = cosine if similarity == "cosine" else lambda x, y: (x * y).sum()
    scores = [[scale * alike(x, y) for y in teacher] for x in student]
    count = range(len(student))
    found = [-scores[i][i] + sum(scores[i][j].exp() for j in count).log() for i in count]
    if symmetric:
        back = [-scores[i][i] + sum(scores[j][i].exp() for j in count).log() for i in count]
        found = [(x + y) / 2 for x, y in zip(found, back, strict=True)]
    return torch.stack(found)


def naive_nce(ratios, examples, eps):
    """Binary cross-entropy of h = x / (x + K/N), label 1 for the first and 0 for the others."""
    total, count = 0.0, len(ratios) - 1
    for k, x in enumerate(ratios):
        chance = count / examples
        total = total - ((x if k == 0 else chance) / (x + chance + eps)).log()
    return total


def naive_crd(student, teacher, *, example_id, memory, eps=1e-7):
    values = []
    for row, own in enumerate(example_id.tolist()):
        total = 0.0
        for features, bank, normalizer in zip((student, teacher), memory.banks, memory.normalizers, strict=True):
            others = [(own + k) % 11 for k in range(4)]
            ratios = [(cosine(features[row], bank[other]) / 0.5).exp() / normalizer for other in others]
            total = total + naive_nce(ratios, memory.examples, eps)
        values.append(total)
    return torch.stack(values)


NAIVE = {
    "infonce": [
        (naive_infonce, ES, ET, {}),
        (naive_infonce, ES, ET, {"temperature": 0.07}),
        (naive_infonce, ES, ET, {"scale": 0.5, "similarity": "dot"}),
        (naive_infonce, ES, ET, {"symmetric": True, "scale": 3.0}),
    ],
    "crd": [
        (naive_crd, ES, ET, {"example_id": IDS, "memory": FixedMemory()}),
        (naive_crd, ES, ET, {"example_id": IDS, "memory": FixedMemory(), "eps": 1e-2}),
    ],
}


@pytest.mark.parametrize(("loss", "case"), golden_parameters(GOLDEN))
def test_golden(loss, case):
    check_golden(GOLDEN, loss, case)


@pytest.mark.parametrize(("loss", "index"), naive_parameters(NAIVE))
def test_second_implementation(loss, index):
    check_naive(NAIVE, loss, index)


# ---- contract --------------------------------------------------------------------------------------------------


class TestInfoNCE(LossContract):
    loss = "infonce"
    identity = per_example = False
    leading = ((4,),)


class TestInfoNCESymmetric(LossContract):
    loss = infonce
    options = {"symmetric": True, "temperature": 0.5}  # noqa: RUF012
    identity = per_example = False
    leading = ((4,),)


class TestCRD(LossContract):
    loss = "crd"
    options = {"memory": FixedMemory()}  # noqa: RUF012
    identity = False
    leading = ((4,),)

    def example(self, *leading):
        return {
            "student": generate((*leading, 12), 0.3, 1.0),
            "teacher": generate((*leading, 12), 1.1, 2.0),
            "example_id": IDS[: leading[0]],
        }


# ---- the memory ------------------------------------------------------------------------------------------------


def memory_of(**options):
    torch.manual_seed(3)
    memory = ContrastiveMemory(**{"examples": 11, "negatives": 4, "width": None, **options}).double()
    memory.size(torch.Size([6, 12]), torch.Size([6, 12]))
    return memory.double()


def test_memory_follows_the_paper():
    """Three batches, against banks that are kept in plain lists."""
    memory = memory_of()
    banks = [list(bank.clone()) for bank in (memory.student_bank, memory.teacher_bank)]
    normalizers = None
    for step, ids in enumerate(([4, 0, 7], [2, 4, 9], [7, 0, 4])):
        sides = [generate((3, 12), b + step, 1.0).requires_grad_() for b in (0.3, 1.1)]
        random_state = torch.get_rng_state()
        ours = memory.ratios(*sides, torch.tensor(ids))
        torch.set_rng_state(random_state)
        candidates = memory.draw(torch.tensor(ids)).tolist()
        likely = [
            torch.stack(
                [
                    torch.stack([(cosine_with(x, bank[c]) / 0.07).exp() for c in others])
                    for x, others in zip(side, candidates, strict=True)
                ]
            )
            for side, bank in zip(sides, reversed(banks), strict=True)
        ]
        normalizers = normalizers or [11 * values.mean().item() for values in likely]
        for x, values, normalizer, side in zip(ours, likely, normalizers, sides, strict=True):
            torch.testing.assert_close(x, values / normalizer, rtol=1e-10, atol=0)
            gradients = [torch.autograd.grad(y.sum(), side)[0] for y in (x, values / normalizer)]
            torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
        for bank, side in zip(banks, sides, strict=True):
            for row, own in zip(side.detach(), ids, strict=True):
                mixed = 0.5 * bank[own] + 0.5 * row / row.norm()
                bank[own] = mixed / mixed.norm()
        for bank, kept in zip(banks, (memory.student_bank, memory.teacher_bank), strict=True):
            torch.testing.assert_close(kept, torch.stack(bank), rtol=1e-12, atol=0)
    torch.testing.assert_close(memory.normalizers, torch.tensor(normalizers).double())


def cosine_with(features, row):
    return (features * row).sum() / (features * features).sum().sqrt()


def test_others_are_drawn_evenly_and_are_others():
    memory = memory_of(negatives=10**6 // 3)
    assert memory.negatives == 10  # no more than there are
    memory.negatives = 20000
    drawn = memory.draw(torch.tensor([3, 10]))
    assert drawn[:, 0].tolist() == [3, 10]
    for row in drawn:
        counts = torch.bincount(row[1:], minlength=11)
        assert counts[row[0]] == 0
        assert counts[counts > 0].min() > 1800
        assert len(counts[counts > 0]) == 10


def test_drawing_follows_torchs_generator():
    memory = memory_of()
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(memory.draw(IDS))
    assert torch.equal(*draws)


def test_eval_mode_neither_draws_nor_remembers():
    memory = memory_of().eval()
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = (memory.ratios(ES, ET, IDS) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())
    assert len(set(memory.draw(IDS)[0].tolist())) == 5


def test_copying_the_bank_or_the_candidates_is_the_same():
    memory = memory_of(examples=40, negatives=3)
    ids = torch.arange(6)
    few = memory.eval().ratios(ES, ET, ids)
    many = [memory.ratios(ES.repeat(5, 1), ET.repeat(5, 1), ids.repeat(5))[side][:6] for side in (0, 1)]
    # the normalizers are the batch's own here, and the batch is the same five times
    torch.testing.assert_close(few, tuple(many), rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [None, 3])
def test_backward_after_the_update(width):
    torch.manual_seed(0)
    memory = ContrastiveMemory(examples=11, negatives=4, width=width)
    memory.size(torch.Size([6, 12]), torch.Size([6, 12]))
    student = ES.float().requires_grad_()
    for _ in range(2):
        crd(student, ET.float(), example_id=IDS, memory=memory).mean().backward()
    assert student.grad.isfinite().all()
    assert student.grad.any()
    for parameter in memory.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_training_brings_the_two_sides_together():
    torch.manual_seed(0)
    memory = ContrastiveMemory(examples=6, negatives=5, width=None, temperature=0.5)
    memory.size(torch.Size([6, 12]), torch.Size([6, 12]))
    student, ids = ES.float().requires_grad_(), torch.arange(6)
    optimizer = torch.optim.SGD([student], lr=0.2)
    alike = [torch.cosine_similarity(student, ET.float()).mean().item()]
    for _ in range(100):
        optimizer.zero_grad()
        crd(student, ET.float(), example_id=ids, memory=memory).mean().backward()
        optimizer.step()
    alike.append(torch.cosine_similarity(student, ET.float()).mean().item())
    assert alike[1] > alike[0] + 0.2


@pytest.mark.parametrize("width", [None, 3])
def test_memory_is_saved_and_loaded(width):
    """Also into one that has no size yet; both go on alike."""
    options = {"examples": 11, "negatives": 4, "width": width}
    torch.manual_seed(0)
    memory, other = ContrastiveMemory(**options), ContrastiveMemory(**options)
    memory.size(torch.Size([6, 12]), torch.Size([6, 12]))
    memory.ratios(ES.float(), ET.float(), IDS)
    other.load_state_dict(memory.state_dict())
    results = []
    for one in (memory, other):
        torch.manual_seed(1)
        results.append(one.ratios(ES.float(), ET.float(), IDS))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(memory.student_bank, other.student_bank, rtol=0, atol=0)


def test_an_optimizer_may_hold_the_embeddings_before_they_have_a_size():
    torch.manual_seed(0)
    memory = ContrastiveMemory(examples=11, negatives=4, width=3)
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.1)
    memory.size(torch.Size([6, 12]), torch.Size([6, 10]))
    before = memory.embed_teacher.weight.detach().clone()
    crd(ES.float(), ET[:, :10].float(), example_id=IDS, memory=memory).mean().backward()
    optimizer.step()
    assert not torch.equal(memory.embed_teacher.weight, before)


# ---- edges -----------------------------------------------------------------------------------------------------


def test_a_batch_of_one_finds_its_own():
    assert infonce(ES[:1], ET[:1]).tolist() == [0.0]


def test_infonce_in_half_precision_with_zero_vectors():
    student = ES.half()
    student[2] = 0
    student.requires_grad_()
    values = infonce(student, ET.half())
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_is_not_swallowed(side):
    pair = {"student": ES.clone(), "teacher": ET.clone()}
    pair[side][2, 3] = math.nan
    assert infonce(pair["student"], pair["teacher"])[2].isnan()
    assert crd(pair["student"], pair["teacher"], example_id=IDS, memory=FixedMemory())[2].isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: infonce(ES, ET[:4]), r"student \(6, 12\) and teacher \(4, 12\) differ in shape"),
        (lambda: infonce(ES[None], ET[None]), "infonce compares embeddings"),
        (lambda: infonce(ES, ET, scale=0.0), "the scale must be positive, got 0.0"),
        (lambda: infonce(ES, ET, temperature=-1.0), "the temperature must be positive, got -1.0"),
        (lambda: infonce(ES, ET, similarity="l2"), "unknown similarity 'l2'"),
        (lambda: crd(ES, ET, example_id=IDS[:4], memory=FixedMemory()), r"ids \(4,\)"),
        (lambda: memory_of().ratios(ES, ET, IDS + 6), "example ids are from 6 to 15, and the memory has 11 rows"),
        (
            lambda: memory_of().size(torch.Size([6, 12]), torch.Size([6, 8])),
            "12 features and the teacher 8; give the memory a width",
        ),
        (lambda: ContrastiveMemory(examples=11).ratios(ES, ET, IDS), "the memory has no size yet"),
        (lambda: ContrastiveMemory(examples=1), "examples must be at least 2, got 1"),
        (lambda: ContrastiveMemory(examples=2, negatives=0), "negatives must be at least 1, got 0"),
        (lambda: ContrastiveMemory(examples=2, width=0), "width must be at least 1, got 0"),
        (lambda: ContrastiveMemory(examples=2, momentum=1.0), "momentum from 0 to below 1, got 0.07 and 1.0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
