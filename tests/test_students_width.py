"""Narrower students: what is dropped, what stays the same, and that the config agrees."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn

from limbeck.students import narrower_sizes, shrink
from limbeck.students.axes import find_axes
from limbeck.students.low_rank import hidden_basis

torch.set_num_threads(1)

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32, "initializer_range": 0.3}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OWN = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**TEXT, **OWN, "num_key_value_heads": 2}


def bert(kind="BertForSequenceClassification", **changes):
    return getattr(transformers, kind)(transformers.BertConfig(**{**TEXT, **PLAIN, "num_labels": 3, **changes}))


def roberta():
    sizes = {**TEXT, **PLAIN, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))


def distilbert():
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "initializer_range": 0.3}
    return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes, max_position_embeddings=32))


def electra():
    return transformers.ElectraForPreTraining(transformers.ElectraConfig(**TEXT, embedding_size=4))


def electra_of_one_width():
    return transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**TEXT, embedding_size=16))


def mpnet():
    return transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**TEXT))


def albert():
    return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**TEXT, embedding_size=8))


def gpt2(**changes):
    sizes = {
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "initializer_range": 0.3,
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **ids, **changes}))


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, **changes}))


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True))


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=8))


def gemma():
    own = {"head_dim": 4, "hidden_activation": "gelu", "tie_word_embeddings": False}
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, **own))


def t5():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def bart():
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 24}
    ids = {"decoder_start_token_id": 2, "forced_eos_token_id": 2, "max_position_embeddings": 32}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads, **OWN, **ids))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4))


TIED = [bert, roberta, distilbert, electra, electra_of_one_width, mpnet, albert, gpt2, bart]
FREE = [llama, qwen2, qwen3, gemma, t5, vit]


def made(make, **changes):
    torch.manual_seed(0)
    model = make(**changes).eval()
    with torch.no_grad():  # biases begin as zeros, and would hide a wrong cut
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model, size=3):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.ViTForImageClassification):
        return {"pixel_values": torch.randn(size, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 30, (size, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


@torch.no_grad()
def logits(model, **changes):
    return model(**{**inputs(model), **changes}).logits


def same(left, right):
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


@pytest.mark.parametrize("make", TIED + FREE)
def test_keeping_everything_changes_nothing(make):
    teacher = made(make)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    student = shrink(teacher, hidden_size=16, heads=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(student), logits(teacher))
    assert same(student, teacher)
    storages = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not storages & {parameter.data_ptr() for parameter in student.parameters()}


@pytest.mark.parametrize("make", TIED + FREE)
def test_the_config_agrees_and_from_pretrained_gives_the_same(make, tmp_path):
    teacher = made(make)
    twin = copy.deepcopy(teacher)
    student = shrink(teacher, hidden_size=8, heads=2, intermediate_size=20)
    config = student.config
    assert type(student) is type(teacher)
    assert config.hidden_size == 8
    assert config.num_attention_heads == 2
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student))
    assert same(twin, teacher)
    assert teacher.config.to_dict() == twin.config.to_dict()
    assert sum(p.numel() for p in student.parameters()) < 0.7 * sum(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize(
    ("make", "tied"), [(gpt2, True), (t5, True), (qwen2, True), (distilbert, True), (llama, False)]
)
def test_tied_weights_stay_tied(make, tied):
    student = shrink(made(make), hidden_size=8)
    assert (student.get_input_embeddings().weight is student.get_output_embeddings().weight) is tied


def unread(teacher, pattern, dim, entries):
    """Nobody reads these entries any more."""
    found = [name for name, _ in teacher.named_parameters() if re.search(pattern, name)]
    assert found
    with torch.no_grad():
        for name in found:
            teacher.get_parameter(name).index_fill_(dim, torch.tensor(entries), 0.0)


UNITS = {
    bert: (r"layer\.\d\.output\.dense\.weight", 1),
    distilbert: (r"ffn\.lin2\.weight", 1),
    gpt2: (r"mlp\.c_proj\.weight", 0),
    llama: (r"down_proj\.weight", 1),
    t5: (r"DenseReluDense\.wo\.weight", 1),
    vit: (r"fc2\.weight", 1),
    bart: (r"fc2\.weight", 1),
}


@pytest.mark.parametrize("make", UNITS)
@pytest.mark.parametrize("importance", ["magnitude", "activation", "taylor"])
def test_units_that_nobody_reads_are_dropped_without_a_change(make, importance):
    teacher = made(make)
    unread(teacher, *UNITS[make], [0, 3, 5, 11])
    before = logits(teacher)
    count = teacher.config.n_inner or 64 if make is gpt2 else 24
    sample = None if importance == "magnitude" else {**inputs(teacher), **labels(teacher)}
    student = shrink(teacher, intermediate_size=count - 4, importance=importance, sample=sample)
    torch.testing.assert_close(logits(student), before)
    assert not torch.allclose(logits(shrink(teacher, intermediate_size=count - 5)), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module._forward_pre_hooks for module in teacher.modules() if isinstance(module, nn.Linear))


def labels(model):
    if model.config.is_encoder_decoder or "LM" in type(model).__name__:
        return {"labels": inputs(model)["input_ids"]}
    return {"labels": torch.tensor([0, 1, 1])}


HEADS = {llama: r"o_proj\.weight", t5: r"(SelfAttention|EncDecAttention)\.o\.weight", vit: r"o_proj\.weight"}


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("importance", ["magnitude", "activation", "taylor"])
def test_heads_that_nobody_reads_are_dropped_without_a_change(make, importance):
    teacher = made(make)
    unread(teacher, HEADS[make], 1, list(range(8, 16)))  # the last two of four heads, in Llama of one key
    before = logits(teacher)
    sample = None if importance == "magnitude" else {**inputs(teacher), **labels(teacher)}
    student = shrink(teacher, heads=2, importance=importance, sample=sample)
    torch.testing.assert_close(logits(student), before)
    assert not torch.allclose(
        logits(shrink(teacher, heads=1, key_value_heads=1 if make is llama else None)), before
    )


def test_fewer_queries_for_each_key():
    teacher = made(llama)
    unread(teacher, HEADS[llama], 1, [*range(4, 8), *range(12, 16)])  # the second query of each key
    student = shrink(teacher, heads=2, key_value_heads=2)
    assert student.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(student), logits(teacher))


def test_layers_choose_their_own_units():
    teacher = made(bert)
    for layer, entries in enumerate(([0, 1, 2], [21, 22, 23])):
        unread(teacher, rf"layer\.{layer}\.output\.dense\.weight", 1, entries)
    torch.testing.assert_close(logits(shrink(teacher, intermediate_size=21)), logits(teacher))


WIDE = {
    bert: [
        (r"embeddings\.\w+_embeddings\.weight", ["", "written"]),
        (r"LayerNorm\.", ["written"]),
        (r"self\.(query|key)\.weight", ["heads", "read"]),
        (r"self\.value\.weight", ["heads", "read"]),
        (r"self\.\w+\.bias", ["heads"]),
        (r"attention\.output\.dense\.weight", ["written", "read"]),
        (r"intermediate\.dense\.weight", ["", "read"]),
        (r"layer\.\d\.output\.dense\.weight|pooler\.dense\.bias", ["written", ""]),
        (r"pooler\.dense\.weight", ["written", "read"]),
        (r"output\.dense\.bias", ["written"]),
        (r"classifier\.weight", ["", "read"]),
    ],
    gpt2: [
        (r"wte|wpe", ["", "written"]),
        (r"ln_", ["written"]),
        (r"c_attn\.weight", ["read", "three heads"]),
        (r"c_attn\.bias", ["three heads"]),
        (r"attn\.c_proj\.weight", ["read", "written"]),
        (r"c_fc\.weight", ["read", ""]),
        (r"mlp\.c_proj\.weight", ["", "written"]),
        (r"c_proj\.bias", ["written"]),
        (r"lm_head", ["", "read"]),
    ],
    llama: [
        (r"embed_tokens", ["", "written"]),
        (r"norm", ["written"]),
        (r"[qkv]_proj|gate_proj|up_proj|lm_head", ["", "read"]),
        (r"[o]_proj|down_proj", ["written", ""]),
    ],
}
"""By name, which dimensions write the hidden state or attention's inside, and which read it."""


def widen(tensor, roles, keep, random):
    """The same weight of a model twice as wide: what is read stands at `keep`, and what is written twice.

    A norm over each hidden dimension twice is the norm over each of them once.
    """
    for dim, role in enumerate(roles):
        if role == "":
            continue
        parts = []
        for part in tensor.chunk(3 if role == "three heads" else 1, dim):
            other = {"read": torch.zeros_like(part), "written": part}.get(role, random * torch.randn_like(part))
            index = torch.cat([keep, without(keep)])
            parts.append(
                torch.empty_like(torch.cat([part, part], dim)).index_copy_(
                    dim, index, torch.cat([part, other], dim)
                )
            )
        tensor = torch.cat(parts, dim)
    return tensor


def without(keep):
    return torch.tensor([place for place in range(2 * len(keep)) if place not in keep.tolist()])


@torch.no_grad()
@pytest.mark.parametrize(("make", "width"), [(bert, "hidden_size"), (gpt2, "n_embd"), (llama, "hidden_size")])
def test_hidden_dimensions_that_nobody_reads_are_dropped_without_a_change(make, width):
    """The narrow model is written down, hidden in a wide one, and found again, with its heads."""
    untied = {"n_inner": 64, "tie_word_embeddings": False} if make is gpt2 else {}
    free = {"head_dim": 4} if make is llama else {}
    narrow = made(make, **untied, **free)
    heads = {"num_attention_heads" if make is bert else "n_head": 8} if make is not llama else {}
    wide = made(make, **{width: 32}, **untied, **free, **heads)
    keep = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19, 28, 29, 30, 31])  # whole heads of four
    for name, parameter in wide.named_parameters():
        roles = next((roles for pattern, roles in WIDE[make] if re.search(pattern, name)), [])
        parameter.copy_(widen(narrow.get_parameter(name), roles[: parameter.ndim], keep, random=0.1))
    torch.testing.assert_close(logits(wide), logits(narrow))
    student = shrink(wide, hidden_size=16)
    assert student.config.hidden_size == 16
    assert same(student, narrow)


@torch.no_grad()
@pytest.mark.parametrize("make", [bert, gpt2])
def test_heads_that_stay_lose_the_entries_that_nobody_reads(make):
    """Attention is divided by the root of a head's size, so the student's queries are scaled."""
    untied = {"n_inner": 64, "tie_word_embeddings": False} if make is gpt2 else {}
    narrow = made(make, **untied)
    wide = made(make, **{"n_embd" if make is gpt2 else "hidden_size": 32}, **untied)
    keep = torch.tensor([0, 2, 3, 7, 8, 9, 10, 11, 20, 21, 22, 23, 24, 26, 28, 30])  # four of each head's eight
    for name, parameter in wide.named_parameters():
        roles = next((roles for pattern, roles in WIDE[make] if re.search(pattern, name)), [])
        value = narrow.get_parameter(name)
        if "query" in name:
            value = value * 2**0.5
        if "c_attn" in name:
            queries, *others = value.chunk(3, -1)
            value = torch.cat([queries * 2**0.5, *others], -1)
        parameter.copy_(widen(value, roles[: parameter.ndim], keep, random=0.0))
    torch.testing.assert_close(logits(wide), logits(narrow))
    student = shrink(wide, hidden_size=16, heads=4)
    torch.testing.assert_close(logits(student), logits(narrow))
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, narrow.get_parameter(name))


def test_a_student_is_a_model_of_its_own_type_and_place():
    teacher = made(bert).to(torch.bfloat16).train()
    teacher.bert.embeddings.requires_grad_(False)
    teacher.classifier.eval()
    student = shrink(teacher, hidden_size=8)
    assert student.dtype == torch.bfloat16
    assert student.training
    assert not student.classifier.training
    assert not student.bert.embeddings.word_embeddings.weight.requires_grad
    assert student.classifier.weight.requires_grad


def test_tokens_that_are_dropped_change_nothing_for_the_others():
    teacher = made(bert, kind="BertForMaskedLM")
    kept = [0, *range(39, 2, -1)]
    student = shrink(teacher, vocabulary=kept)
    batch = inputs(teacher)
    places = torch.full((40,), -1).index_put((torch.tensor(kept),), torch.arange(len(kept)))
    out = logits(student, input_ids=places[batch["input_ids"]])
    torch.testing.assert_close(out, logits(teacher)[..., kept])
    assert student.config.vocab_size == len(kept)
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight


def test_special_tokens_get_their_new_ids(tmp_path):
    teacher = made(gpt2, bos_token_id=30, eos_token_id=35, pad_token_id=35)
    teacher.generation_config.eos_token_id = [35, 7]
    teacher.generation_config.suppress_tokens = [3, 7]
    student = shrink(teacher, vocabulary=[35, 30, 7, 8])
    config, generation = student.config, student.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 0, 0)
    assert (generation.eos_token_id, generation.suppress_tokens) == ([0, 2], [2])
    assert teacher.generation_config.eos_token_id == [35, 7]
    student.save_pretrained(tmp_path)
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path).config.vocab_size == 4


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, t5, gemma])
def test_low_rank_finds_the_directions_that_a_model_uses(make):
    """All that reads or writes the hidden state of 16 uses 8 directions; norms have one gain for all."""
    teacher = made(make)
    basis = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64))[0]
    used = (basis @ basis.T).float()
    for name, parameter in teacher.named_parameters():
        if "norm" in name:
            parameter.fill_(0.3)
        elif re.search(r"o_proj|down_proj|\.o\.|wo", name):
            parameter.copy_(used @ parameter)
        elif "relative_attention_bias" not in name:
            parameter.copy_(parameter @ used)
    student = shrink(teacher, hidden_size=8, init="low_rank")
    factor = 1.0
    if make is t5:  # divides what its head reads by the root of the hidden size
        factor = 2**0.5
    if make is gemma:  # multiplies embeddings by it
        teacher.get_input_embeddings().weight.mul_(0.5**0.5)
    torch.testing.assert_close(logits(student), factor * logits(teacher), rtol=1e-3, atol=1e-3)


def test_low_rank_directions_are_the_best():
    """Against the singular vectors of all matrices side by side, each of length one."""
    teacher = made(llama)
    matrices = []
    for name, parameter in teacher.named_parameters():
        if parameter.ndim == 2:
            hidden_first = parameter if re.search("o_proj|down_proj", name) else parameter.T
            matrices.append((hidden_first / hidden_first.norm()).double())
    best = torch.linalg.svd(torch.cat(matrices, 1))[0][:, :6]
    axes = find_axes(teacher)
    found = hidden_basis(teacher.state_dict(), axes, 6, teacher.state_dict()).directions
    torch.testing.assert_close(found @ found.T, best @ best.T)


def test_fresh_weights_have_the_same_shapes():
    teacher = made(bert)
    torch.manual_seed(3)
    student = shrink(teacher, hidden_size=8, init="fresh")
    torch.manual_seed(3)
    twin = transformers.BertForSequenceClassification(student.config)
    assert same(student, twin)
    assert {n: p.shape for n, p in student.named_parameters()} == {
        n: p.shape for n, p in shrink(teacher, hidden_size=8).named_parameters()
    }


@pytest.mark.parametrize(
    ("make", "share", "sizes"),
    [
        (bert, 0.5, (8, 2, 12)),
        (bert, 0.0, (16, 4, 24)),
        (llama, 0.25, (12, 4, 18)),  # 1.5 heads of keys are two, each with two queries
        (llama, 0.5, (8, 2, 12)),
        (vit, 0.9, (2, 1, 2)),
    ],
)
def test_sizes_that_are_smaller_by_a_share(make, share, sizes):
    found = narrower_sizes(made(make), share)
    assert tuple(found.values()) == sizes
    assert logits(shrink(made(make), **found)).isfinite().all()


def adapted():
    model = bert()
    model.bert.pooler.dense = nn.Linear(16, 20)
    return model


ERRORS = [
    (bert, {"hidden_size": 10}, "hidden_size=10 is no multiple of the 4 numbers of a head"),
    (bert, {"hidden_size": 20}, "hidden_size=20 is out of range, BertForSequenceClassification has 16"),
    (bert, {"heads": 2}, "heads=2 and hidden_size=16 do not go together: .*; set hidden_size=8"),
    (bert, {"hidden_size": 8, "heads": 3}, "heads=3 and hidden_size=8 do not go together"),
    (bert, {"intermediate_size": 0}, "intermediate_size=0 is out of range"),
    (bert, {"key_value_heads": 1}, "has no key_value_heads to make smaller"),
    (bert, {"intermediate_size": 8, "importance": "magnitud"}, "unknown importance 'magnitud'; did you mean"),
    (bert, {"intermediate_size": 8, "init": "frsh"}, "unknown init 'frsh'; did you mean 'fresh'"),
    (bert, {"intermediate_size": 8, "importance": "taylor"}, "needs sample=, a batch of inputs"),
    (bert, {"intermediate_size": 8, "sample": {}}, "'magnitude' needs no sample; drop it"),
    (bert, {"vocabulary": [0, 0]}, "vocabulary is empty or repeats a token"),
    (bert, {"vocabulary": [0, 40]}, "vocabulary has 40, BertForSequenceClassification has tokens 0 to 39"),
    (bert, {"vocabulary": [1, 2]}, r"vocabulary lacks the special token 0 \(pad_token_id\)"),
    (roberta, {"vocabulary": [0, 2, 1]}, "it has to stay 1; let vocabulary begin with 0 to 1"),
    (vit, {"vocabulary": [0]}, "ViTForImageClassification has no vocabulary"),
    (llama, {"heads": 3}, "heads=3 "),
    (llama, {"heads": 3, "key_value_heads": 2}, "key_value_heads=2 and heads=3 do not go together"),
    (adapted, {"hidden_size": 8}, "weights of this BertForSequenceClassification are not as its config says"),
    (
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)),
        {"hidden_size": 8},
        "a GPTNeoXForCausalLM cannot be made narrower: .*query_key_value.weight' holds 3 times the hidden size",
    ),
    (
        lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**TEXT)),
        {"hidden_size": 8},
        "are called query_proj, key_proj, value_proj, which says not what each is",
    ),
    (
        lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(depths=[1], hidden_sizes=[8])),
        {"hidden_size": 8},
        "the config of ResNetForImageClassification has no hidden_size",
    ),
    (lambda: electra_of(4), {"hidden_size": 4}, "of this size has other weights than the model"),
]


def electra_of(width):
    return transformers.ElectraModel(transformers.ElectraConfig(**TEXT, embedding_size=width))


@pytest.mark.parametrize(("make", "options", "message"), ERRORS)
def test_what_cannot_be_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        shrink(make(), **options)
    assert "\n" not in str(caught.value)


def test_wrong_kinds_are_refused():
    with pytest.raises(ValueError, match=r"share=1.0 is out of range; what goes is at least 0 and less than 1"):
        narrower_sizes(bert(), 1.0)
    with pytest.raises(TypeError, match="a Linear has no config to shrink by; pass a transformers model"):
        shrink(nn.Linear(2, 2), hidden_size=1)
    with pytest.raises(TypeError, match=r"hidden_size=0.5 is a float; give a whole number"):
        shrink(bert(), hidden_size=0.5)
    with pytest.raises(ValueError, match="the sample has no labels; add them"):
        shrink(made(bert), intermediate_size=8, importance="taylor", sample=inputs(made(bert)))
