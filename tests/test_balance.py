import copy
import math

import pytest
import torch
from torch import nn

from limbeck import Distiller, Settings, Term, fit
from limbeck.balance import BALANCES, build_balance, gradient_products, interference
from limbeck.train import Callback

NAMES = ["kd", "labels"]


def points(count=24):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator)
    return inputs, (inputs.sum(-1) > 0).long()


def distiller(balance="static", **kd):
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 2), nn.Linear(4, 2)
    terms = [
        Term("logits", loss="forward_kl", name="kd", **{"temperature": 2.0, **kd}),
        Term("labels", loss="cross_entropy", name="labels", weight=0.5),
    ]
    return Distiller(student, teacher, terms, balance=balance)


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.student.parameters()])


def unweighted(term):
    alone = copy.copy(term)
    object.__setattr__(alone, "weight", 1.0)
    return alone


def separate_gradients(module, batch):
    """Each unweighted term's gradient, one backward pass at a time, by another way than the balance's."""
    found = []
    for term in module.terms:
        alone = Distiller(module.student, module.teacher, [unweighted(term)])
        module.student.zero_grad()
        alone(*batch).loss.backward()
        found.append(gradients(module).clone())
    module.student.zero_grad()
    return found


# ---- what the terms do to each other ---------------------------------------------------------------------------


def test_measured_products_are_those_of_separate_backward_passes():
    module, batch = distiller(), points()
    kd, labels = separate_gradients(module, batch)
    expected = torch.tensor([[kd @ kd, kd @ labels], [labels @ kd, labels @ labels]])
    torch.testing.assert_close(module(*batch, measure=True).gradients, expected, rtol=1e-5, atol=1e-7)


def test_measuring_leaves_the_step_as_it_is():
    plain, measured = distiller(), distiller()
    plain(*points()).loss.backward()
    measured(*points(), measure=True).loss.backward()
    assert torch.equal(gradients(plain), gradients(measured))


def test_interference_says_shares_and_cosines():
    kd, labels = torch.tensor([3.0, 0.0]), torch.tensor([-1.0, 1.0])
    products = torch.tensor([[kd @ kd, kd @ labels], [kd @ labels, labels @ labels]])
    shares, cosines = interference(products)
    assert shares == pytest.approx([3 / (3 + 2**0.5), 2**0.5 / (3 + 2**0.5)])
    assert cosines == pytest.approx([-(0.5**0.5)] * 2)


def test_weights_count_in_what_is_said():
    shares, cosines = interference(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [3.0, 1.0])
    assert (shares, cosines) == ([0.75, 0.25], [0.0, 0.0])


def test_a_term_without_gradient_has_no_share():
    weight = nn.Parameter(torch.ones(2))
    products = gradient_products([weight.sum(), torch.tensor(1.0)], [weight])
    assert interference(products) == ([1.0, 0.0], [0.0, 0.0])


# ---- the kinds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BALANCES))
def test_the_first_step_is_the_static_one(kind):
    ours, plain = distiller(kind), distiller()
    torch.testing.assert_close(ours(*points()).loss, plain(*points()).loss)


def test_uncertainty_learns_its_factors():
    module = distiller("uncertainty")
    balance = module.objective.balance
    with torch.no_grad():
        balance.log_variances.copy_(torch.tensor([0.5, -0.25]))
    out = module(*points())
    weighted = [out.terms["kd"], 0.5 * out.terms["labels"]]
    s = torch.tensor([0.5, -0.25])
    expected = weighted[0] * (-s[0]).exp() + weighted[1] * (-s[1]).exp() + s.sum()
    torch.testing.assert_close(out.loss.detach(), expected)
    out.loss.backward()
    by_hand = 1 - torch.stack(weighted) * (-s).exp()  # d/ds of v exp(-s) + s
    torch.testing.assert_close(balance.log_variances.grad, by_hand)


def test_uncertainty_counts_its_penalty_once_per_step():
    module, (inputs, labels) = distiller("uncertainty"), points(8)
    with torch.no_grad():
        module.objective.balance.log_variances.fill_(0.3)
    counts = module.count((inputs, labels))
    parts = [module(inputs[cut], labels[cut], counts=counts).loss for cut in (slice(0, 2), slice(2, 8))]
    torch.testing.assert_close(sum(parts), module(inputs, labels).loss)


def test_matched_scale_brings_every_term_to_the_reference():
    module, batch = distiller({"kind": "matched_scale", "reference": "labels", "momentum": 0.0}), points()
    module(*batch)
    out = module(*batch)
    parts = {name: (out.weights[name] * out.terms[name]).item() for name in NAMES}
    assert parts["labels"] == pytest.approx(0.5 * out.terms["labels"].item(), rel=1e-5)  # its own weight
    assert parts["kd"] == pytest.approx(1.0 * out.terms["labels"].item(), rel=1e-5)  # that of kd, on the same size


def test_gradient_norm_brings_every_gradient_to_the_reference():
    module, batch = distiller({"kind": "gradient_norm", "reference": "kd", "momentum": 0.0}), points()
    kd, labels = separate_gradients(module, batch)
    module(*batch, measure=True)
    out = module(*batch)
    assert float(out.weights["kd"]) == pytest.approx(1.0)
    assert float(out.weights["labels"]) == pytest.approx(0.5 * (kd.norm() / labels.norm()).item(), rel=1e-4)


def test_running_sizes_follow_slowly():
    balance = build_balance({"kind": "matched_scale", "momentum": 0.75}, NAMES)
    balance.observe(torch.tensor([2.0, 4.0]))
    balance.observe(torch.tensor([6.0, 0.0]))
    balance.observe(torch.tensor([math.nan, math.inf]))  # is left out
    assert balance.sizes.tolist() == [3.0, 3.0]
    assert balance.factors().tolist() == [1.0, 1.0]


def test_a_term_at_zero_is_left_alone():
    balance = build_balance("matched_scale", NAMES)
    balance.observe(torch.tensor([2.0, 0.0]))
    assert balance.factors().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("statik", ValueError, "unknown balance 'statik'; did you mean 'static'"),
        ({"kind": "matched_scale", "reference": "kt"}, ValueError, "'kt' is no term; known: kd, labels"),
        ({"kind": "static", "every": 3}, TypeError, "balance 'static' has no option 'every'"),
        ({"kind": "gradient_norm", "every": 0}, ValueError, "every=0"),
        ({"kind": "gradient_norm", "every": 2.5}, ValueError, r"every=2\.5"),
        (3, ValueError, "a balance is a name or .*, got 3"),
        ({"kind": "matched_scale", "momentum": "x"}, ValueError, "got 'x'"),
        ({"kind": "matched_scale", "momentum": 1.0}, ValueError, "lies in"),
    ],
)
def test_a_wrong_balance_is_refused(spec, error, message):
    with pytest.raises(error, match=message):
        build_balance(spec, NAMES)


# ---- in the loop -----------------------------------------------------------------------------------------------


def trained(balance, folder=None, stop=None, accumulation=1, **settings):
    class Watch(Callback):
        seen: list = []  # noqa: RUF012

        def on_gradients(self, state):
            self.seen.append((state.step, state.gradients))

        def on_step(self, state):
            if state.step == stop:
                raise KeyboardInterrupt

    Watch.seen = []
    inputs, labels = points(64)
    data = [{"input": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    module = distiller(balance, weight={"schedule": "linear_decay"})
    chosen = Settings(epochs=4, batch_size=16, learning_rate=0.05, accumulation=accumulation, checkpoint_every=3)
    chosen = chosen.model_copy(update=settings)
    try:
        fit(module, data, None, chosen, folder=folder, callbacks=[Watch()])
    except KeyboardInterrupt:
        assert stop is not None
    return module, Watch.seen


def state(module):
    return torch.cat([v.double().flatten() for v in module.state_dict().values()])


@pytest.mark.parametrize("kind", ["static", "uncertainty", "matched_scale", {"kind": "gradient_norm", "every": 2}])
def test_resume_is_exact_with_every_balance(kind, tmp_path):
    whole, _ = trained(kind)
    trained(kind, tmp_path, stop=8)
    resumed, _ = trained(kind, tmp_path)
    assert torch.equal(state(resumed), state(whole))


@pytest.mark.parametrize("kind", ["static", "uncertainty", "matched_scale"])
def test_a_cut_step_gives_the_same_update_with_every_balance(kind):
    whole, _ = trained(kind)
    cut, _ = trained(kind, accumulation=4)
    torch.testing.assert_close(state(cut), state(whole), rtol=1e-5, atol=1e-6)


def test_gradients_are_measured_every_few_steps_on_request():
    _, seen = trained("static", gradients_every=5)
    assert [step for step, _ in seen] == [1, 6, 11, 16]
    for _, gradients in seen:
        assert set(gradients) == {"share", "cosine"}
        assert sum(gradients["share"].values()) == pytest.approx(1.0)
        assert all(-1.0 <= value <= 1.0 for value in gradients["cosine"].values())


@pytest.mark.parametrize("kind", ["static", {"kind": "gradient_norm", "every": 4}])
def test_measuring_changes_no_weight(kind):
    assert torch.equal(state(trained(kind)[0]), state(trained(kind, gradients_every=3)[0]))


def test_a_weight_that_comes_back_from_zero_is_what_it_says():
    weights = {"schedule": "piecewise", "points": [[0.0, 1.0], [0.4, 0.0], [0.6, 0.0], [1.0, 1.0]]}
    seen = []

    class Watch(Callback):
        def on_log(self, state):
            seen.append(state.weights["kd"])

    inputs, labels = points(32)
    data = [{"input": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    module = distiller({"kind": "matched_scale", "reference": "labels"}, weight=weights)
    fit(
        module, data, None, Settings(steps=30, batch_size=32, log_every=1, learning_rate=1e-3), callbacks=[Watch()]
    )
    assert max(seen) < 100 * max(seen[1], 1.0)


def test_another_balance_does_not_go_on_from_a_checkpoint(tmp_path):
    trained({"kind": "matched_scale", "momentum": 0.9}, tmp_path, stop=8)
    with pytest.raises(ValueError, match=r"balance is .* there and .* here"):
        trained({"kind": "matched_scale", "momentum": 0.5}, tmp_path)


def test_a_scheduled_weight_runs_from_the_first_step_to_the_last():
    weights = []

    class Watch(Callback):
        def on_log(self, state):
            weights.append(state.weights["kd"])

    inputs, labels = points(32)
    data = [{"input": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    module = distiller(weight={"schedule": "linear", "start": 1.0, "end": 0.0})
    fit(module, data, None, Settings(epochs=5, batch_size=32, log_every=1), callbacks=[Watch()])
    assert weights == [1.0, 0.75, 0.5, 0.25, 0.0]
