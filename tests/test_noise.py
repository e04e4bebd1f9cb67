"""Words in the place of others: neighbours in an embedding, and what a masked language model expects."""

import io
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertForMaskedLM, BertModel

from limbeck.enlarging import Wanted
from limbeck.pretrained import load_masked_lm
from limbeck.progress import ConsoleObserver
from limbeck.recipe import Recipe
from limbeck.tasks import make_task
from limbeck.tasks.builtin import train_tokenizer
from limbeck.tasks.extra import ExtraSpec, make_extra
from limbeck.tasks.noise import AUGMENTATIONS, replacing
from limbeck.tasks.rewriting import MaskedWords, Neighbours, WordAt, whole_words

from . import tiny
from .test_extra import OPTIONS, task

TEXTS = ["the warm film was very fine", "a cold room and a dull book", "the room was quite warm"]


def asked(text):
    return [WordAt(text, place) for place in range(len(text.split()))]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocabulary=90)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    made = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes))
    for weight in made.parameters():
        weight.data *= 8  # or all positions would say nearly the same
    return made.eval()


def test_each_word_is_replaced_as_often_as_p_says():
    generator = np.random.default_rng(0)
    out = replacing(["a"] * 4000, generator, candidates=[["b", "c", "d"]] * 4000, p=0.3, k=2)
    assert out.count("a") / 4000 == pytest.approx(0.7, abs=0.03)
    assert out.count("b") / 4000 == pytest.approx(0.15, abs=0.03)
    assert "d" not in out
    assert replacing(["a", "b"], generator, candidates=[[], []], p=1.0) == ["a", "b"]


def test_neighbours_are_those_of_the_largest_cosine(tokenizer):
    torch.manual_seed(0)
    table = torch.randn(len(tokenizer), 6)
    words = whole_words(tokenizer)
    near = Neighbours(table, tokenizer, k=3)(asked("warm rooom --"))
    own = table[words["warm"]]
    cosine = {w: float(own @ table[i] / (own.norm() * table[i].norm())) for w, i in words.items() if w != "warm"}
    assert [list(each) for each in near] == [sorted(cosine, key=cosine.get, reverse=True)[:3], [], []]


def test_a_word_of_several_tokens_has_the_neighbours_of_their_mean(tokenizer):
    torch.manual_seed(0)
    table = torch.randn(len(tokenizer), 6)
    pieces = tokenizer("warmfilm", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    assert Neighbours(table, tokenizer, k=3)(asked("warmfilm")) == [()]
    own, words = table[pieces].mean(dim=0), whole_words(tokenizer)
    cosine = {w: float(own @ table[i] / (own.norm() * table[i].norm())) for w, i in words.items()}
    expected = sorted(cosine, key=cosine.get, reverse=True)[:3]
    assert Neighbours(table, tokenizer, k=3, pieces=True)(asked("warmfilm")) == [expected]


def test_whole_words_are_found_whatever_the_tokenizer_marks():
    """Byte-level tokens carry the space in front of a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=340, show_progress=False))
    words = whole_words(PreTrainedTokenizerFast(tokenizer_object=own))
    assert {"warm", "room", "was"} <= set(words)
    assert own.id_to_token(words["warm"]) == "Ġwarm"


def test_a_masked_word_has_the_words_that_the_model_expects_there(tokenizer, model):
    """Against one forward pass for each word, with the whole of the logits."""
    text = "The warm, film was"
    found = MaskedWords(model, tokenizer, k=4, batch=3)([*asked(TEXTS[1]), *asked(text)])[-4:]
    words, numbers = text.split(), whole_words(tokenizer)
    for place, word in enumerate(words):
        core = re.sub(r"\W", "", word)
        masked = " ".join(w if i != place else w.replace(core, "[MASK]") for i, w in enumerate(words))
        batch = tokenizer(masked, return_tensors="pt")
        at = batch["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        logits = model(**batch).logits[0, at]
        order = sorted((w for w in numbers if w != core.lower()), key=lambda w: -logits[numbers[w]].item())
        assert found[place] == order[:4]


def test_copies_by_a_masked_language_model_are_texts_that_are_new(tokenizer, model, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spec = ExtraSpec(augment="masked_lm", copies=5, masked_lm=str(tmp_path))
    own = task(train=[(text,) for text in TEXTS])
    extra = make_extra(spec, own, OPTIONS, {"masked_lm": MaskedWords.load(str(tmp_path), k=15)})
    assert extra.origins["masked_lm"] == len(set(extra.rows.inputs)) > 10
    assert {len(text.split()) for (text,) in extra.rows.inputs} == {len(text.split()) for text in TEXTS}


def test_an_encoder_is_no_masked_language_model(tokenizer, model, tmp_path):
    BertModel(model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack .*which would be random"):
        load_masked_lm(tmp_path)


def test_a_tokenizer_that_masks_nothing_is_refused(tokenizer, model):
    import copy

    without = copy.deepcopy(tokenizer)
    without.mask_token = None
    with pytest.raises(ValueError, match="no token that masks"):
        MaskedWords(model, without, k=3)


@pytest.mark.parametrize("name", ["mask", "delete", "ngram", "shuffle", "long_shuffle", "replace", "masked_lm"])
def test_every_augmentation_has_a_name(name):
    assert callable(AUGMENTATIONS.get(name))


def test_filling_words_in_shows_how_far_it_is(tokenizer, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    spec = {"augment": "masked_lm", "masked_lm": str(tmp_path / "model"), "copies": 2}
    recipe = Recipe.parse(tiny.recipe(tiny.place_of(tmp_path), extra=spec, store=str(tmp_path / "store")))
    own, screen = make_task(recipe.task), io.StringIO()
    wanted = Wanted.by(recipe, own, tokenizer)
    with ConsoleObserver(Console(file=screen, width=100, force_terminal=True)) as observer:
        first = wanted.make(observer=observer)
    count = 2 * len(own.splits["train"])
    assert f"{count}/{count}" in screen.getvalue()
    assert "is done once" in screen.getvalue()
    assert wanted.make() == first
