"""The command line. Data goes to stdout, messages to stderr.

Only what reads the command line is loaded here; each command loads what it needs when it runs.
"""

import asyncio
import os
import re
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import typer.core

from leasehold.client import exits
from leasehold.client.daemon import NotInstalled
from leasehold.client.errors import LeaseholdError
from leasehold.client.etcd import NoEtcd
from leasehold.client.process import DevFailed

if TYPE_CHECKING:
    from leasehold.client.changes import Progress
    from leasehold.client.connection import Leasehold

T = TypeVar("T")

# gRPC's core writes to stderr that a connection was closed; what matters about that, we say ourselves. It
# reads this when it is loaded, and whoever wants to see more has set it.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


class Form(StrEnum):
    TABLE = "table"
    JSON = "json"


class _Group(typer.core.TyperGroup):
    """Turns the errors of the library into a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LeaseholdError as error:
            say(str(error))
            raise typer.Exit(exits.code_of(error)) from error
        except (NotInstalled, NoEtcd) as error:
            say(str(error))
            raise typer.Exit(exits.CONFIG) from error
        except DevFailed as error:
            say(str(error))
            raise typer.Exit(exits.FAULT) from error


def _typer(text: str, **settings: Any) -> typer.Typer:
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


app = _typer(
    "Decides which one storage controller may use a shared storage device.",
    cls=_Group,
    epilog=exits.HELP,
    add_completion=False,
)
get = _typer("Show what there is.")
create = _typer("Make something known.")
app.add_typer(get, name="get")
app.add_typer(create, name="create")

Coordinators = Annotated[
    list[str] | None,
    typer.Option(
        "--coordinator",
        "-c",
        metavar="HOST:PORT",
        help="Whom to ask; may be repeated. By default $LEASEHOLD_COORDINATORS, separated by commas.",
        show_default=False,
    ),
]
Output = Annotated[Form, typer.Option("--output", "-o", help="How to print it.")]
Config = Annotated[
    Path,
    typer.Option("--config", help="Its configuration, TOML.", exists=True, dir_okay=False, readable=True),
]
Directory = Annotated[
    Path | None,
    typer.Option(
        help="Where everything is kept. By default a temporary one, removed at the end.", file_okay=False
    ),
]


def say(message: str) -> None:
    """One line for the person at the terminal."""
    print(f"leasehold: {message}", file=sys.stderr, flush=True)  # noqa: T201 - the command line's own voice


@get.command("devices")
def get_devices(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Only this one.")] = "",
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Devices, and who holds them."""
    from leasehold.client import output as printer  # noqa: PLC0415

    found = _ask(coordinator, lambda leasehold: _one(leasehold.device(name)) if name else leasehold.devices())
    printer.show(found, printer.DEVICES, output)


@get.command("controllers")
def get_controllers(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Only this one.")] = "",
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Controllers that are registered, and what they hold."""
    from leasehold.client import output as printer  # noqa: PLC0415
    from leasehold.client.errors import NotFound  # noqa: PLC0415

    found = _ask(coordinator, lambda leasehold: leasehold.controllers())
    if name:
        found = [status for status in found if status.controller.controller == name]
        if not found:
            raise NotFound(f"no controller {name} is registered", "NO_CONTROLLER", {"controller": name})
    printer.show(found, printer.CONTROLLERS, output)


@get.command("requests")
def get_requests(
    name: Annotated[str, typer.Argument(metavar="[REQUEST]", help="Only the one of this id.")] = "",
    device: Annotated[str, typer.Option(help="Only those for this device.")] = "",
    ended: Annotated[bool, typer.Option("--ended", help="Also those that are over.")] = False,
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Access requests, in the order of their arrival."""
    from leasehold.client import output as printer  # noqa: PLC0415

    found = _ask(
        coordinator,
        lambda leasehold: _one(leasehold.request(name)) if name else leasehold.requests(device, ended=ended),
    )
    printer.show(found, printer.REQUESTS, output)


@get.command("history")
def get_history(
    device: Annotated[str, typer.Argument(metavar="[DEVICE]", help="Only of this one.")] = "",
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Control changes, by device."""
    from leasehold.client import output as printer  # noqa: PLC0415

    found = _ask(coordinator, lambda leasehold: leasehold.history(device))
    printer.show(found, printer.HISTORY, output)


@create.command("device")
def create_device(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Its id.")],
    *,
    driver: Annotated[str, typer.Option(help="What makes it usable.")] = "nbd",
    backing: Annotated[Path | None, typer.Option(help="Same as -p backing=PATH, made absolute.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="KEY=VALUE", help="For the driver.")
    ] = None,
    controllers: Annotated[
        str, typer.Option(help="Those that may hold it, best first, separated by commas. By default any.")
    ] = "",
    ttl: Annotated[int, typer.Option(help="Seconds its holder's lease lives; 0 for the default.", min=0)] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="A takeover waits a whole TTL longer.")] = False,
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Make a device known. The same once more is accepted."""
    from leasehold.client import output as printer  # noqa: PLC0415

    parameters = {}
    for text in parameter or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="-p")
        parameters[key] = value
    if backing is not None:
        parameters["backing"] = str(backing.absolute())
    eligible = [name.strip() for name in controllers.split(",") if name.strip()]
    found = _ask(
        coordinator,
        lambda leasehold: _one(
            leasehold.create_device(device, driver, parameters, controllers=eligible, ttl=ttl, strict=strict)
        ),
    )
    printer.show(found, printer.DEVICES, output)


@app.command()
def transfer(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Its id.")],
    *,
    to: Annotated[str, typer.Option("--to", metavar="CONTROLLER", help="Who is to hold it.")],
    reason: Annotated[str, typer.Option(help="For the history.")] = "",
    wait: Annotated[str, typer.Option(metavar="TIME", help="How long to wait: 90, 90s, 5m, 2h.")] = "60s",
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Pass a device to another controller, and wait until that one serves it.

    A client that has access keeps it, under another path.
    """
    from leasehold.client import output as printer  # noqa: PLC0415

    limit = _seconds(wait, "--wait")
    found = _ask(
        coordinator,
        lambda leasehold: _one(leasehold.transfer(device, to, reason=reason, timeout=limit)),
    )
    printer.show(found, printer.DEVICES, output)


@app.command(epilog=exits.HELP)
def run(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Its id.")],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="What to run.")],
    *,
    via: Annotated[str, typer.Option(metavar="CONTROLLER", help="The only one to be served by.")] = "",
    priority: Annotated[
        int | None, typer.Option(help="Higher goes first; 50 if not given.", min=0, max=100)
    ] = None,
    wait: Annotated[
        str, typer.Option(metavar="TIME", help="How long to wait: 90, 90s, 5m, 2h. By default without limit.")
    ] = "",
    request_id: Annotated[
        str, typer.Option(metavar="ID", help="The id of the request. By default a new one.")
    ] = "",
    client: Annotated[
        str, typer.Option(metavar="NAME", help="Who asks, for the history. By default user@host.")
    ] = "",
    grace: Annotated[str, typer.Option(metavar="TIME", help="Between SIGTERM and SIGKILL.")] = "5s",
    coordinator: Coordinators = None,
) -> None:
    """Run COMMAND while this machine has a device.

    COMMAND finds where the device is in LEASEHOLD_PATH, and what it may want to know besides in
    LEASEHOLD_DEVICE, LEASEHOLD_EPOCH, LEASEHOLD_CONTROLLER and LEASEHOLD_REQUEST. It has our standard
    streams, and signals are passed on to it. When the access is lost or moved, COMMAND and everything it
    has started is stopped: SIGTERM, then SIGKILL. The device is given back once nothing of it is left.
    """
    from leasehold.client import run as runner  # noqa: PLC0415

    limit = _seconds(wait, "--wait") if wait else None
    patience = _seconds(grace, "--grace")

    async def work(leasehold: "Leasehold") -> int:
        access = leasehold.access(
            device,
            priority=priority,
            controller=via,
            wait=limit,
            client=client,
            request=request_id,
            progress=_progress(device),
        )
        return await runner.run(access, command, say=say, grace=patience)

    raise typer.Exit(_ask(coordinator, work))


@app.command()
def coordinator(config: Config) -> None:
    """Run a coordinator."""
    from leasehold.client import daemon  # noqa: PLC0415

    raise typer.Exit(daemon.run("coordinator", config))


@app.command()
def controller(config: Config) -> None:
    """Run a controller."""
    from leasehold.client import daemon  # noqa: PLC0415

    raise typer.Exit(daemon.run("controller", config))


@app.command()
def dev(
    directory: Directory = None,
    etcd_port: Annotated[int, typer.Option(help="For etcd's clients; 0 for any.", min=0, max=65535)] = 0,
    devices: Annotated[int, typer.Option(help="How many, disk-1 and so on.", min=0)] = 3,
    size: Annotated[str, typer.Option(help="Of each: bytes, or with K, M, G.")] = "64M",
    ttl: Annotated[int, typer.Option(help="Seconds, of devices and sessions.", min=2)] = 5,
) -> None:
    """Run a whole cluster on this machine, to try things out: etcd, two coordinators, three controllers.

    Needs no root, listens on 127.0.0.1 only, ends with Ctrl-C.
    """
    from leasehold.client.dev import DevCluster  # noqa: PLC0415

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    cluster = DevCluster(directory, devices=devices, size=_bytes(size), ttl=ttl, etcd_port=etcd_port, say=say)
    with cluster:
        for line in cluster.instructions():
            print(line, flush=True)  # noqa: T201 - the data of this command
        stop.wait()
        say("stopping")


@app.command()
def demo(directory: Directory = None) -> None:
    """Show on a cluster of its own that what is promised holds, with the times it takes."""
    from leasehold.client import demo as demonstration  # noqa: PLC0415

    raise typer.Exit(demonstration.show(directory, say))


def main() -> None:
    """The entry point."""
    app()


def _ask(coordinators: list[str] | None, work: Callable[["Leasehold"], Awaitable[T]]) -> T:
    from leasehold.client.connection import connect  # noqa: PLC0415

    async def asked() -> T:
        async with connect(*(coordinators or ())) as leasehold:
            return await work(leasehold)

    return asyncio.run(asked())


async def _one(answer: Awaitable[T]) -> list[T]:
    return [await answer]


def _progress(device: str) -> "Callable[[Progress], None]":
    told = ""

    def tell(progress: "Progress") -> None:
        nonlocal told
        place = f" (number {progress.position} in the queue)" if progress.position else ""
        line = f"{device}: {progress.reason or 'on its way'}{place}"
        # Coordinators repeat themselves after a reconnect; people need not read it twice.
        if line != told:
            say(line)
        told = line

    return tell


def _seconds(text: str, option: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no time: 90, 90s, 5m or 2h", param_hint=option)
    return float(match[1]) * {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size: bytes, or with K, M, G", param_hint="--size")
    return int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]


if __name__ == "__main__":
    main()
