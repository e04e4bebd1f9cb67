"""The names of ``pymarlin.utils.config_parser``."""
