"""The names of ``pymarlin.utils.checkpointer``."""
