"""How many numbers each part of a model holds, as a tree and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

MEGABYTE = 2**20


@dataclass
class Part:
    """A part of a model.

    Attributes:
        name: Its own name, the last of its path.
        count: The numbers in it, parameters and buffers; those of a tensor that was met before are counted there.
        bytes: The memory that they take.
        parts: The parts in it, by name.
        shared: Whether it is a tensor that was met before.
    """

    name: str
    count: int = 0
    bytes: int = 0
    parts: dict[str, Part] = field(default_factory=dict)
    shared: bool = False

    def table(self, depth: int | None = None) -> str:
        """Lines with each part's numbers, share of the whole and memory.

        Args:
            depth: How far to go into it; None for all the way.

        Example:
            >>> print(parameter_tree(nn.Sequential(nn.Linear(2, 3))).table(1))
            part          numbers   share        MB
            model               9   100.0%     0.00
              0                 9   100.0%     0.00
        """
        rows = list(self._rows(depth))
        width = max(12, *(len(name) for name, _ in rows))
        lines = [f"{'part':<{width}} {'numbers':>8}   {'share':>5}  {'MB':>8}"]
        for name, part in rows:
            share = part.count / self.count if self.count else 0.0
            lines.append(f"{name:<{width}} {part.count:>8,} {share:>8.1%} {part.bytes / MEGABYTE:>8.2f}")
        return "\n".join(lines)

    def _rows(self, depth: int | None, level: int = 0) -> Iterator[tuple[str, Part]]:
        yield "  " * level + self.name + (" (shared)" if self.shared else ""), self
        if depth is None or level < depth:
            for part in self.parts.values():
                yield from part._rows(depth, level + 1)


def parameter_tree(model: nn.Module | Mapping[str, Tensor]) -> Part:
    """Count the numbers in a model, or in a state dict, part by part.

    Raises:
        TypeError: neither of these.

    Example:
        >>> tree = parameter_tree(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
        >>> tree.count, tree.parts["1"].parts["weight"].count
        (13, 3)
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"parameters are those of a module or a state dict, got {type(model).__name__}")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    root, met = Part("model"), set()
    for path, tensor in state.items():
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        shared = tensor.numel() > 0 and place in met
        met.add(place)
        line = [root]
        for name in path.split("."):
            line.append(line[-1].parts.setdefault(name, Part(name)))
        line[-1].shared = shared
        for part in line:
            part.count += 0 if shared else tensor.numel()
            part.bytes += 0 if shared else tensor.numel() * tensor.element_size()
    return root
