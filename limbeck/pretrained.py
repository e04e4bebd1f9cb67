"""Pretrained transformers models: loaded as safetensors only, whole or not at all.

Nothing of transformers is imported before something is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from limbeck.hub import check_findable

GENERIC = "LABEL_"
"""How transformers calls the classes of a head whose labels nobody named."""

POOLER = "pooler"

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
"""What transformers calls tables with a row for each position: beyond their end a model cannot read."""

UNREADABLE = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises at a folder that holds no model, half a model, or one that needs other software."""


def load_pretrained(source: str | Path) -> nn.Module:
    """Load a transformers model as the class that its config names, with every weight.

    Raises:
        ValueError: there is no such folder or hub model, its config names no class, or weights are missing.

    Example:
        >>> load_pretrained("no/such/folder/here")
        Traceback (most recent call last):
        ValueError: cannot load a model from 'no/such/folder/here': there is no such folder
    """
    import transformers

    config = load_config(source, "a model")
    name = (config.architectures or ["no class"])[0]
    model_class: Any = getattr(transformers, name, None)
    # A config is text from elsewhere: it may name whatever transformers exports.
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"the config of {str(source)!r} names {name}, which transformers lacks as a model")
    model, absent = _load_weights(model_class, source, config, "a model")
    _refuse_random(absent, source)
    return model


def load_with_head(
    model_class: Any, source: str | Path, labels: Sequence[str], what: str, new_head: bool = False
) -> tuple[Any, bool]:
    """Load a model with a head for some labels; the head is new where the source has none for this kind of task.

    Args:
        model_class: An auto class, such as transformers' AutoModelForSequenceClassification.
        source: A folder or hub id.
        labels: Names of the classes; empty where a number is to be predicted.
        what: What is loaded, in error messages: ``"a text model"``.
        new_head: Replace a head for another number of classes too. Pretrained image models come with one.

    Returns:
        The model, and whether its head was trained for these labels.

    Raises:
        ValueError: nothing can be loaded, the head was trained for other labels, or a weight below the head is
            missing, which would be random.
    """
    config = load_config(source, what)
    kind = model_class.__name__.removeprefix("AutoModel")
    own = any(name.endswith(kind) for name in config.architectures or ())
    own = own and not (new_head and len(config.id2label) != len(labels))
    if own:
        check_labels(config, labels, str(source))
    names = tuple(labels) or ("score",)
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification" if labels else "regression"
    model, absent = _load_weights(model_class, source, config, what)
    backbone = f"{backbone_name(model)}."
    _refuse_random([k for k in absent if k.startswith(backbone) and POOLER not in k.split(".")], source)
    # A pooler counts as head: checkpoints of other tasks often lack it, and it is trained with the new head.
    return model, own and not absent


def load_backbone(source: str | Path, what: str = "a model") -> nn.Module:
    """Load the part of a transformers model below its head; a pooler that the source lacks is new.

    Args:
        source: A folder or hub id, of a model with a head or without.
        what: What is loaded, in error messages.

    Raises:
        ValueError: nothing can be loaded, or a weight is missing, which would be random.

    Example:
        >>> load_backbone("no/such/folder/here", "a text encoder")
        Traceback (most recent call last):
        ValueError: cannot load a text encoder from 'no/such/folder/here': there is no such folder
    """
    from transformers import AutoModel

    model, absent = _load_weights(AutoModel, source, load_config(source, what), what)
    _refuse_random([name for name in absent if POOLER not in name.split(".")], source)
    return model


def load_masked_lm(source: str | Path) -> nn.Module:
    """Load a model that fills in masked words, with every weight of its head.

    Raises:
        ValueError: nothing can be loaded, or a weight is missing: an encoder lacks the head.

    Example:
        >>> load_masked_lm("no/such/folder/here")
        Traceback (most recent call last):
        ValueError: cannot load a masked language model from 'no/such/folder/here': there is no such folder
    """
    from transformers import AutoModelForMaskedLM

    what = "a masked language model"
    model, absent = _load_weights(AutoModelForMaskedLM, source, load_config(source, what), what)
    _refuse_random(absent, source)
    return model


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer that can pad.

    Raises:
        ValueError: there is none, or it cannot pad.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except UNREADABLE as error:
            raise ValueError(f"cannot load a tokenizer from {str(source)!r}: {first_line(error)}") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # What transformers makes up where a folder has a config and no vocabulary: every word would be unknown.
        raise ValueError(f"{str(source)!r} has no tokenizer; save it there too: tokenizer.save_pretrained(folder)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {str(source)!r} has no token to pad with; give it a pad_token")
    return tokenizer


def load_config(source: str | Path, what: str = "a model") -> Any:
    """Load a model's config; code that comes with a model is never run.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoConfig

    if is_path(source) and not Path(source).is_dir():
        unread = "; ~ is not read as the home folder here" if str(source).startswith("~") else ""
        raise ValueError(f"cannot load {what} from {str(source)!r}: there is no such folder{unread}")
    check_findable(source, what)
    with quiet_transformers():
        try:
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
        except UNREADABLE as error:
            raise ValueError(f"cannot load {what} from {str(source)!r}: {first_line(error)}") from None


def is_path(source: str | Path) -> bool:
    """Whether a model's source can only be a folder: the hub's ids are ``name`` or ``owner/name``.

    Example:
        >>> is_path("./teacher"), is_path("runs/rte/student"), is_path("google/bert_uncased")
        (True, True, False)
    """
    return isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1


def most_tokens(model: nn.Module) -> int | None:
    """How many tokens a model can read at once; None where no table of positions ends.

    Example:
        >>> from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel
        >>> small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> bert = BertModel(BertConfig(max_position_embeddings=64, **small))
        >>> roberta = RobertaModel(RobertaConfig(max_position_embeddings=66, pad_token_id=1, **small))
        >>> most_tokens(bert), most_tokens(roberta), most_tokens(nn.Linear(2, 2))
        (64, 64, None)
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            stated = getattr(getattr(model, "config", None), "max_position_embeddings", module.num_embeddings)
            return int(min(stated, module.num_embeddings)) - before  # BART's table begins with rows of no use
    return None


def backbone_name(model: nn.Module) -> str:
    """The name of the part of a model below its head.

    It is the one that transformers names, or else the largest child: some classes (CLIP's classifier) hold only a
    part of the model after which they are named.

    Example:
        >>> class Model(nn.Module):
        ...     base_model_prefix = "clip"
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.vision_model, self.classifier = nn.Linear(9, 9), nn.Linear(9, 2)
        >>> backbone_name(Model())
        'vision_model'
    """
    children = dict(model.named_children())
    if model.base_model_prefix in children:
        return str(model.base_model_prefix)
    return max(children, key=lambda name: sum(p.numel() for p in children[name].parameters()))


def check_labels(config: Any, labels: Sequence[str], source: str) -> None:
    """Refuse a model whose head speaks of other classes than the task.

    Raises:
        ValueError: the number, the names or the order of the labels differ.
    """
    theirs = [str(config.id2label[i]) for i in sorted(config.id2label)]
    named = not all(name.startswith(GENERIC) for name in theirs)
    if len(theirs) != max(1, len(labels)) or (named and labels and list(labels) != theirs):
        raise ValueError(
            f"{source} was trained for the labels {theirs}, the task has {list(labels) or 'a number to predict'}; "
            "use another model, or the pretrained one it came from"
        )


def check_same_labels(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse two classifiers whose logits stand for other classes, or for the same ones in another order.

    Models whose classes nobody named, and whose numbers of classes differ, are left alone.

    Raises:
        ValueError: the message names both sides.

    Example:
        >>> from transformers import BertConfig
        >>> class Model(nn.Module):
        ...     def __init__(self, *names):
        ...         super().__init__()
        ...         self.config = BertConfig(id2label=dict(enumerate(names)))
        >>> check_same_labels(Model("no", "yes"), Model("NO", "YES"))
        >>> try:
        ...     check_same_labels(Model("no", "yes"), Model("yes", "no"))
        ... except ValueError as error:
        ...     print(str(error).partition("; ")[2])
        pass teacher_read=lambda output: {'logits': output.logits[..., [1, 0]]}
    """
    ours, theirs = _class_names(student), _class_names(teacher)
    folded, other = [name.casefold() for name in ours], [name.casefold() for name in theirs]
    if len(ours) != len(theirs) or folded == other:
        return
    cure = "name them alike in both configs (id2label), in one order, or leave the logits out of the terms"
    if sorted(folded) == sorted(other):
        order = [other.index(name) for name in folded]
        cure = f"pass teacher_read=lambda output: {{'logits': output.logits[..., {order}]}}"
    raise ValueError(
        f"the student's classes are {ours} and the teacher's {theirs}, so their logits do not stand for the same; "
        f"{cure}"
    )


def _class_names(model: nn.Module) -> list[str]:
    """How a transformers classifier calls its classes; nothing where nobody named them."""
    names: Any = getattr(getattr(model, "config", None), "id2label", None) or {}
    found = [str(names[number]) for number in sorted(names)]
    return [] if all(name.startswith(GENERIC) for name in found) else found


def first_line(error: Exception) -> str:
    """The first line of an error's message.

    Example:
        >>> first_line(ValueError())
        'ValueError'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class quiet_transformers:  # noqa: N801  (a context manager, used like a function)
    """Keep transformers' warnings and bars about new heads off the screen; the plan says what is new."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        from transformers.utils import logging

        level, bars = self._before
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_weights(model_class: Any, source: str | Path, config: Any, what: str) -> tuple[nn.Module, list[str]]:
    """The model, and the names of the weights that its file lacks or has in another shape."""
    with quiet_transformers():
        try:
            model, loading = model_class.from_pretrained(
                source,
                config=config,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are judged here, with those that are missing
            )
        except UNREADABLE as error:
            raise ValueError(
                f"cannot load {what} from {str(source)!r} as safetensors: {first_line(error)}"
            ) from None
    reshaped = [str(mismatch[0]) for mismatch in loading["mismatched_keys"]]
    return model, sorted({*loading["missing_keys"], *reshaped})


def _refuse_random(absent: Iterable[str], source: str | Path) -> None:
    names = list(absent)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"the weights of {str(source)!r} lack {', '.join(names[:3])}{more}, which would be random; "
            "use a folder that holds the whole model"
        )
