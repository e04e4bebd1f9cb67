"""Targets of a few entries: what is kept is exact, what is drawn is right on average."""

import math

import pytest
import torch

from limbeck import sparse
from limbeck.sparse import sample, top_k

TEMPERATURES = (1.0, 2.0, 0.5)


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def naive_rest(row, kept, t):
    return sum(math.exp(z / t) for i, z in enumerate(row) if i not in kept)


def dense(drawn, column):
    """The weights of all entries, (..., V)."""
    zeros = torch.zeros(drawn.shape, dtype=drawn.weights.dtype)
    return zeros.scatter_add(-1, drawn.ids, drawn.weights[..., column])


def test_the_largest_are_kept_and_the_rest_adds_up():
    z = logits(2, 3, 7)
    kept = top_k(z, 3, TEMPERATURES)
    assert kept.shape == z.shape
    assert kept.ids.shape == (2, 3, 3)
    assert kept.log_rest.shape == (2, 3, 3)
    assert kept.temperatures == TEMPERATURES
    for b in range(2):
        for i in range(3):
            row = z[b, i].tolist()
            ids = sorted(range(7), key=lambda n: -row[n])[:3]
            assert kept.ids[b, i].tolist() == ids
            assert kept.values[b, i].tolist() == pytest.approx([row[n] - row[ids[0]] for n in ids])
            for column, t in enumerate(TEMPERATURES):
                rest = naive_rest([z - row[ids[0]] for z in row], ids, t)
                assert kept.log_rest[b, i, column].item() == pytest.approx(math.log(rest))


def test_what_is_kept_is_the_probability_at_each_temperature():
    z = logits(5, 9)
    kept = top_k(z, 4, TEMPERATURES)
    for column, t in enumerate(TEMPERATURES):
        buckets = torch.cat([kept.values / t, kept.log_rest[..., column : column + 1]], dim=-1).softmax(-1)
        p = (z / t).softmax(-1)
        torch.testing.assert_close(buckets[..., :-1], p.gather(-1, kept.ids))
        torch.testing.assert_close(buckets[..., -1], 1 - p.gather(-1, kept.ids).sum(-1))


def test_more_than_there_is_is_all_there_is():
    kept = top_k(logits(2, 5), 9)
    assert kept.ids.shape == (2, 5)
    assert kept.log_rest.isneginf().all()


def test_the_rest_is_known_far_below_what_a_probability_could_say():
    z = torch.tensor([[0.0, -300.0, -300.0, -300.0]])
    assert top_k(z, 2).log_rest.item() == pytest.approx(-300 + math.log(2))
    assert top_k(z + 1e4, 2).log_rest.item() == pytest.approx(-300 + math.log(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(dtype):
    z = logits(4, 50).to(dtype)
    kept, exact = top_k(z, 5, (2.0,)), top_k(z.double(), 5, (2.0,))
    assert kept.values.dtype == kept.log_rest.dtype == torch.float32
    torch.testing.assert_close(kept.log_rest.double(), exact.log_rest, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept.values.double(), exact.values)


def test_entries_that_cannot_occur_are_kept_last_and_never_drawn():
    z = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0]])
    kept = top_k(z, 3)
    assert kept.ids[0, :2].tolist() == [1, 3]
    assert kept.values[0, 2].isneginf()
    assert kept.log_rest.isneginf().all()
    drawn = sample(z, 200, generator=torch.Generator().manual_seed(0))
    assert set(drawn.ids[drawn.weights[..., 0] > 0].tolist()) == {1, 3}
    assert drawn.weights.isfinite().all()


def test_a_position_where_nothing_can_occur_has_no_weight_and_no_nan():
    z = torch.full((1, 4), -torch.inf)
    kept = top_k(z, 2, TEMPERATURES)
    assert kept.values.isneginf().all()
    assert kept.log_rest.isneginf().all()


def test_blocks_change_nothing(monkeypatch):
    z = logits(3, 5, 11)
    whole = top_k(z, 4, TEMPERATURES), sample(z, 6, TEMPERATURES, torch.Generator().manual_seed(1), head=2)
    monkeypatch.setattr(sparse, "BLOCK", 22)
    cut = top_k(z, 4, TEMPERATURES), sample(z, 6, TEMPERATURES, torch.Generator().manual_seed(1), head=2)
    assert torch.equal(whole[0].ids, cut[0].ids)
    assert torch.equal(whole[0].log_rest, cut[0].log_rest)
    assert torch.equal(whole[1].ids, cut[1].ids)
    assert torch.equal(whole[1].weights, cut[1].weights)


@pytest.mark.parametrize("head", [0, 3])
def test_weights_are_the_probabilities_on_average(head):
    """Over 40,000 positions of the same logits, within five standard errors of each mean."""
    z, positions = logits(12), 40_000
    drawn = sample(z.expand(positions, 12), 5, TEMPERATURES, torch.Generator().manual_seed(2), head=head)
    assert drawn.ids.shape == (positions, 5 + head)
    assert drawn.temperatures == TEMPERATURES
    for column, t in enumerate(TEMPERATURES):
        weights, p = dense(drawn, column), (z / t).softmax(-1)
        error = weights.std(dim=0) / positions**0.5
        assert ((weights.mean(dim=0) - p).abs() <= 5 * error + 1e-12).all()
        largest = z.topk(head).indices
        torch.testing.assert_close(weights[:, largest], p[largest].expand(positions, head))


def test_at_the_first_temperature_the_weights_are_counts_and_add_up_to_what_they_stand_for():
    z = logits(50, 30)
    drawn = sample(z, 8, (2.0, 1.0))
    counts = drawn.weights[..., 0] * 8
    torch.testing.assert_close(counts, counts.round())
    torch.testing.assert_close(counts.sum(-1), torch.full((50,), 8.0, dtype=torch.float64))
    mixed = sample(z, 8, (2.0, 1.0), head=4)
    torch.testing.assert_close(mixed.weights[..., 0].sum(-1), torch.ones(50, dtype=torch.float64))


def test_equal_draws_are_one_entry_and_empty_places_come_last():
    drawn = sample(logits(100, 6), 20)
    weights = drawn.weights[..., 0]
    for ids, row in zip(drawn.ids.tolist(), weights.tolist(), strict=True):
        found = [i for i, w in zip(ids, row, strict=True) if w > 0]
        assert len(found) == len(set(found))
        assert row[len(found) :] == [0.0] * (20 - len(found))
        assert ids[len(found) :] == [0] * (20 - len(found))


def test_a_head_that_leaves_nothing_draws_nothing():
    z = logits(4, 5)
    drawn = sample(z, 3, head=9)
    torch.testing.assert_close(dense(drawn, 0), z.softmax(-1))
    assert (drawn.weights[:, 5:] == 0).all()


def test_the_same_generator_draws_the_same():
    z = logits(4, 50)
    one, other, third = (sample(z, 9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.ids, other.ids)
    assert not torch.equal(one.ids, third.ids)


def test_the_tail_of_a_large_vocabulary_is_drawn_from_evenly():
    """In float32 a cumulative sum over so many entries would lose its end."""
    drawn = sample(torch.zeros(1, 151_936), 200_000, generator=torch.Generator().manual_seed(0))
    half = (drawn.ids[drawn.weights[..., 0] > 0] >= 151_936 // 2).double()
    assert drawn.weights[0, :, 0][drawn.ids[0] >= 151_936 // 2].sum().item() == pytest.approx(0.5, abs=0.006)
    assert half.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "call",
    [
        lambda z: top_k(z, 0),
        lambda z: sample(z, 0),
        lambda z: sample(z, 1, head=-1),
        lambda z: top_k(z, 1, ()),
        lambda z: sample(z, 1, (1.0, 0.0)),
        lambda z: top_k(z, 1, (float("nan"),)),
        lambda z: top_k(z.long(), 1),
        lambda z: top_k(z[:, :0], 1),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError, match="give"):
        call(torch.zeros(2, 3))
