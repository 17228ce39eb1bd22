"""`leasehold describe`: how one thing stands, and why, for people."""

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client.options import CODES, Coordinators, DeviceName, RequestName, ask, group

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold

describe = group('Tell how something stands, and why. For people: programs take "get -o json".')


@describe.command("device", epilog=CODES)
def describe_device(device: DeviceName, coordinator: Coordinators = None) -> None:
    """Who holds a device and since when, who has access, who waits and why, and its last changes."""
    from leasehold.client import page  # noqa: PLC0415

    _print(coordinator, lambda leasehold: page.device_page(leasehold, device))


@describe.command("controller", epilog=CODES)
def describe_controller(
    controller: Annotated[str, typer.Argument(metavar="CONTROLLER", help="Its name.")],
    coordinator: Coordinators = None,
) -> None:
    """What a controller is, what it holds, and what it lately gained and lost."""
    from leasehold.client import page  # noqa: PLC0415

    _print(coordinator, lambda leasehold: page.controller_page(leasehold, controller))


@describe.command("request", epilog=CODES)
def describe_request(request: RequestName, coordinator: Coordinators = None) -> None:
    """What is asked for, how far it has come, what it waits for, and the changes made at its request."""
    from leasehold.client import page  # noqa: PLC0415

    _print(coordinator, lambda leasehold: page.request_page(leasehold, request))


def _print(coordinator: list[str] | None, work: "Callable[[Leasehold], Awaitable[list[str]]]") -> None:
    for line in ask(coordinator, work):
        sys.stdout.write(line + "\n")
