"""Fewer tokens: a tokenizer and a student that go together."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from limbeck.students import cut_tokenizer, shrink
from limbeck.tasks.builtin import train_tokenizer
from tests import tiny

TEXTS = tiny.table(rows=40)["text"].tolist()
OFTEN = ["the film was great", "a great film", "the film was poor"]
RARE = "quite a superb book, and very warm"
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def trained(tokenizer, trainer):
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def pieces():
    """BERT's own kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trained(tokenizer, trainers.WordPieceTrainer(vocab_size=150, special_tokens=BERT_TOKENS, show_progress=False))
    return transformers.BertTokenizer(vocab=tokenizer.get_vocab())


def bytes_of_gpt2():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model = json.loads(trained(tokenizer, trainer).to_str())["model"]
    return transformers.GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def unigram():
    """Scored pieces, with special tokens put around by a template, as T5 and XLM-R have them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained(tokenizer, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def merges():
    return train_tokenizer(TEXTS, vocabulary=150)


@pytest.mark.parametrize("make", [pieces, bytes_of_gpt2, unigram, merges])
def test_texts_are_encoded_by_the_same_tokens(make, tmp_path):
    tokenizer = make()
    before = dict(tokenizer.get_vocab())
    fewer = 4 if make is unigram else 20  # so few texts have few pieces
    smaller, ids = cut_tokenizer(tokenizer, OFTEN, size=len(tokenizer) - fewer)
    assert type(smaller) is type(tokenizer)
    assert len(smaller) == len(ids) <= len(tokenizer) - fewer
    for text in OFTEN:
        assert [ids[i] for i in smaller(text)["input_ids"]] == tokenizer(text)["input_ids"]
    assert smaller.get_vocab() == {token: ids.index(i) for token, i in before.items() if i in ids}
    for name in ("pad_token", "eos_token", "cls_token", "unk_token"):
        assert getattr(smaller, name) == getattr(tokenizer, name)
    unknown = smaller.unk_token_id if make is not bytes_of_gpt2 else None
    assert unknown not in smaller(RARE.replace(",", ""))["input_ids"]
    spelled = [t.decode(t(RARE)["input_ids"]).replace(" ", "") for t in (smaller, tokenizer)]
    assert spelled[0] == spelled[1]
    assert len(smaller(RARE)["input_ids"]) > len(tokenizer(RARE)["input_ids"])
    assert tokenizer.get_vocab() == before
    smaller.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again([*OFTEN, RARE])["input_ids"] == smaller([*OFTEN, RARE])["input_ids"]


def test_a_student_of_fewer_tokens_reads_texts_as_before():
    tokenizer = pieces()
    torch.manual_seed(0)
    teacher = transformers.BertForSequenceClassification(tiny.config(vocab_size=len(tokenizer))).eval()
    smaller, ids = cut_tokenizer(tokenizer, OFTEN, size=80)
    student = shrink(teacher, vocabulary=ids)
    with torch.no_grad():
        theirs = teacher(**tokenizer(OFTEN, padding=True, return_tensors="pt")).logits
        ours = student(**smaller(OFTEN, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(ours, theirs)
    assert student.config.pad_token_id == smaller.pad_token_id


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"size=5 is less than the \d+ special tokens and single characters"):
        cut_tokenizer(merges(), OFTEN, size=5)
    with pytest.raises(TypeError, match="a str is no fast tokenizer; load it by AutoTokenizer"):
        cut_tokenizer("bert", OFTEN, size=5)
