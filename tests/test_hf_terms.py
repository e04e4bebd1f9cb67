"""What a transformers student learns where nobody says: against the loss that the model has itself."""

import pytest
import torch
import transformers

from limbeck import Distiller
from limbeck.train.hf_terms import default_terms, predicts_next
from tests.hf_cases import gpt2, t5
from tests.models import bert


class NextWord(transformers.GPT2LMHeadModel):
    """A model of a user's own, as one has it from code beside its weights."""


def next_word():
    return NextWord(gpt2(8, 1, 1).config)


def with_pictures():
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    text = transformers.LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    )


def xlm(kind):
    config = getattr(transformers, f"{kind}Config")
    sizes = {"vocab_size": 40, "n_words": 40, "emb_dim": 8, "n_layers": 1, "n_heads": 2}
    return getattr(transformers, f"{kind}WithLMHeadModel")(config(**sizes, dropout=0.0, attention_dropout=0.0))


def xlnet():
    config = transformers.XLNetConfig(vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=8, dropout=0.0)
    return transformers.XLNetLMHeadModel(config)


MODELS = {
    "gpt2": (lambda: gpt2(8, 1, 1), True),
    "a user's own": (next_word, True),
    "with pictures": (with_pictures, True),
    "xlm": (lambda: xlm("XLM"), False),
    "flaubert": (lambda: xlm("Flaubert"), False),
    "xlnet": (xlnet, False),
    "masked": (lambda: bert(1, 8, kind="BertForMaskedLM", vocab_size=40), False),
    "beside an encoder": (lambda: t5(8, 1, 1), False),
}


@pytest.mark.parametrize("name", MODELS)
def test_labels_count_as_in_the_loss_of_the_model_itself(name):
    make, moved = MODELS[name]
    student = make()
    assert predicts_next(student) is moved
    terms = default_terms(student)[1:]
    distiller = Distiller(student, None, terms, causal=predicts_next(student)).train()
    ids = torch.randint(3, 39, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    found = distiller(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    with torch.no_grad():
        expected = student(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    assert found.terms["labels"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
