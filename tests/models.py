"""Small models that the tests share. Every function gives the same weights for the same arguments."""

import torch
import transformers
from torch import nn


def bert(layers=2, width=16, labels=3, seed=0, kind="BertForSequenceClassification", **config):
    """A BERT without dropout (unless asked for), in training mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 40,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": labels,
        "initializer_range": 0.3,  # with the default of 0.02 a tiny BERT ignores its input
        **config,
    }
    return getattr(transformers, kind)(transformers.BertConfig(**settings)).train()


def text_batch(size=4, length=7, seed=1, labels=3):
    """Token ids of different lengths, padded; the first example has no padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length - i % 4 for i in range(size)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1, 40, (size, length), generator=generator) * mask
    classes = torch.randint(labels, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": classes}


def pad(batch, more):
    """The same batch with `more` positions of padding; its token ids are no zeros, to be seen if they count."""
    longer = dict(batch)
    for key, fill in (("input_ids", 17), ("attention_mask", 0)):
        longer[key] = nn.functional.pad(batch[key], (0, more), value=fill)
    if batch["labels"].ndim == 2:
        longer["labels"] = nn.functional.pad(batch["labels"], (0, more), value=-100)
    return longer


class Convolutional(nn.Module):
    """Images (B, 3, 8, 8) to logits (B, 5), with batch norm and a ReLU that may overwrite its input."""

    def __init__(self, channels=4, inplace=False, stride=1):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, stride=stride)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(channels, 5)

    def forward(self, pixel_values):
        features = self.relu(self.norm(self.stem(pixel_values)))
        return self.head(features.mean((2, 3)))


def convolutional(channels=4, inplace=False, stride=1, seed=0):
    torch.manual_seed(seed)
    return Convolutional(channels, inplace, stride)


def images(size=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 5


def perceptron(width=5, inplace=False, seed=0, outputs=3):
    """(B, 4) to logits (B, 3), modules "0" to "3"; "2" is the ReLU."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.LayerNorm(width), nn.ReLU(inplace=inplace), nn.Linear(width, outputs)
    )


def points(size=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.arange(size) % 3


class Unnamed(nn.Module):
    """Returns a plain tuple: logits, hidden features."""

    def __init__(self, width=5):
        super().__init__()
        self.body = nn.Linear(4, width)
        self.head = nn.Linear(width, 3)

    def forward(self, features):
        hidden = torch.tanh(self.body(features))
        return self.head(hidden), hidden


class Twice(nn.Module):
    """Runs one of its modules twice, and another one never."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, features):
        return self.head(self.shared(torch.relu(self.shared(features))))


def gradients(model):
    """Every parameter's gradient by name, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def hooks(model):
    """Number of limbeck's forward hooks anywhere in a model (transformers has hooks of its own)."""
    found = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook.__module__.startswith("limbeck") for hook in found if hasattr(hook, "__module__"))
