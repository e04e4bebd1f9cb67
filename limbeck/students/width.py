"""A narrower student from a teacher's own weights: fewer hidden dimensions, heads, feed-forward units, tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from limbeck.registry import nearest
from limbeck.students.axes import GROUPS, HEADS, HIDDEN, UNITS, VOCABULARY, Axes, find_axes
from limbeck.students.choice import choose
from limbeck.students.depth import is_transformers_model
from limbeck.students.importance import MEASURES, Batch, Importance, Scores
from limbeck.students.low_rank import hidden_basis

Model = TypeVar("Model", bound=nn.Module)
Init = Literal["importance", "low_rank", "fresh"]
INITS = ("importance", "low_rank", "fresh")


def shrink(
    model: Model,
    *,
    hidden_size: int | None = None,
    heads: int | None = None,
    key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    vocabulary: Sequence[int] | None = None,
    importance: Importance = "magnitude",
    sample: Batch | Iterable[Batch] | None = None,
    init: Init = "importance",
) -> Model:
    """Make a student that is narrower than a transformers model, of the same class and from its weights.

    The hidden dimensions that are kept are the same in all layers, since layers add to one stream; heads and
    feed-forward units are chosen layer by layer (heads for all layers at once where layers share a position bias,
    as T5's do). Config and weights agree, so ``save_pretrained`` and ``from_pretrained`` give the same student.
    What is not named keeps its size. The given model is left as it is.

    Where a config has no ``head_dim`` (BERT, DistilBERT, GPT-2, BART), heads times their size is the hidden size:
    with `hidden_size` alone heads keep their size and become fewer; with `heads` too each head keeps its best
    entries, and queries are scaled so that attention stays what the kept entries make it.

    Heads and units that nothing reads are dropped without any change of the outputs. A norm over fewer hidden
    dimensions is another norm, so with another hidden size a student has to be trained before it is of use.

    Args:
        model: The model to take from, usually the teacher.
        hidden_size: Numbers in a hidden state.
        heads: Attention heads.
        key_value_heads: Heads of keys and values, where several queries share one. By default as many queries
            share one as before, if that divides `heads`.
        intermediate_size: Units between the two feed-forward layers.
        vocabulary: Ids of the tokens to keep, in the student's order: its token i is the model's
            ``vocabulary[i]``. `cut_tokenizer` makes such ids and the tokenizer that goes with them.
        importance: What is kept: ``"magnitude"``, by the weights alone; ``"activation"``, by what a sample makes
            of them; ``"taylor"``, by how much a sample's loss changes to first order.
        sample: A batch of inputs, or several, for the last two; with labels for the last.
        init: ``"importance"``; ``"low_rank"``, the hidden state in the directions in which the weights are
            largest and not in some of its coordinates; or ``"fresh"``, new random weights of the same shapes. Low
            rank keeps the function of a Llama whose weights have that rank; a layer norm's mean, and activations
            of the hidden state such as BERT's pooler, are not the same in other directions.

    Returns:
        A new model of the same class.

    Raises:
        TypeError: this is no transformers model, or a size is no integer.
        ValueError: a size does not fit the model or the other sizes, an option is unknown, a sample is lacking, a
            special token would be dropped, or the class does not say by its config which dimension is what (fused
            queries, keys and values but GPT-2's; configs without one size for all layers).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> teacher = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
        ...                                num_attention_heads=4, intermediate_size=32))
        >>> student = shrink(teacher, hidden_size=8, intermediate_size=20)
        >>> student.config.hidden_size, student.config.num_attention_heads, student.config.intermediate_size
        (8, 2, 20)
    """
    _check_model(model)
    for name, value, known in (("importance", importance, MEASURES), ("init", init, INITS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; {nearest(str(value), known)}")
    axes = find_axes(model)
    asked = {HIDDEN: hidden_size, HEADS: heads, GROUPS: key_value_heads, UNITS: intermediate_size}
    sizes = _targets(axes, asked, type(model).__name__)
    tokens = _tokens(model, axes, vocabulary)
    config = _narrow_config(model, axes, sizes, tokens)
    student = _build(model, config, fresh=init == "fresh")
    _check_same_names(student, model)
    if init != "fresh":
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        scores = Scores(model, axes, importance, sample)
        if init == "low_rank" and sizes[HIDDEN] != axes.sizes[HIDDEN]:
            basis = hidden_basis(state, axes, sizes[HIDDEN], student.state_dict())
            state = {name: basis.apply(name, tensor) for name, tensor in state.items()}
        kept = choose(axes, sizes, tokens, scores, hidden=init == "importance")
        state = {name: kept.cut(name, tensor) for name, tensor in state.items()}
        student.load_state_dict(state, assign=True)
        student.tie_weights()
    _same_state(student, model, tokens)
    return student  # type: ignore[no-any-return]


def narrower_sizes(model: nn.Module, share: float) -> dict[str, Any]:
    """Sizes that are smaller by one share: hidden size, heads and feed-forward units, as `shrink` takes them.

    Heads keep their size, and as many queries share a key as before. Where heads times their size is the hidden
    size, it stays so.

    Args:
        model: A transformers model.
        share: What part goes, between 0 and 1; sizes are rounded, and stay at least 1.

    Raises:
        TypeError: this is no transformers model.
        ValueError: `share` is out of range, or the model cannot be made narrower.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> teacher = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
        ...                                num_attention_heads=4, intermediate_size=32))
        >>> narrower_sizes(teacher, 0.25)
        {'hidden_size': 12, 'heads': 3, 'intermediate_size': 24}
    """
    _check_model(model)
    if not 0 <= share < 1:
        raise ValueError(f"share={share} is out of range; what goes is at least 0 and less than 1")
    axes = find_axes(model)
    groups = axes.sizes.get(GROUPS, axes.sizes[HEADS])
    sizes = {axis: max(1, round(axes.sizes[axis] * (1 - share))) for axis in (HIDDEN, UNITS)}
    heads = max(1, round(groups * (1 - share))) * (axes.sizes[HEADS] // groups)
    hidden = heads * axes.head_size if axes.tied else sizes[HIDDEN]
    return {"hidden_size": hidden, "heads": heads, "intermediate_size": sizes[UNITS]}


def _check_model(model: nn.Module) -> None:
    if not is_transformers_model(model):
        raise TypeError(f"a {type(model).__name__} has no config to shrink by; pass a transformers model")


def _targets(axes: Axes, asked: Mapping[str, int | None], kind: str) -> dict[str, int]:
    """The student's size along each axis."""
    for axis, size in asked.items():
        if size is None:
            continue
        if type(size) is not int:
            raise TypeError(f"{_argument(axis)}={size!r} is a {type(size).__name__}; give a whole number")
        if axis not in axes.sizes:
            raise ValueError(f"{kind} has no {_argument(axis)} to make smaller; drop it")
        if not 1 <= size <= axes.sizes[axis]:
            own = axes.sizes[axis]
            raise ValueError(f"{_argument(axis)}={size} is out of range, {kind} has {own}; choose from 1 to {own}")
    sizes = {**axes.sizes, **{axis: size for axis, size in asked.items() if size is not None}}
    if axes.tied:
        _tie_heads(axes, asked, sizes, kind)
    elif GROUPS in sizes:
        sizes[GROUPS] = _groups(axes, asked[GROUPS], sizes[HEADS])
    return sizes


def _argument(axis: str) -> str:
    return {HIDDEN: "hidden_size", UNITS: "intermediate_size"}.get(axis, axis)


def _tie_heads(axes: Axes, asked: Mapping[str, int | None], sizes: dict[str, int], kind: str) -> None:
    """Make heads times their size the hidden size."""
    hidden, size = sizes[HIDDEN], axes.head_size
    if asked[HEADS] is None:
        if hidden % size:
            raise ValueError(
                f"hidden_size={hidden} is no multiple of the {size} numbers of a head of {kind}; choose a "
                "multiple, or give heads too"
            )
        sizes[HEADS] = hidden // size
    elif hidden % sizes[HEADS] or hidden // sizes[HEADS] > size:
        raise ValueError(
            f"heads={sizes[HEADS]} and hidden_size={hidden} do not go together: the config of {kind} has no "
            f"head_dim, so each head gets hidden_size / heads numbers, at most the {size} that it has; set "
            f"hidden_size={sizes[HEADS] * size}"
        )
    turned = [name for name, value in vars(axes.config).items() if name.startswith(("rope", "rotary")) and value]
    if hidden // sizes[HEADS] != size and turned:
        raise ValueError(
            f"heads of {kind} carry positions by rotation ({turned[0]}), so they keep their {size} numbers; set "
            f"heads={hidden // size}"
        )


def _groups(axes: Axes, asked: int | None, heads: int) -> int:
    """How many heads of keys and values there are for so many heads."""
    share = axes.sizes[HEADS] // axes.sizes[GROUPS]
    fitting = [n for n in range(axes.sizes[GROUPS], 0, -1) if heads % n == 0 and heads // n <= share]
    if asked is not None:
        if asked not in fitting:
            raise ValueError(
                f"key_value_heads={asked} and heads={heads} do not go together: heads must be a multiple, at most "
                f"{share} for each; choose from {fitting}"
            )
        return asked
    if not fitting:
        cure = f"choose a multiple of {share}"
        raise ValueError(
            f"heads={heads} cannot share any number of the {axes.sizes[GROUPS]} key_value_heads; {cure}"
        )
    return heads // share if heads % share == 0 else fitting[0]


def _tokens(model: Any, axes: Axes, vocabulary: Sequence[int] | None) -> list[int] | None:
    """Check the ids of the tokens to keep."""
    if vocabulary is None:
        return None
    ids, kind = [int(token) for token in vocabulary], type(model).__name__
    if VOCABULARY not in axes.sizes:
        raise ValueError(f"{kind} has no vocabulary; drop it")
    count = axes.sizes[VOCABULARY]
    wrong = [token for token in ids if not 0 <= token < count]
    if not ids or wrong or len(set(ids)) < len(ids):
        fact = f"has {wrong[0]}, {kind} has tokens 0 to {count - 1}" if wrong else "is empty or repeats a token"
        raise ValueError(f"vocabulary {fact}; give the ids to keep, each once")
    special = _special_tokens(model.config, count)
    if model.can_generate():
        special |= _special_tokens(model.generation_config, count)
    dropped = {name: value for name, value in special.items() if not set(value) <= set(ids)}
    if dropped:
        name, value = next(iter(dropped.items()))
        raise ValueError(f"vocabulary lacks the special token {value[0]} ({name}); keep it, or set {name} to None")
    pad = special.get("pad_token_id", [None])[0]
    if pad is not None and ids.index(pad) != pad and _counts_from_padding(model):
        raise ValueError(
            f"positions of {kind} are counted from the padding's id, so it has to stay {pad}; let vocabulary "
            f"begin with 0 to {pad}"
        )
    return ids


def _special_tokens(config: Any, count: int) -> dict[str, list[int]]:
    """The special tokens that a config names, but for those that are no tokens of the model."""
    found = {}
    for name, value in vars(config).items():
        ids = [value] if type(value) is int else value
        if name.endswith("_token_id") and isinstance(ids, list):
            found[name] = [token for token in ids if 0 <= token < count]
    return {name: ids for name, ids in found.items() if ids}


def _counts_from_padding(model: nn.Module) -> bool:
    """Whether another table than that of the tokens has the padding's place, as RoBERTa's positions do."""
    return any(
        isinstance(module, nn.Embedding) and module.padding_idx and "position" in name
        for name, module in model.named_modules()
    )


def _narrow_config(model: Any, axes: Axes, sizes: Mapping[str, int], tokens: list[int] | None) -> Any:
    """The config with the student's sizes."""
    config = copy.deepcopy(model.config)
    changed = {axis for axis in sizes if sizes[axis] != axes.sizes[axis]}
    if changed and not axes.tied:
        config.head_dim = axes.head_size
    if HIDDEN in changed and UNITS not in changed:  # some say nothing, which is four times the hidden size
        changed.add(UNITS)
    for axis in sorted(changed):
        for name in axes.names[axis]:
            setattr(config, name, sizes[axis])
    if tokens is not None:
        _rename_tokens(config, tokens, config.vocab_size)
        config.vocab_size = len(tokens)
    return config


def _rename_tokens(config: Any, tokens: Sequence[int], count: int) -> None:
    """Give special tokens their new ids; tokens that are never to be said and are gone leave those lists."""
    new = {token: place for place, token in enumerate(tokens)}
    for name, ids in _special_tokens(config, count).items():
        renamed = [new[token] for token in ids]
        setattr(config, name, renamed if isinstance(getattr(config, name), list) else renamed[0])
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if vars(config).get(name):
            setattr(config, name, [new[token] for token in getattr(config, name) if token in new])


def _build(model: Any, config: Any, fresh: bool) -> Any:
    """A new model; random numbers are used up only where they stay."""
    devices = [] if fresh else list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices, enabled=not fresh):
        return type(model)(config)


def _check_same_names(student: Any, model: Any) -> None:
    """Some classes have other weights where two sizes are equal (ELECTRA's embeddings and hidden states)."""
    differing = sorted(set(student.state_dict()) ^ set(model.state_dict()))
    if differing:
        raise ValueError(
            f"a {type(model).__name__} of this size has other weights than the model ({differing[0]!r}); choose "
            "another size"
        )


def _same_state(student: Any, model: Any, tokens: list[int] | None) -> None:
    """Devices, number types, modes, what is frozen, and how text is generated, as in the model."""
    buffers = dict(model.named_buffers())
    for name, buffer in student.named_buffers():
        buffer.data = buffer.data.to(buffers[name])
    frozen = dict(model.named_parameters())
    for name, parameter in student.named_parameters():
        parameter.data = parameter.data.to(frozen[name])
        parameter.requires_grad_(frozen[name].requires_grad)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in student.named_modules():
        module.training = modes[name]
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
        if tokens is not None:
            _rename_tokens(student.generation_config, tokens, model.config.vocab_size)
