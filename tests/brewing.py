"""Small models, data and adaptors for TextBrewer's scripts, which both TextBrewer and its door can run."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LENGTH, WORDS, CLASSES = 6, 20, 3


class Tagger(nn.Module):
    """Tokens (B, L) to logits, hidden states, attention scores and, given labels, a loss."""

    def __init__(self, width=8, layers=2, of_tokens=True, dropout=0.1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)
        self.of_tokens = of_tokens

    def forward(self, tokens, mask=None, labels=None, scale=1.0):
        hidden, attention = [self.embedding(tokens) * scale], []
        for layer in self.layers:
            states = self.dropout(torch.tanh(layer(hidden[-1])))
            heads = states.unflatten(-1, (2, -1)).transpose(1, 2)
            attention.append(heads @ heads.mT)
            hidden.append(states)
        logits = self.head(hidden[-1] if self.of_tokens else hidden[-1].mean(dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return logits, hidden, attention, loss


def teacher(**options):
    return Tagger(**{"layers": 3, "seed": 5, **options})


def tensors(rows=24, of_tokens=True, seed=3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (rows, 1), generator=generator)).long()
    labels = torch.randint(CLASSES, (rows, LENGTH) if of_tokens else (rows,), generator=generator)
    return tokens, mask, labels


def loader(rows=24, batch=4, of_tokens=True, seed=3, shuffle=False):
    return DataLoader(TensorDataset(*tensors(rows, of_tokens, seed)), batch_size=batch, shuffle=shuffle)


def adaptor(*keys):
    """An adaptor that gives the entries named."""

    def adapt(batch, outputs):
        logits, hidden, attention, loss = outputs
        whole = {
            "logits": logits,
            "logits_mask": batch[1],
            "labels": batch[2],
            "hidden": hidden,
            "attention": attention,
            "inputs_mask": batch[1],
            "losses": loss,
        }
        return {key: whole[key] for key in keys}

    return adapt


def match(loss, layers=1, **options):
    """An intermediate match of one layer, or of one with itself."""
    feature = "attention" if loss.startswith("attention") else "hidden"
    both = [layers, layers] if loss in ("fsp", "nst", "gram", "mmd") else layers
    return {"layer_T": both, "layer_S": both, "feature": feature, "loss": loss, "weight": 0.7, **options}


def losses_of(distiller):
    """Keep the loss of each batch that a distiller, of either package, learns from."""
    kept, learn = [], distiller.train_on_batch

    def noted(batch, args):
        found = learn(batch, args)
        total = found[0] if isinstance(found, tuple) else found
        kept.append(total.item() if isinstance(total, torch.Tensor) else total)
        return found

    distiller.train_on_batch = noted
    return kept
