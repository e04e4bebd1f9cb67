"""One student of two tasks, with a teacher, data, a head and a score for each.

    python examples/several_tasks.py

The texts are made up and the models are tiny, so that it runs anywhere within seconds. With models of your own the
four marked lines change, and nothing else.
"""

import random

import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from limbeck import Distiller, Examples, Settings, Term, fit, take_layers
from limbeck.students import Heads
from limbeck.train import Mixed

TASKS = {
    "tone": {"good": ["fine", "great", "lovely"], "bad": ["dull", "poor", "grim"]},
    "topic": {"film": ["actor", "scene"], "food": ["soup", "bread"], "music": ["song", "band"]},
}
FILLER = ["the", "a", "was", "and", "very", "quite", "it"]
WORDS = ["[PAD]", *FILLER, *(word for kinds in TASKS.values() for words in kinds.values() for word in words)]


def texts(task, count, seed):
    """Encoded texts whose label depends on one word; a tokenizer would do this for real ones."""
    draw = random.Random(f"{task} {seed}")
    items = []
    for _ in range(count):
        label, words = draw.choice(list(enumerate(TASKS[task].values())))
        text = [*draw.choices(FILLER, k=5), draw.choice(words)]
        draw.shuffle(text)
        ids = torch.tensor([WORDS.index(word) for word in text])
        items.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(label)})
    return Examples(items)


def classifier(task):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4}
    config = BertConfig(vocab_size=len(WORDS), num_labels=len(TASKS[task]), **sizes)
    return AutoModelForSequenceClassification.from_config(config)


def train_teacher(task, train):
    teacher = Distiller(classifier(task), None, [Term("labels", loss="cross_entropy")])
    fit(teacher, train, settings=Settings(epochs=6, batch_size=16, learning_rate=3e-3))
    return teacher.export()


def main():
    torch.manual_seed(0)
    train = {"tone": texts("tone", 320, 0), "topic": texts("topic", 96, 0)}  # your data
    held_out = {task: texts(task, 100, 1) for task in TASKS}  # your data
    teachers = {task: train_teacher(task, data) for task, data in train.items()}  # your teachers, or their folders

    # Two of each teacher's four layers and its head; all tasks then share the body of the first.
    student = Heads({task: take_layers(t, [0, 3]) for task, t in teachers.items()}, body="bert")  # your student
    student.requires_grad_(True)

    terms = [
        Term("logits", loss="forward_kl", temperature=2.0, name="kd"),  # for both tasks
        Term("labels", loss="cross_entropy", weight=0.5, task="topic"),  # for one of them
        Term("body.pooler", "bert.pooler", loss="mse", task="tone"),  # for the other
    ]
    distiller = Distiller(student, teachers, terms)
    settings = Settings(epochs=6, batch_size=16, learning_rate=3e-3)
    result = fit(distiller, Mixed(train, tau=0.5), held_out, settings, metric="accuracy")
    for name, score in result.scores.items():
        print(f"{name:16}{score:.3f}")

    alone = student.export_task("tone")  # a plain BertForSequenceClassification, with save_pretrained
    print(f"{type(alone).__name__} of {alone.num_parameters():,} parameters for {alone.config.num_labels} classes")
    return result.scores


if __name__ == "__main__":
    main()
