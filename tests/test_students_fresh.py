"""New models of a teacher's class, and students with adapters."""

import copy

import pytest
import torch
import transformers
from torch import nn

from limbeck import Distiller, Term
from limbeck.students import from_config, merged, with_lora
from limbeck.teachers import WithoutAdapter
from tests import models
from tests.test_students_width import GROUPED, gpt2, llama

torch.set_num_threads(1)


def test_a_fresh_student_is_what_its_class_makes_of_the_config(tmp_path):
    teacher = models.bert(layers=3, id2label={0: "no", 1: "yes", 2: "?"}, label2id={"no": 0, "yes": 1, "?": 2})
    before = teacher.config.to_dict()
    torch.manual_seed(4)
    student = from_config(teacher, num_hidden_layers=1, hidden_size=8, intermediate_size=12)
    torch.manual_seed(4)
    twin = transformers.BertForSequenceClassification(copy.deepcopy(student.config))
    assert all(torch.equal(p, dict(twin.named_parameters())[n]) for n, p in student.named_parameters())
    assert student.config.id2label == {0: "no", 1: "yes", 2: "?"}
    assert len(student.bert.encoder.layer) == 1
    assert student.training
    assert all(p.requires_grad for p in student.parameters())
    assert teacher.config.to_dict() == before
    batch = models.text_batch()
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, student.eval()(**batch).logits)


def test_sizes_go_by_either_name_and_follow_one_another():
    student = from_config(gpt2(), hidden_size=8, n_layer=1)
    assert (student.config.n_embd, student.config.num_hidden_layers) == (8, 1)
    assert student.transformer.h[0].mlp.c_fc.nf == 32
    student = from_config(llama(), hidden_size=8, num_hidden_layers=1)
    assert (student.config.head_dim, student.model.layers[0].self_attn.q_proj.out_features) == (2, 8)
    assert from_config(llama(), hidden_size=8, head_dim=4).config.head_dim == 4
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED))
    assert from_config(qwen, num_hidden_layers=1).config.layer_types == qwen.config.layer_types[:1]
    assert from_config(models.bert(), num_labels=5).classifier.out_features == 5
    assert from_config(models.bert().to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hiden_size": 8},
            TypeError,
            "the config of BertFor.* has no option 'hiden_size'; did you mean 'hidden_",
        ),
        ({"hidden_size": 9}, ValueError, "9. is not a multiple of the number of attention heads"),
        (
            {"num_hidden_layers": "two"},
            ValueError,
            "no BertForSequenceClassification can be built with .* expected int, got str",
        ),
        ({"hidden_act": "gelv"}, ValueError, "no BertForSequenceClassification can be built with .*gelv"),
    ],
)
def test_wrong_changes_are_refused(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        from_config(models.bert(), **changes)
    assert "\n" not in str(caught.value)


def test_only_transformers_models_have_a_config():
    with pytest.raises(TypeError, match="a Linear has no config to build from; pass a transformers model"):
        from_config(nn.Linear(2, 2))


LORA = {"r": 2, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}


ADAPTERS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it


@ADAPTERS
def test_a_student_with_adapters_trains_them_alone_and_merges(tmp_path):
    teacher = models.bert()
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(2)
    student = with_lora(teacher, **LORA)
    training = {name for name, p in student.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in training)
    assert all(p.requires_grad for p in teacher.parameters())
    batch = models.text_batch()
    terms = [Term("logits", loss="forward_kl"), Term("labels", loss="cross_entropy")]
    distiller = Distiller(student, WithoutAdapter(student), terms).train()
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.5)
    first = distiller(**batch)
    assert first.terms["forward_kl"].abs() < 1e-6  # adapters begin as zero
    for _ in range(3):
        out = distiller(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.terms["cross_entropy"] < first.terms["cross_entropy"]
    assert out.terms["forward_kl"] > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    plain = merged(distiller.export())
    assert type(plain) is type(teacher)
    assert all(p.requires_grad for p in plain.parameters())
    expected = student.eval()(**batch).logits
    torch.testing.assert_close(plain.eval()(**batch).logits, expected)
    plain.save_pretrained(tmp_path / "plain")
    again = type(teacher).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(again(**batch).logits, expected)
    assert plain.state_dict().keys() == teacher.state_dict().keys()


@ADAPTERS
def test_adapters_alone_are_kept_and_found_again(tmp_path):
    from peft import PeftModel

    teacher, batch = models.bert().eval(), models.text_batch()
    student = with_lora(teacher, **LORA, init_lora_weights=False).eval()
    student.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(teacher), tmp_path).eval()
    assert torch.equal(again(**batch).logits, student(**batch).logits)
    assert not torch.allclose(student(**batch).logits, teacher(**batch).logits)


@ADAPTERS
def test_wrong_adapters_are_refused():
    with pytest.raises(TypeError, match="LoRA has no option 'lora_alfa'; did you mean 'lora_alpha'"):
        with_lora(models.bert(), lora_alfa=2)
    with pytest.raises(ValueError, match="Target modules"):
        with_lora(models.bert(), target_modules=["nowhere"])
    with pytest.raises(TypeError, match="has no adapters to merge; pass what with_lora returned"):
        merged(models.bert())
