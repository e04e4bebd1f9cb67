"""``limbeck check`` and the list of losses, as the author of a loss meets them."""

import sys

import pytest

from limbeck.losses import LOSSES, full_precision
from limbeck.testing import contract_of, run, verdicts

MINE = '''
import torch

from limbeck.losses import full_precision


def squared(student, teacher, *, scale: float = 1.0):
    """Scaled squares."""
    return scale * (full_precision(student) - full_precision(teacher.detach())).square().mean(-1)


def leaking(student, teacher):
    return (full_precision(student) - full_precision(teacher)).square().mean(-1)


def of_labels(student, labels):
    return torch.nn.functional.cross_entropy(full_precision(student).movedim(-1, 1), labels, reduction="none")


def of_maps(student, teacher):
    """Maps.

    Args:
        student: Maps (B, C, H, W).
    """
    _, _, _, _ = student.shape
    return (full_precision(student) - full_precision(teacher.detach())).square().mean((1, 2, 3))


def lowered(student, teacher):
    return (student.float() - teacher.detach().float()).square().mean(-1)


def below_zero(student, teacher, *, mask=None, labels):
    counts = torch.ones_like(labels) if mask is None else mask
    return (counts != 0) * (full_precision(student) - full_precision(teacher.detach())).mean(-1)


def with_power(student, teacher, *, power: float):
    return (full_precision(student) - full_precision(teacher.detach())).abs().pow(power).mean(-1)


number = 3
'''


@pytest.fixture
def limbeck(monkeypatch, command, tmp_path):
    (tmp_path / "my_losses.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_losses", None)

    return command


def outcomes(printed):
    """The checks by outcome; the last line counts them."""
    lines = [line.split(maxsplit=1) for line in printed.strip().splitlines()[:-1]]
    return {kind: [rest for outcome, rest in lines if outcome == kind] for kind in ("passed", "failed", "skipped")}


@pytest.mark.parametrize(
    "arguments",
    [
        ("my_losses:squared",),
        ("my_losses:squared", "-o", "scale=2.5", "--shape", "B,L,3"),
        ("my_losses:squared", "--shape", "B,4", "--shape", "B,L,5"),
        ("my_losses:of_labels", "--logits"),
        ("my_losses:of_maps",),
        ("forward_kl", "--logits", "-o", "temperature=4"),
        ("dkd", "--logits"),
        ("fsp",),
        ("cka", "--whole-batch"),
        ("soft_cross_entropy", "--no-identity"),
        ("ofd", "--no-identity", "-o", "margin=-0.5"),
        ("my_losses:with_power", "-o", "power=2"),
    ],
)
def test_what_is_right_passes(limbeck, arguments):
    status, printed = limbeck("check", *arguments)
    found = outcomes(printed)
    assert status == 0, printed
    assert not found["failed"]
    assert len(found["passed"]) >= 9
    assert f"{len(found['passed'])} passed, 0 failed, {len(found['skipped'])} skipped" in printed


@pytest.mark.parametrize(
    ("arguments", "failures"),
    [
        (
            ("my_losses:leaking",),
            ["gives a gradient to the student alone: the teacher gets a gradient; detach it"],
        ),
        (("soft_cross_entropy",), ["is zero at equality: a value at equality is"]),
        (
            ("my_losses:squared", "--logits"),
            [
                "extreme inputs stay finite: a class at -inf: the value is nan",
                "ignores a constant added to the logits: differs with a constant added",
            ],
        ),
        (("my_losses:below_zero", "--no-identity"), ["is never negative: the value is -"]),
        (
            ("my_losses:lowered",),
            [
                "gradient is the derivative: ",
                "keeps double precision: inputs in float64 give values in torch.float32; lift",
            ],
        ),
        (("pearson",), ["does not depend on the cut: differs cut in two"]),
    ],
)
def test_what_is_wrong_fails_with_its_reason(limbeck, arguments, failures):
    status, printed = limbeck("check", *arguments)
    found = outcomes(printed)["failed"]
    assert status == 1, printed
    assert len(found) == len(failures), printed
    for line, failure in zip(found, failures, strict=True):
        assert line.startswith(failure)


def test_what_is_not_promised_is_skipped_and_says_so(limbeck):
    status, printed = limbeck("check", "my_losses:below_zero", "--no-identity", "--negative")
    assert status == 0, printed
    skipped = "\n".join(outcomes(printed)["skipped"])
    assert "is never negative: the contract does not promise: non_negative" in skipped
    assert "is zero at equality: the contract does not promise: identity" in skipped


def test_a_broken_promise_names_the_flag(limbeck):
    assert "(--no-identity, if that is meant)" in limbeck("check", "soft_cross_entropy")[1]
    assert "(--whole-batch, if that is meant)" in limbeck("check", "pearson")[1]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("forwrd_kl",), "did you mean 'forward_kl'"),
        (("my_losses:squard",), "did you mean 'squared'"),
        (("my_loses:squared",), "cannot import 'my_loses'"),
        (("my_losses:number",), "'my_losses:number' is no function"),
        (("my_losses:squared", "-o", "scael=2"), "has no option 'scael'; did you mean 'scale'?"),
        (("my_losses:squared", "-o", "scale"), "the option 'scale' has no value; write KEY=VALUE"),
        (("my_losses:squared", "-o", "scale=[1"), "is no YAML"),
        (("my_losses:squared", "--shape", "4,7"), "'4,7' is no shape; write B,7"),
        (("my_losses:squared", "--shape", "B,7", "--shape", "B,8"), "give one shape with positions"),
        (("my_losses:of_maps", "--shape", "B,7"), "fails for inputs (4, 7): not enough values to unpack"),
        (("forward_kl", "-o", "temperature=-1"), "the temperature must be positive"),
        (("vid",), "vid works with a module, its 'variance'"),
        (("my_losses:with_power",), "needs the option 'power'"),
        (("mse", "--logit"), "No such option"),
    ],
)
def test_bad_input_is_one_line(limbeck, arguments, fragment):
    status, printed = limbeck("check", *arguments)
    assert status == 2, printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert fragment in printed


@pytest.mark.parametrize("what", ["losess", "transform", "balance", "schedule"])
def test_a_typo_in_a_list_is_one_line(limbeck, what):
    status, printed = limbeck("list", what)
    assert status == 2
    assert printed.startswith(f"error: there is no list of '{what}'; did you mean")
    assert printed.count("\n") == 1


def test_the_list_shows_name_line_options_and_paper(limbeck):
    printed = limbeck("list", "losses")[1]
    entry = printed.split("\nforward_kl ")[1].split("\nfsp")[0].split("\nhard_label")[0]
    assert "Kullback-Leibler divergence from the teacher to the student." in entry
    assert "temperature=1.0" in entry
    assert "arXiv:1503.02531" in entry
    for name in LOSSES:
        assert f"\n{name} " in f"\n{printed}"


def test_contract_of_a_loss_that_takes_several_tensors():
    def both(student, teacher):
        pairs = zip(student, teacher, strict=True)
        return sum((full_precision(s) - full_precision(t.detach())).square().mean(-1) for s, t in pairs)

    assert len(run(contract_of(both, places=3))) == 14


def learning_teacher(student, teacher):
    return (full_precision(student) - full_precision(teacher)).square().mean(-1)


def test_verdicts_go_on_after_a_failure():
    found = list(verdicts(contract_of(learning_teacher)))
    assert [v.outcome for v in found].count("failed") == 1
    assert len(found) == 15
