"""Two encodings of the same texts: a RoBERTa teacher with a byte-level BPE, a BERT student with a WordPiece."""

import copy
import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import limbeck
from limbeck import Distiller, Settings, Term, fit
from limbeck.batch import view
from limbeck.cache import Store
from limbeck.encodings import pair, paired
from limbeck.run import Observer
from limbeck.tasks import TaskOptions, make_task
from limbeck.teachers import Cached, Ensemble, ModuleTeacher
from limbeck.train import predict
from tests import tiny

WORDS = tiny.GOOD + tiny.BAD + tiny.FILLER
KD = Term("logits", loss="forward_kl", name="kd")


def word_pieces():
    """BERT's own kind of tokenizer: some words whole, the others in pieces."""
    letters = sorted({letter for word in WORDS for letter in word})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *WORDS[::3]]
    return BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)})


def bytes_in_pairs():
    """RoBERTa's kind: bytes, joined in pairs that are frequent; other special tokens, padding is 1."""
    special = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
    }
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(
        [" ".join(WORDS)], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizers():
    return word_pieces(), bytes_in_pairs()


def roberta(tokenizer, labels=2, seed=1, width=24, **changes):
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        pad_token_id=1,
        type_vocab_size=1,
        num_labels=labels,
        initializer_range=0.3,
        **changes,
    )
    return RobertaForSequenceClassification(config).eval()


def bert(tokenizer, labels=2, seed=0, **changes):
    torch.manual_seed(seed)
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    return BertForSequenceClassification(
        tiny.config(vocab_size=len(tokenizer), num_labels=labels, **calm, **changes)
    )


def rows(count=40):
    frame = tiny.table(count)
    frame["number"] = [int(name == "good") for name in frame["label"]]
    frame["other"] = frame["text"].to_list()[::-1]
    return frame


def test_each_side_is_what_its_tokenizer_makes_of_the_text(tokenizers):
    frame = rows(6)
    data = paired(frame, *tokenizers, label="number")
    batch = data.batch([4, 1, 3])
    texts = [frame["text"][i] for i in (4, 1, 3)]
    for side, tokenizer in zip(("student", "teacher"), tokenizers, strict=True):
        by_hand = tokenizer(texts, padding="longest", return_tensors="pt")
        assert batch[side].keys() == by_hand.keys() & {"input_ids", "attention_mask", "token_type_ids"}
        assert all(torch.equal(batch[side][key], by_hand[key]) for key in batch[side])
    assert batch["labels"].tolist() == [frame["number"][i] for i in (4, 1, 3)]
    assert batch["labels"].dtype == torch.int64
    assert batch["example_id"].tolist() == [4, 1, 3]
    assert data.lengths == [len(tokenizers[0](text)["input_ids"]) for text in frame["text"]]
    assert batch["student"]["input_ids"].shape[1] < batch["teacher"]["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["frame", "dicts", "hub"])
def test_all_kinds_of_data_sets_give_the_same(tokenizers, kind):
    frame = rows(6)
    made = {"frame": frame, "dicts": frame.to_dict("records"), "hub": datasets.Dataset.from_pandas(frame)}[kind]
    options = {"text": ("text", "other"), "label": "stars", "max_length": 16}
    found = paired(made, *tokenizers, **options).batch(range(6))
    for side, tokenizer in zip(("student", "teacher"), tokenizers, strict=True):
        by_hand = tokenizer(
            frame["text"].to_list(),
            frame["other"].to_list(),
            truncation=True,
            max_length=16,
            padding=True,
            return_tensors="pt",
        )
        assert torch.equal(found[side]["input_ids"], by_hand["input_ids"])
    assert found["labels"].tolist() == frame["stars"].to_list()
    assert found["labels"].dtype == torch.float32


def test_labels_may_be_names_or_none(tokenizers):
    frame = rows(6)
    named = paired(frame, *tokenizers, classes=["good", "bad"]).batch(range(6))
    assert named["labels"].tolist() == [int(name == "bad") for name in frame["label"]]
    assert "labels" not in paired(frame[["text"]], *tokenizers, label=None).batch(range(6))


def test_the_loss_is_that_of_both_models_on_their_own_encoding(tokenizers):
    student, teacher = bert(tokenizers[0]), roberta(tokenizers[1])
    frame = rows(5)
    terms = [KD, Term("labels", loss="cross_entropy", weight=0.5)]
    batch = paired(frame, *tokenizers, label="number").batch(range(5))
    out = Distiller(student, teacher, terms).train()(**batch)
    with torch.no_grad():
        own, its = (
            model.double()(**tokenizer(frame["text"].to_list(), padding=True, return_tensors="pt")).logits
            for model, tokenizer in zip((copy.deepcopy(student).eval(), teacher), tokenizers, strict=True)
        )
    chance = its.softmax(-1)
    kl = (chance * (chance.log() - own.log_softmax(-1))).sum(-1).mean()
    cross = -own.log_softmax(-1)[torch.arange(5), torch.tensor(frame["number"])].mean()
    assert out.loss.item() == pytest.approx((kl + 0.5 * cross).item(), rel=1e-4)


def test_training_teaches_the_student_what_the_teacher_says(tokenizers):
    student, teacher = bert(tokenizers[0]), roberta(tokenizers[1])
    data = paired(rows(8)[["text"]], *tokenizers, label=None)
    with torch.no_grad():  # it is sure of what it says, and finds each class in half of the texts
        teacher.classifier.out_proj.weight *= 30
        logits = teacher(**view(data.batch(range(8)), "teacher")).logits
        teacher.classifier.out_proj.bias[0] -= (logits[:, 0] - logits[:, 1]).median()
    hidden = Term("bert.pooler", "classifier.out_proj#input", loss="mse", project="linear", name="hidden")
    distiller = Distiller(student, teacher, [KD, hidden])
    whole = data.batch(range(8))

    def terms_now():
        distiller.train()
        with torch.no_grad():
            return {name: value.item() for name, value in distiller.distil(whole).terms.items()}

    distiller.preflight(whole)
    before = terms_now()
    fit(distiller, data, settings=Settings(epochs=60, batch_size=8, learning_rate=3e-3, accumulation=2))
    after = terms_now()
    assert after["kd"] < 0.5 * before["kd"]
    assert after["hidden"] < 0.5 * before["hidden"]


def test_padding_and_accumulation_change_nothing(tokenizers):
    data = paired(rows(24), *tokenizers, label="number")
    teacher = roberta(tokenizers[1])
    found = []
    for accumulation in (1, 3):
        student = bert(tokenizers[0])
        settings = Settings(steps=4, batch_size=12, learning_rate=1e-3, accumulation=accumulation, optimizer="sgd")
        fit(Distiller(student, teacher, [KD, Term("labels", loss="cross_entropy")]), data, settings=settings)
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_what_the_teacher_says_is_kept_by_its_own_encoding(tokenizers):
    """Another student tokenizer, other batches and other labels ask for nothing new."""
    teacher = Cached(ModuleTeacher(roberta(tokenizers[1])), Store({}))
    frame = rows(20)
    distinct = frame["text"].nunique()
    settings = Settings(epochs=2, batch_size=8, learning_rate=1e-3)
    result = fit(
        Distiller(bert(tokenizers[0]), teacher, [KD]), paired(frame, *tokenizers, label="number"), None, settings
    )
    assert result.teacher_examples == distinct
    other = tiny.train_tokenizer(WORDS, vocabulary=60)
    again = Distiller(bert(other), teacher, [KD])
    fit(again, paired(frame, other, tokenizers[1], label=None), None, Settings(epochs=1, batch_size=5))
    assert again.teacher_examples == distinct


@pytest.mark.parametrize(
    ("tap", "teacher_tap", "loss"),
    [
        ("hidden_states.1", "hidden_states.2", "mse"),
        ("bert.encoder.layer.0", "roberta.encoder.layer.0", "mse"),
        ("attentions.1", "attentions.1", "mse"),
    ],
)
def test_terms_by_token_are_refused_and_say_why(tokenizers, tap, teacher_tap, loss):
    student, teacher = (
        bert(tokenizers[0], attn_implementation="eager"),
        roberta(tokenizers[1], width=16, attn_implementation="eager"),
    )
    data = paired(rows(8), *tokenizers, label="number")
    distiller = Distiller(student, teacher, [Term(tap, teacher_tap, loss=loss, name="hidden")])
    message = (
        r"term 'hidden' .* token by token, and .* \(up to \d+ and \d+ here\), as two tokenizers .*; compare the"
    )
    with pytest.raises(ValueError, match=message):
        fit(distiller, data, settings=Settings(steps=1))


def test_terms_by_token_are_refused_where_the_lengths_happen_to_be_equal(tokenizers):
    """Two texts, of which one is longer for the one tokenizer and the other for the other."""
    student, teacher = bert(tokenizers[0]), roberta(tokenizers[1], width=16)
    own = torch.ones(2, 6, dtype=torch.long)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    batch = {
        "student": {"input_ids": own, "attention_mask": mask},
        "teacher": {"input_ids": own + 2, "attention_mask": mask.flip(0)},
    }
    term = Term("hidden_states.1", loss="mse")
    with pytest.raises(ValueError, match="token by token"):
        Distiller(student, teacher, [term]).train()(**batch)
    batch["teacher"]["attention_mask"] = mask  # the same tokens, other numbers: a cleaner input, say
    assert Distiller(student, teacher, [term]).train()(**batch).loss > 0


@pytest.mark.parametrize("kept", ["each", "all"])
def test_several_teachers_have_tokenizers_taps_and_caches_of_their_own(tokenizers, tmp_path, kept):
    pieces, pairs = tokenizers
    large, small, student = roberta(pairs), bert(pieces, seed=3).eval(), bert(pieces, seed=4)
    data = paired(rows(16), pieces, {"large": pairs, "small": pieces}, label="number")
    batch = data.batch(range(4))
    assert sorted(batch["teacher"]) == ["large", "small"]
    if kept == "each":
        members = {"large": Cached(large, tmp_path / "large"), "small": Cached(small, tmp_path / "small")}
        teacher, caches = Ensemble(members, weights=[3, 1]), list(members.values())
    else:
        teacher = Cached(Ensemble({"large": large, "small": small}, weights=[3, 1]), tmp_path)
        caches = [teacher]
    hidden = Term("bert.encoder.layer.1", "small:bert.encoder.layer.1", loss="mse", name="hidden")
    distiller = Distiller(student, teacher, [KD, hidden] if kept == "each" else [KD])
    out = distiller(**batch)
    with torch.no_grad():
        p = 0.75 * large(**batch["teacher"]["large"]).logits.double().softmax(-1)
        p += 0.25 * small(**batch["teacher"]["small"]).logits.double().softmax(-1)
        log_q = student(**batch["student"]).logits.double().log_softmax(-1)
    assert out.terms["kd"].item() == pytest.approx((p * (p.log() - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert kept == "all" or out.terms["hidden"].item() > 0
    fit(distiller, data, settings=Settings(epochs=3, batch_size=8))
    assert [cached.computed for cached in caches] == [16] * len(caches)


def test_bad_data_is_refused(tokenizers):
    frame = rows(6)

    def refused(message, *arguments, error=ValueError, **options):
        with pytest.raises(error, match=message):
            paired(*(arguments or (frame, *tokenizers)), **options)

    refused("has no column 'txt'; did you mean 'text'", text="txt")
    refused("has no column 'lable'; did you mean 'label'.*; without labels, pass label=None", label="lable")
    refused("the label 'bad' is no number; name the classes in the order of the models' logits")
    refused("the label 'bad' is none of the classes", classes=["good", "worse"])
    refused("one text or a pair of texts, and 3 columns", text=("text", "other", "label"))
    refused("column 'stars' holds .*, which is no text", text="stars")
    refused("the label -1 is no class number", frame.assign(label=-1), *tokenizers)
    refused("column 'text' has no value in 1 of 2", [{"text": "a", "label": 1}, {"label": 0}], *tokenizers)
    refused("the data set is empty", [], *tokenizers)
    refused("the data set is empty", frame.head(0), *tokenizers)
    split = datasets.DatasetDict({"train": datasets.Dataset.from_pandas(frame)})
    refused("cannot read texts from a DatasetDict; pass one split", split, *tokenizers, error=TypeError)
    refused("cannot read texts from a list; pass one split", ["a text"], *tokenizers, error=TypeError)
    refused("max_length is 0; give", max_length=0)
    refused("max_length is 2.5; give", max_length=2.5)
    refused(
        "the student's tokenizer is a NoneType; pass", frame, None, tokenizers[1], error=TypeError, label="number"
    )
    refused(
        "no folder './nowhere' with the teacher's tokenizer", frame, tokenizers[0], "./nowhere", label="number"
    )
    mute = copy.deepcopy(tokenizers[1])
    mute.pad_token = None
    refused("the teacher's tokenizer has no token to pad with", frame, tokenizers[0], mute, label="number")
    short = paired(frame.head(3), *tokenizers, label="number")
    with pytest.raises(ValueError, match="the student has 6 examples and the teacher 3"):
        pair(paired(frame, *tokenizers, label="number"), short)


# Runs.


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizers):
    """A teacher's encoder and two students with tokens of their own, as folders; a table."""
    folder = tmp_path_factory.mktemp("paired")
    own, its = tokenizers
    roberta(its).roberta.save_pretrained(folder / "teacher")
    its.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    BertModel(tiny.config(vocab_size=len(own))).save_pretrained(folder / "student")
    own.save_pretrained(folder / "student")
    tiny.table(60).to_csv(folder / "data.csv", index=False)
    return folder


def recipe(place, **changes):
    return {
        "task": {"name": "table", "data": str(place / "data.csv"), "text": ["text"], "label": "label"},
        "teacher": {"model": str(place / "teacher"), "training": {"epochs": 2, "learning_rate": 1e-3}},
        "student": {"model": str(place / "student")},
        "training": {"epochs": 3, "batch_size": 8, "learning_rate": 3e-3},
        "store": str(place / "store"),
        **changes,
    }


def test_a_run_with_two_tokenizers(place, tmp_path):
    task = {**recipe(place)["task"], "holdout": 0.2}
    notes = []

    class Notes(Observer):
        def on_note(self, text):
            notes.append(text)

    report = limbeck.distill(recipe(place, task=task), tmp_path / "run", observer=Notes())
    assert any("different tokenizers" in note for note in notes)
    assert [row["name"] for row in report.plan] == ["kd", "labels"]
    assert report.student.teacher_examples <= report.examples["train"]

    # What is saved reads its own tokens and scores what the report says, without limbeck.
    validation = make_task(TaskOptions(**task)).splits["validation"]
    (kept,) = (place / "store" / "teachers").iterdir()
    for folder, tokens, stated in (
        (tmp_path / "run" / "student", word_pieces(), report.student),
        (kept, bytes_in_pairs(), report.teacher),
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == tokens.get_vocab()
        inputs = tokenizer([text for (text,) in validation.inputs], padding=True, return_tensors="pt")
        with torch.no_grad():
            found = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits.argmax(-1)
        assert stated.score.value == pytest.approx(np.mean(found.numpy() == np.array(validation.labels)))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    kd = [line["terms"]["kd"] for line in log if line["stage"] == "student-0" and "terms" in line]
    assert kd[-1] < kd[0]


def learned(folder):
    found = load_file(folder / "student" / "model.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(found.items())])


def test_a_run_learns_the_same_from_a_teacher_that_is_remembered(place, tmp_path):
    short = {"training": {"steps": 9, "batch_size": 8, "learning_rate": 3e-3}, "baseline": False}
    ours = limbeck.distill(recipe(place, **short), tmp_path / "on")
    live = limbeck.distill(recipe(place, **short, cache="off"), tmp_path / "off")
    assert live.student.teacher_examples is None
    assert ours.student.teacher_examples <= ours.examples["train"] < ours.student.examples
    torch.testing.assert_close(*(learned(tmp_path / name) for name in ("on", "off")), rtol=1e-3, atol=1e-4)


def test_layers_are_matched_on_each_models_own_tokens(place, tmp_path):
    """The pairs are found, and only the terms by token that they make are refused."""
    terms = {"hidden": {"tap": "layers", "loss": "mse", "map": "cka", "project": "linear"}}
    with pytest.raises(ValueError, match="token by token"):
        limbeck.distill(recipe(place, terms=terms), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_model_is_asked_whether_it_can_read_its_own_texts(place, tmp_path, tokenizers):
    long = {**recipe(place)["task"], "max_length": 512}
    frame = pd.read_csv(place / "data.csv")
    frame.loc[0, "text"] = "fine " * 30  # a word for the student, and several pieces for the teacher
    frame.to_csv(tmp_path / "data.csv", index=False)
    sizes = [len(tokenizer(frame["text"][0])["input_ids"]) for tokenizer in tokenizers]
    assert sizes[0] < 64 < sizes[1]
    with pytest.raises(
        ValueError, match=rf"the teacher reads at most 64 tokens, and the longest text has {sizes[1]}"
    ):
        limbeck.distill(recipe(place, task={**long, "data": str(tmp_path / "data.csv")}), tmp_path / "run")
    torch.manual_seed(0)
    BertModel(tiny.config(vocab_size=len(tokenizers[0]), max_position_embeddings=8)).save_pretrained(
        tmp_path / "s"
    )
    tokenizers[0].save_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match="the student reads at most 8 tokens"):
        limbeck.distill(recipe(place, student={"model": str(tmp_path / "s")}), tmp_path / "run")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_head_with_the_labels_in_another_order_is_refused_in_a_run(place, tmp_path, role):
    folder = tiny.save_classifier(tmp_path / "model", ["good", "bad"])
    with pytest.raises(
        ValueError, match=r"trained for the labels \['good', 'bad'\], the task has \['bad', 'good'\]"
    ):
        limbeck.distill(recipe(place, **{role: {"model": str(folder)}}), tmp_path / "run")


def test_a_trained_student_is_predicted_with_on_its_own_encoding(tokenizers):
    student, teacher = bert(tokenizers[0]).eval(), roberta(tokenizers[1])
    data = paired(rows(10), *tokenizers, label="number")
    found = predict(student, data, batch_size=4).logits
    texts = rows(10)["text"].to_list()
    with torch.no_grad():
        expected = student(**tokenizers[0](texts, padding=True, return_tensors="pt")).logits
        said = teacher(**tokenizers[1](texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(torch.from_numpy(found), expected.double(), rtol=1e-4, atol=1e-5)
    theirs = predict(teacher, data, batch_size=4, side="teacher").logits
    torch.testing.assert_close(torch.from_numpy(theirs), said.double(), rtol=1e-4, atol=1e-5)
