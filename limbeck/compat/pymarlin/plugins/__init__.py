"""The names of ``pymarlin.plugins``: a task from a YAML file alone."""

from limbeck.compat.pymarlin.plugins.base import Plugin
from limbeck.compat.pymarlin.plugins.hf_ner import HfNERPlugin
from limbeck.compat.pymarlin.plugins.hf_seq_classification import HfSeqClassificationPlugin

__all__ = ["HfNERPlugin", "HfSeqClassificationPlugin", "Plugin"]
