import copy

import pytest
import torch
from torch import Size, nn
from torch.nn.parameter import UninitializedParameter

from limbeck.projectors import MLP, PROJECTORS, Conv1x1, Linear, build_projector, mismatch

# kind -> a student's shape and a teacher's that it can map
SHAPES = {
    "identity": ((2, 5, 8), (2, 5, 8)),
    "linear": ((2, 5, 8), (2, 5, 12)),
    "linear_relu": ((2, 8), (2, 12)),
    "linear_tanh": ((2, 5, 8), (2, 5, 12)),
    "mlp": ((2, 5, 8), (2, 5, 12)),
    "conv1x1": ((2, 3, 8, 8), (2, 7, 4, 6)),
}


def sized(project, student, teacher):
    projector = build_projector(project)
    projector.size(Size(student), Size(teacher))
    return projector


@pytest.mark.parametrize("kind", list(PROJECTORS))
def test_maps_the_students_shape_to_the_teachers(kind):
    """Every registered kind; a new one needs a row in SHAPES."""
    student, teacher = SHAPES[kind]
    projector = sized(kind, student, teacher)
    assert projector.sized
    features = torch.randn(student, requires_grad=True)
    projected = projector(features, Size(teacher))
    assert projected.shape == teacher
    projected.square().sum().backward()
    assert features.grad.abs().sum() > 0
    for name, parameter in projector.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "identity"])
def test_another_number_of_examples(kind):
    student, teacher = SHAPES[kind]
    projector = sized(kind, student, teacher)
    assert projector(torch.randn(7, *student[1:]), Size(teacher)).shape == (7, *teacher[1:])


def test_linear_is_the_affine_map():
    projector = sized("linear", (2, 3), (2, 4))
    features = torch.randn(2, 3)
    by_hand = [
        [
            sum(w * x for w, x in zip(row, example, strict=True)) + bias
            for row, bias in zip(projector.affine.weight.tolist(), projector.affine.bias.tolist(), strict=True)
        ]
        for example in features.tolist()
    ]
    torch.testing.assert_close(projector(features), torch.tensor(by_hand))


@pytest.mark.parametrize(
    ("project", "function"),
    [
        ("linear_relu", torch.relu),
        ("linear_tanh", torch.tanh),
        ({"kind": "linear", "activation": "gelu"}, nn.functional.gelu),
    ],
)
def test_activation(project, function):
    projector, features = sized(project, (2, 3), (2, 4)), torch.randn(2, 3)
    torch.testing.assert_close(projector(features), function(projector.affine(features)))


def test_mlp_has_a_gelu_between_two_maps():
    projector, features = sized({"kind": "mlp", "hidden": 6}, (2, 3), (2, 4)), torch.randn(2, 3)
    assert projector.inner.weight.shape == (6, 3)
    assert projector.outer.weight.shape == (4, 6)
    torch.testing.assert_close(projector(features), projector.outer(nn.functional.gelu(projector.inner(features))))
    assert sized("mlp", (2, 3), (2, 4)).inner.weight.shape == (4, 3)  # as wide as the wider side


def test_conv1x1_is_a_linear_map_of_channels():
    projector, features = sized("conv1x1", (2, 3, 4, 4), (2, 5, 4, 4)), torch.randn(2, 3, 4, 4)
    by_hand = torch.einsum("oc,bchw->bohw", projector.affine.weight, features)
    torch.testing.assert_close(projector(features), by_hand + projector.affine.bias[:, None, None])


@pytest.mark.parametrize("area", [(2, 2), (8, 8)])
def test_conv1x1_resizes_to_the_teachers_map(area):
    projector = sized("conv1x1", (2, 3, 4, 4), (2, 3, *area))
    with torch.no_grad():
        projector.affine.weight.copy_(torch.eye(3))
        projector.affine.bias.zero_()
    features = torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4)  # a constant map stays that constant
    mapped = projector(features, Size([2, 3, *area]))
    torch.testing.assert_close(mapped, features[..., :1, :1].expand(2, 3, *area))


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv1x1"])
def test_initialised_as_torch_does(kind):
    """Uniform within one over the square root of the inputs, as `torch.nn.Linear`."""
    projector = (
        sized(kind, (2, 400, 3, 3), (2, 500, 3, 3)) if kind == "conv1x1" else sized(kind, (2, 400), (2, 500))
    )
    affine = projector.inner if kind == "mlp" else projector.affine
    reference = nn.Linear(400, 500)
    for ours, torchs in ((affine.weight, reference.weight), (affine.bias, reference.bias)):
        assert ours.shape == torchs.shape
        assert ours.abs().max() <= 1 / 20
        assert ours.std().item() == pytest.approx(torchs.std().item(), rel=0.1)
        assert abs(ours.mean().item()) < 0.005


def test_parameters_exist_before_they_have_a_size():
    projector = build_projector("linear")
    before = dict(projector.named_parameters())
    assert not projector.sized
    assert all(isinstance(p, UninitializedParameter) for p in before.values())
    projector.size(Size([2, 3]), Size([2, 4]))
    assert projector.sized
    assert all(before[name] is p for name, p in projector.named_parameters()), "an optimizer holds others"


def test_a_state_dict_sizes_a_projection():
    """Resuming loads before the first batch."""
    trained, fresh = sized("linear", (2, 3), (2, 4)), build_projector("linear")
    fresh.load_state_dict(trained.state_dict())
    assert fresh.sized
    features = torch.randn(2, 3)
    assert torch.equal(fresh(features), trained(features))


def test_state_dict_before_there_is_a_size():
    """A checkpoint may be written before the first batch, and a copy made."""
    projector = build_projector("linear")
    assert not copy.deepcopy(projector).sized
    saved, fresh = projector.state_dict(), build_projector("linear")
    fresh.load_state_dict(saved)
    assert not fresh.sized


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "mlp", "conv1x1"])
def test_features_of_another_type(kind, dtype):
    """A student in bfloat16 or float64 meets a projection that was made before its type was known."""
    student, teacher = SHAPES[kind]
    projector = sized(kind, student, teacher)
    projected = projector(torch.ones(student, dtype=dtype))
    torch.testing.assert_close(projected.double(), projector(torch.ones(student)).double(), rtol=0.02, atol=0.02)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "message"),
    [
        ("identity", (2, 5, 8), (2, 5, 12), "add project='linear'"),
        ("linear", (2, 5, 8), (2, 6, 12), "tap other places"),
        ("linear", (2, 3, 4, 4), (2, 5, 4, 4), "add project='conv1x1'"),
        ("mlp", (2, 8), (2, 5, 12), "tap other places"),
        ("conv1x1", (2, 8), (2, 12), r"conv1x1 maps \(B, C, H, W\) tensors, got \(2, 8\) and \(2, 12\)"),
    ],
)
def test_shapes_that_a_kind_cannot_map(kind, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        build_projector(kind).size(Size(student), Size(teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "cure"),
    [
        ((2, 8), (2, 12), "add project='linear'"),
        ((2, 5, 8), (2, 5, 12), "add project='linear'"),
        ((2, 3, 8, 8), (2, 5, 4, 4), "add project='conv1x1'"),
        ((2, 5, 8), (2, 6, 8), "tap other places"),
    ],
)
def test_mismatch_proposes_a_projection_that_works(student, teacher, cure):
    message = mismatch(Size(student), Size(teacher))
    assert str(student) in message
    assert str(teacher) in message
    assert message.endswith(cure)
    if "'" in cure:
        projector = sized(cure.split("'")[1], student, teacher)
        assert projector(torch.zeros(student), Size(teacher)).shape == teacher


def test_unknown_kinds_and_options():
    with pytest.raises(ValueError, match="unknown projection 'liner'; did you mean 'linear'"):
        build_projector("liner")
    with pytest.raises(TypeError, match="projection 'mlp' has no option 'hiden'; did you mean 'hidden'"):
        build_projector({"kind": "mlp", "hiden": 3})
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: relu, tanh, gelu"):
        build_projector({"kind": "linear", "activation": "swish"})


def test_builds_the_kind():
    assert isinstance(build_projector("linear"), Linear)
    assert isinstance(build_projector({"activation": "relu"}), Linear)  # the kind of options alone
    assert isinstance(build_projector("conv1x1"), Conv1x1)
    assert isinstance(build_projector("mlp"), MLP)
    assert build_projector("linear_tanh").activation == "tanh"
