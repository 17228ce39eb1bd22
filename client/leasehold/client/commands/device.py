"""`leasehold create`, `apply`, `delete` and `transfer`: what operators do with devices."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client import exits
from leasehold.client.options import (
    CODES,
    Coordinators,
    DeviceName,
    Form,
    Output,
    ask,
    group,
    one,
    say,
    seconds,
)
from leasehold.client.policies import FailBack, LostLease, Preemption

if TYPE_CHECKING:
    from leasehold.client.applying import Step
    from leasehold.client.connection import Leasehold

Unchecked = Annotated[
    bool,
    typer.Option(
        "--unchecked", help="Ask no controller whether it could serve the device, if none runs yet."
    ),
]

create = group("Make something known.")
delete = group("Forget something.")


@create.command("device", epilog=CODES)
def create_device(
    device: DeviceName,
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
    path_template: Annotated[
        str, typer.Option(metavar="URI", help="What clients get, made of {path}, {data_host}, {epoch}, ...")
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY=VALUE", help="By what requests may choose it; may be repeated."),
    ] = None,
    preemption: Annotated[
        Preemption, typer.Option(help="Whether a client loses it to one of higher priority.")
    ] = Preemption.NEVER,
    preemption_grace: Annotated[
        int, typer.Option(help="Seconds that a client then has to stop; 0 for the default.", min=0)
    ] = 0,
    min_hold: Annotated[
        int, typer.Option(help="Seconds for which a controller serves it at least.", min=0)
    ] = 0,
    cool_down: Annotated[
        int, typer.Option(help="Seconds for which it stays where it was used last.", min=0)
    ] = 0,
    fail_back: Annotated[
        FailBack, typer.Option(help="Whether it goes back to its first controller when nobody uses it.")
    ] = FailBack.STAY,
    on_lost_lease: Annotated[
        LostLease, typer.Option(help="Whether its holder goes on while etcd does not answer.")
    ] = LostLease.STOP,
    unchecked: Unchecked = False,
    output: Output = Form.TABLE,
    coordinator: Coordinators = None,
) -> None:
    """Make a device known. The same once more is accepted.

    The controllers that may hold it are asked whether they could serve it.
    """
    from leasehold.client import output as printer  # noqa: PLC0415

    parameters = _pairs(parameter, "-p")
    labels = _pairs(label, "--label")
    if backing is not None:
        parameters["backing"] = str(backing.absolute())
    eligible = [name.strip() for name in controllers.split(",") if name.strip()]
    found = ask(
        coordinator,
        lambda leasehold: one(
            leasehold.create_device(
                device,
                driver,
                parameters,
                controllers=eligible,
                ttl=ttl,
                strict=strict,
                path_template=path_template,
                labels=labels,
                preemption=preemption.value,
                preemption_grace=preemption_grace,
                min_hold=min_hold,
                cool_down=cool_down,
                fail_back=fail_back.value,
                on_lost_lease=on_lost_lease.value,
                unchecked=unchecked,
            )
        ),
    )
    printer.show(found, printer.DEVICES, output)


def apply(
    file: Annotated[str, typer.Option("--file", "-f", metavar="FILE", help="Devices in YAML; - for stdin.")],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change and whether it would be accepted.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before changing anything.")] = False,
    unchecked: Unchecked = False,
    coordinator: Coordinators = None,
) -> None:
    """Make devices what a file says: create those that are not there, change those that differ.

    \b
    device: disk-1                        its id
    driver: nbd                           by default nbd
    parameters: {backing: /srv/1.img}     for the driver
    controllers: [b, a]                   that may hold it, best first; by default any
    ttl_seconds: 20                       of its holder's lease; by default the cluster's
    takeover: strict                      or hold-off, the default
    path_template: "{path}?tls=on"        what clients get; by default the driver's path
    labels: {pool: gold}                  by what a request may choose it
    preemption: lower                     or at-safe-point, or never, the default
    preemption_grace_seconds: 60          that a client then has to stop; by default 30
    min_hold_seconds: 300                 for which a controller serves it at least
    cool_down_seconds: 30                 for which it stays where it was used last
    fail_back: preferred                  or stay, the default
    on_lost_lease: continue               or stop, the default: while etcd does not answer

    One device, a list of them, or several documents separated by ---. A field that is left out gets its
    default. What "leasehold get devices -o yaml" prints is taken as well, and then refused where the device
    was changed since. Devices that the file does not name are left alone.

    What would change is printed to stdout. Coordinators are asked whether they would accept all of it before
    any of it is done, and they ask the controllers whether they could serve it. While a device is held, its
    driver and parameters stay as they are, and its holder stays among the controllers; path_template stays
    while a client has access; ttl_seconds and takeover apply from its next epoch on, the rest at once.
    """
    from leasehold.client import applying, manifest  # noqa: PLC0415

    entries = manifest.parse(_read(file), "stdin" if file == "-" else file)
    steps = ask(coordinator, lambda leasehold: applying.plan(leasehold, entries))
    todo = [step for step in steps if step.verb]
    for step in todo:
        sys.stdout.write(f"{step.verb} device {step.entry.device}\n")
        sys.stdout.writelines(f"{line}\n" for line in step.lines)
    sys.stdout.flush()
    if not todo:
        say(f"nothing to change: {len(steps)} of {len(steps)} devices are as the file says")
        return
    _carry_out(coordinator, todo, validate_only=True, unchecked=unchecked)
    if dry_run:
        say("nothing was changed: this was a dry run")
        return
    if not yes:
        _confirm(f"Change {len(todo)} of {len(steps)} devices?")
    _carry_out(coordinator, todo, validate_only=False, unchecked=unchecked)


@delete.command("device", epilog=CODES)
def delete_device(
    device: DeviceName,
    *,
    release: Annotated[
        bool,
        typer.Option("--release", help="First take back every request for it, if no controller holds it."),
    ] = False,
    coordinator: Coordinators = None,
) -> None:
    """Forget a device. Its data are not touched, and its epochs are kept, so that none is given out twice.

    Refused while somebody asks for it or has access, while a controller holds it, and while an epoch of it is
    not proved to be over. A controller keeps what it holds, wanted or not, until somebody else wants it or it
    is stopped in order (SIGTERM); the refusal names it.
    """

    async def work(leasehold: "Leasehold") -> list[str]:
        from leasehold.client.errors import Refused  # noqa: PLC0415

        ended = []
        if release:
            holder = (await leasehold.device(device)).holder.controller
            if holder:
                # Ending accesses and then being refused would be the worst of both.
                raise Refused(
                    f"device {device} is held by {holder}, and nothing but {holder} can give it up: end the "
                    f"requests for it (leasehold get requests --device {device}, leasehold release REQUEST), "
                    f"stop controller {holder} in order (SIGTERM), and delete the device then",
                    "DEVICE_IN_USE",
                    {"device": device, "holder": holder},
                )
            for status in await leasehold.requests(device):
                await leasehold.release(status.request.request)
                ended.append(status.request.request)
        await leasehold.delete_device(device)
        return ended

    for request in ask(coordinator, work):
        say(f"request {request} was ended")
    say(f"device {device} is deleted")


def transfer(
    device: DeviceName,
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

    limit = seconds(wait, "--wait")
    found = ask(
        coordinator,
        lambda leasehold: one(leasehold.transfer(device, to, reason=reason, timeout=limit)),
    )
    printer.show(found, printer.DEVICES, output)


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    found = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=option)
        found[key] = value
    return found


def _read(file: str) -> str:
    from leasehold.client.errors import BadRequest  # noqa: PLC0415

    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{file} is not text in UTF-8: {error}", "BAD_FILE") from error
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}", param_hint="--file") from error


def _carry_out(
    coordinator: list[str] | None, steps: "list[Step]", *, validate_only: bool, unchecked: bool
) -> None:
    """Do it and say so; what fails is said, and ends the command with the code of the first."""
    from leasehold.client import applying  # noqa: PLC0415

    failures = ask(
        coordinator,
        lambda leasehold: applying.carry_out(
            leasehold, steps, validate_only=validate_only, unchecked=unchecked
        ),
    )
    failed = {failure.entry.device for failure in failures}
    if not validate_only:
        for step in steps:
            if step.entry.device not in failed:
                say(f"device {step.entry.device} {step.verb}d")
    for failure in failures:
        say(f"{failure.entry.where}: {failure.error}")
    if failures:
        if validate_only:
            say("nothing was changed")
        raise typer.Exit(exits.code_of(failures[0].error))


def _confirm(question: str) -> None:
    if not _is_person():
        raise typer.BadParameter("nobody can be asked here: give --yes, or --dry-run", param_hint="--yes")
    if not typer.confirm(question, err=True):
        say("nothing was changed")
        raise typer.Exit(exits.BROKEN)


def _is_person() -> bool:
    return sys.stdin.isatty()
