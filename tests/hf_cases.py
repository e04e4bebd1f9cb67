"""One tiny student, teacher and data set for each task, and each task's loss written out, without limbeck."""

import torch
import transformers
from torch.nn import functional as F  # noqa: N812
from transformers import TrainingArguments

from tests.models import bert

T = 2.0
KEPT = 0.5  # the weight of labels among the default terms


def arguments(folder, **changes):
    """Plain gradient descent over the data in order, without a sound."""
    settings = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": False,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    kind = transformers.Seq2SeqTrainingArguments if "predict_with_generate" in changes else TrainingArguments
    return kind(str(folder), **{**settings, **changes})


def padded(examples):
    """A batch of lists of different lengths."""
    fill = {"labels": -100, "attention_mask": 0, "input_ids": 0}
    batch = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if isinstance(values[0], list) and isinstance(values[0][0], int):
            longest = max(map(len, values))
            values = [v + [fill.get(key, 0)] * (longest - len(v)) for v in values]
        batch[key] = torch.tensor(values)
    return batch


def texts(count=24, shortest=3, longest=9, vocabulary=40, seed=5):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = shortest + i * 5 % (longest - shortest)
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length})
    return found


def classes():
    data = [{**text, "labels": text["input_ids"][0] % 3} for text in texts()]
    return bert(1, 8, seed=1), bert(2, 16, seed=2), data, classes_loss


def numbers():
    data = [{**text, "labels": text["input_ids"][0] / 40} for text in texts()]
    return bert(1, 8, labels=1, seed=1), bert(2, 16, labels=1, seed=2), data, numbers_loss


def several():
    data = [{**text, "labels": [float(t % 2) for t in text["input_ids"][:3]]} for text in texts()]
    options = {"problem_type": "multi_label_classification"}
    return bert(1, 8, seed=1, **options), bert(2, 16, seed=2, **options), data, several_loss


def tokens():
    data = [{**t, "labels": [-100] + [i % 3 for i in t["input_ids"][1:-1]] + [-100]} for t in texts()]
    kind = "BertForTokenClassification"
    return bert(1, 8, seed=1, kind=kind), bert(2, 16, seed=2, kind=kind), data, tokens_loss


def spans():
    data = []
    for text in texts():  # each position is a class, the padded ones too: as usual, all are padded to one length
        length = len(text["input_ids"])
        whole = {key: values + [0] * (9 - length) for key, values in text.items()}
        data.append({**whole, "start_positions": 1, "end_positions": length - 1})
    kind = "BertForQuestionAnswering"
    return bert(1, 8, labels=2, seed=1, kind=kind), bert(2, 16, labels=2, seed=2, kind=kind), data, spans_loss


def gpt2(width, layers, seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": width, "n_layer": layers, "n_head": 2}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **still, **ends)).train()


def language():
    data = [{**t, "labels": [-100, *t["input_ids"][1:]]} for t in texts()]
    return gpt2(8, 1, 1), gpt2(16, 2, 2), data, language_loss


def t5(width, layers, seed):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=40,
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config).train()


def sequences():
    data = [{**t, "labels": [*t["input_ids"][::2], 1]} for t in texts()]
    return t5(8, 1, 1), t5(16, 2, 2), data, language_of_decoder_loss


TASKS = [classes, numbers, several, tokens, spans, language, sequences]


def divergence(student, teacher):
    """KL(teacher || student) at temperature T, times T², at each position."""
    q, p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    return T * T * (p.exp() * (p - q)).sum(-1)


def classes_loss(student, teacher, batch):
    labels = batch["labels"]
    return divergence(student.logits, teacher.logits).mean() + KEPT * F.cross_entropy(student.logits, labels)


def numbers_loss(student, teacher, batch):
    hard = (student.logits.squeeze(-1) - batch["labels"]).pow(2).mean()
    return (student.logits - teacher.logits).pow(2).mean() + KEPT * hard


def several_loss(student, teacher, batch):
    def both(logits):
        return torch.stack([logits, torch.zeros_like(logits)], -1)

    soft = divergence(both(student.logits), both(teacher.logits)).mean()
    return soft + KEPT * F.binary_cross_entropy_with_logits(student.logits, batch["labels"])


def tokens_loss(student, teacher, batch):
    valid = batch["labels"] != -100
    soft = divergence(student.logits, teacher.logits)[valid].mean()
    return soft + KEPT * F.cross_entropy(student.logits[valid], batch["labels"][valid])


def spans_loss(student, teacher, batch):
    total = 0.0
    for side in ("start", "end"):
        own, its = student[f"{side}_logits"], teacher[f"{side}_logits"]
        hard = F.cross_entropy(own, batch[f"{side}_positions"])
        total = total + 0.5 * (divergence(own, its).mean() + KEPT * hard)
    return total


def language_loss(student, teacher, batch):
    valid = batch["labels"][:, 1:] != -100
    own, its = student.logits[:, :-1][valid], teacher.logits[:, :-1][valid]
    return divergence(own, its).mean() + KEPT * F.cross_entropy(own, batch["labels"][:, 1:][valid])


def language_of_decoder_loss(student, teacher, batch):
    return tokens_loss(student, teacher, batch)


def naive(student, teacher, data, loss_of, steps=3, rate=0.05, size=8):
    """Gradient descent by hand; the losses of the steps."""
    losses = []
    for step in range(steps):
        batch = padded(data[step * size : (step + 1) * size])
        with torch.no_grad():
            said = teacher.eval()(**batch)
        loss = loss_of(student(**batch), said, batch)
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        losses.append(loss.item())
    return losses


def assert_same_weights(one, other, tolerance=1e-6):
    there = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        difference = float((parameter - there[name]).detach().abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"
