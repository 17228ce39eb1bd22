"""The command line. Data goes to stdout, messages to stderr.

Only what reads the command line is loaded here; each command loads what it needs when it runs.
"""

import os
import queue
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import typer.core

from leasehold.client import exits
from leasehold.client.commands import (
    confirm,
    describe,
    device,
    get,
    health,
    history,
    maintenance,
    request,
    version,
    why,
)
from leasehold.client.daemon import NotInstalled
from leasehold.client.errors import LeaseholdError
from leasehold.client.etcd import NoEtcd
from leasehold.client.modes import Filesystem, Mode
from leasehold.client.options import CODES, Coordinators, ask, group, limit, say, seconds
from leasehold.client.process import DevFailed, Unusable

if TYPE_CHECKING:
    from leasehold.client.changes import Progress
    from leasehold.client.connection import Leasehold

# gRPC's core writes to stderr that a connection was closed; what matters about that, we say ourselves. It
# reads this when it is loaded, and whoever wants to see more has set it.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


class _Group(typer.core.TyperGroup):
    """Turns the errors of the library into a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LeaseholdError as error:
            say(str(error))
            raise typer.Exit(exits.code_of(error)) from error
        except (NotInstalled, NoEtcd, Unusable) as error:
            say(str(error))
            raise typer.Exit(exits.USAGE) from error
        except DevFailed as error:
            say(str(error))
            raise typer.Exit(exits.FAULT) from error
        except KeyboardInterrupt as error:
            # How one ends a watch; nothing that would need words.
            raise typer.Exit(128 + signal.SIGINT) from error


app = group(
    "Decides which one storage controller may use a shared storage device.",
    cls=_Group,
    epilog=exits.HELP,
)
app.add_typer(get.get, name="get")
app.add_typer(describe.describe, name="describe")
app.add_typer(device.create, name="create")
app.command(epilog=CODES)(device.apply)
app.add_typer(device.delete, name="delete")
app.command(epilog=CODES)(device.transfer)
app.command("confirm-dead", epilog=CODES)(confirm.confirm_dead)
app.command(epilog=CODES)(why.why)
app.command(epilog=CODES)(maintenance.drain)
app.command(epilog=CODES)(maintenance.undrain)
app.command(epilog=CODES)(maintenance.pause)
app.command(epilog=CODES)(maintenance.resume)
app.command(epilog=CODES)(request.request)
app.command(epilog=CODES)(request.renew)
app.command("give-way", epilog=CODES)(request.give_way)
app.command(epilog=CODES)(request.release)
app.command(epilog=CODES)(request.cancel)
app.add_typer(history.history, name="history")
app.command(epilog=CODES)(health.health)
app.command(epilog=CODES)(version.version)

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


@app.command(epilog=exits.HELP)
def run(
    wanted: request.Wanted,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="What to run.")],
    *,
    mode: request.How = Mode.EXCLUSIVE,
    via: request.Via = "",
    prefer: request.Prefer = "",
    priority: request.Priority = None,
    operation: request.Operation = "",
    wait: request.Wait = "",
    hold: request.Hold = "",
    idle: request.Idle = "",
    request_id: request.RequestId = "",
    client: request.Client = "",
    grace: Annotated[str, typer.Option(metavar="TIME", help="Between SIGTERM and SIGKILL.")] = "5s",
    coordinator: Coordinators = None,
) -> None:
    """Run COMMAND while this machine has a device, or several.

    COMMAND finds where the device is in LEASEHOLD_PATH, and what it may want to know besides in
    LEASEHOLD_DEVICE, LEASEHOLD_EPOCH, LEASEHOLD_CONTROLLER, LEASEHOLD_REQUEST and LEASEHOLD_MODE; of several
    devices these are about the first, and LEASEHOLD_DEVICES and LEASEHOLD_PATHS name all, with spaces
    between. It has our standard streams, and signals are passed on to it. When the access is lost or moved,
    COMMAND and everything it has started is stopped: SIGTERM, then SIGKILL. The device is given back once
    nothing of it is left.
    """
    from leasehold.client import run as runner  # noqa: PLC0415
    from leasehold.client.asking import parsed  # noqa: PLC0415

    waiting, holding, idling = limit(wait, "--wait"), limit(hold, "--hold"), limit(idle, "--idle")
    patience = seconds(grace, "--grace")

    async def work(leasehold: "Leasehold") -> int:
        access = leasehold.access(
            parsed(wanted),
            mode=mode,
            priority=priority,
            operation=operation,
            controller=via,
            preferred=prefer,
            wait=waiting,
            hold=holding,
            idle=idling,
            client=client,
            request=request_id,
            progress=_progress(wanted),
        )
        return await runner.run(access, command, say=say, grace=patience)

    raise typer.Exit(ask(coordinator, work))


@app.command(epilog=exits.HELP)
def attach(
    wanted: request.Wanted,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A file; with --mount a directory.")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND]", help="What to run meanwhile.")
    ] = None,
    *,
    mount: Annotated[
        Filesystem | None, typer.Option(metavar="FSTYPE", help="Mount its filesystem on TARGET. Needs root.")
    ] = None,
    mode: request.How = Mode.EXCLUSIVE,
    via: request.Via = "",
    prefer: request.Prefer = "",
    priority: request.Priority = None,
    operation: request.Operation = "",
    wait: request.Wait = "",
    hold: request.Hold = "",
    idle: request.Idle = "",
    request_id: request.RequestId = "",
    client: request.Client = "",
    grace: Annotated[str, typer.Option(metavar="TIME", help="Between SIGTERM and SIGKILL.")] = "5s",
    coordinator: Coordinators = None,
) -> None:
    """Have a device as the file TARGET, or mounted there, for programs that know nothing of NBD.

    Until COMMAND ends, or without one until Ctrl-C. When the device moves to another controller, what is
    under way waits and goes on there. When the access is lost, COMMAND and everything it has started is
    stopped, and TARGET is taken apart. Needs nbdfuse and nbdkit.
    """
    from leasehold.client import attaching  # noqa: PLC0415
    from leasehold.client.asking import parsed  # noqa: PLC0415

    waiting, holding, idling = limit(wait, "--wait"), limit(hold, "--hold"), limit(idle, "--idle")
    patience = seconds(grace, "--grace")
    place = attaching.Target(target.absolute(), "" if mount is None else mount.value)
    if (why := place.check()) is not None:
        raise typer.BadParameter(f"{target} {why}", param_hint="TARGET")

    async def work(leasehold: "Leasehold") -> int:
        access = leasehold.access(
            parsed(wanted),
            mode=mode,
            priority=priority,
            operation=operation,
            controller=via,
            preferred=prefer,
            wait=waiting,
            hold=holding,
            idle=idling,
            client=client,
            request=request_id,
            progress=_progress(wanted),
        )
        return await attaching.attach(access, place, command or (), say=say, grace=patience)

    raise typer.Exit(ask(coordinator, work))


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


@app.command("driver-check", epilog=exits.HELP)
def driver_check(
    name: Annotated[str, typer.Argument(help="Of an installed driver.")],
    parameter: Annotated[
        list[str], typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="Of a scratch device.")
    ],
    *,
    destructive: Annotated[bool, typer.Option(help="The device may be written to.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="Of a controller: programs, addresses.", exists=True, dir_okay=False)
    ] = None,
    writer: Annotated[
        Path | None,
        typer.Option(help="Run with a path and a text; exits with 0 once that is written.", exists=True),
    ] = None,
    patience: Annotated[float, typer.Option(help="Seconds for one verb.", min=1)] = 30,
    second: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Where the second controller reaches the device otherwise."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PROMISE", help="Try this one; may be repeated.")
    ] = None,
) -> None:
    """Try whether a driver keeps its promises, on a device that nobody needs.

    The device is written to, and remembers the epochs of the check. Use one that Leasehold does not manage.
    """
    from leasehold.client import daemon  # noqa: PLC0415

    if not destructive:
        raise typer.BadParameter("the device is written to: say that it may be", param_hint="--destructive")
    check = cast("Callable[..., int]", daemon.command("driver-check", "controller"))
    raise typer.Exit(check(name, parameter, config, writer, patience, second=second or (), only=only or ()))


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

    # Not an Event: to set one in a signal handler hangs if the signal came just as somebody began to wait.
    stop: queue.SimpleQueue[int] = queue.SimpleQueue()
    _on_end(stop.put)
    cluster = DevCluster(directory, devices=devices, size=_bytes(size), ttl=ttl, etcd_port=etcd_port, say=say)
    with cluster:
        for line in cluster.instructions():
            print(line, flush=True)  # noqa: T201 - the data of this command
        stop.get()
        say("stopping")


@app.command()
def demo(directory: Directory = None) -> None:
    """Show on a cluster of its own that what is promised holds, with the times it takes."""
    from leasehold.client import demo as demonstration  # noqa: PLC0415

    ending = demonstration.Ending()
    _on_end(ending.by)
    try:
        raise typer.Exit(demonstration.show(directory, say, ending))
    except KeyboardInterrupt as error:
        raise typer.Exit(128 + ending.number) from error


def main() -> None:
    """The entry point."""
    app()


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


def _on_end(act: Callable[[int], None]) -> None:
    """Do `act` at Ctrl-C, SIGTERM, or when the terminal goes.

    Once: a second one must not keep what is being stopped from being stopped in order and removed.
    """
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # nohup means it.
        numbers.remove(signal.SIGHUP)
    ending = False

    def handle(number: int, _: object) -> None:
        nonlocal ending
        if not ending:
            ending = True
            act(number)

    for number in numbers:
        signal.signal(number, handle)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,12})([KMG]?)", text)
    if match is None or not int(match[1]):
        raise typer.BadParameter(f"{text!r} is no size: bytes, or with K, M, G", param_hint="--size")
    return int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]


if __name__ == "__main__":
    main()
