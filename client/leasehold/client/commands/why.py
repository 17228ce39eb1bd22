"""`leasehold why`: what something waits for, and what would help."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client.errors import NotFound
from leasehold.client.options import Coordinators, Form, Output, ask

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold
    from leasehold.v1 import explanations_pb2


def why(
    name: Annotated[str, typer.Argument(metavar="REQUEST|DEVICE", help="Its id; a request's goes first.")],
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Tell why a request waits, or why a device stands as it does: in whose hands it is, who comes first,
    which controller could serve it and why each of the others could not, and what would help.
    """
    from leasehold.client import output as printer  # noqa: PLC0415

    found = ask(coordinator, lambda leasehold: _explained(leasehold, name))
    if output in (Form.TABLE, Form.WIDE):
        for line in _lines(name, found):
            sys.stdout.write(line + "\n")
        return
    printer.show([found], printer.Kind(lambda _: name, {}), output)


async def _explained(leasehold: "Leasehold", name: str) -> "explanations_pb2.ExplainResponse":
    try:
        return await leasehold.why(request=name)
    except NotFound:
        return await leasehold.why(device=name)


def _lines(name: str, found: "explanations_pb2.ExplainResponse") -> Iterator[str]:
    from leasehold.client.output import aligned  # noqa: PLC0415

    yield f"{name} is {found.state}: {found.reason or 'nothing is known of why'}"

    def part(title: str, rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
        if lines := aligned(list(rows)):
            yield f"{title}:"
            yield from (f"  {line}" for line in lines)

    yield from part(
        "In the hands of",
        (
            (item.device, item.request, item.client, f"priority {item.priority}", item.reason)
            for item in found.users
        ),
    )
    yield from part(
        "Before it" if found.state == "PENDING" else "Waiting",
        (
            (item.device, item.request, item.client, f"priority {item.priority}", item.reason)
            for item in found.ahead
        ),
    )
    yield from part(
        "Controllers",
        ((item.device, item.controller, item.refused or "would serve it") for item in found.candidates),
    )
    yield from part("What would help", ((item,) for item in found.unblocked_by))
