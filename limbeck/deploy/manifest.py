"""What stands beside an exported model: what it is, how it was checked, and where it came from."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from limbeck.atomic import write_text
from limbeck.models import file_digest

MANIFEST = "manifest.json"
FORMAT = 1
TOLD = ("limbeck", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Parity:
    """How an exported model compares with the PyTorch model that it was made of, on the same inputs.

    Attributes:
        examples: On how many examples.
        inputs: What they were.
        greatest_difference: Between any two logits.
        agreement: Share of the examples on which both decide alike; a correlation where numbers are predicted.
        metric: The task's main metric; None where the examples have no labels.
        score_before: The PyTorch model's score.
        score_after: The exported model's.
    """

    examples: int
    inputs: str
    greatest_difference: float
    agreement: float
    metric: str | None = None
    score_before: float | None = None
    score_after: float | None = None


@dataclass(frozen=True)
class Manifest:
    """What an exported model is.

    Attributes:
        file: The model's file, beside this one.
        kind: ``"onnx"`` or ``"torch"``.
        int8: Whether its weights are int8.
        optimised: Whether onnxruntime rewrote it.
        opset: The version of ONNX's operators; None for ``.pt2``.
        sha256: Of the file.
        size_bytes: Of the file.
        parameters: Of the model that it was made of.
        inputs: Names of its inputs, in order.
        labels: Names of the classes; empty where a number is predicted, or nobody named them.
        max_tokens: After which a text is cut; None for other inputs.
        most_tokens: That the model can read at all; None where it has no end.
        padding: Number and text of the token to pad with; None for other inputs.
        task: The ``task:`` part of the recipe; None where no task was named.
        parity: How it compares with the PyTorch model.
        lineage: Hashes and names of what it was made of.
        versions: Of the software that made it.
        files: All files of the export but this one.

    Example:
        >>> parity = Parity(200, "texts", 1e-6, 1.0)
        >>> how = ("model.onnx", "onnx", False, False, 20)
        >>> made = Manifest(*how, "00", 8, 2, ["input"], [], None, None, None, None, parity)
        >>> Manifest.from_json(made.to_json()) == made
        True
    """

    file: str
    kind: str
    int8: bool
    optimised: bool
    opset: int | None
    sha256: str
    size_bytes: int
    parameters: int
    inputs: list[str]
    labels: list[str]
    max_tokens: int | None
    most_tokens: int | None
    padding: dict[str, Any] | None
    task: dict[str, Any] | None
    parity: Parity
    lineage: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def runtime(self) -> str:
        """What runs it, in words."""
        return "torch.export" if self.kind == "torch" else "ONNX int8" if self.int8 else "ONNX"

    def to_json(self) -> str:
        """Write it as JSON."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            ValueError: no manifest, or one of another format version.
        """
        try:
            data = json.loads(text)
            version = data.pop("format")
            if version != FORMAT:
                raise ValueError(f"it has format {version}, this limbeck reads format {FORMAT}")
            return cls(**{**data, "parity": Parity(**data["parity"])})
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"it is no manifest of limbeck export: {error}") from None

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        write_text(folder / MANIFEST, self.to_json() + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read it from a folder, and check that the model beside it is the one that it speaks of.

        Raises:
            ValueError: it cannot be read, or the model is missing, damaged or another one.
        """
        try:
            made = cls.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cannot read {folder / MANIFEST}: {error}") from None
        model = folder / made.file
        if Path(made.file).name != made.file or not model.is_file():
            raise ValueError(f"{folder / MANIFEST} speaks of {made.file}, which is not beside it; export it again")
        if file_digest(model) != made.sha256:
            raise ValueError(f"{model} is not the file that {MANIFEST} speaks of; export it again")
        return made


def versions(names: Sequence[str] = TOLD) -> dict[str, str]:
    """The versions of Python and of packages, those that are installed.

    Example:
        >>> sorted(versions(["torch", "no-such-package"]))
        ['python', 'torch']
    """
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
