"""Which layers of two models belong together: where they are and, if a recipe asks, what they do with data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.batch import ATTENTION_MASK, valid_positions, view
from limbeck.matching import layer_flow, match_layers, pool, similarity
from limbeck.recipe import LayerMatch, Places
from limbeck.students.depth import count_layers, find_layers
from limbeck.taps import Recorder, resolve
from limbeck.teachers import ModuleInputs, record
from limbeck.terms import Term
from limbeck.types import STUDENT, TEACHER, Batch


@dataclass(frozen=True)
class Layers:
    """What modules a model has, and where its layers are.

    Attributes:
        modules: The paths of its modules.
        path: Where it keeps its layers; empty where that cannot be found.
        count: How many there are.
    """

    modules: tuple[str, ...]
    path: str = ""
    count: int = 0


def layers_of(model: nn.Module, path: str | None) -> Layers:
    """Find a model's layers, at `path` if that is given."""
    modules = tuple(name for name, _ in model.named_modules() if name)
    try:
        return Layers(modules, find_layers(model, path), count_layers(model, path))
    except ValueError:
        return Layers(modules)


def find_places(student: Layers, teacher: Layers) -> Places:
    """What terms that are spread over layers have to know of both models."""
    modules = {"student_modules": student.modules, "teacher_modules": teacher.modules}
    if not (student.count and teacher.count):
        return Places(**modules)
    return Places(
        student_path=student.path,
        teacher_path=teacher.path,
        student=student.count,
        teacher=teacher.count,
        **modules,
    )


def expose_attention(terms: Iterable[Term], *models: nn.Module) -> None:
    """Let transformers models return attention weights, where a term reads them; the faster kernels keep none."""
    from transformers import PreTrainedModel

    read = {tap.partition(".")[0] for term in terms for tap in (*term.taps, *term.teacher_taps)}
    for model in models if "attentions" in read else ():
        if isinstance(model, PreTrainedModel):
            model.set_attn_implementation("eager")


@torch.no_grad()
def match_places(
    student: nn.Module, teacher: nn.Module, places: Places, batches: Iterable[Batch], kinds: Iterable[str]
) -> Places:
    """Find out which layers belong together, from what both models make of a few batches.

    Args:
        student: The student as it begins.
        teacher: The teacher.
        places: Where their layers are.
        batches: Batches of training data; 200 examples or so suffice.
        kinds: ``"cka"`` and ``"emd"``, see `limbeck.matching.match_layers`.

    Returns:
        The places with their matches.
    """
    batches = list(batches)  # read twice
    own, its = ([view(batch, side) for batch in batches] for side in (STUDENT, TEACHER))
    ours = _layer_features(student, places.student_path, places.student, own)
    theirs = _layer_features(teacher, places.teacher_path, places.teacher, its)
    alike = similarity(ours, theirs)
    flow = layer_flow(alike)
    matches = {}
    for kind in sorted(kinds):
        pairs = match_layers(alike, kind)
        parts = [1 / len(pairs)] * len(pairs) if kind == "cka" else [flow[pair].item() for pair in pairs]
        matches[kind] = LayerMatch(pairs=tuple(pairs), shares=tuple(parts))
    return places.model_copy(update={"matches": matches})


def _layer_features(model: nn.Module, path: str, count: int, batches: Sequence[Batch]) -> list[Tensor]:
    """What each layer makes of the batches: one vector per example, (N, D) for each layer."""
    taps = [f"{path}.{i}" for i in range(count)]
    recorder, call = Recorder(model, resolve(model, taps)), ModuleInputs(model)
    model.eval()
    seen = []
    for batch in batches:
        mask = valid_positions(batch, ATTENTION_MASK)
        _, found = record(recorder, lambda batch=batch, **extra: call(batch, **extra))
        seen.append([pool(found[tap], mask) for tap in taps])
    return [torch.cat(layer).double() for layer in zip(*seen, strict=True)]
