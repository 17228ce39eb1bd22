"""Runs a daemon of another role, which its own package provides as an entry point.

The entry points of the group `leasehold.commands` are functions `run(config_file: Path) -> int`; what they
return is the exit code.
"""

import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

GROUP = "leasehold.commands"


class NotInstalled(Exception):
    """What this role needs is not installed. The message says how to install it."""


def run(role: str, config: Path) -> int:
    """Run the daemon of `role` until it ends; its exit code. Raises `NotInstalled`."""
    return command(role)(config)


def command(role: str, extra: str = "") -> Callable[[Path], int]:
    """The entry point `role`, which comes with `extra`, or what has its name. Raises `NotInstalled`."""
    extra = extra or role
    found = tuple(entry_points(group=GROUP, name=role))
    if not found:
        raise NotInstalled(f"there is no {role} here; install it: pip install 'leasehold[{extra}]'")
    try:
        return cast("Callable[[Path], int]", found[0].load())
    except ModuleNotFoundError as error:
        raise NotInstalled(
            f"the {role} needs {error.name}, which is not installed: pip install 'leasehold[{extra}]'"
        ) from error


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.stderr.write("usage: python -m leasehold.client.daemon ROLE CONFIG\n")
        sys.exit(2)
    try:
        sys.exit(run(sys.argv[1], Path(sys.argv[2])))
    except NotInstalled as error:
        sys.exit(str(error))
