"""``getlogger``: Python's own logging, and nothing is set up that your application has not set up."""

from __future__ import annotations

import logging


def getlogger(name: str, log_level: str = "INFO") -> logging.Logger:
    """A logger of a name, at a level.

    Example:
        >>> getlogger("pymarlin.example", "DEBUG").isEnabledFor(logging.DEBUG)
        True
    """
    logger = logging.getLogger(name)
    logger.setLevel(log_level)
    return logger
