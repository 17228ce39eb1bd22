"""The drivers that come with the controller, and how installed ones are found."""

from __future__ import annotations

from importlib.metadata import entry_points

from leasehold.controller.driver import ENTRY_POINTS, Driver, DriverContext


class UnknownDriver(Exception):
    """No driver of this name is installed."""


def installed() -> list[str]:
    """The names of all drivers that are installed here, in order."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def load(name: str, context: DriverContext) -> Driver:
    """Make the driver `name`. Raises UnknownDriver, and TypeError if what is installed is no driver."""
    for point in entry_points(group=ENTRY_POINTS, name=name):
        driver = point.load()(context)
        if not isinstance(driver, Driver):
            raise TypeError(f"{point.value} is no driver")
        return driver
    raise UnknownDriver(f"no driver {name!r} is installed; there are: {', '.join(installed())}")
