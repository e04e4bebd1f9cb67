"""Convolutional networks with fewer channels."""

import copy

import pytest
import torch
import transformers

from limbeck.students import shrink_channels
from tests import models

torch.set_num_threads(1)


def resnet(**changes):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic", **changes}
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()


@pytest.mark.parametrize(
    ("share", "sizes", "changes"),
    [
        (0.5, [4, 4, 8], {}),
        (0.3, [5, 5, 11], {}),
        (0.5, [4, 8, 16], {"layer_type": "bottleneck", "hidden_sizes": [16, 32]}),
    ],
)
def test_a_resnet_is_what_its_config_says(share, sizes, changes, tmp_path):
    teacher = resnet(**changes)
    before = copy.deepcopy(teacher.state_dict())
    images = torch.randn(2, 3, 32, 32)
    student = shrink_channels(teacher, images, share=share)
    assert [student.config.embedding_size, *student.config.hidden_sizes] == sizes
    student.save_pretrained(tmp_path)
    again = type(teacher).from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, student(images).logits)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not student.training


def test_channels_that_nobody_reads_go_without_a_change():
    """Half of the channels are zero in all weights that write and read them, so they are the smallest."""
    teacher = models.convolutional(channels=8).eval()
    with torch.no_grad():
        for parameter in (teacher.stem.weight, teacher.stem.bias, teacher.norm.weight, teacher.norm.bias):
            parameter[[1, 2, 5, 7]] = 0.0
        teacher.head.weight[:, [1, 2, 5, 7]] = 0.0
    pixels, _ = models.images()
    student = shrink_channels(teacher, pixels, share=0.5)
    assert student.stem.weight.shape[0] == 4
    assert torch.equal(student.stem.weight, teacher.stem.weight[[0, 3, 4, 6]])
    torch.testing.assert_close(student(pixels), teacher(pixels))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_nothing_dropped_is_the_same_model():
    teacher, (pixels, _) = models.convolutional().requires_grad_(False).train(), models.images()
    student = shrink_channels(teacher, pixels, share=0.0)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in teacher.state_dict().items())
    assert student.training
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"share=1.5 is out of range; what goes is at least 0 and less than 1"):
        shrink_channels(models.convolutional(), models.images()[0], share=1.5)
    config = transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], groups_width=8)
    other = transformers.RegNetForImageClassification(config)
    with pytest.raises(
        ValueError, match="no config describes a RegNetForImageClassification with 50% of the channels"
    ):
        shrink_channels(other, torch.randn(2, 3, 32, 32), share=0.5)
