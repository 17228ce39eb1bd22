"""`leasehold version`: what runs here, and what runs in the cluster."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client.options import Coordinators, ask, say

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold
    from leasehold.v1 import records_pb2


class Form(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def version(
    *,
    client: Annotated[bool, typer.Option("--client", help="Only of this program; nobody is asked.")] = False,
    output: Annotated[Form, typer.Option("--output", "-o", help="How to print it.")] = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """The versions of this program, and of the coordinators and controllers that are registered."""
    from importlib.metadata import version as installed  # noqa: PLC0415

    from leasehold.client import output as printer  # noqa: PLC0415
    from leasehold.client.errors import LeaseholdError  # noqa: PLC0415

    own = installed("leasehold")
    found: list[dict[str, str]] = [{"role": "client", "name": "", "version": own, "endpoint": ""}]
    failure: LeaseholdError | None = None
    if not client:
        try:
            found += ask(coordinator, _cluster)
        except LeaseholdError as error:
            # What runs here is told in any case.
            failure = error
    if output is Form.TABLE:
        heading = ("ROLE", "NAME", "VERSION", "ENDPOINT")
        rows = [tuple(item[name.lower()] for name in heading) for item in found]
        sys.stdout.writelines(f"{line}\n" for line in printer.aligned([heading, *rows]))
    else:
        printer.print_data(found, output)
    strangers = sorted({item["version"] for item in found} - {own})
    if strangers:
        say(f"not all of it is {own}: there is {', '.join(strangers)}")
    if failure is None:
        return
    if failure.reason != "NO_ENDPOINT":
        raise failure
    say(f"only of this program: {failure}")


async def _cluster(leasehold: "Leasehold") -> list[dict[str, str]]:
    coordinators = await leasehold.coordinators()
    controllers = await leasehold.controllers()
    return [
        *(_row("coordinator", item.coordinator, item) for item in coordinators),
        *(_row("controller", item.controller.controller, item.controller) for item in controllers),
    ]


def _row(role: str, name: str, record: "records_pb2.Coordinator | records_pb2.Controller") -> dict[str, str]:
    return {"role": role, "name": name, "version": record.software, "endpoint": record.endpoint}
