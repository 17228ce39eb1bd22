"""`leasehold driver-check`: tries whether a driver keeps its promises, on a scratch device of the operator's.

Exit codes: 0 every promise that was tried is kept; 1 one is not; 2 it can not be tried; 128+N ended by
signal N.
"""

import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leasehold.controller.config import ControllerConfig
from leasehold.controller.conformance import leftovers
from leasehold.controller.conformance.checks import PROMISES, Checks
from leasehold.controller.conformance.site import Hung, Site
from leasehold.controller.conformance.trial import Given
from leasehold.controller.driver import DriverError
from leasehold.controller.drivers import driver_factories
from leasehold.controller.fencer.channel import FencerFailed
from leasehold.runtime.config import ConfigError, load

KEPT, BROKEN, UNUSABLE = range(3)
_WORDS = {True: "passed", False: "FAILED", None: "not tried"}


@dataclass(frozen=True, slots=True)
class _How:
    config_file: Path | None
    writer: Path | None
    patience: float
    only: Collection[str]


def run(
    name: str,
    parameters: Sequence[str],
    config_file: Path | None,
    writer: Path | None,
    patience: float,
    *,
    second: Sequence[str] = (),
    only: Collection[str] = (),
) -> int:
    """Check the driver `name` on the device of `parameters`, each `key=value`. Returns the exit code.

    `second` are those that differ where the second controller reaches the device. `only` are the promises to
    try, all if there are none.
    """
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    for text in (*parameters, *second):
        key, sign, _ = text.partition("=")
        if not key or not sign:
            sys.stderr.write(f"{text!r} is not KEY=VALUE\n")
            return UNUSABLE
    if unknown := sorted(set(only) - set(PROMISES)):
        sys.stderr.write(f"{unknown[0]!r} is no promise; there are {', '.join(PROMISES)}\n")
        return UNUSABLE
    first = _read(parameters)
    directory = Path(tempfile.mkdtemp(prefix="driver-check-"))
    try:
        config = (
            load(ControllerConfig, config_file)
            if config_file
            else ControllerConfig(name="driver-check", state_dir=directory)
        )
        devices = (first, {**first, **_read(second)})
        return _run(_main(name, devices, config, _How(config_file, writer, patience, only), directory))
    except (ConfigError, FencerFailed) as error:
        sys.stderr.write(f"{error}\n")
        return UNUSABLE
    finally:
        for thing in leftovers.remove(directory):
            sys.stderr.write(f"left behind: {thing}\n")


def _read(parameters: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (text.partition("=") for text in parameters)}


def _run(main: Coroutine[Any, Any, int]) -> int:
    """As asyncio.run, but a driver that heeds no cancellation does not keep it from ending.

    Ctrl-C and SIGTERM end it in order: what is stopped goes on, what is active is deactivated.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(main)
    caught: list[int] = []

    def end(number: int) -> None:
        caught.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    try:
        return loop.run_until_complete(task)
    except asyncio.CancelledError:
        return 128 + caught[0]
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _main(
    name: str,
    devices: tuple[dict[str, str], dict[str, str]],
    config: ControllerConfig,
    how: _How,
    directory: Path,
) -> int:
    factory = driver_factories((name,))[name]
    sites = [Site(directory / end, factory, config, how.patience) for end in "ab"]
    kept = True
    try:
        try:
            for site in sites:
                await site.start()
        except (DriverError, Hung) as error:
            sys.stderr.write(f"the driver {name} does not start: {error}\n")
            return UNUSABLE
        given = Given(
            *(name, *devices, how.writer, how.config_file, how.patience, how.only),
            directory=directory,
        )
        async for result in Checks(sites[0], sites[1], given).run():
            why = f": {result.why}" if result.why else ""
            sys.stdout.write(f"{_WORDS[result.kept]:9}  {result.promise}: {result.check}{why}\n")
            sys.stdout.flush()
            kept = kept and result.kept is not False
    finally:
        for site in sites:
            await site.stop()
    return KEPT if kept else BROKEN
