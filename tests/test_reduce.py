import math

import pytest
import torch

from limbeck.reduce import masked_mean, per_position

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_mean_over_valid_positions_only():
    assert masked_mean(VALUES, MASK).item() == pytest.approx((1 + 2 + 8) / 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_of_any_type(dtype):
    assert masked_mean(VALUES, MASK.to(dtype)).item() == pytest.approx(11 / 3)


def test_a_mask_is_no_weight():
    """An attention mask may number packed sequences: every number but 0 counts once."""
    assert masked_mean(VALUES, torch.tensor([[1, 1, 0], [2, 0, 0]])).item() == pytest.approx(11 / 3)


def test_without_a_mask_every_example_counts_once():
    assert masked_mean(VALUES).item() == pytest.approx((7 / 3 + 56 / 3) / 2)
    assert masked_mean(VALUES[:, 0]).item() == pytest.approx(4.5)


def test_mask_per_example():
    assert masked_mean(VALUES, torch.tensor([0, 1])).item() == pytest.approx(56 / 3)


def test_what_stands_behind_a_position_is_averaged():
    behind = torch.stack([VALUES, 3 * VALUES], dim=-1)[..., None, :]  # (2, 3, 1, 2)
    torch.testing.assert_close(per_position(behind, MASK), 2 * VALUES)
    assert masked_mean(behind, MASK).item() == pytest.approx(22 / 3)
    torch.testing.assert_close(per_position(behind, None), 2 * VALUES.mean(1))


def test_a_scalar_is_left_as_it_is():
    assert masked_mean(torch.tensor(3.5), MASK, 100).item() == 3.5


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(3), torch.ones(2, 3, 1)])
def test_a_mask_that_does_not_fit(mask):
    with pytest.raises(ValueError, match=r"a mask of shape .* does not fit values of shape \(2, 3\)"):
        masked_mean(VALUES, mask)


@pytest.mark.parametrize("count", [6.0, 6, torch.tensor(6)])
def test_count_from_outside(count):
    assert masked_mean(VALUES, MASK, count).item() == pytest.approx(11 / 6)
    assert masked_mean(VALUES[:, 0], None, count).item() == pytest.approx(9 / 6)


def test_count_below_one():
    """A backend that averages over ranks divides the count by their number; that may give less than one."""
    assert masked_mean(VALUES[:, 0], None, 0.25).item() == pytest.approx(36)
    assert masked_mean(VALUES, MASK, 0.25).item() == pytest.approx(44)


@pytest.mark.parametrize("count", [None, 0.0])
def test_no_valid_position_gives_zero(count):
    values = VALUES.clone().requires_grad_()
    total = masked_mean(values, torch.zeros(2, 3), count)
    total.backward()
    assert total.item() == 0
    assert values.grad.tolist() == torch.zeros(2, 3).tolist()


def test_parts_sum_up_to_the_whole():
    count = float(MASK.sum())
    for cut in ([1, 1], [2]):
        parts = zip(VALUES.split(cut), MASK.split(cut), strict=True)
        assert sum(masked_mean(v, m, count).item() for v, m in parts) == pytest.approx(11 / 3, rel=1e-15)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_masked_positions_give_nothing(poison):
    values = torch.where(MASK != 0, VALUES, poison).requires_grad_()
    total = masked_mean(values, MASK)
    total.backward()
    assert total.item() == pytest.approx(11 / 3)
    torch.testing.assert_close(values.grad, MASK.double() / 3)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_valid_positions_are_not_hidden(poison):
    values = VALUES.clone()
    values[0, 0] = poison
    assert not math.isfinite(masked_mean(values, MASK).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    ones = torch.ones(70_000, dtype=dtype)  # float16 ends at 65504, and bfloat16 cannot count beyond 256
    assert masked_mean(ones, torch.ones(70_000)).item() == 1.0
    assert masked_mean(ones).dtype == torch.float32


def test_double_precision_is_kept():
    assert masked_mean(VALUES, MASK).dtype == torch.float64
