"""Logging of a daemon: one line an event on stderr, where its supervisor picks it up."""

import logging
import sys


def configure(name: str, level: str = "INFO") -> None:
    """Send everything from `level` up to stderr, with the daemon's name in each line."""
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s.%(msecs)03d %(levelname)-7s {name} %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(line, "%Y-%m-%dT%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
