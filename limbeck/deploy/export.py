"""Exporting: a model becomes a file that is served without limbeck, checked before anybody relies on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.deploy.manifest import MANIFEST, Manifest, Parity, versions
from limbeck.deploy.onnx_files import MOST_BYTES, need_onnx, write_int8, write_onnx, write_optimised
from limbeck.deploy.parity import ALLOWANCE, check_close, check_kept, compared, first, greatest_difference
from limbeck.deploy.program import graph_inputs, plain_attention, trace, write_program
from limbeck.deploy.served import open_onnx, open_program
from limbeck.deploy.sources import Source
from limbeck.evaluate import count_parameters, size_in_bytes
from limbeck.models import file_digest
from limbeck.pretrained import most_tokens
from limbeck.registry import nearest

ONNX, TORCH = "onnx", "torch"
FORMATS = (ONNX, TORCH)
EXAMPLES = 200

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
        format: ``"onnx"``, or ``"torch"`` for a ``.pt2`` file.
        int8: Make the weights of an ONNX model int8.
        opset: The version of ONNX's operators; by default the exporter's own.
        optimise: Let onnxruntime rewrite an ONNX model, for itself alone.
        examples: How many inputs logits are compared on.
        allowance: What int8 may cost, in points of the score (0.01 is one).

    Raises:
        ValueError: a value that there is not, or options that do not go together.

    Example:
        >>> ExportOptions("torch", int8=True)
        Traceback (most recent call last):
        ValueError: int8 is for ONNX, and a .pt2 file was asked for; leave it out, or take --format onnx
    """

    format: str = ONNX
    int8: bool = False
    opset: int | None = None
    optimise: bool = False
    examples: int = EXAMPLES
    allowance: float = ALLOWANCE

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"there is no format {self.format!r}; {nearest(self.format, FORMATS)}")
        chosen = {"int8": self.int8, "opset": self.opset is not None, "optimize": self.optimise}
        wrong = [name for name, value in chosen.items() if value]
        if self.format == TORCH and wrong:
            raise ValueError(
                f"{wrong[0]} is for ONNX, and a .pt2 file was asked for; leave it out, or take --format onnx"
            )
        if self.examples < 1:
            raise ValueError(f"examples is {self.examples}; a check needs one at least")

    @property
    def file(self) -> str:
        """The name of the model's file."""
        return "model.pt2" if self.format == TORCH else "model-int8.onnx" if self.int8 else "model.onnx"


def export(
    source: Source,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> Manifest:
    """Export a model, check it against PyTorch, and write what it is beside it.

    Args:
        source: The model with its inputs; see `limbeck.deploy.find_source`.
        out: The folder, which is whole or not there: it holds the model, ``manifest.json`` and the files of its
            tokenizer or image processor.
        options: How.
        overwrite: Replace what an earlier export wrote there.
        say: Is told what was found, in lines.

    Raises:
        ValueError: the folder holds other things, the model cannot be exported, or what came of it says something
            else than the model; nothing is left then.
        ValueError: the extra ``deploy`` is not installed.

    Example:
        >>> import tempfile, torch
        >>> from limbeck.train import Examples
        >>> data = Examples([{"input": torch.rand(4), "labels": torch.tensor(i % 3)} for i in range(8)])
        >>> model = Source(nn.Linear(4, 3), None, data, "random numbers", "accuracy", (), None, None, {})
        >>> made = export(model, tempfile.mkdtemp(), ExportOptions("torch"))
        >>> made.file, made.parity.greatest_difference <= 1e-4
        ('model.pt2', True)
    """
    options, out = options or ExportOptions(), Path(out).resolve()  # what a link stands for is replaced, not it
    need_format(options)
    check_folder(out, overwrite)
    if options.format == ONNX and size_in_bytes(source.model) > MOST_BYTES:
        raise ValueError("the model has more than 2 GiB, which one ONNX file cannot hold; take --format torch")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=".partial-"))
    try:
        made = _write(source, partial, options, say)
        partial.chmod(0o755)  # a temporary folder is for its owner alone
        check_folder(out, overwrite)  # another one may have come since
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def need_format(options: ExportOptions) -> None:
    """Say what to install, where a format needs what is not there.

    Raises:
        ValueError: the extra ``deploy`` is not installed, and ONNX is asked for.
    """
    if options.format == ONNX:
        need_onnx()


def check_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything that an export would not replace.

    Raises:
        ValueError: it holds other things, or an earlier export that may not be replaced.
    """
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if not names:
        return
    if not (out / MANIFEST).is_file():
        raise ValueError(f"{out} holds other things; choose a new or empty folder with --out")
    try:
        own = Manifest.from_json((out / MANIFEST).read_text(encoding="utf-8")).files
    except ValueError as error:
        raise ValueError(f"{out / MANIFEST}: {error}; choose a new or empty folder with --out") from None
    others = sorted(names - {MANIFEST, *own})
    if others:
        raise ValueError(f"{out} holds other things beside an export ({others[0]}); choose another --out")
    if not overwrite:
        raise ValueError(f"{out} holds an export already; choose another --out, or pass --overwrite")


def _write(source: Source, folder: Path, options: ExportOptions, say: Say) -> Manifest:
    """Write all files of an export into a folder of its own."""
    model, checked = source.model.cpu().eval(), first(source.examples, options.examples)
    inputs = graph_inputs(model, checked)
    path = folder / options.file
    make = _as_program if options.format == TORCH else _as_onnx
    exported, opset, parity = make(source, inputs, path, checked, options, say)
    del exported  # it holds the file
    if source.processor is not None:
        source.processor.save_pretrained(folder)
    made = Manifest(
        file=path.name,
        kind=options.format,
        int8=options.int8,
        optimised=options.optimise,
        opset=opset,
        sha256=file_digest(path),
        size_bytes=path.stat().st_size,
        parameters=count_parameters(model),
        inputs=list(inputs),
        labels=list(source.labels),
        max_tokens=source.max_tokens,
        most_tokens=most_tokens(model),
        padding=_padding(source),
        task=source.task,
        parity=parity,
        lineage=source.lineage,
        versions=versions(),
        files=sorted(each.name for each in folder.iterdir()),
    )
    made.save(folder)
    return made


def _padding(source: Source) -> dict[str, Any] | None:
    if source.max_tokens is None:
        return None
    return {"id": int(source.processor.pad_token_id), "token": str(source.processor.pad_token)}


Written = tuple[nn.Module, int | None, Parity]


def _as_program(
    source: Source, inputs: dict[str, Any], path: Path, checked: Any, options: ExportOptions, say: Say
) -> Written:
    model = source.model
    write_program(trace(model, inputs, source.max_tokens is not None), path)
    exported = open_program(path, list(inputs))
    difference = _differs(source, exported, checked, "the .pt2 file", say)
    return exported, None, compared(model, exported, checked, source.inputs, source.metric, difference)


def _as_onnx(
    source: Source, inputs: dict[str, Any], path: Path, checked: Any, options: ExportOptions, say: Say
) -> Written:
    """Write ONNX, checked in fp32 first, so that what int8 costs is known apart from what the export does."""
    model, plain = source.model, path.with_name("plain.onnx")
    with plain_attention(model):
        program = trace(model, inputs, source.max_tokens is not None)
    opset = write_onnx(program, list(inputs), plain, options.opset)
    exported = open_onnx(plain)
    difference = _differs(source, exported, checked, "the ONNX model", say)
    if options.int8:
        quantised = path.with_name("quantised.onnx")
        write_int8(plain, quantised)
        plain.unlink()
        plain = quantised
    if options.optimise:
        write_optimised(plain, path)
        plain.unlink()
    else:
        plain.rename(path)
    exported = open_onnx(path)
    if options.int8:
        return exported, opset, _int8_parity(source, exported, checked, options, say)
    if options.optimise:
        difference = _differs(source, exported, checked, "the optimised ONNX model", say)
    return exported, opset, compared(model, exported, checked, source.inputs, source.metric, difference)


def _differs(source: Source, exported: nn.Module, checked: Any, what: str, say: Say) -> float:
    difference = greatest_difference(source.model, exported, checked)
    check_close(difference, what)
    say(f"{what}: greatest difference from PyTorch {difference:.2g}, {len(checked)} examples, {source.inputs}")
    return difference


def _int8_parity(source: Source, exported: nn.Module, checked: Any, options: ExportOptions, say: Say) -> Parity:
    """Compare an int8 model, whose score is that on all examples: on a few, one more error is a point."""
    difference = greatest_difference(source.model, exported, checked)
    parity = compared(source.model, exported, source.examples, source.inputs, source.metric, difference)
    check_kept(parity, options.allowance)
    scores = ""
    if parity.metric is not None:
        scores = f", {parity.metric} {parity.score_before:.4f} before and {parity.score_after:.4f} after"
    say(
        f"int8: greatest difference from PyTorch {difference:.2g}, {parity.agreement:.2%} agreement on "
        f"{parity.examples} examples{scores}"
    )
    return parity
