"""What a model is given of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from limbeck.batch import DECODER_IDS, positional
from limbeck.types import EXAMPLE_ID, INPUTS, LABELS, TASK, Batch

DECODER_EMBEDS = "decoder_inputs_embeds"

MAIN_INPUTS = frozenset({"input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"})
"""What transformers models are about; they can be labels too, of a model that learns to say its input again."""


class ModuleInputs:
    """Calls a model with what it takes from a batch.

    A batch holds more than one model wants: labels, example numbers, inputs of the other model. Only the
    parameters that the model's ``forward`` names are passed; a forward that takes ``**kwargs`` alone, or beside
    ``task``, gets all. A model with an encoder and a decoder that is given labels, and nothing for its decoder,
    gets the decoder's inputs made of the labels, in its own way.

    Args:
        model: The model to call.
        labels: Entries that are read as labels beside ``labels`` itself. The model is not given them, since it
            would compute a loss of its own, unless it cannot run without.

    Example:
        >>> import torch
        >>> call = ModuleInputs(nn.Linear(2, 3))
        >>> call({"input": torch.zeros(4, 2), "labels": torch.zeros(4)}).shape
        torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module, labels: Collection[str] = ()) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters.values()
        self.named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        self.is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.required = [p.name for p in parameters if p.name in self.named and p.default is p.empty]

        needed = {*self.required, *MAIN_INPUTS}
        self.withheld = frozenset({EXAMPLE_ID, LABELS, *(entry for entry in labels if entry not in needed)})
        # An adapted model (peft) passes the question on to the model in it, which its class would not tell.
        shift: Callable[[Tensor], Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        self._shift = shift if DECODER_IDS in self.named else None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model can make the inputs of its decoder of labels."""
        return self._shift is not None

    def prepared(self, batch: Batch) -> Batch:
        """The batch with ``decoder_input_ids`` made of its labels (B, L), where the model needs them.

        Example:
            >>> import torch
            >>> batch = {"input": torch.zeros(4, 2)}
            >>> ModuleInputs(nn.Linear(2, 3)).prepared(batch) is batch
            True
        """
        labels = batch.get(LABELS)
        given = DECODER_IDS in batch or DECODER_EMBEDS in batch
        if self._shift is None or given or not isinstance(labels, Tensor) or labels.ndim != 2:
            return batch
        return {**batch, DECODER_IDS: self._shift(labels)}

    def select(self, batch: Batch) -> dict[str, Any]:
        """The entries of the batch that the model takes by name."""
        takes_all = self.is_open and not self.named - {TASK}
        reserved = self.withheld | ({INPUTS} if positional(batch) else set())
        return {k: v for k, v in batch.items() if k not in reserved and (takes_all or k in self.named)}

    def __call__(self, batch: Batch, run: Callable[..., Any] | None = None, **extra: Any) -> Any:
        """Call the model, what it was compiled to or a replica; of `extra`, it gets what its forward can take."""
        batch = self.prepared(batch)
        inputs, given = self.select(batch), positional(batch)
        if not inputs and not given:
            raise ValueError(
                f"{type(self.model).__name__} takes {sorted(self.named)}, and the batch has {sorted(batch)}; "
                "rename the batch's entries to the model's"
            )
        missing = [] if given else [name for name in self.required if name not in inputs and name not in extra]
        if missing:
            raise ValueError(
                f"{type(self.model).__name__} takes {missing[0]!r}, and the batch has {sorted(batch)}; add it, or "
                "rename an entry"
            )
        extra = {key: value for key, value in extra.items() if self.is_open or key in self.named}
        return (self.model if run is None else run)(*given, **inputs, **extra)

    def alone(self, inputs: Sequence[Any], named: Mapping[str, Any], run: Callable[..., Any] | None = None) -> Any:
        """Call the model as its user would, with labels if it takes them, and without what it cannot take."""
        if LABELS not in named and len(inputs) > max(1, self.places):
            inputs = inputs[:-1]
        unknown = {EXAMPLE_ID, LABELS, TASK} - self.named
        known = {k: v for k, v in named.items() if k in self.named or (self.is_open and k not in unknown)}
        return (self.model if run is None else run)(*inputs, **known)
