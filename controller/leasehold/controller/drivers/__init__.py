"""The drivers that come with the controller, and how installed ones are found."""

from collections.abc import Callable
from importlib.metadata import entry_points

from leasehold.controller.driver import ENTRY_POINTS, Driver, DriverContext
from leasehold.runtime.config import ConfigError

DriverFactory = Callable[[DriverContext], Driver]


def driver_factories(names: tuple[str, ...]) -> dict[str, DriverFactory]:
    """The drivers of these names. Raises ConfigError for one that is not installed."""
    installed = {item.name: item for item in entry_points(group=ENTRY_POINTS)}
    missing = [name for name in names if name not in installed]
    if missing:
        there = ", ".join(sorted(installed)) or "none"
        raise ConfigError(f"drivers: {', '.join(missing)} not installed; there are {there}")
    return {name: installed[name].load() for name in names}
