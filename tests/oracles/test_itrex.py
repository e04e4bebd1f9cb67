"""Neural Compressor 2.6 and its door, side by side: same models, data and seed, and the same losses for 20 steps.

Where the door corrects theirs, the deviation is shown by their own formula.
"""

import copy

import pytest
import torch
import yaml
from torch import nn

from limbeck.compat import neural_compressor as ours

# Neural Compressor changes how YAML's safe loader reads "null", for all of the process; others read it as it was.
_safe = dict(yaml.SafeLoader.yaml_constructors)
config = pytest.importorskip("neural_compressor.config")
training = pytest.importorskip("neural_compressor.training")
yaml.SafeLoader.yaml_constructors = _safe

STEPS, CLASSES = 20, 5


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def losses(configs, prepare, criterion, optimizer):
    """The losses of 20 steps of a loop as Neural Compressor's examples write it."""
    name, options = criterion
    student, teacher = network(7, seed=0).double(), network(12, seed=1).double()
    loss_config = getattr(configs, name)(**copy.deepcopy(options))
    manager = prepare(student, configs.DistillationConfig(teacher, loss_config))
    updates = optimizer(student.parameters())
    own, generator, found = nn.CrossEntropyLoss(), torch.Generator().manual_seed(3), []
    manager.callbacks.on_train_begin()
    manager.callbacks.on_epoch_begin(0)
    for step in range(STEPS):
        inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (16,), generator=generator)
        manager.callbacks.on_step_begin(step)
        outputs = manager.model(inputs)
        loss = manager.callbacks.on_after_compute_loss(inputs, outputs, own(outputs, labels))
        updates.zero_grad()
        loss.backward()
        updates.step()
        manager.callbacks.on_step_end()
        found.append(float(loss.detach()))
    manager.callbacks.on_epoch_end()
    return torch.tensor(found, dtype=torch.float64)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def both(criterion, optimizer=sgd):
    theirs = losses(config, training.prepare_compression, criterion, optimizer)
    return theirs, losses(ours, ours.prepare_compression, criterion, optimizer)


def knowledge(kind, weights=(0.5, 0.5), temperature=3.0):
    options = {"temperature": temperature, "loss_types": ["CE", kind], "loss_weights": list(weights)}
    return "KnowledgeDistillationLossConfig", options


def layers(kinds, **options):
    mappings = [[["1"], ["1"]], [["4", ""], ["4", ""]]]
    chosen = {
        "layer_mappings": mappings[1:] if len(kinds) == 1 else mappings,
        "loss_types": list(kinds),
        **options,
    }
    return "IntermediateLayersKnowledgeDistillationLossConfig", chosen


@pytest.mark.parametrize("optimizer", [sgd, lambda parameters: torch.optim.AdamW(parameters, lr=0.01)])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.1, 0.9), (0.0, 1.0)])
@pytest.mark.parametrize("kind", ["CE", "MSE"])
def test_knowledge(kind, weights, optimizer):
    theirs, found = both(knowledge(kind, weights), optimizer)
    assert (theirs - found).abs().max() <= 1e-6 * theirs.abs().max()
    assert theirs[0] != theirs[-1]


def test_their_divergence_is_too_small_by_the_number_of_classes():
    theirs, found = both(knowledge("KL", (0.0, 1.0)), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    assert torch.allclose(theirs * CLASSES, found, rtol=1e-6, atol=0)


def test_with_that_factor_in_the_weight_the_divergence_is_theirs():
    """20 updates with momentum: what theirs minimises is ours with the weight over the number of classes."""
    theirs, found = (
        losses(config, training.prepare_compression, knowledge("KL"), sgd),
        losses(ours, ours.prepare_compression, knowledge("KL", (0.5, 0.5 / CLASSES)), sgd),
    )
    assert torch.allclose(theirs, found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"loss_weights": [0.3], "add_origin_loss": True}])
@pytest.mark.parametrize("kind", ["MSE", "L1"])
def test_layers(kind, options):
    theirs, found = both(layers([kind], **options))
    assert torch.allclose(theirs, found, rtol=1e-6, atol=0)
    assert theirs[0] != theirs[-1]


def test_layers_with_a_function_and_the_whole_model():
    half = [["", lambda output: output[:, :2]], ["2", lambda output: output[:, 2:4]]]
    options = {"layer_mappings": [half, ["4", "4"]], "loss_types": ["L1", "MSE"], "loss_weights": [0.4, 0.6]}
    theirs, found = both(("IntermediateLayersKnowledgeDistillationLossConfig", options))
    assert torch.allclose(theirs, found, rtol=1e-6, atol=0)


def test_their_divergence_between_features_too():
    """It is divided by the width as well; here of probabilities on both sides."""
    softmax = [["4", lambda output: output.softmax(dim=-1)]]
    options = {"layer_mappings": [softmax], "loss_types": ["KL"], "loss_weights": [1.0]}
    frozen = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    theirs, found = both(("IntermediateLayersKnowledgeDistillationLossConfig", options), frozen)
    assert torch.allclose(theirs * CLASSES, found, rtol=1e-6, atol=0)


def test_their_matchers_stay_as_they_were_and_ours_learn():
    student, teacher, inputs = network(7, seed=0), network(12, seed=1), torch.randn(16, 6)
    matchers = []
    for configs, prepare in ((config, training.prepare_compression), (ours, ours.prepare_compression)):
        criterion = configs.IntermediateLayersKnowledgeDistillationLossConfig([["1"]])
        own = {"SGD": {"learning_rate": 0.1}}
        manager = prepare(copy.deepcopy(student), configs.DistillationConfig(teacher, criterion, own))
        updates = sgd(manager.model.parameters())
        weights = []
        for step in range(3):
            manager.callbacks.on_step_begin(step)
            loss = manager.callbacks.on_after_compute_loss(inputs, manager.model(inputs), torch.tensor(0.0))
            loss.backward()
            updates.step()
            manager.callbacks.on_step_end()
            weights.append(matcher(manager.callbacks).detach().clone())
        matchers.append(weights)
    theirs, found = matchers
    assert torch.equal(theirs[0], theirs[-1])
    assert not torch.equal(found[0], found[-1])


def matcher(callbacks):
    """The weights of the map from the student's width to the teacher's."""
    if isinstance(callbacks, ours.Callbacks):
        return next(callbacks.beside.parameters())
    return callbacks.callbacks_list[0].criterion.feature_matchers["1"].dense.weight


def exits(configs, prepare, temperature):
    """The loss of self-distillation on given features."""
    torch.manual_seed(0)
    features = {name: torch.randn(4, CLASSES) for name in ("a.fc", "b.fc", "last.fc")}
    groups = [[["a.fc", "last.fc"]], [["b.fc", "last.fc"]], [["a.fc", "last.fc"], ["b.fc", "last.fc"]]]
    criterion = configs.SelfKnowledgeDistillationLossConfig(
        groups, temperature, ["L2", "CE", "CE"], [0.5, 0.2, 0.3]
    )
    model = nn.Linear(3, 2)
    manager = prepare(model, configs.DistillationConfig(model, criterion))
    inputs = torch.ones(4, 3)
    manager.callbacks.on_step_begin(0)
    manager.model(inputs)
    return float(manager.callbacks.on_after_compute_loss(inputs, features, torch.tensor(0.0), features)), features


def test_their_self_distillation_counts_earlier_groups_again():
    theirs, features = exits(config, training.prepare_compression, temperature=2.0)
    found, _ = exits(ours, ours.prepare_compression, temperature=2.0)
    a, b, last = features.values()

    def soft(side, temperature):
        p = torch.softmax(last / temperature, dim=-1)
        return -(p * torch.log_softmax(side / temperature, dim=-1)).sum(dim=-1).mean()

    first = 0.5 * torch.dist(a, last)
    second, third = 0.2 * soft(b, 2.0), 0.3 * (soft(a, 1.0) + soft(b, 1.0))
    assert theirs == pytest.approx(float(3 * first + 2 * second + third), rel=1e-6)
    first = 0.5 * (a - last).norm(dim=1).mean()
    second, third = 0.2 * 4 * soft(b, 2.0), 0.3 * 4 * (soft(a, 2.0) + soft(b, 2.0))
    assert found == pytest.approx(float(first + second + third), rel=1e-6)
