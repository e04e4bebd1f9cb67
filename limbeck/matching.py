"""Which student layer learns from which teacher layer, found from data or from the names of their modules.

Shape legend: N examples, D features; n student layers, m teacher layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from limbeck.registry import nearest

Pairs = list[tuple[int, int]]


def pool(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """One vector per example, to be compared with `similarity`.

    Args:
        features: Hidden states (N, L, D), maps (N, C, H, W), or what is one vector per example already (N, D).
        mask: Valid positions (N, L) of hidden states.

    Returns:
        Means over positions, (N, D) or (N, C).

    Raises:
        ValueError: other dimensions.

    Example:
        >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    if features.ndim == 2:
        return features
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    if features.ndim != 3:
        raise ValueError(f"pool takes (N, D), (N, L, D) or (N, C, H, W), got {tuple(features.shape)}")
    if mask is None:
        return features.mean(dim=1)
    kept = mask.bool()[:, :, None]
    return features.masked_fill(~kept, 0).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


def similarity(students: Sequence[Tensor], teachers: Sequence[Tensor], kind: str = "cka") -> Tensor:
    r"""How alike every student layer is to every teacher layer, on the same examples.

    .. math:: \frac{\lVert X^T Y \rVert_F^2}{\lVert X^T X \rVert_F \, \lVert Y^T Y \rVert_F}

    X and Y are centred. It does not change with rotation or scale of either side, and the widths may differ. All
    examples enter at once: a mean over minibatches would be biased upwards.

    Args:
        students: Features of each student layer, (N, D), from a few batches put together; see `pool`.
        teachers: Features of each teacher layer, (N, D'), for the same examples in the same order.
        kind: ``"cka"``, linear centred kernel alignment.

    Returns:
        Values from 0 to 1 in float64, (n, m). A layer that is the same for all examples is like no other: 0.

    Raises:
        ValueError: no layers, another shape than (N, D), another number of examples, values that are not finite,
            or an unknown kind.

    Example:
        >>> layer = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> similarity([layer], [3 * layer.flip(1), layer[:, :1]]).round(decimals=2)
        tensor([[1.0000, 0.7900]], dtype=torch.float64)

    Reference:
        Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, arXiv:1905.00414.
    """
    if kind != "cka":
        raise ValueError(f"unknown similarity {kind!r}; known: cka")
    _check_layers(students, teachers)
    own, others = [_normalised(x) for x in students], [_normalised(y) for y in teachers]
    if len(own[0]) < max(x.shape[1] for x in (*own, *others)):  # O(N² D) in all, and O(N²) for each pair
        return _inner_products(own) @ _inner_products(others).T
    return torch.stack([torch.stack([(x.T @ y).square().sum() for y in others]) for x in own])  # O(N D²)


def _check_layers(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    layers = [
        (side, i, x) for side, xs in (("student", students), ("teacher", teachers)) for i, x in enumerate(xs)
    ]
    if not students or not teachers:
        raise ValueError(f"nothing to compare: {len(students)} student and {len(teachers)} teacher layers")
    for side, index, features in layers:
        if features.ndim != 2:
            raise ValueError(
                f"features of {side} layer {index} are {tuple(features.shape)}, not (N, D); pool them"
            )
        if len(features) != len(students[0]):
            raise ValueError(
                f"{side} layer {index} has {len(features)} examples and student layer 0 has {len(students[0])}; "
                "both models must see the same"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"features of {side} layer {index} are not all finite; check the model")


def _normalised(features: Tensor) -> Tensor:
    """Features X in float64, centred and scaled so that ``||X^T X|| = 1``; zeros where only rounding is left."""
    features = features.detach().double()
    features = features / features.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    centred = features - features.mean(dim=0)
    norm: Tensor = torch.linalg.vector_norm(centred)
    if norm <= 16 * torch.finfo(torch.float64).eps * math.sqrt(features.numel()):
        return torch.zeros_like(centred)
    centred = centred / norm
    square = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    scale: Tensor = torch.linalg.vector_norm(square).sqrt()
    return centred / scale


def _inner_products(layers: Sequence[Tensor]) -> Tensor:
    """``X X^T`` of each layer, flat; the inner product of two such rows is ``||X^T Y||²``."""
    return torch.stack([(x @ x.T).flatten() for x in layers])


def match_layers(similarity: Tensor, kind: str = "cka", monotone: bool = True) -> Pairs:
    """Choose which student layer learns from which teacher layer.

    Args:
        similarity: How alike they are, (n, m), from `similarity`.
        kind: ``"cka"``: a teacher layer of its own for every student layer, so that the sum of the similarities
            is the greatest. ``"emd"``: many to many, wherever `layer_flow` is not zero.
        monotone: A deeper student layer learns from a deeper teacher layer; of kind ``"cka"`` only.

    Returns:
        Pairs ``(student layer, teacher layer)`` from 0 in ascending order, as `limbeck.terms.spread` takes them.

    Raises:
        ValueError: no finite matrix, an unknown kind, or of kind ``"cka"`` a student deeper than its teacher.

    Example:
        >>> alike = torch.tensor([[0.9, 0.8, 0.1], [0.95, 0.3, 0.2]])
        >>> match_layers(alike), match_layers(alike, monotone=False)
        ([(0, 0), (1, 1)], [(0, 1), (1, 0)])
        >>> match_layers(alike, kind="emd")
        [(0, 0), (0, 1), (1, 0), (1, 2)]

    Reference:
        Kornblith et al. 2019, arXiv:1905.00414 (similarity); Li et al. 2020, BERT-EMD, arXiv:2010.06133.
    """
    _check_matrix(similarity)
    if kind not in ("cka", "emd"):
        raise ValueError(f"unknown matching {kind!r}; known: cka, emd")
    if kind == "emd":
        return [(int(s), int(t)) for s, t in layer_flow(similarity).nonzero()]
    if similarity.shape[0] > similarity.shape[1]:
        raise ValueError(
            f"{similarity.shape[0]} student layers cannot each have one of {similarity.shape[1]} teacher layers; "
            "use kind='emd'"
        )
    gain = similarity.detach().cpu().double()
    return _in_order(gain) if monotone else _in_any_order(gain)


def _check_matrix(similarity: Tensor) -> None:
    if similarity.ndim != 2 or not similarity.numel() or not torch.isfinite(similarity).all():
        raise ValueError(f"similarity must be a finite matrix (n, m), got {tuple(similarity.shape)}: {similarity}")


def _in_order(gain: Tensor) -> Pairs:
    """The best strictly increasing assignment, by dynamic programming over (student layers, teacher layers)."""
    students, teachers = gain.shape
    best = torch.full((students + 1, teachers + 1), -math.inf, dtype=torch.float64)
    best[0] = 0  # the sum for the first i student layers when only the first j teacher layers may be used
    for i in range(students):
        for j in range(teachers):
            best[i + 1, j + 1] = torch.maximum(best[i + 1, j], best[i, j] + gain[i, j])
    pairs, j = [], teachers
    for i in reversed(range(students)):
        while best[i + 1, j] == best[i + 1, j - 1]:
            j -= 1
        j -= 1
        pairs.append((i, j))
    return pairs[::-1]


def _in_any_order(gain: Tensor) -> Pairs:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    return [(int(s), int(t)) for s, t in zip(rows, columns, strict=True)]


def layer_flow(similarity: Tensor) -> Tensor:
    r"""The cheapest way to move the student's layers onto the teacher's: the flow of the earth mover's distance.

    .. math:: \min_F \sum_{ij} F_{ij} (1 - s_{ij}), \quad \sum_j F_{ij} = 1/n, \; \sum_i F_{ij} = 1/m

    Every layer of a side has the same weight, and all of it is moved.

    Args:
        similarity: How alike they are, (n, m), from `similarity`.

    Returns:
        The flow F in float64, (n, m), which sums to 1: the weight of each pair of layers. At most n + m - 1
        entries are not zero, and all are multiples of one over the least common multiple of n and m.

    Raises:
        ValueError: no finite matrix.

    Example:
        >>> layer_flow(torch.tensor([[0.9, 0.8, 0.1], [0.95, 0.3, 0.2]])).round(decimals=3)
        tensor([[0.1670, 0.3330, 0.0000],
                [0.1670, 0.0000, 0.3330]], dtype=torch.float64)

    Reference:
        Li et al. 2020, BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's Distance,
        arXiv:2010.06133, with the cost 1 - similarity and uniform weights, which its training then adapts.
    """
    from scipy.optimize import linprog

    _check_matrix(similarity)
    students, teachers = similarity.shape
    units = math.lcm(students, teachers)  # whole units make the corners of the polytope whole numbers
    leaves = torch.eye(students, dtype=torch.float64).repeat_interleave(teachers, dim=1)
    arrives = torch.eye(teachers, dtype=torch.float64).repeat(1, students)
    supply = [units // students] * students + [units // teachers] * teachers
    cost = (1 - similarity.detach().cpu().double()).flatten()
    solved = linprog(cost.numpy(), A_eq=torch.cat([leaves, arrives]).numpy(), b_eq=supply, method="highs-ds")
    assert solved.success, solved.message
    return torch.as_tensor(solved.x).round().reshape(students, teachers) / units


def regex_pairs(
    student_paths: Sequence[str],
    teacher_paths: Sequence[str],
    pattern: str,
    replacement: str | Callable[[re.Match[str]], str],
) -> list[tuple[str, str]]:
    r"""Pair modules by name: the teacher's path is the student's with a regular expression replaced.

    Args:
        student_paths: Paths of the student's modules, as in ``named_modules()``.
        teacher_paths: Paths of the teacher's modules.
        pattern: Paths in which it is found take part. What it does not cover is kept.
        replacement: What stands in its place: text, in which ``\1`` is the first group, or a function of the
            match where numbers have to be computed.

    Returns:
        Pairs ``(student path, teacher path)`` in the student's order.

    Raises:
        ValueError: the pattern or the replacement is no valid one, no path of the student has it, or the teacher
            has no module of that name.

    Example:
        >>> teacher = [f"bert.encoder.layer.{i}" for i in range(12)]
        >>> regex_pairs(["layer.0", "layer.1", "head"], teacher, r"^layer\.(\d+)$", r"bert.encoder.layer.\1")
        [('layer.0', 'bert.encoder.layer.0'), ('layer.1', 'bert.encoder.layer.1')]
        >>> regex_pairs(["layer.3"], teacher, r"^layer\.(\d+)$", lambda m: f"bert.encoder.layer.{2 * int(m[1])}")
        [('layer.3', 'bert.encoder.layer.6')]
    """
    try:
        matches = [(path, match) for path in student_paths if (match := re.search(pattern, path))]
        pairs = [(path, _replaced(match, replacement)) for path, match in matches]
    except (re.error, IndexError) as error:
        raise ValueError(f"cannot replace {pattern!r} by {replacement!r}: {error}") from None
    if not pairs:
        raise ValueError(f"no module of the student matches {pattern!r}; {nearest(pattern, student_paths)}")
    known = set(teacher_paths)
    for path, other in pairs:
        if other not in known:
            raise ValueError(f"{path!r} becomes {other!r}, which the teacher has not; {nearest(other, known)}")
    return pairs


def _replaced(match: re.Match[str], replacement: str | Callable[[re.Match[str]], str]) -> str:
    new = replacement(match) if callable(replacement) else match.expand(replacement)
    return match.string[: match.start()] + new + match.string[match.end() :]
