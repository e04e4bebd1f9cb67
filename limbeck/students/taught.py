"""How a student is set up to be taught: what a teacher's answers make needless, or free."""

from __future__ import annotations

from torch import nn

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def set_dropout(model: nn.Module, p: float) -> None:
    """Give all dropout layers of a model the same probability.

    A student that imitates a teacher on many examples needs no noise against learning them by heart, and layers
    that are compared with a teacher's, which has none in eval mode, learn faster without.

    Args:
        model: Changed in place; layers of dropout that are modules, not numbers that a layer holds by itself.
        p: From 0 on, below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        >>> set_dropout(model, 0.0)
        >>> model[1].p
        0.0
    """
    for module in model.modules():
        if isinstance(module, DROPOUT):
            module.p = p


def freeze_embeddings(model: nn.Module) -> None:
    """Leave the table of token vectors as it is: of a small model most weights, and the update's largest part.

    Args:
        model: A model of transformers; changed in place.

    Raises:
        ValueError: it has no such table.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
        >>> model = BertModel(BertConfig(vocab_size=8, **sizes))
        >>> freeze_embeddings(model)
        >>> model.embeddings.word_embeddings.weight.requires_grad
        False
    """
    table = token_vectors(model)
    if table is None:
        raise ValueError(
            f"a {type(model).__name__} has no table of token vectors to freeze; drop student.freeze_embeddings"
        )
    table.weight.requires_grad_(False)


def token_vectors(model: nn.Module) -> nn.Embedding | None:
    """The table of a model's token vectors; None where it has none.

    Example:
        >>> token_vectors(nn.Linear(2, 2))
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:  # of images, or of a kind that transformers does not know
        return None
    return found if isinstance(found, nn.Embedding) else None
