"""The module names of ``pymarlin.utils``."""
