"""Other entries of a batch that are read as labels, and the losses that transformers models have of their own."""

import pytest
import torch
import transformers

from limbeck import Distiller, Examples, Settings, Term, fit
from limbeck.teachers import Cached, ModuleTeacher
from tests.models import bert, gradients, text_batch

START = Term("start_logits", "labels.start_positions", loss="cross_entropy", weight=0.5, name="start")
END = Term("end_logits", "labels.end_positions", loss="cross_entropy", weight=0.5, name="end")
SPANS = [
    START,
    END,
    Term("start_logits", loss="forward_kl", temperature=2.0, name="start kd"),
    Term("end_logits", loss="forward_kl", temperature=2.0, name="end kd"),
]


def answering(**options):
    return bert(kind="BertForQuestionAnswering", labels=2, **options)


def questions():
    given = text_batch()
    del given["labels"]
    return {**given, "start_positions": torch.tensor([1, 0, 2, 1]), "end_positions": torch.tensor([3, 2, 2, 1])}


def inputs(given):
    return {key: given[key] for key in ("input_ids", "attention_mask")}


def test_answers_are_learned_as_the_model_would_itself():
    student, own = answering(), answering()
    out = Distiller(student, None, [START, END]).train()(**questions())
    expected = own(**questions()).loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    for name, gradient in gradients(own).items():
        torch.testing.assert_close(gradients(student)[name], gradient, atol=1e-6, rtol=1e-5)


def by_hand(student, teacher):
    """A divergence over the positions of each text, in plain loops."""
    total = 0.0
    for ours, theirs in zip(student.double() / 2.0, teacher.double() / 2.0, strict=True):
        q, p = ours.log_softmax(-1), theirs.log_softmax(-1)
        total = total + 4.0 * sum(p[i].exp() * (p[i] - q[i]) for i in range(len(p)))
    return total / len(student)


def test_answers_of_a_teacher():
    """Both models see padding alike: the attention mask is no mask of logits over positions."""
    student, teacher, given = answering(), answering(width=24, layers=3, seed=5), questions()
    distiller = Distiller(student, teacher, SPANS)
    ours, theirs = (model.eval()(**inputs(given)) for model in (student, teacher))
    out = distiller.train()(**given)
    for name in ("start", "end"):
        expected = by_hand(ours[f"{name}_logits"], theirs[f"{name}_logits"]).float()
        torch.testing.assert_close(out.terms[f"{name} kd"], expected)
    assert [planned.mask for planned in distiller.preflight(given)] == [
        "labels.start_positions",
        "labels.end_positions",
        None,
        None,
    ]


@pytest.mark.parametrize("fill", [float("-inf"), -1e30])
def test_padding_that_is_marked_in_the_logits_gives_no_nan(fill):
    """Models that put minus infinity, or a large number, where a text has ended."""

    def read(output):
        return {name: output[name].masked_fill(given["attention_mask"] == 0, fill) for name in output}

    student, teacher, given = answering(), answering(seed=5), questions()
    ours, theirs = (model.eval()(**inputs(given)) for model in (student, teacher))
    out = Distiller(student, teacher, SPANS, read=read).train().distil(given)
    out.loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(student).values())
    lengths = given["attention_mask"].sum(1)
    rows = [
        by_hand(ours.start_logits[i : i + 1, :n], theirs.start_logits[i : i + 1, :n])
        for i, n in enumerate(lengths)
    ]
    torch.testing.assert_close(out.terms["start kd"], torch.stack(rows).mean().float())
    picked = [
        torch.log_softmax(ours.start_logits[i, :n], 0)[given["start_positions"][i]] for i, n in enumerate(lengths)
    ]
    torch.testing.assert_close(out.terms["start"], -torch.stack(picked).mean())


def test_answers_outside_of_the_text_are_ignored():
    """As a dataset of long texts marks them: with the text's length here, and -100 by default."""
    given, length = questions(), 7
    given["start_positions"][1] = length
    own = answering()
    expected = own(**given).loss
    terms = [
        Term("start_logits", "labels.start_positions", loss="cross_entropy", weight=0.5, ignore_index=length),
        Term("end_logits", "labels.end_positions", loss="cross_entropy", weight=0.5),
    ]
    distiller = Distiller(answering(), None, terms)
    torch.testing.assert_close(distiller.train()(**given).loss, expected)
    assert distiller.count(given) == {
        "examples": 4.0,
        "attention_mask": 22.0,
        "labels.start_positions": 4.0,
        "labels.end_positions": 4.0,
        "labels.start_positions but 7": 3.0,
    }
    given["start_positions"][1] = -100
    torch.testing.assert_close(Distiller(answering(), None, [START, END]).train()(**given).loss, expected)


def test_each_entry_counts_for_itself():
    """Parts of a step in which one of the answers is not known."""
    given = questions()
    given["start_positions"][:3] = -100
    given["end_positions"][2] = -100
    distiller = Distiller(answering(), answering(seed=5), SPANS).train()
    whole, counts = distiller(**given).loss, distiller.count(given)
    assert (counts["labels.start_positions"], counts["labels.end_positions"]) == (1.0, 3.0)
    parts = [
        {key: value[rows] for key, value in given.items()} for rows in (slice(0, 2), slice(2, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(distiller(**part, counts=counts).loss for part in parts), whole)


def test_neither_model_is_given_what_is_read_as_labels():
    seen = []

    class Watched(transformers.BertForQuestionAnswering):
        def forward(self, input_ids=None, attention_mask=None, start_positions=None, end_positions=None, **more):
            seen.append((start_positions, end_positions))
            return super().forward(input_ids, attention_mask, **more)

    student, teacher = (Watched(answering().config) for _ in range(2))
    distiller = Distiller(student, teacher, SPANS).train()
    distiller(**questions())
    assert len(seen) == 4
    assert all(given == (None, None) for given in seen)
    assert distiller.eval()(**questions()).start_logits.shape == (4, 7)  # whose user may want its own loss
    assert torch.equal(seen[-1][0], questions()["start_positions"])


def test_what_a_model_cannot_run_without_it_is_given():
    """An autoencoder, whose labels are its input."""
    torch.manual_seed(0)
    student = torch.nn.Linear(3, 3)
    given = {"input": torch.randn(5, 3)}
    out = Distiller(student, None, [Term("labels.input", loss="label_mse")]).train()(**given)
    torch.testing.assert_close(out.loss, (student(given["input"]) - given["input"]).square().mean())


def test_an_entry_that_is_not_there():
    given = questions()
    del given["end_positions"]
    with pytest.raises(
        ValueError,
        match=r"term 'end' \(end_logits -> labels.end_positions\): the batch has no 'end_positions' to read as "
        r"labels, only \['attention_mask', 'input_ids', 'start_positions'\]; drop the term or add them",
    ):
        Distiller(answering(), None, [START, END]).train()(**given)


def test_a_term_on_an_entry_says_so():
    assert (START.reads_labels, START.labels, START.teacher_taps) == (
        True,
        "start_positions",
        ("labels.start_positions",),
    )
    short = Term("labels.targets", loss="cross_entropy")
    assert (short.taps, short.labels, short.name) == (("logits",), "targets", "cross_entropy")


def test_texts_in_other_tokens_have_other_answers():
    """Positions of two tokenizers are no classes of one kind, although as many could be compared."""
    given = questions()
    longer = {key: torch.nn.functional.pad(value, (0, 2), value=1) for key, value in inputs(given).items()}
    batch = {"student": inputs(given), "teacher": longer, "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match="compares token by token, and the two models are given different tokens"):
        Distiller(answering(), answering(seed=5), [SPANS[2]]).train()(**batch)


def test_answers_may_be_kept_and_are_told_apart_by_their_padding():
    teacher = ModuleTeacher(answering(seed=5))
    cached, given = Cached(teacher), questions()
    longer = {key: torch.nn.functional.pad(value, (0, 2)) for key, value in inputs(given).items()}
    for _ in range(2):
        for batch in (inputs(given), longer):
            for tap in ("start_logits", "end_logits"):
                kept, expected = (source.signal(batch, [tap])[tap] for source in (cached, teacher))
                torch.testing.assert_close(kept, expected)
    assert cached.computed == 16


def test_training_on_entries_is_the_same_however_it_is_cut():
    given = questions()
    given["start_positions"][0] = -100
    items = [{key: value[i] for key, value in given.items()} for i in range(4)]
    trained, cut = [], {"steps": 3, "optimizer": "sgd", "learning_rate": 0.1}
    for accumulation in (1, 4):
        distiller = Distiller(answering(), answering(seed=5), SPANS)
        fit(distiller, Examples(items), None, Settings(batch_size=4, accumulation=accumulation, **cut))
        trained.append(distiller.export())
    for ours, theirs in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


# ---- the losses of other problems ------------------------------------------------------------------------------


def test_multi_label_is_the_models_own():
    given = {**text_batch(), "labels": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])}
    student, own = bert(), bert(problem_type="multi_label_classification")
    out = Distiller(student, None, [Term("labels", loss="binary_cross_entropy")]).train()(**given)
    expected = own(**given).loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    torch.testing.assert_close(student.classifier.weight.grad, own.classifier.weight.grad)


@pytest.mark.parametrize(("outputs", "labels"), [(1, torch.tensor([0.5, -2.0, 3.0, 1.0])), (2, torch.ones(4, 2))])
def test_regression_is_the_models_own(outputs, labels):
    given = {**text_batch(), "labels": labels}
    own = bert(labels=outputs, problem_type="regression")
    out = Distiller(bert(labels=outputs), None, [Term("labels", loss="label_mse")]).train()(**given)
    torch.testing.assert_close(out.loss, own(**given).loss)


def test_token_classification_is_the_models_own():
    given = text_batch()
    given["labels"] = torch.randint(3, (4, 7)).masked_fill(given["attention_mask"] == 0, -100)
    own = bert(kind="BertForTokenClassification")
    student = bert(kind="BertForTokenClassification")
    out = Distiller(student, None, [Term("labels", loss="cross_entropy")]).train()(**given)
    torch.testing.assert_close(out.loss, own(**given).loss)
