"""ONNX files: written by PyTorch's exporter, made int8 and optimised by onnxruntime."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.atomic import replacing
from limbeck.deploy.program import BATCH, LENGTH, LOGITS, quiet
from limbeck.pretrained import first_line

QUANTISED = ("MatMul", "Gemm", "Gather")
"""Whose weights become int8: matrix products and tables. Convolutions stay: onnxruntime has no fast ones."""

NEEDED = ("onnx", "onnxscript", "onnxruntime")

MOST_BYTES = 2**31 - 2**24
"""What one file of this format can hold, with room for the graph itself."""


def need_onnx() -> None:
    """Say what to install where the extra is missing.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}; install it: pip install 'limbeck[deploy]'")


def write_onnx(
    program: torch.export.ExportedProgram, names: Sequence[str], path: Path, opset: int | None = None
) -> int:
    """Write a traced model as ONNX, whole or not at all.

    Args:
        program: What `limbeck.deploy.program.trace` made.
        names: The names of its inputs, in order.
        path: The file.
        opset: The version of ONNX's operators; by default the exporter's own.

    Returns:
        The version of the operators that it has.

    Raises:
        ValueError: the exporter refuses the model or the opset.
    """
    import onnx

    try:
        with quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(names),
                output_names=[LOGITS],
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds, of which few are its own
        raise ValueError(f"PyTorch's exporter refuses this model: {first_line(error)}") from None
    assert made is not None
    proto = made.model_proto
    found = next(int(each.version) for each in proto.opset_import if not each.domain)
    if opset is not None and found != opset:
        raise ValueError(
            f"the exporter cannot write opset {opset}, it wrote {found}; leave --opset out, or name that"
        )
    _name_dimensions(proto, names)
    # Shapes of inner values are stale after the exporter's own rewriting, and every reader infers them anew.
    del proto.graph.value_info[:]
    with replacing(path) as temporary:
        onnx.save(proto, temporary)
    return found


def _name_dimensions(proto: Any, names: Sequence[str]) -> None:
    """Call the free dimensions what they are, where the tracer numbered them."""
    for value in [*proto.graph.input, *proto.graph.output]:
        for place, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param and place < 2:
                dimension.dim_param = (BATCH, LENGTH)[place]


def write_int8(source: Path, path: Path) -> None:
    """Quantise the weights of an ONNX file to int8, a scale for each column; activations as they come.

    Raises:
        ValueError: onnxruntime cannot quantise it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    try:
        with replacing(path) as temporary, quiet():
            quantize_dynamic(
                source,
                temporary,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"onnxruntime cannot make this model int8: {first_line(error)}") from None


def write_optimised(source: Path, path: Path) -> None:
    """Write an ONNX file as onnxruntime would rewrite it at each start: fused nodes, folded constants.

    What comes out has onnxruntime's own operators, and other runtimes cannot read it.
    """
    import onnxruntime

    options = session_options(1)
    # Beyond this level the rewriting is for one kind of processor, and would not be right on another.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with replacing(path) as temporary:
        options.optimized_model_filepath = str(temporary)
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def session_options(threads: int) -> Any:
    """Options of an onnxruntime session with so many threads, which do not spin while another model runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options
