"""Models with an encoder and a decoder: what the decoder reads is made of the labels, by each model in its way."""

import pytest
import torch
import transformers

from limbeck import Distiller, Examples, Settings, Term, fit
from limbeck.teachers import Cached, ModuleInputs, ModuleTeacher
from tests.models import gradients

VOCABULARY = 29


def made(kind, config, **options):
    return getattr(transformers, kind)(getattr(transformers, config)(vocab_size=VOCABULARY, **options)).train()


BARTS = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "init_std": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def t5(width=16, seed=0, start=0):
    torch.manual_seed(seed)
    return made(
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        initializer_factor=1.0,
        decoder_start_token_id=start,
    )


def bart(seed=0, **options):
    torch.manual_seed(seed)
    return made("BartForConditionalGeneration", "BartConfig", **{**BARTS, **options})


def marian(seed=0):
    torch.manual_seed(seed)
    return made("MarianMTModel", "MarianConfig", **{**BARTS, "decoder_start_token_id": 1})


def pegasus(seed=0):
    torch.manual_seed(seed)
    return made("PegasusForConditionalGeneration", "PegasusConfig", **{**BARTS, "decoder_start_token_id": 1})


def two_berts(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    part = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(part, part)
    both.pad_token_id, both.decoder_start_token_id = 0, 3
    return transformers.EncoderDecoderModel(both).train()


KINDS = {"t5": t5, "bart": bart, "marian": marian, "pegasus": pegasus, "two berts": two_berts}


def batch(rows=3, length=6, target=6, seed=1):
    """Source and target of one length, so that a mask of the wrong side would fit."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < torch.tensor([length, length - 1, length - 3])[:rows, None]).long()
    known = torch.arange(target) < torch.tensor([target - 2, target, target - 1])[:rows, None]
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(3, VOCABULARY, (rows, target), generator=generator)
    return {
        "input_ids": ids.masked_fill(mask == 0, 1),
        "attention_mask": mask,
        "labels": labels.masked_fill(~known, -100),
    }


LM = Term("labels", loss="cross_entropy", name="lm")
KD = Term("logits", loss="forward_kl", name="kd")


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")  # two BERTs say so at every loss
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_on_labels_is_the_models_own(kind):
    student, own = KINDS[kind](), KINDS[kind]()
    out = Distiller(student, None, [LM]).train()(**batch())
    expected = own(**batch()).loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    for name, gradient in gradients(own).items():
        torch.testing.assert_close(gradients(student)[name], gradient, atol=1e-6, rtol=1e-5)


def test_each_model_begins_in_its_own_way():
    """The teacher's decoder starts with another token than the student's."""
    student, teacher, given = t5(), t5(24, seed=5, start=7), batch()
    with torch.no_grad():
        ours, theirs = (model(**given).logits for model in (student, teacher))
        unlike = teacher(
            **{k: v for k, v in given.items() if k != "labels"},
            decoder_input_ids=student._shift_right(given["labels"]),
        ).logits
    counts = given["labels"] != -100
    q, p = (logits.double().log_softmax(-1)[counts] for logits in (ours, theirs))
    out = Distiller(student, teacher, [KD, LM]).train()(**given)
    torch.testing.assert_close(out.terms["kd"].double(), (p.exp() * (p - q)).sum(-1).mean(), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(unlike, theirs)


def test_a_batch_may_bring_the_decoders_inputs():
    given = {**batch(), "decoder_input_ids": torch.full((3, 6), 5)}
    student = t5()
    expected = t5()(**given).loss
    torch.testing.assert_close(Distiller(student, None, [LM]).train()(**given).loss, expected)
    assert ModuleInputs(student).prepared(given) is given


def test_a_decoders_states_count_where_there_is_a_label():
    """And an encoder's where its own mask says so; cross attention has a mask of neither kind."""
    student, teacher, given = bart(), bart(seed=5), batch()
    taps = {
        "decoder_hidden_states.1": "labels",
        "model.decoder.layers.0": "labels",
        "model.encoder.layers.0": "attention_mask",
        "encoder_last_hidden_state": "attention_mask",
        "logits": "labels",
    }
    distiller = Distiller(student, teacher, [Term(tap, loss="mse", name=tap) for tap in taps])
    assert {p.term.name: p.mask for p in distiller.preflight(given)} == taps
    with torch.no_grad():
        ours, theirs = (m(**given, output_hidden_states=True).decoder_hidden_states[1] for m in (student, teacher))
    squares = (ours - theirs).square().mean(-1)[given["labels"] != -100]
    out = distiller.train()(**given)
    torch.testing.assert_close(out.terms["decoder_hidden_states.1"], squares.mean())


def test_a_decoders_own_mask_comes_first():
    given = {**batch(), "decoder_attention_mask": torch.ones(3, 6, dtype=torch.long)}
    distiller = Distiller(bart(), bart(seed=5), [Term("decoder_hidden_states.1", loss="mse")])
    assert distiller.preflight(given)[0].mask == "decoder_attention_mask"
    assert distiller.count(given)["decoder_attention_mask"] == 18.0
    torch.testing.assert_close(
        distiller.train()(**given, counts=distiller.count(given)).loss, distiller(**given).loss
    )


def test_attention_between_two_texts_has_no_mask_of_either():
    eager = {"attn_implementation": "eager"}
    given = batch()
    loss = Term("cross_attentions.0", loss="mse")
    distiller = Distiller(bart(**eager), bart(seed=5, **eager), [loss])
    assert distiller.preflight(given)[0].mask is None


def test_training_is_the_same_however_it_is_cut():
    items = [{key: value[i] for key, value in batch().items()} for i in range(3)]
    trained = []
    for accumulation in (1, 3):
        distiller = Distiller(t5(), t5(seed=5), [KD, LM])
        fit(distiller, Examples(items), None, Settings(steps=3, batch_size=3, accumulation=accumulation))
        trained.append(distiller.export())
    for ours, theirs in zip(*(model.parameters() for model in trained), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_cache_would_not_see_the_labels():
    teacher = Cached(ModuleTeacher(t5(seed=5)))
    with pytest.raises(ValueError, match=r"the teacher.s decoder reads the batch.s labels.*without a cache"):
        Distiller(t5(), teacher, [KD]).train()(**batch())


def test_causal_is_for_decoders_alone():
    with pytest.raises(ValueError, match="in a T5ForConditionalGeneration they stand where its decoder says them"):
        Distiller(t5(), None, [LM], causal=True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_an_adapted_model_prepares_as_the_model_in_it():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"])
    student = peft.get_peft_model(t5(), config)
    torch.testing.assert_close(Distiller(student, None, [LM]).train()(**batch()).loss, t5()(**batch()).loss)
