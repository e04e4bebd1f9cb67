"""Language models: the label of a position is that of the next token, for terms, masks and counts alike."""

import pytest
import torch
import transformers

from limbeck import Distiller, Ensemble, Examples, Settings, Term, fit
from tests.models import gradients

VOCABULARY = 23


def gpt2(width=16, layers=2, seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).train()


def batch(rows=3, length=8, seed=1):
    """Padded on the right, and a prompt that is not learned."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, length - 2, length - 3][:rows])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator) * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


KD = Term("logits", loss="forward_kl", temperature=2.0, name="kd")
LM = Term("labels", loss="cross_entropy", name="lm")
HIDDEN = Term("hidden_states.-1", loss="mse", name="hidden")


def by_hand(student, teacher, labels):
    """The mean divergence over the positions whose next token has a label, in plain loops."""
    student, teacher = (logits.double() / 2.0 for logits in (student, teacher))
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            if labels[row, position + 1] == -100:
                continue
            q, p = student[row, position].log_softmax(-1), teacher[row, position].log_softmax(-1)
            total = total + 4.0 * sum(p[c].exp() * (p[c] - q[c]) for c in range(VOCABULARY))
            count += 1
    return total / count


def test_the_loss_on_labels_is_the_models_own():
    student, own = gpt2(), gpt2()
    out = Distiller(student, None, [LM], causal=True).train()(**batch())
    expected = own(**batch()).loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    for name, gradient in gradients(own).items():
        torch.testing.assert_close(gradients(student)[name], gradient, atol=1e-6, rtol=1e-5)


def test_logits_count_where_the_next_token_has_a_label():
    student, teacher, given = gpt2(), gpt2(24, 3, seed=5), batch()
    distiller = Distiller(student, teacher, [KD, LM], causal=True)
    inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
    logits = [model.eval()(**inputs).logits for model in (student, teacher)]
    out = distiller.train()(**given)
    torch.testing.assert_close(out.terms["kd"].double(), by_hand(*logits, given["labels"]), atol=1e-6, rtol=1e-6)
    shifted = int((given["labels"][:, 1:] != -100).sum())
    assert distiller.count(given) == {"examples": 3.0, "attention_mask": 19.0, "labels": float(shifted)}
    assert {p.term.name: p.mask for p in distiller.preflight(given)} == {"kd": "labels", "lm": "labels"}
    assert torch.equal(given["labels"], batch()["labels"])


def test_hidden_states_go_on_with_the_attention_mask():
    student, teacher, given = gpt2(), gpt2(seed=5), batch()
    inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
    ours, theirs = (m(**inputs, output_hidden_states=True).hidden_states[-1] for m in (student, teacher))
    squares = (ours - theirs).square().mean(-1)[given["attention_mask"] == 1]
    out = Distiller(student, teacher, [HIDDEN], causal=True).train()(**given)
    torch.testing.assert_close(out.loss, squares.mean())


def test_without_labels_nothing_is_moved():
    given = {key: value for key, value in batch().items() if key != "labels"}
    plain, causal = (Distiller(gpt2(), gpt2(seed=5), [KD], causal=c).train()(**given).loss for c in (False, True))
    assert torch.equal(plain, causal)


def test_parts_of_a_step_sum_up_to_the_step():
    """Rows and positions that count differ between the parts."""
    given = batch()
    distiller = Distiller(gpt2(), gpt2(seed=5), [KD, LM], causal=True).train()
    whole, counts = distiller(**given).loss, distiller.count(given)
    parts = [{key: value[rows] for key, value in given.items()} for rows in (slice(0, 1), slice(1, 3))]
    assert {k: sum(distiller.count(part)[k] for part in parts) for k in counts} == counts
    torch.testing.assert_close(sum(distiller(**part, counts=counts).loss for part in parts), whole)


def test_training_is_the_same_however_it_is_cut():
    items = [{key: value[i] for key, value in batch().items()} for i in range(3)]
    trained, cut = [], {"steps": 3, "optimizer": "sgd", "learning_rate": 0.1}
    for accumulation in (1, 3):
        distiller = Distiller(gpt2(), gpt2(seed=5), [KD, LM], causal=True)
        fit(distiller, Examples(items), None, Settings(batch_size=3, accumulation=accumulation, **cut))
        trained.append(distiller.export())
    for ours, theirs in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_loss_that_asks_for_labels_gets_those_of_the_next_token():
    seen = []

    def asking(student, teacher, *, labels):
        seen.append(labels)
        return (student - teacher).square().mean(-1)

    given = batch()
    Distiller(gpt2(), gpt2(seed=5), [Term("logits", loss=asking)], causal=True, sample=given)
    expected = torch.cat([given["labels"][:2, 1:], torch.full((2, 1), -100)], dim=1)
    assert torch.equal(seen[0], expected)


def test_an_ensemble_weighs_by_the_next_token():
    """The teachers' confidence in the labels, by hand: the likelier a teacher finds them, the more it counts."""
    teachers, given = {"a": gpt2(seed=5), "b": gpt2(seed=6)}, batch()
    seen = []

    def keep(student, teacher):
        seen.append(teacher)
        return (student - teacher).square().mean(-1)

    mixed = Ensemble(teachers, mix="per-sample confidence")
    inputs = {key: given[key] for key in ("input_ids", "attention_mask")}
    Distiller(gpt2(), mixed, [Term("logits", loss=keep)], causal=True).train().distil(given)
    moved = torch.cat([given["labels"][:, 1:], torch.full((3, 1), -100)], dim=1)
    expected = mixed.signal({**inputs, "labels": moved}, ["logits"])["logits"]
    unmoved = mixed.signal(given, ["logits"])["logits"]
    counts = moved != -100
    torch.testing.assert_close(seen[-1][counts], expected[counts])
    assert not torch.allclose(expected[counts], unmoved[counts])


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.long), torch.zeros(3, 8)])
def test_labels_that_are_not_of_tokens_are_refused(labels):
    distiller = Distiller(gpt2(), None, [LM], causal=True)
    with pytest.raises(
        ValueError, match=r"causal=True moves the labels of tokens .* of shape .*; leave causal out"
    ):
        distiller.train()(**{**batch(), "labels": labels})


def test_another_mark_for_what_does_not_count_is_refused():
    with pytest.raises(ValueError, match="the term ignores 0; put -100 into the labels"):
        Distiller(gpt2(), None, [Term("labels", loss="cross_entropy", ignore_index=0)], causal=True)


def test_an_input_that_is_also_its_label_reaches_the_student_unmoved():
    """A model that learns to say its input: the labels are the input ids, read by their name."""
    given = batch()
    del given["labels"]
    own = gpt2()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, 0)
    expected = own(**given, labels=labels).loss
    term = Term("logits", "labels.input_ids", loss="cross_entropy")
    torch.testing.assert_close(Distiller(gpt2(), None, [term], causal=True).train()(**given).loss, expected)
