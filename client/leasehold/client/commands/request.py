"""`leasehold request`, `renew`, `release` and `cancel`: access for clients that poll."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client.modes import Mode
from leasehold.client.options import (
    Coordinators,
    Form,
    Output,
    RequestName,
    ask,
    limit,
    one,
    say,
)

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold
    from leasehold.v1 import access_pb2

Via = Annotated[str, typer.Option(metavar="CONTROLLER", help="The only one to be served by.")]
Wanted = Annotated[
    str,
    typer.Argument(
        metavar="DEVICE",
        help="Its id; or several, all of which are wanted: d1,d2; or labels, of any that has them: pool=a.",
    ),
]
Prefer = Annotated[str, typer.Option(metavar="CONTROLLER", help="The one to be served by if it can.")]
Priority = Annotated[
    int | None,
    typer.Option(help="Higher goes first; by default what --for is worth, or 50.", min=0, max=100),
]
Operation = Annotated[
    str,
    typer.Option("--for", metavar="OPERATION", help="restore, backup, verify, copy, or another they know."),
]
Hold = Annotated[str, typer.Option(metavar="TIME", help="How long to have it at most.")]
Idle = Annotated[
    str, typer.Option(metavar="TIME", help="How long to have it at most without reading or writing.")
]
Wait = Annotated[
    str, typer.Option(metavar="TIME", help="How long to wait: 90, 90s, 5m, 2h. By default without limit.")
]
RequestId = Annotated[str, typer.Option(metavar="ID", help="The id of the request. By default a new one.")]
How = Annotated[
    Mode,
    typer.Option("--mode", help="Alone; beside others that write too; beside others that only read as well."),
]
Client = Annotated[str, typer.Option(metavar="NAME", help="Who asks, for the history. By default user@host.")]


def request(
    wanted: Wanted,
    *,
    mode: How = Mode.EXCLUSIVE,
    via: Via = "",
    prefer: Prefer = "",
    priority: Priority = None,
    operation: Operation = "",
    wait: Wait = "",
    hold: Hold = "",
    idle: Idle = "",
    requeue: Annotated[
        bool, typer.Option("--requeue", help="Wait again if it is taken for a higher priority.")
    ] = False,
    request_id: RequestId = "",
    client: Client = "",
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Ask for devices and return at once. The same id is the same request, however often it is sent.

    For programs that can not stay; "leasehold run" does all of this by itself. Look how far it has come with
    "get requests REQUEST", say with "renew" that its client is still there, granted or not, and end it with
    "release". Who does not renew in time loses it.
    """
    from leasehold.client.asking import parsed  # noqa: PLC0415

    waiting, holding, idling = limit(wait, "--wait"), limit(hold, "--hold"), limit(idle, "--idle")
    found = ask(
        coordinator,
        lambda leasehold: one(
            leasehold.submit(
                parsed(wanted),
                mode=mode,
                priority=priority,
                operation=operation,
                controller=via,
                preferred=prefer,
                wait=waiting,
                hold=holding,
                idle=idling,
                requeue=requeue,
                client=client,
                request=request_id,
            )
        ),
    )
    _show(found, output)
    (status,) = found
    say(
        f"within {status.access_ttl_seconds} s, and again and again: leasehold renew {status.request.request}"
    )


def give_way(request: RequestName, output: Output = Form.TABLE, coordinator: Coordinators = None) -> None:
    """Say that its client has stopped using what is about to be taken for a request of higher priority."""
    _on(coordinator, lambda leasehold: leasehold.give_way(request), output)


def renew(request: RequestName, output: Output = Form.TABLE, coordinator: Coordinators = None) -> None:
    """Say that the client of a request is still there. Refused once the request is over."""
    _on(coordinator, lambda leasehold: leasehold.renew(request), output)


def release(request: RequestName, output: Output = Form.TABLE, coordinator: Coordinators = None) -> None:
    """End an access: the device is given back. A request that waits is cancelled. Twice is as good as once.

    Its client learns of it; but who ends the access of another should know that it does not use the path.
    """
    _on(coordinator, lambda leasehold: leasehold.release(request), output)


def cancel(request: RequestName, output: Output = Form.TABLE, coordinator: Coordinators = None) -> None:
    """Take a request back that waits. Refused once it is granted: release it then."""
    _on(coordinator, lambda leasehold: leasehold.cancel(request), output)


def _on(
    coordinator: list[str] | None,
    work: "Callable[[Leasehold], Awaitable[access_pb2.AccessStatus]]",
    output: Form,
) -> None:
    _show(ask(coordinator, lambda leasehold: one(work(leasehold))), output)


def _show(found: "list[access_pb2.AccessStatus]", output: Form) -> None:
    from leasehold.client import output as printer  # noqa: PLC0415

    printer.show(found, printer.REQUESTS, output)
