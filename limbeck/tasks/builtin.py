"""A text task that every Python carries: which standard-library package does a docstring belong to?"""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.tasks.base import (
    TASKS,
    TRAIN,
    VALIDATION,
    Loaded,
    Rows,
    TaskOptions,
    check_taken,
    shorten,
    split_rows,
    with_first,
)
from limbeck.tasks.text import TextTask

FEWEST, MOST, CLASSES = 100, 700, 10
SHORTEST = 25
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "ensurepip", "turtledemo"}
VOCABULARY = 4000
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@TASKS.register_as("docstrings")
def docstrings(options: TaskOptions) -> TextTask:
    """To which package of Python's standard library a docstring belongs; it carries its data.

    Raises:
        ValueError: this Python came without the source of its standard library, or an option that this task
            does not use.
    """
    check_taken(options, ["max_length"])
    by_package = docstrings_by_package(Path(sysconfig.get_paths()["stdlib"]))
    sizes = {name: len(texts) for name, texts in by_package.items() if len(texts) >= FEWEST}
    if len(sizes) < 2:
        raise ValueError("this Python came without the source of its standard library; use another task")
    names = tuple(sorted(sorted(sizes, key=lambda n: (-sizes[n], n))[:CLASSES]))
    texts: list[tuple[str, ...]] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        chosen = sorted(by_package[name])[:MOST]
        texts += [(text,) for text in chosen]
        labels += [label] * len(chosen)
    train, validation = split_rows(Rows(texts, labels))
    metrics = with_first(options.metric, ("accuracy", "macro_f1"))
    splits = shorten({TRAIN: train, VALIDATION: validation}, options)
    return TextTask("docstrings", names, metrics, splits, options.max_length)


def docstrings_by_package(library: Path) -> dict[str, set[str]]:
    """The docstrings of each top-level package, without those that stand in more than one."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if len(parts) > 1 and not SKIPPED.intersection(parts):
            found[parts[0]].update(docstrings_of(path))
    owners = Counter(text for texts in found.values() for text in texts)
    return {name: {t for t in texts if owners[t] == 1} for name, texts in found.items()}


def docstrings_of(path: Path) -> Iterator[str]:
    """The docstrings of one source file, each on one line, without the very short ones."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= SHORTEST:
                yield text


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> Any:
    """Train a BPE tokenizer on some texts, in the form that transformers saves and loads.

    BPE, since the same texts give the same tokens; the library's WordPiece trainer breaks ties at random.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    numbers = tokenizer.get_vocab()
    separator, start = SPECIAL["sep_token"], SPECIAL["cls_token"]
    tokenizer.post_processor = processors.BertProcessing((separator, numbers[separator]), (start, numbers[start]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def fresh_bert(task: TextTask, *, processor: Any = None, layers: int = 4, hidden: int = 192) -> Loaded:
    """A BERT with random weights, for tasks that shall need no hub.

    Args:
        task: The task.
        processor: The tokenizer, a teacher's; by default one is trained on the task's own texts.
        layers: Number of layers.
        hidden: Width.
    """
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = processor or train_tokenizer([text for row in task.splits[TRAIN].inputs for text in row])
    names = task.labels or ("score",)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 48),
        intermediate_size=4 * hidden,
        max_position_embeddings=task.max_length,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type="single_label_classification" if task.labels else "regression",
    )
    return Loaded(BertForSequenceClassification(config), tokenizer, head_is_trained=False)
