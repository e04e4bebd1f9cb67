"""Labels for words: reading, encoding and scores."""

import pytest
import torch
import transformers

from limbeck.tasks.tables import class_numbers, read_table
from limbeck.tasks.words import encode_words, read_words, word_scores
from tests import tiny

NAMES = ["O", "B-X", "I-X"]


@pytest.fixture
def tokenizer(tmp_path):
    tiny.save_encoder(tmp_path / "encoder")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "encoder")


def test_tokens_have_the_labels_of_their_words(tokenizer):
    words = ["fine", "unheardof", "film"]
    examples = encode_words([(words, [0, 1, 2]), (["film"], [2])], tokenizer, 32)
    batch = examples.batch([0, 1])
    encoded = tokenizer(words, is_split_into_words=True)
    firsts = [encoded.word_ids().index(i) for i in range(3)]
    expected = torch.full((len(encoded.input_ids),), -100)
    expected[firsts] = torch.tensor([0, 1, 2])
    assert torch.equal(batch["labels"][0], expected)
    assert batch["input_ids"][0].tolist() == encoded.input_ids
    assert batch["labels"].shape == batch["input_ids"].shape
    assert batch["labels"][1][batch["labels"][1] != -100].tolist() == [2]
    assert examples.lengths == [len(encoded.input_ids), 3]


def test_all_is_padded_to_one_length_where_told(tokenizer):
    examples = encode_words([(["fine"], [1])], tokenizer, 16, ignored=7, every=True, longest=False)
    batch = examples.batch([0])
    assert {tuple(value.shape) for name, value in batch.items() if name != "example_id"} == {(1, 16)}
    assert batch["labels"].tolist()[0].count(7) == 15
    assert batch["attention_mask"].sum() == 3


def test_scores_of_words_are_those_of_entities():
    labels = torch.tensor([[-100, 1, 2, 0, -100], [0, 1, -100, -100, -100]])
    right = torch.nn.functional.one_hot(labels.clamp(min=0), 3).float()
    assert word_scores(right, labels, NAMES) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    right[0, 2] = torch.tensor([1.0, 0.0, 0.0])  # the first entity ends too early
    assert word_scores(right, labels, NAMES) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("to Rome\tO", "'to Rome' has 2 words and 1 labels; give each one"),
        ("to Rome\tO B-Y", "label 'B-Y' is none of the classes; did you mean 'B-X'"),
    ],
)
def test_rows_that_do_not_fit_are_told(tmp_path, row, message):
    (tmp_path / "a.txt").write_text(f"Sentence\tSlot\nhe\tO\n\t\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_words(tmp_path / "a.txt", "Sentence", "Slot", NAMES, suffix=".tsv")


def test_a_table_may_have_no_header_and_another_suffix(tmp_path):
    (tmp_path / "a.txt").write_text("a,1\nNA,2\n")
    table = read_table(tmp_path / "a.txt", suffix=".csv", header=None)
    assert table.to_dict("list") == {"0": ["a", "NA"], "1": [1, 2]}
    (tmp_path / "b.json").write_text('{"x": 1}\n{"x": 2}\n')
    assert read_table(tmp_path / "b.json", suffix=".jsonl")["x"].tolist() == [1, 2]


def test_labels_are_numbered_in_the_order_of_the_names():
    assert class_numbers(["b", "a", "b"], ["b", "a"]) == [0, 1, 0]
    with pytest.raises(ValueError, match="label 3 is none of the classes"):
        class_numbers([1, 3], [1, 2])
