"""`leasehold history`: control changes in the order in which they were made."""

import json
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client.options import (
    CODES,
    POLLS,
    Coordinators,
    Form,
    Output,
    ask,
    group,
    say,
    seconds,
)
from leasehold.client.walltime import now

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold
    from leasehold.v1 import history_pb2

history = group(
    "Who held what when: control changes in the order in which they were made. The oldest ones of each "
    'device are forgotten in time; "history export" is for keeping them.',
    no_args_is_help=False,
    invoke_without_command=True,
    epilog=CODES,
)

Device = Annotated[str, typer.Option("--device", "-d", metavar="DEVICE", help="Only of this one.")]


@history.callback()
def show(
    context: typer.Context,
    *,
    device: Device = "",
    since: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Only those of the last 90s, 5m, 2h or 7d, or since a time such as 2026-01-31T12:00:00Z. "
            "By the clocks of those who recorded them.",
        ),
    ] = "",
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help=f"Go on with those to come, until Ctrl-C. {POLLS} None is missed."
        ),
    ] = False,
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Print them, unless a command of the group does."""
    if context.invoked_subcommand is not None:
        return
    from leasehold.client import output as printer  # noqa: PLC0415
    from leasehold.client import watching  # noqa: PLC0415

    begin = _moment(since) if since else None

    async def once(leasehold: "Leasehold") -> "list[history_pb2.RecordedChange]":
        return _later((await leasehold.changes(device))[0], begin)

    if follow:
        ask(
            coordinator,
            lambda leasehold: watching.follow_history(
                leasehold, device, printer.Rows(printer.HISTORY, output), lambda found: _later(found, begin)
            ),
        )
    else:
        printer.show(ask(coordinator, once), printer.HISTORY, output)


@history.command(epilog=CODES)
def export(
    device: Device = "",
    after_revision: Annotated[
        int, typer.Option(metavar="REVISION", help="Only changes made after this etcd revision.", min=0)
    ] = 0,
    coordinator: Coordinators = None,
) -> None:
    """Print control changes as lines of JSON, in the order in which they were made.

    Each has the etcd revision that made it. Append the output to a file, and go on another time with
    --after-revision and the revision of its last line: nothing is missed and nothing comes twice. As the
    oldest changes of each device are forgotten, a gap in the numbers of a device says that it was too long
    ago.
    """
    from leasehold.client import output as printer  # noqa: PLC0415

    found, until = ask(coordinator, lambda leasehold: leasehold.changes(device, after=after_revision))
    for recorded in found:
        sys.stdout.write(json.dumps(printer.as_dict(recorded)) + "\n")
    sys.stdout.flush()
    say(f"{len(found)} changes, complete up to revision {until}")


def _moment(text: str) -> datetime:
    """The time that `text` names, or that is so long ago."""
    try:
        named = datetime.fromisoformat(text)
    except ValueError:
        pass
    else:
        # Without a zone it is the time of the person's own clock.
        return named.astimezone(UTC)
    try:
        ago = timedelta(seconds=seconds(text, "--since"))
    except (typer.BadParameter, OverflowError) as error:
        raise typer.BadParameter(
            f"{text!r} is no time: 90s, 5m, 2h or 7d ago, or 2026-01-31T12:00:00Z", param_hint="--since"
        ) from error
    return now() - ago


def _later(
    found: "list[history_pb2.RecordedChange]", begin: datetime | None
) -> "list[history_pb2.RecordedChange]":
    if begin is None:
        return found
    return [recorded for recorded in found if _recorded(recorded.change.recorded_at) >= begin]


def _recorded(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        # One that can not be read is shown rather than left out.
        return datetime.max.replace(tzinfo=UTC)
