"""One network for rows of texts, images, categories and numbers: a part for each kind, fused late.

Shape legend: B examples, L tokens, I images of an example, S height and width, K categorical columns, N numbers,
D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.atomic import write_text
from limbeck.pretrained import load_config, quiet_transformers
from limbeck.teachers import ModuleInputs
from limbeck.train.checkpoint import load_weights, save_weights

CONFIG, WEIGHTS = "fusion.json", "fusion.safetensors"
Pooling = Literal["cls", "mean"]


@dataclass(frozen=True)
class Fused:
    """What the network returns.

    Attributes:
        logits: (B, C); (B, 1) where a number is predicted.
        features: (B, D), what the head reads.
    """

    logits: Tensor
    features: Tensor


class TextPart(nn.Module):
    """A text encoder of transformers, whose vector of a text is that of its first token or the mean of all.

    Args:
        encoder: The encoder.
        pooling: ``"cls"`` or ``"mean"``.

    Raises:
        ValueError: another pooling.
    """

    def __init__(self, encoder: nn.Module, pooling: Pooling = "cls") -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"unknown pooling {pooling!r}; known: cls, mean")
        self.encoder, self.pooling = encoder, pooling
        config: Any = encoder.config
        self.width: int = config.hidden_size

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Map token ids (B, L) to (B, D)."""
        hidden_BLD: Tensor = ModuleInputs(self.encoder)(batch).last_hidden_state
        if self.pooling == "cls":
            return hidden_BLD[:, 0]
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden_BLD.dtype)
        mean: Tensor = (hidden_BLD * mask).sum(1) / mask.sum(1).clamp_min(1)
        return mean


class ImagePart(nn.Module):
    """An image backbone of transformers; several images of an example are averaged.

    Args:
        encoder: The backbone.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        sizes = getattr(config, "hidden_sizes", None)
        self.width: int = sizes[-1] if sizes else config.hidden_size

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Map pixels (B, I, 3, S, S) to (B, D)."""
        pixels = batch["pixel_values"]
        output = self.encoder(pixel_values=pixels.flatten(0, 1))
        pooled: Tensor | None = output.get("pooler_output")
        if pooled is None:
            hidden: Tensor = output.last_hidden_state
            pooled = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden.mean(1)
        return pooled.reshape(*pixels.shape[:2], -1).mean(1)


class CategoryPart(nn.Module):
    """An embedding for each categorical column, and a layer over all of them.

    Args:
        sizes: The number of values of each column, that for unknown ones included.
        width: Of the result.
    """

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        widths = [min(64, 1 + math.ceil(size / 2)) for size in sizes]
        self.columns = nn.ModuleList(nn.Embedding(size, own) for size, own in zip(sizes, widths, strict=True))
        self.mix = nn.Sequential(nn.Linear(sum(widths), width), nn.LayerNorm(width), nn.LeakyReLU())
        self.width = width

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Map numbers of values (B, 1, K) to (B, D)."""
        numbers = batch["categories"].squeeze(1).unbind(1)
        return self.mix(torch.cat([own(n) for own, n in zip(self.columns, numbers, strict=True)], 1))  # type: ignore[no-any-return]


class NumberPart(nn.Module):
    """A layer over all numerical columns.

    Args:
        numbers: How many there are.
        width: Of the result.
    """

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(numbers, width), nn.LayerNorm(width), nn.LeakyReLU())
        self.width = width

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Map standardised numbers (B, 1, N) to (B, D)."""
        return self.mix(batch["numbers"].squeeze(1))  # type: ignore[no-any-return]


class Fusion(nn.Module):
    """Brings the vectors of all parts to one width and mixes them; a single part's vector stays as it is.

    Args:
        widths: Of the parts.
        hidden: Width of the result, where there are several parts.
        dropout: Share of the result that is dropped in training.
    """

    def __init__(self, widths: Sequence[int], hidden: int, dropout: float) -> None:
        super().__init__()
        several = len(widths) > 1
        self.width = hidden if several else widths[0]
        self.adapters = nn.ModuleList(nn.Linear(width, max(widths)) for width in widths if several)
        layers = [nn.Linear(len(widths) * max(widths), hidden), nn.LayerNorm(hidden), nn.LeakyReLU()]
        self.mix = nn.Sequential(*layers, nn.Dropout(dropout)) if several else nn.Identity()

    def forward(self, vectors: Sequence[Tensor]) -> Tensor:
        """Map one (B, D) for each part to (B, D)."""
        if len(vectors) == 1:
            return vectors[0]
        adapted = [adapt(vector) for adapt, vector in zip(self.adapters, vectors, strict=True)]
        mixed: Tensor = self.mix(torch.cat(adapted, dim=1))
        return mixed


class FusionNetwork(nn.Module):
    """Rows of texts, images, categories and numbers to features and logits; see `limbeck.tasks.frames.Columns`.

    Its taps ``"features"`` and ``"logits"`` are what terms of a distillation read, and ``"head"`` is the part that
    a loss may borrow.

    Args:
        outputs: Number of logits C.
        text: A text encoder of transformers.
        pooling: How it makes one vector of a text, ``"cls"`` or ``"mean"``.
        image: An image backbone of transformers.
        categories: Numbers of values of the categorical columns.
        numbers: Numerical inputs of a row.
        hidden: Width of tabular parts and of the fusion.
        dropout: After the fusion.

    Raises:
        ValueError: no part.

    Example:
        >>> network = FusionNetwork(2, categories=[3, 4], numbers=2, hidden=8)
        >>> out = network(categories=torch.tensor([[[1, 3]]]), numbers=torch.zeros(1, 1, 2))
        >>> out.logits.shape, out.features.shape
        (torch.Size([1, 2]), torch.Size([1, 8]))
    """

    def __init__(
        self,
        outputs: int,
        *,
        text: nn.Module | None = None,
        pooling: Pooling = "cls",
        image: nn.Module | None = None,
        categories: Sequence[int] = (),
        numbers: int = 0,
        hidden: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        if text is not None:
            self.parts["text"] = TextPart(text, pooling)
        if image is not None:
            self.parts["image"] = ImagePart(image)
        if categories:
            self.parts["categories"] = CategoryPart(categories, hidden)
        if numbers:
            self.parts["numbers"] = NumberPart(numbers, hidden)
        if not self.parts:
            raise ValueError("a fusion network needs a part: a text or image encoder, categories or numbers")
        self.features = Fusion([int(part.width) for part in self.parts.values()], hidden, dropout)  # type: ignore[arg-type]
        self.head = nn.Linear(self.features.width, outputs)
        self.made_with = {
            "outputs": outputs,
            "pooling": pooling,
            "categories": list(categories),
            "numbers": numbers,
            "hidden": hidden,
            "dropout": dropout,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        categories: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> Fused:
        """Map a batch to logits (B, C) and features (B, D).

        Args:
            input_ids: (B, L).
            attention_mask: (B, L).
            token_type_ids: (B, L).
            pixel_values: (B, I, 3, S, S).
            categories: (B, 1, K).
            numbers: (B, 1, N).
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
            "categories": categories,
            "numbers": numbers,
        }
        batch = {name: value for name, value in given.items() if value is not None}
        features = self.features([part(batch) for part in self.parts.values()])
        return Fused(self.head(features), features)

    def save(self, folder: str | Path) -> None:
        """Write the configuration as JSON and all weights as safetensors.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, encoder in self.encoders().items():
            encoder.config.save_pretrained(folder / name)
        save_weights(self, folder / WEIGHTS)
        write_text(folder / CONFIG, json.dumps({**self.made_with, "encoders": sorted(self.encoders())}))

    @classmethod
    def load(cls, folder: str | Path) -> FusionNetwork:
        """Load what `save` wrote.

        Raises:
            ValueError: there is no such network, or its weights are damaged.
        """
        from transformers import AutoModel

        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} holds no network, for it has no {CONFIG}; correct the path")
        made_with = json.loads((folder / CONFIG).read_text())
        encoders = {}
        with quiet_transformers():
            for name in made_with.pop("encoders"):
                encoders[name] = AutoModel.from_config(load_config(folder / name))
        network = cls(**made_with, **encoders)
        load_weights(network, folder / WEIGHTS)
        return network

    def encoders(self) -> dict[str, Any]:
        """The encoders of transformers, by what they read."""
        return {name: part.encoder for name, part in self.parts.items() if isinstance(part, (TextPart, ImagePart))}
