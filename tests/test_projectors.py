import copy
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Size, nn
from torch.nn.parameter import UninitializedParameter

from limbeck.projectors import MLP, PROJECTORS, Conv1x1, Linear, Projector, build_projector
from limbeck.shapes import mismatch

# what losses learn beside projections; `test_channel_variance` and those behind it
LEARNED = {"channel_variance", "contrastive_memory"}

# kind -> a student's shape and a teacher's that it can map, or tuples of such
SHAPES = {
    "identity": ((2, 5, 8), (2, 5, 8)),
    "linear": ((2, 5, 8), (2, 5, 12)),
    "linear_relu": ((2, 8), (2, 12)),
    "linear_tanh": ((2, 5, 8), (2, 5, 12)),
    "linear_where_needed": ((2, 5, 8), (2, 7, 8)),
    "mlp": ((2, 5, 8), (2, 5, 12)),
    "conv1x1": ((2, 3, 8, 8), (2, 7, 4, 6)),
    "batch_norm_linear": ((4, 8), (4, 12)),
    "resize": ((2, 3, 8, 8), (2, 3, 4, 6)),
    "pool_tokens": ((2, 5, 8), (2, 3, 12)),
    "masked_generator": ((2, 3, 8, 8), (2, 7, 4, 6)),
    "vid_regressor": ((2, 3, 8, 8), (2, 7, 4, 6)),
    "each": (((2, 5, 8), (2, 3)), ((2, 5, 12), (2, 4))),
    "abf": (((2, 3, 8, 8), (2, 5, 4, 4), (2, 6, 1, 1)), ((2, 4, 8, 8), (2, 7, 2, 2), (2, 5, 1, 1))),
}

# further ways to write them
OPTIONS = {
    "conv1x1": [{"norm": True}, {"activation": "relu"}, {"norm": True, "activation": "relu"}],
    "pool_tokens": [{"class_tokens": 1}, {"mode": "average"}],
    "masked_generator": [{"mask_on_channel": True}, {"mask_ratio": 0.0}],
    "vid_regressor": [{"norm": False}, {"mid_channels": 9}],
    "resize": [{"mode": "average"}],
    "each": [{"places": 2}, {"of": {"kind": "mlp", "hidden": 6}}],
    "abf": [{"places": 3}, {"mid_channels": 9}],
}
ALL = [(kind, options) for kind in SHAPES for options in ({}, *OPTIONS.get(kind, ()))]
everything = pytest.mark.parametrize(("kind", "options"), ALL)


def as_sizes(shape):
    return tuple(map(Size, shape)) if isinstance(shape[0], tuple) else Size(shape)


def sized(project, student, teacher):
    projector = build_projector(project)
    projector.size(as_sizes(student), as_sizes(teacher))
    return projector


def made(kind, options):
    """A sized projection, its weights the same for the same arguments."""
    torch.manual_seed(0)
    return sized({"kind": kind, **options}, *SHAPES[kind])


def drawn(shape, examples=None, **options):
    """A random tensor of a shape, or a tuple of them, with another number of examples if asked for."""
    if isinstance(shape[0], tuple):
        return tuple(drawn(s, examples, **options) for s in shape)
    return torch.randn(examples or shape[0], *shape[1:], **options)


def tensors(thing):
    return thing if isinstance(thing, tuple) else (thing,)


def shapes_of(thing):
    shapes = tuple(tuple(tensor.shape) for tensor in tensors(thing))
    return shapes if isinstance(thing, tuple) else shapes[0]


def test_every_kind_is_tested():
    """A new one needs a row in SHAPES."""
    assert set(PROJECTORS) == set(SHAPES) | LEARNED


@everything
def test_maps_the_students_shape_to_the_teachers(kind, options):
    student, teacher = SHAPES[kind]
    projector = made(kind, options)
    assert projector.sized
    features = drawn(student, requires_grad=True)
    projected = projector(features, as_sizes(teacher))
    assert shapes_of(projected) == teacher
    weights = drawn(teacher)  # a plain sum is blind to what comes before batch normalisation
    sum((p.square() * w).sum() for p, w in zip(tensors(projected), tensors(weights), strict=True)).backward()
    for tensor in tensors(features):
        assert tensor.grad.abs().sum() > 0
    for name, parameter in projector.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "identity"])
def test_another_number_of_examples(kind):
    student, teacher = SHAPES[kind]
    projected = made(kind, {})(drawn(student, 7), as_sizes(teacher))
    assert [tuple(p.shape) for p in tensors(projected)] == [
        (7, *t[1:]) for t in (teacher if isinstance(teacher[0], tuple) else (teacher,))
    ]


@everything
def test_nothing_moves_in_eval_mode(kind, options):
    """The preflight looks at a projection without training it and without drawing random numbers."""
    student, teacher = SHAPES[kind]
    projector, features = made(kind, options).eval(), drawn(student)
    before, random = copy.deepcopy(projector.state_dict()), torch.get_rng_state()
    once, again = (tensors(projector(features, as_sizes(teacher))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in projector.state_dict().items())


def train_a_step(projector, features, like):
    """Move weights and running statistics, where there are any."""
    loss = sum(p.square().sum() for p in tensors(projector(features, like)))
    trained = [p for p in projector.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained) if trained else ()
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter -= 0.01 * gradient


@everything
def test_resumes_exactly(kind, options):
    """Weights and running statistics go through a checkpoint's file into a projection that was never sized."""
    student, teacher = SHAPES[kind]
    projector = made(kind, options)
    for _ in range(3):
        train_a_step(projector, drawn(student), as_sizes(teacher))
    fresh = build_projector({"kind": kind, **options})
    fresh.load_state_dict(load(save(projector.state_dict())))
    assert fresh.sized or not projector.state_dict()
    assert projector.state_dict().keys() == fresh.state_dict().keys()
    if not fresh.sized:
        fresh.size(as_sizes(student), as_sizes(teacher))
    asked = [p.requires_grad for p in projector.parameters()]
    assert [p.requires_grad for p in fresh.parameters()] == asked
    features = drawn(student)
    for train in (True, False):
        results = []
        for module in (projector, fresh):
            torch.manual_seed(5)
            results.append(tensors(module.train(train)(features, as_sizes(teacher))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("kind", "options"), [(k, o) for k, o in ALL if k not in ("identity", "resize")])
def test_unsized_until_it_is_sized(kind, options):
    """An optimizer, a checkpoint, a copy and another type are all possible before the first batch."""
    places = len(SHAPES[kind][0]) if isinstance(SHAPES[kind][0][0], tuple) else None
    projector = build_projector({"kind": kind, **options}, places)
    before = list(projector.parameters())
    assert before
    assert not projector.sized
    assert all(isinstance(p, UninitializedParameter) for p in before)
    optimizer = torch.optim.AdamW(before)
    assert not projector.state_dict()
    projector.load_state_dict({})
    projector.double()
    assert not copy.deepcopy(projector).sized
    assert not projector.sized
    projector.size(*map(as_sizes, SHAPES[kind]))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert projector.sized
    assert all(a is b for a, b in zip(held, projector.parameters(), strict=True))
    assert all(t.dtype == torch.float64 for t in projector.state_dict().values())
    projected = projector(drawn(SHAPES[kind][0]), as_sizes(SHAPES[kind][1]))
    sum(p.sum() for p in tensors(projected)).backward()
    optimizer.step()


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


def test_linear_where_needed_maps_the_dimension_that_differs():
    maps, like = torch.randn(2, 3, 4, 6), Size([2, 5, 4, 6])
    projector = sized("linear_where_needed", maps.shape, like)
    weight, bias = projector.affine.weight, projector.affine.bias
    by_hand = torch.einsum("oc,bchw->bohw", weight, maps) + bias[:, None, None]
    torch.testing.assert_close(projector(maps, like), by_hand)
    fresh = build_projector("linear_where_needed")
    fresh.load_state_dict(projector.state_dict())
    torch.testing.assert_close(fresh(maps, like), by_hand)


def test_linear_where_needed_lets_equal_shapes_through():
    features = torch.randn(2, 5, 8)
    projector = sized("linear_where_needed", features.shape, features.shape)
    assert projector(features, features.shape) is features
    assert not any(p.requires_grad or p.numel() for p in projector.parameters())


@pytest.mark.parametrize("teacher", [(2, 6, 9), (3, 5, 8), (2, 5), (2, 5, 8, 1)])
def test_linear_where_needed_maps_one_dimension_only(teacher):
    with pytest.raises(ValueError, match=r"student \(2, 5, 8\) and teacher .* differ in more than one dimension"):
        sized("linear_where_needed", (2, 5, 8), teacher)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@everything
def test_features_of_another_type(kind, options, dtype):
    """A student in half or double precision meets a projection that was made before its type was known."""
    student, teacher = SHAPES[kind]
    projector, like = made(kind, options).eval(), as_sizes(teacher)
    features = drawn(student)
    other = tuple(t.to(dtype) for t in tensors(features))
    projected = projector(other if isinstance(features, tuple) else other[0], like)
    for ours, expected in zip(tensors(projected), tensors(projector(features, like)), strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=0.03, atol=0.03)


# ---- batch normalisation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_torchs(training):
    projector = sized({"kind": "conv1x1", "norm": True}, (2, 3, 4, 4), (2, 5, 4, 4))
    reference = nn.BatchNorm2d(5)
    for seed in range(3):
        torch.manual_seed(seed)
        features = torch.randn(2, 3, 4, 4)
        projector.train(), reference.train()
        projector(features), reference(projector.affine.over_channels(features))
    projector.train(training), reference.train(training)
    torch.testing.assert_close(projector(features), reference(projector.affine.over_channels(features)))
    torch.testing.assert_close(projector.norm.running_var, reference.running_var)
    torch.testing.assert_close(projector.norm.running_mean, reference.running_mean)


def test_norm_then_activation():
    options = {"norm": True, "activation": "relu"}
    projector = sized({"kind": "conv1x1", **options}, (2, 3, 4, 4), (2, 5, 4, 4))
    assert projector.affine.bias is None
    features = torch.randn(2, 3, 4, 4)
    mapped = torch.relu(projector.norm(projector.affine.over_channels(features)))
    torch.testing.assert_close(projector(features), mapped)


def test_batch_norm_linear_standardises():
    projector = sized({"kind": "batch_norm_linear", "eps": 0.01}, (6, 3), (6, 4))
    assert [name for name, _ in projector.named_parameters()] == ["affine.weight"]
    features = torch.randn(6, 3)
    mapped = projector.affine(features)
    expected = (mapped - mapped.mean(0)) / (mapped.var(0, correction=0) + 0.01).sqrt()
    torch.testing.assert_close(projector(features), expected)


def test_batch_norm_of_a_single_value():
    projector = sized("batch_norm_linear", (2, 3), (2, 4))
    with pytest.raises(
        ValueError, match=r"more than one value per channel, got \(1, 4\); use larger micro-batches"
    ):
        projector(torch.randn(1, 3))
    assert projector.eval()(torch.randn(1, 3)).shape == (1, 4)


# ---- maps and tokens -------------------------------------------------------------------------------------------


def triangle(count, wanted):
    """Weights of antialiased linear interpolation along an axis, (wanted, count), from its definition."""
    scale = count / wanted
    reach = max(scale, 1.0)
    rows = []
    for i in range(wanted):
        weights = [max(0.0, 1 - abs(j + 0.5 - (i + 0.5) * scale) / reach) for j in range(count)]
        rows.append([w / sum(weights) for w in weights])
    return torch.tensor(rows)


@pytest.mark.parametrize("area", [(3, 5), (8, 8), (6, 12), (1, 1)])
def test_resize_weighs_all_of_the_map(area):
    features = torch.randn(2, 3, 6, 8)
    expected = torch.einsum("ih,jw,bchw->bcij", triangle(6, area[0]), triangle(8, area[1]), features)
    resized = build_projector("resize")(features, Size([2, 3, *area]))
    torch.testing.assert_close(resized, expected, rtol=1e-4, atol=1e-5)


def test_resize_by_averages():
    features = torch.randn(2, 3, 6, 8)
    expected = features.unflatten(3, (4, 2)).unflatten(2, (3, 2)).mean((3, 5))
    resized = build_projector({"kind": "resize", "mode": "average"})(features, Size([2, 3, 3, 4]))
    torch.testing.assert_close(resized, expected)


@pytest.mark.parametrize("length", [3, 9, 7])
def test_tokens_are_interpolated(length):
    projector = sized("pool_tokens", (2, 7, 4), (2, length, 4))
    assert sum(p.numel() for p in projector.parameters()) == 0
    features = torch.randn(2, 7, 4)
    expected = torch.einsum("il,bld->bid", triangle(7, length), features)
    torch.testing.assert_close(projector(features, Size([2, length, 4])), expected, rtol=1e-4, atol=1e-5)


def test_class_tokens_are_kept_apart():
    projector = sized({"kind": "pool_tokens", "class_tokens": 2, "mode": "average"}, (2, 8, 4), (2, 5, 4))
    features = torch.randn(2, 8, 4)
    expected = torch.cat([features[:, :2], features[:, 2:].unflatten(1, (3, 2)).mean(2)], 1)
    torch.testing.assert_close(projector(features, Size([2, 5, 4])), expected)


def test_tokens_of_a_square():
    projector = sized(
        {"kind": "pool_tokens", "class_tokens": 1, "grid": True, "mode": "average"}, (2, 17, 3), (2, 5, 3)
    )
    features = torch.randn(2, 17, 3)
    cells = features[:, 1:].reshape(2, 2, 2, 2, 2, 3)  # (B, row, within the row, column, within the column, D)
    expected = torch.cat([features[:, :1], cells.mean((2, 4)).flatten(1, 2)], 1)
    torch.testing.assert_close(projector(features, Size([2, 5, 3])), expected)


def test_tokens_then_widths():
    projector = sized({"kind": "pool_tokens", "mode": "average"}, (2, 6, 4), (2, 3, 5))
    features = torch.randn(2, 6, 4)
    expected = projector.affine(features.unflatten(1, (3, 2)).mean(2))
    torch.testing.assert_close(projector(features, Size([2, 3, 5])), expected)


def naive_convolution(maps, weight, bias=None):
    """A convolution that keeps height and width, pixel by pixel."""
    examples, _, height, width = maps.shape
    half = weight.shape[-1] // 2
    rows = []
    for b in range(examples):
        for o in range(weight.shape[0]):
            for y in range(height):
                for x in range(width):
                    value = maps.new_zeros(()) if bias is None else bias[o]
                    for dy in range(-half, half + 1):
                        for dx in range(-half, half + 1):
                            if 0 <= y + dy < height and 0 <= x + dx < width:
                                value = (
                                    value + (weight[o, :, dy + half, dx + half] * maps[b, :, y + dy, x + dx]).sum()
                                )
                    rows.append(value)
    return torch.stack(rows).reshape(examples, -1, height, width)


def naive_norm(maps, norm):
    channels = []
    for c in range(maps.shape[1]):
        values = maps[:, c]
        mean = values.mean()
        variance = ((values - mean) ** 2).sum() / values.numel()
        channels.append((values - mean) / (variance + norm.eps).sqrt() * norm.weight[c] + norm.bias[c])
    return torch.stack(channels, 1)


def naive_nearest(maps, height, width):
    old_height, old_width = maps.shape[2:]
    ys = [y * old_height // height for y in range(height)]
    xs = [x * old_width // width for x in range(width)]
    return torch.stack([torch.stack([maps[:, :, y, x] for x in xs], -1) for y in ys], -2)


def naive_fusion(stages, maps, like):
    results, deeper = [], None
    for stage, features, (_, _, height, width) in reversed(list(zip(stages, maps, like, strict=True))):
        fused = naive_norm(naive_convolution(features, stage.inward.weight), stage.inward_norm)
        if deeper is not None:
            others = naive_nearest(deeper, *fused.shape[2:])
            both = naive_convolution(torch.cat([fused, others], 1), stage.attention.weight, stage.attention.bias)
            first, second = 1 / (1 + torch.exp(-both[:, 0])), 1 / (1 + torch.exp(-both[:, 1]))
            fused = torch.stack([first * fused[:, c] + second * others[:, c] for c in range(fused.shape[1])], 1)
        deeper = naive_nearest(fused, height, width)
        results.insert(0, naive_norm(naive_convolution(deeper, stage.outward.weight), stage.outward_norm))
    return tuple(results)


def agree(ours, expected, leaves):
    """Values, and gradients of a random weighting of them, are the same."""
    weights = [torch.randn_like(value) for value in expected]

    def gradients(values):
        return torch.autograd.grad(sum((v * w).sum() for v, w in zip(values, weights, strict=True)), leaves)

    for mine, other in zip((*ours, *gradients(ours)), (*expected, *gradients(expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (((2, 3, 5, 4), (2, 4, 3, 2), (2, 5, 1, 1)), ((2, 4, 5, 4), (2, 3, 3, 2), (2, 2, 1, 1))),
        (((2, 3, 4, 4), (2, 4, 2, 2)), ((2, 5, 2, 2), (2, 6, 4, 4))),  # other sizes than the teacher's
        (((3, 2, 3, 3),), ((3, 4, 3, 3),)),
    ],
)
def test_abf_against_loops(student, teacher):
    torch.manual_seed(0)
    projector = sized({"kind": "abf", "mid_channels": 3}, student, teacher).double()
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    features = drawn(student, dtype=torch.float64, requires_grad=True)
    leaves = (*features, *projector.parameters())
    agree(projector(features, as_sizes(teacher)), naive_fusion(projector.parts, features, teacher), leaves)


def test_abf_is_as_wide_as_the_deepest_map():
    student = ((2, 3, 4, 4), (2, 6, 2, 2))
    assert sized("abf", student, student).parts[0].inward.weight.shape[0] == 6
    wide = ((2, 3, 4, 4), (2, 600, 1, 1))
    assert sized("abf", wide, student).parts[0].inward.weight.shape[0] == 512


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("mask_on_channel", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_masked_generator_against_loops(channels, mask_on_channel, training):
    student, teacher = (2, channels, 4, 3), (2, 4, 4, 3)
    torch.manual_seed(0)
    options = {"mask_on_channel": mask_on_channel}
    projector = sized({"kind": "masked_generator", **options}, student, teacher).double().train(training)
    features = torch.randn(student, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    ours = projector(features, Size(teacher))
    torch.manual_seed(3)
    draws = torch.rand((2, 4, 1, 1) if mask_on_channel else (2, 1, 4, 3)).tolist()
    aligned = features
    if channels != 4:
        aligned = naive_convolution(features, projector.align.weight, projector.align.bias)
    if training:
        kept = [
            0.0 if (draws[b][c][0][0] if mask_on_channel else draws[b][0][y][x]) < 0.65 else 1.0
            for b in range(2)
            for c in range(4)
            for y in range(4)
            for x in range(3)
        ]
        assert 0 < sum(kept) < len(kept)
        aligned = aligned * torch.tensor(kept, dtype=torch.float64).reshape(2, 4, 4, 3)
    hidden = naive_convolution(aligned, projector.inner.weight, projector.inner.bias)
    hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
    expected = naive_convolution(hidden, projector.outer.weight, projector.outer.bias)
    leaves = (features, *(p for p in projector.parameters() if p.requires_grad))
    agree((ours,), (expected,), leaves)


@pytest.mark.parametrize("mask_on_channel", [False, True])
def test_masked_share(mask_on_channel):
    torch.manual_seed(0)
    projector = build_projector(
        {"kind": "masked_generator", "mask_ratio": 0.8, "mask_on_channel": mask_on_channel}
    )
    mask = projector.mask(torch.zeros(50, 40, 8, 8))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.2, abs=0.03)
    assert not torch.equal(projector.mask(torch.zeros(50, 40, 8, 8)), mask)


def test_nothing_to_align():
    """The step is left out, and nobody waits for its gradient."""
    projector = sized("masked_generator", (2, 4, 3, 3), (2, 4, 3, 3))
    assert not projector.align.weight.requires_grad
    assert projector.align.weight.numel() == 0
    assert all(p.requires_grad for name, p in projector.named_parameters() if not name.startswith("align"))


def test_vid_regressor_is_three_convolutions():
    projector = sized("vid_regressor", (2, 3, 4, 4), (2, 5, 4, 4)).eval()
    features = torch.randn(2, 3, 4, 4)
    hidden = features
    for stage in (projector.first, projector.second):
        hidden = torch.relu(torch.einsum("oc,bchw->bohw", stage.affine.weight, hidden) / math.sqrt(1 + 1e-5))
    expected = torch.einsum("oc,bchw->bohw", projector.last.weight[:, :, 0, 0], hidden)
    torch.testing.assert_close(projector(features), expected)


# ---- several places --------------------------------------------------------------------------------------------


def test_each_place_has_a_projection_of_its_own():
    student, _ = SHAPES["each"]
    projector, features = made("each", {"of": "linear_relu"}), drawn(student)
    for part, tensor, mapped in zip(projector.parts, features, projector(features), strict=True):
        assert torch.equal(mapped, part(tensor))
    assert projector.parts[0].activation == "relu"


def test_the_number_of_places_may_come_from_the_term():
    assert len(build_projector("each", 3).parts) == 3
    assert len(build_projector({"kind": "abf", "places": 2}, 3).parts) == 2  # what a user wrote counts
    assert build_projector("linear", 3).affine is not None
    attention = [part.attention is None for part in build_projector("abf", 3).parts]
    assert attention == [False, False, True]


def test_identity_of_several_places():
    student = SHAPES["each"][0]
    features = drawn(student)
    assert sized("identity", student, student)(features) is features
    with pytest.raises(ValueError, match=r"student \(\(2, 5, 8\), \(2, 3\)\) and teacher .* 'each'"):
        sized("identity", *SHAPES["each"])


@pytest.mark.parametrize("kind", sorted({*SHAPES, "channel_variance"} - {"identity", "each", "abf"}))
def test_several_places_for_a_kind_that_maps_one(kind):
    with pytest.raises(ValueError, match=r"maps one tensor and got several; write .*'each'"):
        sized(kind, *SHAPES["each"])


@pytest.mark.parametrize("kind", ["each", "abf"])
def test_one_place_for_a_kind_that_maps_several(kind):
    with pytest.raises(ValueError, match=f"'{kind}' reads several places and got one"):
        sized(kind, (2, 3), (2, 4))


@pytest.mark.parametrize("kind", ["each", "abf"])
def test_another_number_of_places(kind):
    student, teacher = ((2, 3, 4, 4),) * 3, ((2, 3, 4, 4),) * 2
    with pytest.raises(ValueError, match="is for 3 places and got 3 of the student and 2 of the teacher"):
        sized(kind, student, teacher)
    with pytest.raises(ValueError, match="is for 2 places and got 3 of the student and 3 of the teacher"):
        sized({"kind": kind, "places": 2}, student, student)


# ---- what losses learn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [(2, 5, 3, 3), (2, 4, 5), (2, 5)])
def test_channel_variance(teacher):
    """One variance per channel: dimension 1 of maps, the last one of all else."""
    variance = sized("channel_variance", (2, 3, 3, 3), teacher)
    torch.testing.assert_close(variance(), torch.full((5,), 5.0))
    with torch.no_grad():
        variance.raw.copy_(torch.linspace(-2, 2, 5))
    expected = torch.tensor([math.log(1 + math.exp(a)) + 1e-5 for a in torch.linspace(-2, 2, 5).tolist()])
    torch.testing.assert_close(variance(), expected)
    variance().sum().backward()
    torch.testing.assert_close(variance.raw.grad, torch.sigmoid(variance.raw.detach()))


@pytest.mark.parametrize("initial", [1e-3, 0.5, 200.0])
def test_initial_variance(initial):
    options = {"kind": "channel_variance", "initial_variance": initial, "eps": 1e-6}
    torch.testing.assert_close(sized(options, (2, 3), (2, 4))(), torch.full((4,), initial))


def test_channel_variance_resumes():
    variance = sized("channel_variance", (2, 3), (2, 4))
    with torch.no_grad():
        variance.raw.uniform_()
    fresh = build_projector("channel_variance")
    assert not fresh.sized
    assert not fresh.state_dict()
    fresh.load_state_dict(variance.state_dict())
    assert fresh.sized
    assert torch.equal(fresh(), variance())


class Memory(Projector):
    """Learns nothing, and remembers a row for each feature: buffers alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(0))

    def size(self, student, teacher):
        self.shape(rows=(teacher[-1], 3))
        self.rows.fill_(1.0)


def test_a_module_of_buffers_alone():
    memory, fresh = Memory(), Memory()
    assert not memory.sized
    assert not memory.state_dict()
    memory.size(Size([2, 3]), Size([2, 4]))
    assert memory.sized
    fresh.load_state_dict(memory.state_dict())
    assert fresh.sized
    assert torch.equal(fresh.rows, torch.ones(4, 3))


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "message"),
    [
        ("identity", (2, 5, 8), (2, 5, 12), "add project='linear'"),
        ("linear", (2, 5, 8), (2, 6, 12), "tap other places"),
        ("linear", (2, 3, 4, 4), (2, 5, 4, 4), "add project='conv1x1'"),
        ("mlp", (2, 8), (2, 5, 12), "tap other places"),
        *(
            (kind, (2, 8), (2, 12), rf"{kind} maps \(B, C, H, W\) tensors, got \(2, 8\) and \(2, 12\)")
            for kind in ("conv1x1", "resize", "masked_generator", "vid_regressor")
        ),
        ("abf", ((2, 8),), ((2, 12),), r"abf maps \(B, C, H, W\) tensors"),
        ("resize", (2, 3, 4, 4), (2, 5, 2, 2), "has 3 for the teacher's 5; use project='conv1x1'"),
        ("batch_norm_linear", (2, 5, 8), (2, 5, 12), r"maps \(B, D\) embeddings, .*; use project='linear'"),
        ("pool_tokens", (2, 8), (2, 12), r"pool_tokens maps \(B, L, D\) tensors, got \(2, 8\)"),
        (
            {"kind": "pool_tokens", "class_tokens": 3},
            (2, 5, 8),
            (2, 3, 8),
            "3 tokens, and class_tokens=3 leaves none",
        ),
        (
            {"kind": "pool_tokens", "grid": True},
            (2, 16, 8),
            (2, 5, 8),
            "5 tokens fill no square; set class_tokens",
        ),
    ],
)
def test_shapes_that_a_kind_cannot_map(kind, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        sized(kind, student, teacher)


def test_resize_asks_at_every_call():
    """It has no parameters, so it is never sized by the Distiller."""
    with pytest.raises(ValueError, match="use project='conv1x1'"):
        build_projector("resize")(torch.zeros(2, 3, 4, 4), Size([2, 5, 4, 4]))


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
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        build_projector({"kind": "conv1x1", "activation": "swish"})
    with pytest.raises(ValueError, match="unknown mode 'cubic'; known: bilinear, average"):
        build_projector({"kind": "resize", "mode": "cubic"})
    with pytest.raises(ValueError, match="unknown mode 'bilinear'; known: linear, average"):
        build_projector({"kind": "pool_tokens", "mode": "bilinear"})
    with pytest.raises(ValueError, match="class_tokens must be 0 or more, got -1"):
        build_projector({"kind": "pool_tokens", "class_tokens": -1})
    with pytest.raises(ValueError, match="unknown projection 'liner'"):
        build_projector({"kind": "each", "of": "liner"})
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        build_projector({"kind": "batch_norm_linear", "eps": 0})
    with pytest.raises(ValueError, match="initial_variance must exceed eps"):
        build_projector({"kind": "channel_variance", "initial_variance": 0.0})


@pytest.mark.parametrize(
    ("kind", "option"),
    [("mlp", "hidden"), ("vid_regressor", "mid_channels"), ("abf", "mid_channels"), ("each", "places")],
)
def test_numbers_that_are_none(kind, option):
    with pytest.raises(ValueError, match=f"{option} must be 1 or more, got 0"):
        build_projector({"kind": kind, option: 0})


@pytest.mark.parametrize("ratio", [-0.1, 1.0, math.nan])
def test_mask_ratio(ratio):
    with pytest.raises(ValueError, match="mask_ratio must be at least 0 and below 1"):
        build_projector({"kind": "masked_generator", "mask_ratio": ratio})


def test_builds_the_kind():
    assert isinstance(build_projector("linear"), Linear)
    assert isinstance(build_projector({"activation": "relu"}), Linear)  # the kind of options alone
    assert isinstance(build_projector("conv1x1"), Conv1x1)
    assert isinstance(build_projector("mlp"), MLP)
    assert build_projector("linear_tanh").activation == "tanh"
