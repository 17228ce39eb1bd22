"""`leasehold drain`, `undrain`, `pause` and `resume`: what operators order while they work on something."""

from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client.options import Coordinators, ask, one, say, seconds

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold
    from leasehold.v1 import records_pb2

ControllerName = Annotated[str, typer.Argument(metavar="CONTROLLER", help="Its name.")]
Reason = Annotated[str, typer.Option(help="Why. Whoever waits because of it is told, with your name.")]
Operator = Annotated[str, typer.Option(metavar="NAME", help="Who says so. By default user@host.")]
Device = Annotated[str, typer.Argument(metavar="[DEVICE]", help="Its id.")]
All = Annotated[bool, typer.Option("--all", help="All devices, those to come too.")]

EVERY = "_any"
"""The device in an order that is about all of them."""


def drain(
    controller: ControllerName,
    *,
    reason: Reason = "maintenance",
    within: Annotated[
        str, typer.Option(metavar="TIME", help="How long to wait: 90, 90s, 5m, 2h. By default without limit.")
    ] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until nothing is left.")] = False,
    operator: Operator = "",
    coordinator: Coordinators = None,
) -> None:
    """Have a controller give up its devices, and wait until nothing is left.

    They go to others that may hold them, in use or not: a client that has access keeps it, under another
    path. What nobody else can serve stays, and you are told why. The controller is given nothing more until
    "leasehold undrain", whether it runs or not.

    With --within it ends with 124 when the time is over. The controller stays drained then, and goes on
    giving up what it can.
    """
    from leasehold.client import draining  # noqa: PLC0415

    limit = seconds(within, "--within") if within else None

    async def work(leasehold: "Leasehold") -> None:
        status = await leasehold.drain(controller, reason=reason, operator=operator)
        say(f"controller {controller} is being drained{_said(status.drain)}")
        if not no_wait:
            await draining.until_empty(leasehold, controller, limit, say)
            say(f"controller {controller} has nothing left")
            return
        say(f"controller {controller} has {draining.devices(status.held)} left")

    ask(coordinator, work)


def undrain(controller: ControllerName, coordinator: Coordinators = None) -> None:
    """Let a controller that was drained be given devices again."""

    async def work(leasehold: "Leasehold") -> bool:
        stood = bool((await leasehold.maintenance(controller)).drains)
        await leasehold.undrain(controller)
        return stood

    stood = ask(coordinator, work)
    say(f"controller {controller} {'can be given devices again' if stood else 'was not drained'}")


def pause(
    device: Device = "",
    *,
    every: All = False,
    reason: Reason = "maintenance",
    operator: Operator = "",
    coordinator: Coordinators = None,
) -> None:
    """Leave control of a device where it is: until "leasehold resume" it changes by a transfer only.

    Requests are granted where the device is served. It is not moved for anybody, and nobody takes it over
    when its holder is gone.
    """
    _check(device, every=every)
    (stands,) = ask(
        coordinator, lambda leasehold: one(leasehold.pause(device, reason=reason, operator=operator))
    )
    say(f"{f'device {device} is' if device else 'all devices are'} paused{_said(stands)}")


def resume(device: Device = "", *, every: All = False, coordinator: Coordinators = None) -> None:
    """Take a pause back. With --all, the one of all: devices that were paused by their names stay so."""
    _check(device, every=every)

    async def work(leasehold: "Leasehold") -> "list[records_pb2.Pause]":
        stood = list((await leasehold.maintenance()).pauses)
        await leasehold.resume(device)
        return stood

    pauses = {item.device: item for item in ask(coordinator, work)}
    stood = pauses.pop(device or EVERY, None)
    if device:
        say(f"device {device} is not paused{' any more' if stood else ''}")
    else:
        say("the pause of all devices is taken back" if stood else "there is no pause of all devices")
    if device and EVERY in pauses:
        say(f"all devices are paused still{_said(pauses[EVERY])}")
    elif not device and pauses:
        say(f"paused still, by their names: {', '.join(sorted(pauses))}")


def _check(device: str, *, every: bool) -> None:
    if bool(device) == every:
        raise typer.BadParameter("name either a device or --all", param_hint="DEVICE")


def _said(order: "records_pb2.Drain | records_pb2.Pause") -> str:
    from leasehold.client import output  # noqa: PLC0415

    return f" {output.ordered(order)}"
