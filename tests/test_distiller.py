import copy
import itertools
import pickle
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from limbeck import Distiller, Output, Term, layer_pairs, spread
from limbeck.batch import rows
from limbeck.teachers import ModuleTeacher
from tests.models import (
    Twice,
    Unnamed,
    bert,
    convolutional,
    gradients,
    hooks,
    images,
    pad,
    perceptron,
    points,
    text_batch,
)

KD = Term("logits", loss="forward_kl", temperature=2.0, name="kd")
CE = Term("labels", loss="cross_entropy", name="ce")
LAYER = "bert.encoder.layer.{}"

PROJECTIONS = "objective.projections"


def text_distiller(dtype=torch.float32, kind="BertForSequenceClassification", sample=None):
    """A BERT of 2 layers learns logits, hidden states and labels from a wider one of 4."""
    student, teacher = bert(kind=kind), bert(layers=4, width=24, seed=1, kind=kind)
    hidden = spread(
        LAYER, LAYER, layer_pairs("uniform", 2, 4), name="hidden", weight=0.5, loss="mse", project="linear"
    )
    terms = [
        Term("logits", loss="forward_kl", temperature=2.0, weight=0.9, name="kd"),
        *hidden,
        Term("labels", loss="cross_entropy", weight=0.1, name="ce"),
    ]
    return Distiller(student, teacher.to(dtype), terms, sample=sample).to(dtype)


def token_batch():
    batch = text_batch()
    labels = torch.where(batch["attention_mask"] != 0, batch["input_ids"] % 3, -100)
    labels[:, 0] = -100
    return {**batch, "labels": labels}


def image_distiller(**arguments):
    terms = [Term("relu", loss="mse", project="conv1x1", name="maps"), KD]
    return Distiller(convolutional(4, stride=1), convolutional(6, stride=2, seed=1), terms, **arguments)


# ---- the teacher stands outside --------------------------------------------------------------------------------


def test_the_teacher_is_no_part_of_the_module():
    distiller = text_distiller(sample=text_batch())
    teacher = distiller.teacher.module
    ours = {id(t) for t in (*distiller.parameters(), *distiller.buffers(), *distiller.modules())}
    assert not ours & {id(t) for t in (*teacher.parameters(), *teacher.buffers(), *teacher.modules())}
    prefixes = {key.split(".")[0] for key in distiller.state_dict()}
    assert prefixes == {"student", "objective"}


def test_the_teacher_stays_frozen_in_eval_mode():
    distiller = text_distiller()
    teacher = distiller.teacher.module
    before = copy.deepcopy(teacher.state_dict())
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1.0)
    distiller(**text_batch()).loss.backward()
    optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: lambda: m, ModuleTeacher], ids=["module", "function", "teacher"]
)
def test_a_student_cannot_be_its_own_teacher(wrap):
    student = perceptron()
    with pytest.raises(ValueError, match=r"share weights; pass copy.deepcopy\(teacher\)"):
        Distiller(student, wrap(student), [KD])


def test_a_shared_layer_is_refused():
    student, teacher = perceptron(), perceptron(seed=1)
    student[0] = teacher[0]
    with pytest.raises(ValueError, match="share weights"):
        Distiller(student, teacher, [KD])


# ---- eval mode is the student ----------------------------------------------------------------------------------


def test_eval_mode_is_the_student():
    distiller, batch = text_distiller().eval(), text_batch()
    ours, expected = distiller(**batch), bert().eval()(**batch)
    assert type(ours) is type(expected)
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.loss, expected.loss)


def test_eval_mode_takes_positional_inputs():
    pixels, labels = images()
    distiller = image_distiller().eval()
    expected = convolutional(4).eval()(pixels)
    assert torch.equal(distiller(pixels), expected)
    assert torch.equal(distiller(pixels, labels), expected)
    assert torch.equal(distiller(pixel_values=pixels, labels=labels), expected)


def test_eval_mode_passes_on_what_the_student_understands():
    distiller, batch = text_distiller().eval(), text_batch()
    assert len(distiller(**batch, output_hidden_states=True).hidden_states) == 3


def test_eval_mode_takes_several_positional_inputs():
    distiller, batch = text_distiller().eval(), text_batch()
    inputs = batch["input_ids"], batch["attention_mask"]
    assert torch.equal(distiller(*inputs).logits, bert().eval()(*inputs).logits)


def test_training_mode_gives_an_output():
    distiller, batch = text_distiller(), text_batch()
    out = distiller(**batch)
    assert isinstance(out, Output)
    assert torch.equal(out.logits, bert()(batch["input_ids"], batch["attention_mask"]).logits)
    assert list(out.terms) == ["kd", "hidden.0", "hidden.1", "ce"]
    assert not any(value.requires_grad for value in out.terms.values())
    weighted = (
        0.9 * out.terms["kd"] + 0.25 * (out.terms["hidden.0"] + out.terms["hidden.1"]) + 0.1 * out.terms["ce"]
    )
    torch.testing.assert_close(out.loss.detach(), weighted)


# ---- the loss, by hand -----------------------------------------------------------------------------------------


def by_hand(student, teacher, projections, batch):
    """kd (T = 2, weight 0.9), two hidden states (weight 0.25 each) and cross-entropy (weight 0.1)."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        taught = teacher.eval()(**inputs, output_hidden_states=True)
    learnt = student.train()(**inputs, output_hidden_states=True)
    p, log_q = (taught.logits / 2).softmax(-1), (learnt.logits / 2).log_softmax(-1)
    total = 0.9 * 4 * (p * (p.log() - log_q)).sum() / len(p)
    valid = [(b, i) for b, row in enumerate(batch["attention_mask"].tolist()) for i, one in enumerate(row) if one]
    for layer, (weight, bias) in enumerate(projections):
        ours, theirs = learnt.hidden_states[layer + 1], taught.hidden_states[2 * layer + 2]
        distances = [(weight @ ours[at] + bias - theirs[at]).square().mean() for at in valid]
        total = total + 0.25 * sum(distances) / len(valid)
    log_q = learnt.logits.log_softmax(-1)
    return total - 0.1 * sum(log_q[i, label] for i, label in enumerate(batch["labels"])) / len(log_q)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_training_loss_and_every_gradient_equal_those_by_hand(dtype, tolerance):
    distiller, batch = text_distiller(dtype), text_batch()
    out = distiller(**batch)
    out.loss.backward()
    projections = [
        tuple(
            distiller.get_parameter(f"{PROJECTIONS}.hidden/{layer}.affine.{name}") for name in ("weight", "bias")
        )
        for layer in (0, 1)
    ]
    student, teacher = bert().to(dtype), bert(layers=4, width=24, seed=1).to(dtype)
    copies = [tuple(p.detach().clone().requires_grad_() for p in pair) for pair in projections]
    expected = by_hand(student, teacher, copies, batch)
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients(student).items():
        ours = gradients(distiller.student)[name]
        torch.testing.assert_close(ours, gradient, rtol=10 * tolerance, atol=tolerance, msg=name)
    for ours, theirs in zip(sum(projections, ()), sum(copies, ()), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=10 * tolerance, atol=tolerance)


def test_a_loss_gets_the_inputs_that_it_asks_for():
    batch, seen = token_batch(), {}

    def curious(student, teacher, *, mask, labels):
        seen.update(mask=mask, labels=labels)
        return (student - teacher).square().mean(-1)

    kind = "BertForTokenClassification"
    Distiller(bert(kind=kind), bert(kind=kind, seed=1), [Term("logits", loss=curious)])(**batch)
    assert torch.equal(seen["mask"], batch["labels"] != -100)
    assert torch.equal(seen["labels"], batch["labels"])


def test_losses_are_in_float32_under_autocast():
    distiller = text_distiller(sample=text_batch())
    with torch.autocast("cpu", torch.bfloat16):
        out = distiller(**text_batch())
    assert out.logits.dtype == torch.bfloat16
    assert {value.dtype for value in (out.loss, *out.terms.values())} == {torch.float32}


def test_a_loss_runs_outside_of_autocast():
    """It may multiply matrices, and does so in float32."""
    seen = []

    def watching(student, teacher):
        seen.append(torch.is_autocast_enabled("cpu"))
        return (student - teacher).square().mean(-1)

    distiller = Distiller(perceptron(), perceptron(seed=1), [Term("logits", loss=watching)])
    with torch.autocast("cpu", torch.bfloat16):
        distiller(*points())
    assert set(seen) == {False}


def test_labels_that_are_numbers_have_no_number_to_ignore():
    features, _ = points()
    labels = torch.tensor([1.0, -100.0, 3.0, 0.0, 2.0, -1.0])
    distiller = Distiller(perceptron(outputs=1), None, [Term("labels", loss="label_mse")])
    expected = (perceptron(outputs=1)(features)[:, 0] - labels).square().mean()
    torch.testing.assert_close(distiller(features, labels).loss, expected)
    assert distiller.count((features, labels)) == {"examples": 6.0, "labels": 6.0}


# ---- padding, masks, parts of a step ---------------------------------------------------------------------------


def measure(distiller, batch, parts=(), counted=True):
    """The loss and the gradients of a step, done at once or in parts."""
    distiller.zero_grad()
    counts = distiller.count(batch) if counted else None
    total = 0.0
    for part in parts or [batch]:
        loss = distiller(**part, counts=counts).loss
        loss.backward()
        total += loss.item()
    return total, gradients(distiller)


def compare(ours, expected, tolerance):
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (ours[1][name] - gradient).abs().max() <= tolerance * scale, name


KINDS = [("BertForSequenceClassification", text_batch), ("BertForTokenClassification", token_batch)]


@pytest.mark.parametrize(("kind", "make"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_padding_changes_nothing(kind, make, dtype, tolerance):
    distiller = text_distiller(dtype, kind)
    expected = measure(distiller, make())
    compare(measure(distiller, pad(make(), 5)), expected, tolerance)
    compare(measure(distiller, make(), counted=False), expected, tolerance)  # the batch's own count is the default


@pytest.mark.parametrize(("kind", "make"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_parts_of_a_step_sum_up_to_the_step(kind, make, dtype, tolerance):
    distiller, batch = text_distiller(dtype, kind), make()
    expected = measure(distiller, batch)
    for cuts in ([0, 2, 4], [0, 1, 2, 4], [0, 3, 4]):
        parts = [rows(batch, start, stop) for start, stop in itertools.pairwise(cuts)]
        compare(measure(distiller, batch, parts), expected, tolerance)


def test_parts_of_a_step_with_a_loss_over_the_whole_batch():
    """A scalar counts once per example."""
    features, labels = points()
    terms = [Term("logits", loss=lambda student, teacher: (student - teacher).square().mean(), name="whole")]
    distiller = Distiller(perceptron(), perceptron(seed=1), terms)
    batch = {"input": features, "labels": labels}
    parts = [rows(batch, 0, 1), rows(batch, 1, 6)]
    compare(measure(distiller, batch, parts), measure(distiller, batch), 1e-6)


def test_a_loss_over_the_whole_batch_has_no_use_for_the_mask():
    term = Term(LAYER.format(0), loss=lambda student, teacher: (student - teacher).square().sum() / len(student))
    distiller, batch = Distiller(bert(), bert(seed=1), [term]), text_batch()
    expected = measure(distiller, batch)
    compare(measure(distiller, batch, [rows(batch, 0, 1), rows(batch, 1, 4)]), expected, 1e-5)


def test_a_part_without_any_label():
    features, labels = points()
    labels[:2] = -100
    distiller = Distiller(perceptron(), None, [CE])
    batch = {"input": features, "labels": labels}
    expected = measure(distiller, batch)
    compare(measure(distiller, batch, [rows(batch, 0, 2), rows(batch, 2, 6)]), expected, 1e-6)
    assert measure(distiller, rows(batch, 0, 2))[0] == 0


def test_count():
    assert text_distiller().count(text_batch()) == {"examples": 4.0, "attention_mask": 22.0, "labels": 4.0}
    tokens = token_batch()
    valid = sum(label != -100 for row in tokens["labels"].tolist() for label in row)
    assert text_distiller().count(tokens)["labels"] == valid
    assert Distiller(perceptron(), None, [CE]).count(points()) == {"examples": 6.0, "labels": 6.0}


def test_a_mask_of_the_users_own():
    features, labels = points()
    chosen = torch.tensor([1, 0, 0, 1, 0, 1])
    term = Term("logits", loss="mse", mask="chosen")
    distiller = Distiller(perceptron(), perceptron(seed=1), [term])
    out = distiller(input=features, labels=labels, chosen=chosen)
    keep = chosen.bool()
    expected = (perceptron()(features) - perceptron(seed=1)(features))[keep].square().mean()
    torch.testing.assert_close(out.loss, expected)
    assert distiller.count({"input": features, "chosen": chosen})["chosen"] == 3


def test_a_mask_that_is_not_in_the_batch():
    distiller = Distiller(perceptron(), perceptron(seed=1), [Term("logits", loss="mse", mask="chosn")])
    with pytest.raises(ValueError, match="chosn"):
        distiller(input=points()[0], chosen=torch.ones(6))


class Poisoned(nn.Module):
    """A teacher whose padding is NaN, as that of a fully masked attention row is."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        output = self.model(input_ids, attention_mask, output_hidden_states=True)
        hidden = output.hidden_states[1].masked_fill(attention_mask[..., None] == 0, float("nan"))
        return {"logits": output.logits, "last_hidden_state": hidden}


def test_nan_at_masked_positions_of_the_teacher_gives_no_gradient():
    term = Term("hidden_states.1", "last_hidden_state", loss="mse")
    distiller = Distiller(bert(), Poisoned(bert(seed=1)), [term])
    clean = Distiller(bert(), bert(seed=1), [Term("hidden_states.1", loss="mse")])
    expected = measure(clean, text_batch())
    compare(measure(distiller, text_batch()), expected, 1e-6)


# ---- batches and outputs of other shapes -----------------------------------------------------------------------


def test_tuples_and_dicts_are_the_same_batch():
    pixels, labels = images()
    distiller = Distiller(convolutional(), convolutional(seed=1), [KD, CE])
    losses = [
        distiller(pixels, labels).loss,
        distiller(pixels, labels=labels).loss,
        distiller(pixel_values=pixels, labels=labels).loss,
        distiller((pixels, labels)).loss,
        distiller([pixels, labels]).loss,  # as a DataLoader of pairs gives them
        distiller({"pixel_values": pixels, "labels": labels}).loss,
        distiller(UserDict(pixel_values=pixels, labels=labels)).loss,  # as tokenizers give them
    ]
    assert len({loss.item() for loss in losses}) == 1


def test_read_names_the_outputs_of_both_models():
    features, labels = points()
    terms = [KD, Term("hidden", loss="cosine"), CE]

    def read(output):
        return {"logits": output[0], "hidden": output[1]}

    student, teacher = Unnamed(), Unnamed()
    out = Distiller(student, teacher, terms, read=read)(features, labels)
    hidden, taught = student(features)[1], teacher(features)[1]
    torch.testing.assert_close(
        out.terms["cosine[hidden]"], (1 - functional.cosine_similarity(hidden, taught)).mean()
    )
    assert torch.equal(out.logits, student(features)[0])


def test_teacher_read_is_the_teachers_own():
    features, labels = points()
    student, teacher = perceptron(), Unnamed()
    distiller = Distiller(student, teacher, [KD], teacher_read=lambda output: {"logits": output[0]})
    assert distiller(features, labels).loss.isfinite()


def test_a_student_and_a_teacher_with_inputs_of_their_own():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(2, 3)

        def forward(self, summary):
            return self.body(summary)

    features, labels = points()
    teacher = Other()
    out = Distiller(perceptron(), teacher, [KD])(input=features, summary=features[:, :2], labels=labels)
    student_log, teacher_log = (
        (logits / 2).log_softmax(-1) for logits in (perceptron()(features), teacher(features[:, :2]))
    )
    by_definition = 4 * functional.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")
    torch.testing.assert_close(out.loss, by_definition)


def test_plain_training_needs_no_teacher():
    features, labels = points()
    out = Distiller(perceptron(), None, [CE])(features, labels)
    torch.testing.assert_close(out.loss, functional.cross_entropy(perceptron()(features), labels))


# ---- projections -----------------------------------------------------------------------------------------------


def test_an_optimizer_may_be_built_before_the_first_batch():
    distiller, batch = text_distiller(), text_batch()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.01, fused=True)
    distiller(**batch).loss.backward()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    optimizer.step()
    projections = [name for name in before if name.startswith("objective.projections.")]
    assert len(projections) == 4
    for name, parameter in distiller.named_parameters():
        assert id(parameter) in held, name
        assert parameter.grad is not None, name
    for name in (*projections, "student.classifier.weight", "student.bert.encoder.layer.0.output.dense.weight"):
        assert not torch.equal(distiller.get_parameter(name), before[name]), name
    first = distiller(**batch).loss.item()
    for _ in range(5):
        optimizer.zero_grad()
        distiller(**batch).loss.backward()
        optimizer.step()
    assert distiller(**batch).loss.item() < first


def test_projections_stand_in_the_state_dict_under_their_terms_names():
    keys = set(text_distiller(sample=text_batch()).state_dict())
    ours = {key for key in keys if not key.startswith("student.")}
    assert ours == {f"{PROJECTIONS}.hidden/{i}.affine.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert f"{PROJECTIONS}.maps.affine.weight" in image_distiller(sample=images()).state_dict()


def test_state_dict_round_trip():
    trained, fresh = text_distiller(sample=text_batch()), text_distiller(sample=text_batch(seed=9))
    fresh.load_state_dict(trained.state_dict())
    assert fresh(**text_batch()).loss == trained(**text_batch()).loss


def test_resuming_loads_before_the_first_batch():
    trained, fresh = text_distiller(sample=text_batch()), text_distiller()
    fresh.load_state_dict(trained.state_dict())
    assert fresh(**text_batch()).loss == trained(**text_batch()).loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_student_of_another_type(dtype):
    """`from_pretrained` gives a bfloat16 student for a bfloat16 checkpoint."""
    term = Term(LAYER.format(0), loss="mse", project="linear")
    distiller = Distiller(bert().to(dtype), bert(width=24, seed=1).to(dtype), [term])
    distiller(**text_batch()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.objective.parameters())


def test_feature_maps_through_conv1x1():
    distiller, (pixels, labels) = image_distiller(), images()
    out = distiller(pixels, labels)
    out.loss.backward()
    student, teacher = convolutional(4), convolutional(6, stride=2, seed=1).eval()
    ours = student.relu(student.norm(student.stem(pixels)))
    theirs = teacher.relu(teacher.norm(teacher.stem(pixels)))
    ours = functional.interpolate(ours, theirs.shape[2:], mode="bilinear", antialias=True)
    affine = distiller.objective.projections["maps"].affine
    mapped = torch.einsum("oc,bchw->bohw", affine.weight, ours) + affine.bias[:, None, None]
    torch.testing.assert_close(out.terms["maps"], (mapped - theirs).square().mean().detach())
    assert affine.weight.grad.abs().sum() > 0
    assert distiller.student.stem.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("when", ["sample", "first batch"])
@pytest.mark.parametrize(
    ("student", "teacher", "tap", "batch", "cure"),
    [
        (perceptron(5), perceptron(7), "0", points(), "project='linear'"),
        (convolutional(4), convolutional(6), "norm", images(), "project='conv1x1'"),
        (perceptron(outputs=3), perceptron(outputs=4), "logits", points(), "project='linear'"),
    ],
)
def test_shapes_that_differ_propose_a_projection(student, teacher, tap, batch, cure, when):
    distiller = Distiller(student, teacher, [Term(tap, loss="mse", name="features")])
    kind = cure.split("'")[1]
    message = rf"term 'features' \({tap} -> {tap}\): student .* and teacher .* differ in shape; .*'{kind}'"
    with pytest.raises(ValueError, match=message):
        distiller.preflight(batch) if when == "sample" else distiller(*batch)
    cured = Distiller(student, teacher, [Term(tap, loss="mse", project=kind)], sample=batch)
    assert cured(*batch).loss.isfinite()


def gram(student, teacher):
    """A loss between relations: the two widths need not be equal."""
    return (student @ student.T - teacher @ teacher.T).square().mean(-1)


def test_a_loss_that_compares_relations_needs_no_equal_shapes():
    terms = [Term("0", loss=gram)]
    distiller = Distiller(perceptron(5), perceptron(7, seed=1), terms)
    assert distiller(*points()).loss > 0
    distiller.preflight(points())


# ---- export ----------------------------------------------------------------------------------------------------


def test_export_gives_the_student_back():
    student = bert()
    keys, batch = list(student.state_dict()), text_batch()
    teacher = bert(layers=4, width=24, seed=1)
    distiller = Distiller(student, teacher, [KD, Term(LAYER.format(1), loss="mse", project="linear")])
    distiller(**batch).loss.backward()
    torch.optim.SGD(distiller.parameters(), lr=0.1).step()
    expected = distiller.eval()(**batch)
    exported = distiller.export()
    assert exported is student
    assert type(exported).__name__ == "BertForSequenceClassification"
    assert list(exported.state_dict()) == keys
    assert hooks(exported) == 0
    assert torch.equal(exported(**batch).logits, expected.logits)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_exported_student_can_be_copied_and_pickled(again, compiled):
    distiller = Distiller(convolutional(), convolutional(seed=1), [KD, Term("norm", loss="mse")])
    if compiled:
        distiller.compile_student(backend="eager")
    pixels, labels = images()
    distiller(pixels, labels).loss.backward()
    exported = distiller.export().eval()
    twin = again(exported)
    assert torch.equal(twin(pixels), exported(pixels))
    assert hooks(twin) == 0


def test_an_exported_transformer_can_be_saved_and_loaded(tmp_path):
    distiller, batch = text_distiller(), text_batch()
    distiller(**batch).loss.backward()
    exported = distiller.export().eval()
    exported.save_pretrained(tmp_path)
    loaded = type(exported).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, exported(**batch).logits)


def test_a_distiller_can_be_copied():
    """`torch.optim.swa_utils.AveragedModel` does."""
    distiller = text_distiller(sample=text_batch())
    twin = copy.deepcopy(distiller)
    assert twin(**text_batch()).loss == distiller(**text_batch()).loss
    twin(**text_batch()).loss.backward()
    assert all(p.grad is None for p in distiller.parameters())


# ---- what is refused before anything runs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "teacher", "message"),
    [
        ([], perceptron(), "a Distiller needs a term"),
        ([KD, KD], perceptron(), "two terms are called 'kd'; give one another name="),
        ([KD], None, r"term 'kd' \(logits -> logits\) needs a teacher, and there is none"),
        (
            [Term("layer.0", loss="mse", name="hidden")],
            perceptron(),
            r"term 'hidden' \(layer.0 -> layer.0\): student: no module or output 'layer.0'; known: ",
        ),
        (
            [Term("0", "00", loss="mse", name="hidden")],
            perceptron(),
            r"term 'hidden' \(0 -> 00\): the teacher has no '00'; did you mean '0'",
        ),
        (
            [Term("logits", "logit", loss="mse")],
            perceptron(),
            "the teacher has no 'logit'; did you mean 'logits'",
        ),
    ],
)
def test_a_wrong_distiller_is_none(terms, teacher, message):
    with pytest.raises(ValueError, match=message):
        Distiller(perceptron(seed=1), teacher, terms)


@pytest.mark.parametrize("terms", [KD, {"kd": KD}, [KD, {"tap": "logits", "loss": "mse"}], ["forward_kl"]])
def test_terms_are_a_list_of_terms(terms):
    with pytest.raises(TypeError, match=r"^the terms of a Distiller are a list of Term, got .*; write \[Term"):
        Distiller(perceptron(seed=1), perceptron(), terms)


def test_a_value_that_the_loss_cannot_take_names_the_term():
    terms = [Term("logits", loss="cosine", dim="hot", name="angle")]
    with pytest.raises(TypeError, match=r"term 'angle' \(logits -> logits\): ") as caught:
        Distiller(perceptron(seed=1), perceptron(), terms, sample=points())
    assert isinstance(caught.value.__cause__, TypeError)  # with the place within the loss


@pytest.mark.parametrize("names", [("train",), ("type",), ("a.b", "a/b")])
def test_names_of_terms_with_projections(names):
    """A name that a module dictionary cannot hold works or is refused; two never share one projection."""
    terms = [Term("logits", loss="mse", name=name, project="linear") for name in names]
    try:
        distiller = Distiller(perceptron(), perceptron(seed=1), terms)
    except ValueError as refusal:
        assert names[0] in str(refusal)  # noqa: PT017
    else:
        assert len(distiller.objective.projections) == len(names)


@pytest.mark.parametrize("when", ["sample", "first batch"])
def test_a_batch_without_labels(when):
    distiller = Distiller(perceptron(), None, [CE])
    with pytest.raises(
        ValueError, match=r"term 'ce' .*the batch has no labels, only \['input'\]; drop the term or add"
    ):
        distiller.preflight({"input": points()[0]}) if when == "sample" else distiller(input=points()[0])


@pytest.mark.parametrize(("tap", "message"), [("idle", "did not run"), ("shared", "ran more than once")])
def test_a_module_that_cannot_be_tapped(tap, message):
    with pytest.raises(ValueError, match=message):
        Distiller(Twice(), Twice(), [Term(tap, loss="mse")], sample=points())


# ---- preflight -------------------------------------------------------------------------------------------------


def test_preflight_says_what_each_term_will_do():
    distiller, batch = text_distiller(), text_batch()
    kd, first, second, ce = distiller.preflight(batch)
    assert [plan.term.name for plan in (kd, first, second, ce)] == ["kd", "hidden.0", "hidden.1", "ce"]
    assert (kd.student_shape, kd.teacher_shape, kd.mask, kd.parameters) == ((2, 3), (2, 3), None, 0)
    assert (first.student_shape, first.teacher_shape) == ((2, 7, 16), (2, 7, 24))
    assert (first.mask, first.parameters) == ("attention_mask", 16 * 24 + 24)
    assert (ce.student_shape, ce.teacher_shape, ce.mask, ce.parameters) == ((2, 3), (2,), "labels", 0)
    two = rows(batch, 0, 2)
    expected = functional.cross_entropy(bert()(two["input_ids"], two["attention_mask"]).logits, two["labels"])
    assert ce.value == pytest.approx(expected.item(), rel=1e-5)


def test_preflight_trains_nothing():
    distiller = image_distiller(sample=images())
    before = copy.deepcopy(distiller.state_dict())
    teacher = copy.deepcopy(distiller.teacher.module.state_dict())
    distiller.preflight(images(seed=5))
    for key, tensor in distiller.state_dict().items():
        assert torch.equal(tensor, before[key]), key  # the running statistics among them
    for key, tensor in distiller.teacher.module.state_dict().items():
        assert torch.equal(tensor, teacher[key]), key
    assert all(p.grad is None for p in distiller.parameters())


def test_the_teachers_time_is_that_of_training():
    distiller = image_distiller(sample=images())
    assert distiller.teacher_seconds == 0
    distiller(*images())
    assert distiller.teacher_seconds > 0


def test_preflight_draws_no_random_numbers_but_for_new_projections():
    student = bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    teacher = bert(seed=1, hidden_dropout_prob=0.5)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    distiller = Distiller(student, teacher, [KD, CE], sample=text_batch())
    assert torch.equal(torch.get_rng_state(), state)
    projected = image_distiller()
    torch.manual_seed(3)
    projected.preflight(images())
    assert not torch.equal(torch.get_rng_state(), state)
    state = torch.get_rng_state()
    projected.preflight(images())
    distiller.preflight(text_batch())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_preflight_leaves_the_mode_of_every_module(training):
    """A part that is kept in eval mode (frozen batch norm) stays so; so does a student fresh from disk."""
    student = convolutional().train(training)
    student.norm.eval()
    modes = {name: module.training for name, module in student.named_modules()}
    distiller = Distiller(student, convolutional(seed=1), [KD], sample=images())
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert distiller.training


def broken_distiller(loss, side):
    models = {"student": perceptron(), "teacher": perceptron(seed=1)}
    with torch.no_grad():
        models[side][3].bias[1] = float("nan")
    return Distiller(models["student"], models["teacher"], [Term("logits", loss=loss, name="broken")])


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("loss", ["forward_kl", "soft_cross_entropy", "mse", "cosine"])
def test_preflight_finds_a_nan_and_names_the_term(loss, side):
    with pytest.raises(ValueError, match=r"term 'broken' .* is nan before any training"):
        broken_distiller(loss, side).preflight(points())


def test_the_first_batch_is_checked_like_a_sample():
    with pytest.raises(ValueError, match=r"term 'broken' .* is nan before any training"):
        broken_distiller("mse", "teacher")(*points())


def test_preflight_of_a_single_example():
    features, labels = points(size=1)
    (plan,) = Distiller(perceptron(), perceptron(seed=1), [KD]).preflight((features, labels))
    assert plan.student_shape == (1, 3)


def test_preflight_finds_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match=r"'hidden_states.9' asks for part 9 of 3"):
        Distiller(bert(), bert(seed=1), [Term("hidden_states.9", loss="mse")], sample=text_batch())


# ---- calls that nest -------------------------------------------------------------------------------------------


def test_no_hook_is_left_after_a_step_or_an_error():
    distiller = image_distiller()
    distiller(*images())
    assert hooks(distiller.student) == hooks(distiller.teacher.module) == 0
    with pytest.raises(RuntimeError):
        distiller(torch.ones(2, 4, 8, 8), torch.zeros(2))
    assert hooks(distiller.student) == hooks(distiller.teacher.module) == 0


def test_a_student_may_learn_from_one_that_learns():
    """A chain: the student of one Distiller teaches in another."""
    assistant = perceptron(seed=1)
    first = Distiller(assistant, perceptron(seed=2), [KD])
    first(*points()).loss.backward()
    second = Distiller(perceptron(), first.export(), [KD])
    second(*points()).loss.backward()
    assert all(p.grad is not None for p in second.parameters())
    assert not any(p.requires_grad for p in assistant.parameters())


def test_a_student_that_was_refused_as_its_own_teacher_still_trains():
    student = nn.Linear(2, 3)
    for teacher in (student, {"a": student}):
        with pytest.raises(ValueError, match="share weights"):
            Distiller(student, teacher, [Term("logits", loss="mse")])
    assert all(p.requires_grad for p in student.parameters())


def test_a_student_of_which_nothing_trains_is_refused():
    student = nn.Linear(2, 3).requires_grad_(False)
    distiller = Distiller(student, nn.Linear(2, 3), [Term("logits", loss="mse")]).train()
    with pytest.raises(ValueError, match=r"nothing that trains: 0 of the student's parameters have requires_grad"):
        distiller(torch.ones(4, 2), torch.zeros(4))
    with torch.no_grad():
        assert distiller(torch.ones(4, 2), torch.zeros(4)).loss > 0


def test_counts_that_lack_something():
    distiller = Distiller(nn.Linear(4, 3), nn.Linear(4, 3), [Term("logits", loss="mse")]).train()
    with pytest.raises(ValueError, match=r"counts lack 'examples', they have \['exmples'\]; add up"):
        distiller(torch.ones(2, 4), torch.zeros(2, dtype=torch.long), counts={"exmples": 2.0})


def test_the_places_that_are_proposed_have_names():
    """The model itself is a module too, whose path is empty."""
    with pytest.raises(ValueError, match=r"the teacher has no 'zzz'; known: 0, 1, "):
        Distiller(nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Tanh()), [Term("logits", "zzz", loss="mse")])
