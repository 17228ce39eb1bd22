"""`leasehold get`: lists, or one of them."""

from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client.options import CODES, Coordinators, Form, Output, Watch, ask, group, one, say

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold
    from leasehold.v1 import access_pb2, devices_pb2

get = group("Show what there is.")


@get.command("devices", epilog=CODES)
def get_devices(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Only this one.")] = "",
    *,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="Also those of which only the epochs are left.")
    ] = False,
    watch: Watch = False,
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Devices, and who holds them."""
    from leasehold.client import output as printer  # noqa: PLC0415
    from leasehold.client import watching  # noqa: PLC0415

    async def look(leasehold: "Leasehold") -> "list[devices_pb2.DeviceStatus]":
        if name:
            return await one(leasehold.device(name))
        found = await leasehold.devices()
        return [status for status in found if deleted or printer.device_state(status) != "DELETED"]

    if not watch:
        printer.show(ask(coordinator, look), printer.DEVICES, output)
        return
    ask(
        coordinator,
        lambda leasehold: watching.watch(
            lambda: look(leasehold), printer.DEVICES, output, lambda gone: say(f"device {gone} is deleted")
        ),
    )


@get.command("controllers", epilog=CODES)
def get_controllers(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Only this one.")] = "",
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Controllers that are registered, and what they hold."""
    from leasehold.client import output as printer  # noqa: PLC0415
    from leasehold.client.errors import NotFound  # noqa: PLC0415

    found = ask(coordinator, lambda leasehold: leasehold.controllers())
    if name:
        found = [status for status in found if status.controller.controller == name]
        if not found:
            raise NotFound(f"no controller {name} is registered", "NO_CONTROLLER", {"controller": name})
    printer.show(found, printer.CONTROLLERS, output)


@get.command("coordinators", epilog=CODES)
def get_coordinators(output: Output = Form.TABLE, coordinator: Coordinators = None) -> None:
    """Coordinators that are registered."""
    from leasehold.client import output as printer  # noqa: PLC0415

    found = ask(coordinator, lambda leasehold: leasehold.coordinators())
    printer.show(found, printer.COORDINATORS, output)


@get.command("requests", epilog=CODES)
def get_requests(
    name: Annotated[str, typer.Argument(metavar="[REQUEST]", help="Only the one of this id.")] = "",
    *,
    device: Annotated[str, typer.Option(help="Only those for this device.")] = "",
    ended: Annotated[bool, typer.Option("--ended", help="Also those that are over.")] = False,
    watch: Watch = False,
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Access requests, in the order of their arrival."""
    from leasehold.client import output as printer  # noqa: PLC0415
    from leasehold.client import watching  # noqa: PLC0415

    async def look(leasehold: "Leasehold") -> "list[access_pb2.AccessStatus]":
        if name:
            return await one(leasehold.request(name))
        return await leasehold.requests(device, ended=ended)

    async def follow(leasehold: "Leasehold") -> None:
        if name or ended:
            await watching.watch(lambda: look(leasehold), printer.REQUESTS, output)
        else:
            await watching.watch(watching.OpenRequests(leasehold, device).look, printer.REQUESTS, output)

    if watch:
        ask(coordinator, follow)
    else:
        printer.show(ask(coordinator, look), printer.REQUESTS, output)


@get.command("history", epilog=CODES)
def get_history(
    device: Annotated[str, typer.Argument(metavar="[DEVICE]", help="Only of this one.")] = "",
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Control changes, by device. `leasehold history` has them by time."""
    from leasehold.client import output as printer  # noqa: PLC0415

    found = ask(coordinator, lambda leasehold: leasehold.history(device))
    printer.show(found, printer.HISTORY, output)
