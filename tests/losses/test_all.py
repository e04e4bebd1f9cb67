"""Every loss is proven: other people's numbers, a second implementation, and the contract, which has teeth."""

import importlib
import pkgutil

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

import tests.losses
from limbeck.losses import LOSSES
from limbeck.testing import LossContract
from tests.golden_cases import CASES, FINGERPRINTS, INPUTS


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_golden_inputs_are_the_oracles_inputs(name):
    tensor, expected = INPUTS[name], FINGERPRINTS[name]
    ours = {
        "first": tensor.flatten()[0].item(),
        "sum": tensor.sum().item(),
        "abssum": tensor.abs().sum().item(),
    }
    assert ours == pytest.approx(expected, rel=1e-12)


def families():
    """The test modules of the families."""
    names = [m.name for m in pkgutil.iter_modules(tests.losses.__path__, "tests.losses.")]
    return [importlib.import_module(n) for n in names if ".test_" in n and not n.endswith("test_all")]


def test_every_loss_is_tested():
    """A new loss has a golden case or a second implementation, and a contract."""
    proven = {name for family in families() for kind in ("GOLDEN", "NAIVE") for name in getattr(family, kind, {})}
    contracts = {case.loss for case in LossContract.__subclasses__() if isinstance(case.loss, str)}
    for name in LOSSES:
        function = LOSSES.get(name)
        home = importlib.import_module(function.__module__)
        if not home.__name__.startswith("limbeck.") or getattr(home, function.__name__, None) is not function:
            continue  # registered by a test or a doctest
        assert name in proven, f"{name} has neither a golden case nor a second implementation in tests/losses"
        assert name in contracts, f"{name} has no LossContract in tests/losses"


def test_every_golden_case_is_used():
    """No number of other people's code lies unused."""
    used = {case for family in families() for cases in getattr(family, "GOLDEN", {}).values() for case in cases}
    assert set(CASES) == used


# ---- the contract catches what goes wrong ---------------------------------------------------------------------


def raw_logit_kl(student, teacher):
    p, q = teacher.detach().clamp(1e-7), student.clamp(1e-7)
    return (p * (p / q).log()).sum(-1)


def nan_at_minus_infinity(student, teacher):
    log_p, log_q = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def overwriting(student, teacher):
    return (student - teacher.detach().mul_(2.0)).square().mean(-1)


def no_epsilon(student, teacher):
    lengths = student.norm(dim=-1) * teacher.detach().norm(dim=-1)
    return 1 - (student * teacher.detach()).sum(-1) / lengths


def shared_out(student, teacher, *, mask):
    return (student - teacher.detach()).square().mean(-1) * mask * mask.numel() / mask.sum()


def with_mask(self, *leading):
    return {**LossContract.example(self, *leading), "mask": torch.ones(leading)}


def first_alone(student, teacher):
    others = (student.detach() - teacher.detach())[1:].square().mean()  # of a batch of one there are none
    return (student - teacher.detach()).square().mean(-1) / others


def ends_at_zero(student, teacher):
    return (student - teacher.detach()).square().mean(-1).sqrt()


BROKEN = {
    "reduced": (lambda s, t: (s - t.detach()).square().mean(), "keeps_the_leading_dimensions", {}),
    "entropy": (lambda s, t: -(t.detach().softmax(-1) * s.log_softmax(-1)).sum(-1), "is_zero_at_equality", {}),
    "signed": (lambda s, t: (s - t.detach()).mean(-1), "is_never_negative", {}),
    "ranked": (
        lambda s, t: (s - t.detach()).square().mean(-1).sort(dim=0).values,
        "follows_a_permutation_of_the_examples",
        {},
    ),
    "raw logits": (raw_logit_kl, "ignores_a_constant_added_to_the_logits", {"shift_invariant": True}),
    "teacher learns": (lambda s, t: (s - t).square().mean(-1), "gives_a_gradient_to_the_student_alone", {}),
    "student detached": (
        lambda s, t: (s.detach() - t).square().mean(-1),
        "gives_a_gradient_to_the_student_alone",
        {},
    ),
    "half detached": (
        lambda s, t: ((s - t.detach()) * (s.detach() - t)).mean(-1),
        "gradient_is_the_derivative",
        {},
    ),
    "in half": (lambda s, t: (s - t.detach()).square().mean(-1), "half_precision_stays_close", {}),
    "no epsilon": (no_epsilon, "extreme_inputs_stay_finite", {}),
    "minus infinity": (nan_at_minus_infinity, "extreme_inputs_stay_finite", {"logits": True}),
    "in place": (overwriting, "leaves_its_inputs_alone", {}),
    "centred on the batch": (
        lambda s, t: (s - s.mean(1, keepdim=True) - t.detach()).square().mean(-1),
        "does_not_depend_on_padding",
        {},
    ),
    "leaking": (lambda s, t: (s - t.detach()).cumsum(1).square().mean(-1), "masked_positions_do_not_leak", {}),
    "own count": (shared_out, "an_empty_mask_gives_zero", {"example": with_mask}),
    "no others": (first_alone, "extreme_inputs_stay_finite", {}),
    "lowered": (lambda s, t: (s.float() - t.float()).square().mean(-1), "keeps_double_precision", {}),
    "root": (ends_at_zero, "is_zero_at_equality", {}),
    "relative": (
        lambda s, t: (s - t.detach()).square().mean(-1) / t.detach().square().mean(),
        "does_not_depend_on_the_cut",
        {},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_contract_catches(name):
    loss, caught_by, promises = BROKEN[name]
    contract = type("Broken", (LossContract,), {"loss": staticmethod(loss), **promises})()
    with pytest.raises((AssertionError, GradcheckError)):
        getattr(contract, f"test_{caught_by}")()
