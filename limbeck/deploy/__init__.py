"""From a distilled model to a file that is served: ONNX, int8 and ``.pt2``, checked, timed, with its lineage."""

from limbeck.deploy.evaluation import Evaluation, Measured, evaluate, open_model
from limbeck.deploy.export import ExportOptions, export
from limbeck.deploy.manifest import Manifest, Parity
from limbeck.deploy.sources import Source, find_source

__all__ = [
    "Evaluation",
    "ExportOptions",
    "Manifest",
    "Measured",
    "Parity",
    "Source",
    "evaluate",
    "export",
    "find_source",
    "open_model",
]
