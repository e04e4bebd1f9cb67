"""Fewer channels in convolutional networks, by torch-pruning, which traces which channels belong together."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from limbeck.students.depth import is_transformers_model

Model = TypeVar("Model", bound=nn.Module)
SIZES = ("embedding_size", "hidden_sizes")
"""Where a transformers config keeps the widths of a convolutional network."""


def shrink_channels(model: Model, images: Tensor, share: float) -> Model:
    """Make a student of a convolutional network with fewer channels in every layer, from its weights.

    Channels that are added to one another (by shortcuts) are kept or dropped together; those with the smallest
    weights go. What the last layers say (the outputs of linear layers) stays. The student of a transformers model
    gets a config that agrees with it, so ``from_pretrained`` gives it back.

    Args:
        model: The network; it is left as it is.
        images: Some inputs to trace it with, (B, channels, height, width).
        share: What part of the channels of each layer goes, between 0 and 1.

    Returns:
        A new model of the same class.

    Raises:
        ModuleNotFoundError: torch-pruning is not there.
        ValueError: `share` is out of range, or no config describes the narrower transformers model.

    Example:
        >>> body = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        >>> model = nn.Sequential(*body, nn.Linear(8, 5))
        >>> student = shrink_channels(model, torch.zeros(1, 3, 8, 8), share=0.5)
        >>> student[0].weight.shape, student[4].weight.shape
        (torch.Size([4, 3, 3, 3]), torch.Size([5, 4]))

    Reference:
        Fang et al. 2023, DepGraph: Towards Any Structural Pruning, arXiv:2301.12900.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share} is out of range; what goes is at least 0 and less than 1")
    student = _pruned(model, images, share)
    return _from_config(student, share) if is_transformers_model(model) else student


def _pruned(model: Model, images: Tensor, share: float) -> Model:
    try:
        import torch_pruning
    except ModuleNotFoundError:
        raise ModuleNotFoundError("fewer channels need torch-pruning; pip install 'limbeck[pruning]'") from None
    student = copy.deepcopy(model)
    frozen = [parameter.requires_grad for parameter in student.parameters()]
    modes = [module.training for module in student.modules()]
    student.eval().requires_grad_(True)  # it follows what autograd notes
    with torch.enable_grad():
        torch_pruning.pruner.MetaPruner(
            student,
            images,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[module for module in student.modules() if isinstance(module, nn.Linear)],
            output_transform=_sum,
        ).step()
    for parameter, requires_grad in zip(student.parameters(), frozen, strict=True):
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    for module, training in zip(student.modules(), modes, strict=True):
        module.training = training
    return student


def _sum(output: Any) -> Tensor:
    """A number of which everything is a part, out of what a model returns."""
    if isinstance(output, Tensor):
        return output.sum()
    parts = output.values() if isinstance(output, dict) else output
    return torch.stack([_sum(part) for part in parts]).sum()


def _from_config(student: Any, share: float) -> Any:
    """The same model, built from a config with these sizes."""
    config = copy.deepcopy(student.config)
    for name in SIZES:
        value = vars(config).get(name)
        if isinstance(value, list):
            setattr(config, name, [int(size * (1 - share)) for size in value])
        elif value is not None:
            setattr(config, name, int(value * (1 - share)))
    with torch.device("meta"):
        built = {name: tensor.shape for name, tensor in type(student)(copy.deepcopy(config)).state_dict().items()}
    if built != {name: tensor.shape for name, tensor in student.state_dict().items()}:
        raise ValueError(
            f"no config describes a {type(student).__name__} with {1 - share:.0%} of the channels in every layer; "
            "choose a share that divides its sizes, or make a new model (from_config)"
        )
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        built_student = type(student)(config)
    built_student.load_state_dict(student.state_dict(), assign=True)
    for name, parameter in built_student.named_parameters():
        parameter.requires_grad_(student.get_parameter(name).requires_grad)
    modes = {name: module.training for name, module in student.named_modules()}
    for name, module in built_student.named_modules():
        module.training = modes[name]
    return built_student
