import copy
import re
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from limbeck.students import take_layers
from limbeck.students.depth import count_layers, find_layers

torch.set_num_threads(1)

VOCABULARY = 40
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
LLAMA = {**BERT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


def bert_masked():
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=4, n_heads=2, hidden_dim=24)
    return transformers.DistilBertForSequenceClassification(config)


def roberta():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT))


def electra():
    config = transformers.ElectraConfig(**BERT, embedding_size=8)
    return transformers.ElectraForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def vit():
    sizes = {name: value for name, value in BERT.items() if name.startswith(("hidden", "num", "int"))}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**ENCODER_DECODER))


def t5():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


# The family, where its stack is, and by which attribute its config counts layers.
FAMILIES = {
    "bert": (bert, "bert.encoder.layer", "num_hidden_layers"),
    "bert_masked": (bert_masked, "bert.encoder.layer", "num_hidden_layers"),
    "distilbert": (distilbert, "distilbert.transformer.layer", "n_layers"),
    "roberta": (roberta, "roberta.encoder.layer", "num_hidden_layers"),
    "electra": (electra, "electra.encoder.layer", "num_hidden_layers"),
    "gpt2": (gpt2, "transformer.h", "n_layer"),
    "llama": (llama, "model.layers", "num_hidden_layers"),
    "vit": (vit, "vit.layers", "num_hidden_layers"),
}


def build(make, seed=0):
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():  # as initialised, biases are zero, and a wrong bias would not show
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(params=FAMILIES, ids=str)
def family(request):
    make, path, attribute = FAMILIES[request.param]
    return build(make), path, attribute


def inputs_for(model):
    torch.manual_seed(1)
    if isinstance(model, transformers.ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    ids = torch.randint(3, VOCABULARY, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def logits(model, **options):
    return model(**inputs_for(model), **options).logits


def by_hand(model, path, layers):
    """Replace the ModuleList in a plain copy; without a cache, no layer needs to know its index."""
    reference = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    stack = reference.get_submodule(path)
    setattr(reference.get_submodule(parent), name, nn.ModuleList([stack[i] for i in layers]))
    if isinstance(reference, transformers.LlamaForCausalLM):  # runs as many as its config says
        reference.config.num_hidden_layers = len(layers)
    return reference


def storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def assert_reloads(student, tmp_path):
    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(student), logits(loaded.eval()))


class Block(nn.Module):
    """A layer that says when it is copied."""

    copies = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)

    def __deepcopy__(self, memo):
        Block.copies += 1
        clone = Block()
        clone.load_state_dict(self.state_dict())
        return clone


class Plain(nn.Module):
    """A model that transformers knows nothing about."""

    def __init__(self, layers=4):
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# --- the seven families -------------------------------------------------------------------------


def test_finds_the_stack(family):
    model, path, _ = family
    assert find_layers(model) == path
    assert find_layers(model, path) == path
    assert count_layers(model) == 4


def test_counts_parameters_and_layers(family):
    model, path, attribute = family
    student = take_layers(model, [0, 2])
    assert type(student) is type(model)
    each = sum(p.numel() for p in model.get_submodule(path)[0].parameters())
    assert student.num_parameters() == model.num_parameters() - 2 * each
    assert student.config.num_hidden_layers == getattr(student.config, attribute) == 2
    assert student.config.to_dict()[attribute] == 2
    assert count_layers(student) == 2


@pytest.mark.parametrize("layers", [[0, 2], [3, 1, 0], [-1, 0], [0, 1, 2, 3]], ids=str)
def test_computes_as_a_model_cut_by_hand(family, layers):
    model, path, _ = family
    options = {"use_cache": False} if model.can_generate() else {}
    student = take_layers(model, layers)
    reference = by_hand(model, path, layers)
    assert torch.equal(logits(student, **options), logits(reference, **options))
    changed = layers != [0, 1, 2, 3]
    assert torch.equal(logits(student), logits(model)) is not changed


def test_reloads_bit_equal(family, tmp_path):
    model, _, _ = family
    assert_reloads(take_layers(model, [2, 0]), tmp_path)


def test_leaves_the_model_alone(family):
    model, _, _ = family
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    student = take_layers(model, [1, 3])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert count_layers(model) == 4
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not storages(model) & storages(student)


def test_uses_no_random_numbers(family):
    model, _, _ = family
    state = torch.get_rng_state()
    take_layers(model, [0])
    assert torch.equal(torch.get_rng_state(), state)


# --- ties, modes, caches ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, bert_masked])
def test_tied_weights_stay_tied(make):
    student = take_layers(build(make), [0, 3])
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    assert head.weight is embeddings.weight


def test_keeps_mode_and_frozen_weights():
    model = build(bert)
    model.train()
    model.bert.encoder.layer[2].eval()
    model.bert.embeddings.requires_grad_(requires_grad=False)
    student = take_layers(model, [0, 2])
    assert student.training
    assert [layer.training for layer in student.bert.encoder.layer] == [True, False]
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in student.named_parameters() if n.startswith("bert.embeddings")}


def test_distilbert_module_counts_its_layers():
    assert take_layers(build(distilbert), [0, 3]).distilbert.transformer.n_layers == 2


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generates_the_same_with_and_without_a_cache(make):
    student = take_layers(build(make), [3, 1])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached = student.generate(**inputs_for(student), **options, use_cache=True)
    plain = student.generate(**inputs_for(student), **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))
    assert len(cached.past_key_values.layers) == 2


def test_layer_index_is_renumbered():
    model = build(llama)
    model.model.layers[3].mlp.layer_idx = -1
    student = take_layers(model, [3, 0, 1])
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert student.model.layers[0].mlp.layer_idx == -1


# --- configs ------------------------------------------------------------------------------------


def test_lists_with_an_entry_for_each_layer_follow(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Qwen2Config(
        **LLAMA, layer_types=kinds, use_sliding_window=True, sliding_window=3, max_window_layers=4
    )
    student = take_layers(build(lambda: transformers.Qwen2ForCausalLM(config)), [1, 0, 3])
    assert student.config.layer_types == [kinds[1], kinds[0], kinds[3]]
    assert student.config.num_hidden_layers == 3
    assert_reloads(student, tmp_path)


def test_lists_of_other_things_stay():
    config = transformers.ViTConfig(**{**vit().config.to_dict(), "num_hidden_layers": 2, "image_size": [8, 8]})
    student = take_layers(build(lambda: transformers.ViTForImageClassification(config)), [1])
    assert student.config.image_size == [8, 8]


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("make", [bart, t5])
def test_encoder_and_decoder_by_path(make, side, tmp_path):
    model = build(make)
    path = {bart: f"model.{side}.layers", t5: f"{side}.block"}[make]
    other = path.replace(side, {"encoder": "decoder", "decoder": "encoder"}[side])
    student = take_layers(model, [0, 2], path)
    assert (count_layers(student, path), count_layers(student, other)) == (2, 4)
    assert_reloads(student, tmp_path)


def test_nested_config_of_one_tower(tmp_path):
    text = transformers.CLIPTextConfig(**{**LLAMA, "num_hidden_layers": 3}, pad_token_id=0)
    vision = vit().config.to_dict()
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision)
    model = build(lambda: transformers.CLIPModel(config))
    student = take_layers(model, [0, 2], "vision_model.encoder.layers")
    assert student.config.vision_config.num_hidden_layers == 2
    assert student.config.text_config.num_hidden_layers == 3
    assert student.vision_model.config is student.config.vision_config
    student.save_pretrained(tmp_path)
    _, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_module_around_a_transformers_model():
    wrapper = nn.ModuleDict({"backbone": build(bert), "head": nn.Sequential(nn.Linear(2, 2))})
    assert find_layers(wrapper) == "backbone.bert.encoder.layer"
    student = take_layers(wrapper, [1])
    assert student["backbone"].config.num_hidden_layers == 1
    assert len(take_layers(wrapper, [0], "head")["head"]) == 1


def test_subclass_that_wants_more_than_a_config():
    class Custom(transformers.BertForSequenceClassification):
        def __init__(self, config, extra):
            super().__init__(config)
            self.extra = extra

    student = take_layers(Custom(transformers.BertConfig(**BERT), extra=7), [3])
    assert (student.extra, student.config.num_hidden_layers) == (7, 1)


def test_model_that_was_changed_after_it_was_built():
    model = build(bert)
    for layer in model.bert.encoder.layer:
        layer.adapter = nn.Linear(16, 16)
    student = take_layers(model, [1, 2])
    adapters = [layer.adapter.weight for layer in student.bert.encoder.layer]
    expected = [model.bert.encoder.layer[i].adapter.weight for i in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(adapters, expected, strict=True))


# --- any module, by path ------------------------------------------------------------------------


def test_path_on_a_plain_module_copies_no_dropped_layer():
    model, x = Plain(), torch.randn(3, 2)
    Block.copies = 0
    student = take_layers(model, [3, 0], "blocks")
    assert Block.copies == 2
    y = model.head(model.blocks[0](model.blocks[3](model.embed(x))))
    assert torch.equal(student(x), y)
    assert len(model.blocks) == 4


def test_sequential_keeps_its_class_and_numbers_anew():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    student = take_layers(model, [0, -1], path="")
    assert type(student) is nn.Sequential
    assert list(student.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_named_entries_of_a_sequential_keep_their_names():
    model = nn.Sequential()
    for name in ("first", "middle", "last"):
        model.add_module(name, nn.Linear(2, 2))
    student = take_layers(model, [-1, 0], path="")
    assert list(student._modules) == ["last", "first"]
    assert torch.equal(student.last.weight, model.last.weight)


def test_one_layer_in_several_places_stays_one():
    shared = nn.Linear(2, 2)
    student = take_layers(nn.Sequential(*[shared] * 4), [0, 2], path="")
    assert student[0] is student[1]
    assert student[0] is not shared


def test_takes_any_kind_of_integer():
    layers = torch.tensor([0, 2])
    assert len(take_layers(Plain(), layers, "blocks").blocks) == 2


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "path", "message"),
    [
        ([], "blocks", "layers is empty; name at least one of the 4 layers of 'blocks'"),
        ([0, 1, 0], "blocks", "layer 0 of 'blocks' is given twice; name each layer once"),
        ([3, -1], "blocks", "layer -1 of 'blocks' is given twice; name each layer once"),
        (
            [0, 4],
            "blocks",
            "layer 4 is out of range, 'blocks' has 4 layers; choose from 0 to 3, or -4 to -1",
        ),
        (
            [-5],
            "blocks",
            "layer -5 is out of range, 'blocks' has 4 layers; choose from 0 to 3, or -4 to -1",
        ),
        ([0], "block", "Plain has no 'block'; did you mean 'blocks'?"),
        ([0], "zzz", "Plain has no 'zzz'; known: blocks, head"),
        (
            [0],
            "embed",
            "'embed' is a Linear, not a list of layers; give the path of an nn.ModuleList or "
            "nn.Sequential; known: blocks, head",
        ),
        (
            [0],
            None,
            "found no stack of layers in Plain; pass path=, one of: 'blocks' (4 layers), 'head' (2 layers)",
        ),
    ],
)
def test_errors(layers, path, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        take_layers(Plain(), layers, path)


def test_layer_that_is_no_integer():
    message = re.escape("layer '0' is a str; give layers by number, as in [0, 2, -1]")
    with pytest.raises(TypeError, match=message):
        take_layers(Plain(), "0,2", "blocks")


def test_no_list_at_all():
    message = "no stack of layers in Linear; it has no nn.ModuleList and no nn.Sequential"
    with pytest.raises(ValueError, match=message):
        find_layers(nn.Linear(2, 2))


def test_many_candidates_are_cut_short():
    model = nn.ModuleDict({f"part{i}": nn.Sequential() for i in range(13)})
    with pytest.raises(ValueError, match=re.escape("'part11' (0 layers), ...") + "$"):
        find_layers(model)


@pytest.mark.parametrize("decoder_layers", [4, 3])
def test_two_stacks_need_a_path(decoder_layers):
    config = transformers.BartConfig(**{**ENCODER_DECODER, "decoder_layers": decoder_layers})
    message = (
        "found 2 stacks of layers in BartModel; pass path=, one of: 'encoder.layers' (4 layers), "
        f"'decoder.layers' ({decoder_layers} layers)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        take_layers(transformers.BartModel(config), [0])


def test_list_that_the_config_does_not_count():
    model = build(bert)
    model.classifier = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    message = "config of BertForSequenceClassification does not say that 'classifier' has 3 layers"
    with pytest.raises(ValueError, match=message):
        take_layers(model, [0, 2], "classifier")


def test_cut_that_no_config_describes():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    special |= {"cls_token_id": 1, "sep_token_id": 2}
    model = transformers.ModernBertModel(transformers.ModernBertConfig(**BERT, **special))
    assert count_layers(take_layers(model, [0, 3])) == 2
    message = (
        "no config describes a ModernBertModel with layers [1, 3] of 'layers': a model built from "
        "it has another 'layers.0.attn_norm.weight'; choose other layers"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        take_layers(model, [1, 3])


def test_dropped_layer_that_is_used_elsewhere():
    model = Plain()
    model.last = model.blocks[3]
    assert len(take_layers(model, [0, 3], "blocks").blocks) == 2
    with pytest.raises(ValueError, match="dropped from 'blocks' is used elsewhere in Plain, too"):
        take_layers(model, [0, 1], "blocks")
    assert model.last is model.blocks[3]


def test_import_pulls_in_no_transformers():
    code = "import sys, limbeck.students; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
