"""A new student of a teacher's kind, with random weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from limbeck.registry import refuse_unknown
from limbeck.students.depth import cut_config, is_transformers_model

Model = TypeVar("Model", bound=nn.Module)

SHORT = ("num_labels",)
"""What configs take under a name that is none of their fields."""


def from_config(model: Model, **changes: Any) -> Model:
    """Make a new model of a transformers model's class, with its config but for some changes, and random weights.

    Labels, special tokens and all else that the config says stay, so the student reads what the teacher reads. A
    ``head_dim`` that is the hidden size over the heads stays that; lists with an entry for each layer lose the
    last ones. The random weights are drawn from torch's generator: `torch.manual_seed` makes them the same again.

    Args:
        model: The model whose class and config are taken, usually the teacher.
        **changes: Fields of its config, under the class's own names or the usual ones: ``num_hidden_layers=3``,
            ``hidden_size=128``.

    Returns:
        A new model in training mode, with the given one's number type and device.

    Raises:
        TypeError: this is no transformers model, or its config has no such field.
        ValueError: the sizes do not go together.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> teacher = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
        ...                                num_attention_heads=4, intermediate_size=32))
        >>> student = from_config(teacher, num_hidden_layers=1, hidden_size=8, num_attention_heads=2)
        >>> student.config.vocab_size, student.pooler.dense.weight.shape
        (50, torch.Size([8, 8]))
        >>> from_config(teacher, hidden_siz=1)
        Traceback (most recent call last):
        TypeError: the config of BertModel has no option 'hidden_siz'; did you mean 'hidden_size'...?
    """
    kind: Any = type(model)
    if not is_transformers_model(model):
        raise TypeError(f"a {kind.__name__} has no config to build from; pass a transformers model")
    given: Any = model.config
    names = {name for name in vars(given) if not name.startswith("_")}
    refuse_unknown(changes, {*names, *given.attribute_map, *SHORT}, f"the config of {kind.__name__}")
    # transformers refuses a wrong value by an error of its own, or stumbles over it in building the model.
    from huggingface_hub.errors import StrictDataclassError

    refusals = (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError, StrictDataclassError)
    try:
        config = _changed(given, changes)
        config.validate()
        student = kind(config)
    except refusals as error:
        raise ValueError(
            f"no {kind.__name__} can be built with {changes}: {' '.join(str(error).split())}"
        ) from None
    return student.to(next(model.parameters()))  # type: ignore[no-any-return]


def _changed(given: Any, changes: dict[str, Any]) -> Any:
    """A copy of a config with changes, and with what follows from them."""
    config = copy.deepcopy(given)
    own = {given.attribute_map.get(name, name): value for name, value in changes.items()}
    layers = given.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    before = vars(given).get(layers)
    if type(own.get(layers)) is int and type(before) is int and own[layers] < before:
        cut_config(config, [layers], before, range(own[layers]))
    for name, value in own.items():
        setattr(config, name, value)
    if "head_dim" not in changes and vars(given).get("head_dim") == _head_size(given) is not None:
        config.head_dim = _head_size(config)
    return config


def _head_size(config: Any) -> int | None:
    """The hidden size over the heads, where it is whole."""
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not (type(hidden) is int and type(heads) is int and heads > 0):
        return None
    if hidden % heads:
        raise ValueError(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}; choose a multiple")
    return hidden // heads
