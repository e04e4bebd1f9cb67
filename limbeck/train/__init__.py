"""Training: settings, data order, the loop on accelerate, checkpoints."""

from limbeck.train.callbacks import Callback, JsonLog, State, read_log
from limbeck.train.data import Examples
from limbeck.train.loop import FitResult, fit
from limbeck.train.mixing import Mixed
from limbeck.train.predict import Predictions, predict
from limbeck.train.settings import Settings

__all__ = [
    "Callback",
    "Examples",
    "FitResult",
    "JsonLog",
    "Mixed",
    "Predictions",
    "Settings",
    "State",
    "fit",
    "predict",
    "read_log",
]
