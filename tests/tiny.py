"""A tiny text model and tiny tables, on disk, as a user would have them."""

import random

import pandas as pd
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from limbeck.tasks.builtin import train_tokenizer

GOOD = ["fine", "great", "lovely", "superb", "nice", "warm"]
BAD = ["awful", "poor", "dull", "broken", "cold", "grim"]
FILLER = ["the", "a", "film", "book", "room", "was", "and", "very", "quite", "it"]


def table(rows=80, seed=0):
    """Short texts whose label depends on one word."""
    generator = random.Random(seed)
    examples = []
    for i in range(rows):
        label = i % 2
        words = [*generator.choices(FILLER, k=generator.randint(2, 6)), generator.choice(GOOD if label else BAD)]
        generator.shuffle(words)
        examples.append({"text": " ".join(words), "label": ["bad", "good"][label], "stars": 1.0 + 3.5 * label})
    return pd.DataFrame(examples)


def place_of(folder):
    """A folder with an encoder to fine-tune and a table to learn."""
    save_encoder(folder / "teacher")
    table().to_csv(folder / "data.csv", index=False)
    return folder


def recipe(place, **changes):
    """A small run in such a folder."""
    return {
        "task": {"name": "table", "data": str(place / "data.csv"), "text": ["text"], "label": "label"},
        "teacher": {"model": str(place / "teacher"), "training": {"steps": 2}},
        "student": {"layers": [0]},
        "training": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3},
        "store": str(place / "store"),
        **changes,
    }


def config(**changes):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    return BertConfig(**{**sizes, **changes})


def save_encoder(folder, **changes):
    """A pretrained encoder without a head, with its tokenizer."""
    tokenizer = train_tokenizer([" ".join(GOOD + BAD + FILLER)], vocabulary=200)
    torch.manual_seed(0)
    BertModel(config(vocab_size=len(tokenizer), **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_classifier(folder, labels, **changes):
    """A classifier for the given labels, with its tokenizer."""
    tokenizer = train_tokenizer([" ".join(GOOD + BAD + FILLER)], vocabulary=200)
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    made = config(vocab_size=len(tokenizer), id2label=names, label2id={n: i for i, n in names.items()}, **changes)
    BertForSequenceClassification(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
