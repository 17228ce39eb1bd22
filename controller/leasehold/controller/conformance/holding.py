"""A controller's end of a driver as a process of its own, so that it can be stopped.

It brings one epoch up, renews it for as long as it runs, and says on its standard output where it is served.
When its standard input ends, it deactivates that epoch and ends. Each line that it says is a JSON object:
`path` once it is up; `ended` at the end; `error` in the place of either.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from leasehold.controller.config import ControllerConfig
from leasehold.controller.conformance.site import SHORT, Hung, Site
from leasehold.controller.driver import DriverError
from leasehold.controller.drivers import driver_factories
from leasehold.controller.fencer.channel import FencerFailed
from leasehold.runtime.config import load


@dataclass(frozen=True, slots=True)
class Orders:
    """What it is told on its command line, as JSON. `config` is a controller's configuration, or empty."""

    directory: str
    driver: str
    parameters: Mapping[str, str]
    config: str
    patience: float
    epoch: int
    forever: bool
    """Whether the hold does not have to be renewed, because the device itself ends it."""


def _say(**fields: object) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


async def _hold(orders: Orders) -> None:
    directory = Path(orders.directory)
    config = (
        load(ControllerConfig, Path(orders.config))
        if orders.config
        else ControllerConfig(name="driver-check", state_dir=directory)
    )
    site = Site(directory, driver_factories((orders.driver,))[orders.driver], config, orders.patience)
    try:
        await site.start()
        one = site.activation(orders.epoch, orders.parameters)
        path = await (site.bring_up(one) if orders.forever else site.bring_up(one, seconds=SHORT))
        _say(path=path)
        await asyncio.to_thread(sys.stdin.read)
        await site.deactivate(one)
    finally:
        await site.stop()


def main() -> None:
    """Entry of the process: `python -m leasehold.controller.conformance.holding ORDERS`."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    try:
        asyncio.run(_hold(Orders(**json.loads(sys.argv[1]))))
    except (DriverError, Hung, FencerFailed) as error:
        _say(error=str(error))
    else:
        _say(ended=True)


if __name__ == "__main__":
    main()
