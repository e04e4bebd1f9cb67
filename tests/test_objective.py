"""Losses that read several places, learn something or use a part of the teacher, through a whole Distiller."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from limbeck import Distiller, Self, Settings, Term, fit, self_distillation
from limbeck.losses import evaluate
from tests.models import bert


class Stages(nn.Module):
    """A small network with two stages of maps, a pooled vector and a head."""

    def __init__(self, width=4, classes=3):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images):
        second = torch.tanh(self.second(torch.tanh(self.first(images))))
        return self.head(self.flat(self.pool(second)))


class Exits(nn.Module):
    """Two exits, each a linear map on the stage before it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.exit, self.head = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs))
        self.exit(hidden)
        return self.head(torch.tanh(self.second(hidden)))


def images(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def models(student=4, teacher=4):
    torch.manual_seed(0)
    return Stages(student), Stages(teacher)


def hidden(model, *names):
    """What the modules give on the images, read by hooks of the test's own."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
        for name in names
    ]
    model(images()[0])
    for handle in handles:
        handle.remove()
    return tuple(seen[name] for name in names)


# ---- several places --------------------------------------------------------------------------------------------


def test_a_loss_over_two_places():
    student, teacher = models(4, 4)
    taps = ["first", "second"]
    distiller = Distiller(student, teacher, [Term(taps, loss="fsp")])
    expected = evaluate("fsp", hidden(student, *taps), hidden(teacher, *taps))
    out = distiller(*images())
    torch.testing.assert_close(out.loss, expected)
    assert list(out.terms) == ["fsp[first+second]"]
    out.loss.backward()
    assert student.first.weight.grad.any()


def test_places_may_have_other_names_in_the_teacher():
    student, teacher = models()
    term = Term(
        ["first", "second"],
        ["second", "first"],
        loss="hcl",
        name="swapped",
        project={"kind": "each", "of": "conv1x1"},
    )
    assert Distiller(student, teacher, [term])(*images()).loss.isfinite()


def test_as_many_places_on_both_sides():
    with pytest.raises(ValueError, match="2 places of the student meet 1 of the teacher"):
        Term(["first", "second"], "first", loss="fsp")


def test_fused_stages_train_with_the_student_from_the_first_step():
    student, teacher = models(3, 5)
    term = Term(["first", "second"], loss="hcl", project={"kind": "abf", "mid_channels": 4}, name="review")
    distiller = Distiller(student, teacher, [term])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)  # built before anything is sized
    distiller(*images()).loss.backward()
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in known and p.grad is not None for p in distiller.objective.parameters())


# ---- what belongs to a loss ------------------------------------------------------------------------------------


def test_a_loss_brings_its_projection():
    term = Term("second", loss="mgd")
    assert term.project == "masked_generator"
    student, teacher = models(3, 5)
    distiller = Distiller(student, teacher, [term])
    (plan,) = distiller.preflight(images())
    assert plan.parameters > 0
    assert distiller(*images()).loss.isfinite()


def test_a_loss_that_learns_trains_saves_and_resumes(tmp_path):
    def make():
        student, teacher = models(3, 5)
        terms = [
            Term("second", loss="vid", project="vid_regressor", name="vid"),
            Term("labels", loss="cross_entropy"),
        ]
        return Distiller(student, teacher, terms)

    data = [{"images": x, "labels": y} for x, y in zip(*images(32), strict=True)]
    settings = Settings(steps=8, batch_size=8, learning_rate=0.05, checkpoint_every=4)

    class Stopped(Exception):  # noqa: N818
        pass

    def run(stop=None, folder=None):
        from limbeck.train import Callback

        class Watch(Callback):
            def on_checkpoint(self, state):
                if state.step == stop:
                    raise Stopped

        distiller = make()
        with contextlib.suppress(Stopped):
            fit(distiller, data, None, settings, folder=folder, callbacks=[Watch()])
        return distiller.state_dict()

    whole = run()
    run(stop=4, folder=tmp_path)
    resumed = run(folder=tmp_path)
    assert any("learned.vid.variance" in key for key in whole)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    start = make()
    start.preflight(images())
    variance = next(key for key in whole if "learned.vid.variance" in key)
    assert not torch.equal(start.state_dict()[variance], whole[variance])


def test_options_of_what_a_loss_learns():
    term = Term("second", loss="vid", variance={"initial_variance": 2.0}, project="conv1x1")
    assert term.learned["variance"] == {"initial_variance": 2.0, "kind": "channel_variance"}
    with pytest.raises(TypeError, match="has no option 'initial_varance'"):
        Term("second", loss="vid", variance={"initial_varance": 2.0})


def test_a_contrastive_memory_lives_in_the_distiller():
    student, teacher = models(3, 5)
    term = Term("flat", loss="crd", name="crd", memory={"examples": 20, "negatives": 6, "width": 8})
    distiller = Distiller(student, teacher, [term])
    inputs, labels = images()
    batch = {"images": inputs, "labels": labels, "example_id": torch.arange(8)}
    distiller.preflight(batch)
    banks = {k: v.clone() for k, v in distiller.state_dict().items() if "bank" in k}
    assert [tuple(bank.shape) for bank in banks.values()] == [(20, 8), (20, 8)]
    distiller(**batch).loss.backward()
    changed = {
        key: (distiller.state_dict()[key] != bank).any(-1).nonzero().flatten().tolist()
        for key, bank in banks.items()
    }
    assert list(changed.values()) == [list(range(8))] * 2  # the preflight left the banks alone, the step did not
    assert all(p.grad is not None and p.grad.any() for p in distiller.objective.learned.parameters())
    with pytest.raises(ValueError, match="no example_id, which tells examples apart"):
        distiller(inputs, labels)


# ---- transformers ----------------------------------------------------------------------------------------------


def tokens():
    ids = torch.arange(12).view(2, 6) + 5
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}


def padded(batch):
    """The same with two more positions of padding."""
    more = {"input_ids": torch.full((2, 2), 3), "attention_mask": torch.zeros(2, 2, dtype=torch.long)}
    return {key: torch.cat([batch[key], more[key]], dim=1) for key in batch}


TRANSFORMER_TERMS = {
    "relations": {
        "tap": [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key", "value")],
        "loss": "qkv_relation",
        "relation_heads": 4,
    },
    "attention": {"tap": "attentions.1", "loss": "attention_kl", "of": "probabilities"},
    "squares": {"tap": "attentions.1", "loss": "attention_mse", "heads": "mean"},
    "gram": {"tap": "hidden_states.1", "loss": "token_gram_kl"},
}


@pytest.mark.parametrize("name", TRANSFORMER_TERMS)
def test_padding_changes_nothing_of_what_is_read_between_tokens(name):
    eager = {"attn_implementation": "eager"} if "attentions" in str(TRANSFORMER_TERMS[name]["tap"]) else {}
    student, teacher = (bert(seed=seed, **eager).eval() for seed in (0, 1))
    distiller = Distiller(student, teacher, [Term(name=name, **TRANSFORMER_TERMS[name])])
    distiller.preflight(tokens())
    losses = [distiller.distil(batch).loss for batch in (tokens(), padded(tokens()))]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-7)
    losses[0].backward()
    gradient = student.bert.encoder.layer[1].attention.self.query.weight.grad if name != "gram" else None
    assert name == "gram" or gradient.any()


# ---- through a part of the teacher -----------------------------------------------------------------------------


def test_features_through_the_teachers_head():
    student, teacher = models()
    term = Term("flat", loss="softmax_regression", head="head")
    distiller = Distiller(student, teacher, [term])
    (own,), (its,) = hidden(student, "flat"), hidden(teacher, "flat")
    expected = (teacher.head(own) - teacher.head(its)).square().mean()
    out = distiller(*images())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert student.second.weight.grad.any()
    assert teacher.head.weight.grad is None


def test_a_borrowed_option_may_be_a_number_of_ones_own():
    assert Distiller(*models(), [Term("second", loss="ofd", margin=-0.5)])(*images()).loss.isfinite()
    with pytest.raises(ValueError, match="the teacher has no module 'norm'"):
        Distiller(*models(), [Term("second", loss="ofd", margin="norm")])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "hed"}, ValueError, "the teacher has no module 'hed'; did you mean 'head'"),
        ({}, TypeError, "needs the option 'head'"),
    ],
)
def test_a_head_that_is_not_there(options, error, message):
    with pytest.raises(error, match=message):
        Distiller(*models(), [Term("flat", loss="softmax_regression", **options)])


# ---- a student that is its own teacher -------------------------------------------------------------------------


def points():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3


def test_earlier_exits_learn_from_the_last():
    torch.manual_seed(0)
    student = Exits()
    twin = copy.deepcopy(student)
    terms = self_distillation([["exit", "head"]], temperature=3.0, labels="cross_entropy")
    inputs, labels = points()
    out = Distiller(student, Self(), terms)(inputs, labels)
    out.loss.backward()

    hidden = torch.tanh(twin.first(inputs))
    shallow, deep = twin.exit(hidden), twin.head(torch.tanh(twin.second(hidden)))
    kd = 9 * nn.functional.kl_div(
        (shallow / 3).log_softmax(-1), (deep.detach() / 3).softmax(-1), reduction="batchmean"
    )
    ce = nn.functional.cross_entropy
    expected = kd + ce(shallow, labels) + ce(deep, labels)
    expected.backward()
    torch.testing.assert_close(out.loss, expected)
    for ours, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_each_group_counts_once():
    terms = self_distillation([["a", "b", "c"], ["x", "y"]], weight=0.6)
    assert [(t.tap, t.teacher_tap, t.weight) for t in terms] == [("a", "c", 0.3), ("b", "c", 0.3), ("x", "y", 0.6)]


def test_an_exit_that_is_not_there():
    with pytest.raises(ValueError, match="no module or output 'exti'; did you mean 'exit'"):
        Distiller(Exits(), Self(), self_distillation([["exit", "exti"]]))


# ---- transforms ------------------------------------------------------------------------------------------------


def test_transforms_and_own_temperatures_reach_the_loss():
    student, teacher = models()
    inputs, labels = images()
    term = Term("logits", loss="forward_kl", transforms=["probability_shift", "standardize"], temperature="flsw")
    out = Distiller(student, teacher, [term])(inputs, labels)
    expected = evaluate(
        "forward_kl",
        student(inputs),
        teacher(inputs),
        transforms=["probability_shift", "standardize"],
        temperature="flsw",
        labels=labels,
    )
    torch.testing.assert_close(out.loss, expected)


def test_a_transform_that_needs_labels_says_so():
    term = Term("logits", loss="forward_kl", transforms="probability_shift")
    with pytest.raises(ValueError, match="labels"):
        Distiller(*models(), [term])((images()[0],)[0])


@pytest.mark.parametrize("loss", ["forward_kl", "js_divergence", "soft_cross_entropy", "total_variation"])
def test_a_divergence_between_single_numbers_is_refused(loss):
    """A softmax over one class is 1: such a term would teach nothing, and say so by no more than a zero."""
    batch = {"input": torch.randn(2, 4), "labels": torch.tensor([0.5, 2.0])}
    student, teacher = nn.Linear(4, 1), nn.Linear(4, 1)
    with pytest.raises(ValueError, match=rf"term 'kd' .*: {loss} is -?0 whatever the student says.*by loss: mse"):
        Distiller(student, teacher, [Term("logits", loss=loss, name="kd")]).preflight(batch)
    Distiller(copy.deepcopy(teacher), teacher, [Term("logits", loss="mse")]).preflight(batch)  # 0 at first alone
    classes = nn.Linear(4, 2)
    Distiller(copy.deepcopy(classes), classes, [Term("logits", loss=loss)]).preflight(batch)
