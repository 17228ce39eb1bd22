"""`leasehold driver-check`: tries whether a driver keeps its promises, on a scratch device of the operator's.

Exit codes: 0 every promise that was tried is kept; 1 one is not; 2 it can not be tried.
"""

import asyncio
import logging
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leasehold.controller.config import ControllerConfig
from leasehold.controller.conformance.checks import Checks
from leasehold.controller.conformance.site import Hung, Site
from leasehold.controller.driver import DriverError
from leasehold.controller.drivers import driver_factories
from leasehold.controller.fencer.channel import FencerFailed
from leasehold.runtime.config import ConfigError, load

KEPT, BROKEN, UNUSABLE = range(3)
_WORDS = {True: "passed", False: "FAILED", None: "not tried"}


@dataclass(frozen=True, slots=True)
class _How:
    writer: Path | None
    patience: float


def run(
    name: str, parameters: Sequence[str], config_file: Path | None, writer: Path | None, patience: float
) -> int:
    """Check the driver `name` on the device of `parameters`, each `key=value`. Returns the exit code."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(message)s")
    split = [text.partition("=") for text in parameters]
    if wrong := [text for text, (key, sign, _) in zip(parameters, split, strict=True) if not key or not sign]:
        sys.stderr.write(f"{wrong[0]!r} is not KEY=VALUE\n")
        return UNUSABLE
    device = {key: value for key, _, value in split}
    with tempfile.TemporaryDirectory(prefix="driver-check-") as directory:
        try:
            config = (
                load(ControllerConfig, config_file)
                if config_file
                else ControllerConfig(name="driver-check", state_dir=Path(directory))
            )
            return _run(_main(name, device, config, _How(writer, patience), Path(directory)))
        except (ConfigError, FencerFailed) as error:
            sys.stderr.write(f"{error}\n")
            return UNUSABLE


def _run(main: Coroutine[Any, Any, int]) -> int:
    """As asyncio.run, but a driver that heeds no cancellation does not keep it from ending."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _main(
    name: str, parameters: dict[str, str], config: ControllerConfig, how: _How, directory: Path
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
        async for result in Checks(sites[0], sites[1], parameters, how.writer).run():
            why = f": {result.why}" if result.why else ""
            sys.stdout.write(f"{_WORDS[result.kept]:9}  {result.promise}: {result.check}{why}\n")
            sys.stdout.flush()
            kept = kept and result.kept is not False
    finally:
        for site in sites:
            await site.stop()
    return KEPT if kept else BROKEN
