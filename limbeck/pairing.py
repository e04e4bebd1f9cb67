"""Which layers of two models belong together: where they are and, if a recipe asks, what they do with data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def find_places(student: nn.Module, teacher: nn.Module, path: str | None) -> Places:
    """The modules of both models, and where both keep their layers, if it can be found."""
    modules = {
        "student_modules": tuple(name for name, _ in student.named_modules() if name),
        "teacher_modules": tuple(name for name, _ in teacher.named_modules() if name),
    }
    try:
        return Places(
            student_path=find_layers(student, path),
            teacher_path=find_layers(teacher, path),
            student=count_layers(student, path),
            teacher=count_layers(teacher, path),
            **modules,
        )
    except ValueError:
        return Places(**modules)


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
