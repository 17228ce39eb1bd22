"""`leasehold controller`: runs one controller until it is told to stop.

Exit codes: 0 stopped in order; 1 ended by an error, or something could not be given up and is left to its
lease; 2 the configuration can not be used, or the address in it can not be had; 3 refused, because this
controller runs already, a driver or the fencer can not start, or its past can not be cleaned up.
"""

import asyncio
import logging
from pathlib import Path

from leasehold.controller.config import ControllerConfig
from leasehold.controller.daemon import Daemon
from leasehold.controller.fencer.channel import FencerFailed
from leasehold.controller.gate import GateError
from leasehold.controller.journal import JournalRefused
from leasehold.controller.recovery import RecoveryRefused
from leasehold.runtime import daemon, log
from leasehold.runtime.api import CanNotListen
from leasehold.runtime.config import ConfigError, load
from leasehold.runtime.notify import Manager, attend
from leasehold.runtime.session import NameTaken
from leasehold.store.errors import StoreError

_log = logging.getLogger(__name__)

DONE, FAILED, MISCONFIGURED, REFUSED = range(4)

CLOSING = 15.0
"""Seconds beyond the time to stop that may be asked of a service manager, for what drivers leave behind."""


def run(config_file: Path) -> int:
    """Run the controller that `config_file` describes. Returns the exit code."""
    try:
        config = load(ControllerConfig, config_file)
    except ConfigError as error:
        log.configure("leasehold-controller")
        _log.error("%s", error)
        return MISCONFIGURED
    log.configure(config.name, config.log_level)
    return daemon.run(lambda stop: main(config, stop))


async def main(config: ControllerConfig, stop: asyncio.Event) -> int:
    """Run a controller until `stop` is set or it can not go on. Returns the exit code."""
    controller = Daemon(config)
    manager = Manager.from_environment()
    attending = asyncio.create_task(attend(manager, controller.condition))
    try:
        return await _run(controller, config, stop, manager)
    finally:
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)
        manager.close()


async def _run(controller: Daemon, config: ControllerConfig, stop: asyncio.Event, manager: Manager) -> int:
    starting = asyncio.create_task(controller.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            manager.stopping(CLOSING)
            starting.cancel()
            await asyncio.wait((starting,))
            return DONE
        starting.result()
    except (JournalRefused, RecoveryRefused, NameTaken, GateError, FencerFailed) as error:
        _log.error("refused: %s", error)
        return REFUSED
    except (ConfigError, CanNotListen) as error:
        _log.error("%s", error)
        return MISCONFIGURED
    except (StoreError, OSError) as error:
        _log.error("can not start: %s", error)
        return FAILED
    else:
        manager.ready(controller.condition())
        await asyncio.wait((stopping, controller.failed), return_when=asyncio.FIRST_COMPLETED)
        manager.stopping(config.timing.stop + CLOSING)
        return await _end(controller)
    finally:
        stopping.cancel()


async def _end(controller: Daemon) -> int:
    error = controller.failed.result() if controller.failed.done() else None
    if error is not None:
        _log.error("can not go on: %s", error, exc_info=error)
    clean = await controller.stop()
    _log.info("stopped%s", "" if clean else "; what is left runs out with its lease")
    if isinstance(error, NameTaken):
        return REFUSED
    return DONE if clean and error is None else FAILED
