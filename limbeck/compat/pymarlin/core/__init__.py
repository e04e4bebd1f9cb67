"""The module names of ``pymarlin.core``."""
