"""`leasehold confirm-dead`: a person's word where nothing can be proved."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client import exits
from leasehold.client.options import Coordinators, ask, one, say

if TYPE_CHECKING:
    from leasehold.v1 import devices_pb2


def confirm_dead(
    controller: Annotated[str, typer.Argument(metavar="CONTROLLER", help="Its name.")],
    *,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="The device that waits for it.")],
    reason: Annotated[str, typer.Option(help="How you know. It is kept in the history, with your name.")],
    operator: Annotated[str, typer.Option(metavar="NAME", help="Who says so. By default user@host.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    coordinator: Coordinators = None,
) -> None:
    """Vouch that a controller is dead, so that a device it held can be given to another.

    Needed where a device stands at FENCE_UNAVAILABLE: its driver can not make a controller stop that only
    fell silent. Your word takes the place of the proof. Say it only of a host that is switched off, or that
    can never reach the device again; if it still writes, it destroys the data under whoever comes next.

    Refused while that controller is registered as the start that held the device, or is its holder. If it can
    be started again, do that instead: it proves what is left of it, and releases the device by itself.
    """
    if not yes:
        _be_sure(ask(coordinator, lambda leasehold: one(leasehold.device(device)))[0], device, controller)
    answer = ask(
        coordinator,
        lambda leasehold: one(leasehold.confirm_dead(device, controller, reason=reason, operator=operator)),
    )[0]
    epochs = ", ".join(map(str, answer.epochs))
    say(f"device {device}: what {controller} held is released, epoch {epochs}; {answer.status.reason}")


def _be_sure(status: "devices_pb2.DeviceStatus", device: str, controller: str) -> None:
    """Ask whether that is so. Raises `typer.Exit` if it is not, `typer.BadParameter` if nobody is there."""
    if not is_person():
        raise typer.BadParameter("nobody can be asked here: give --yes", param_hint="--yes")
    epochs = [str(item.epoch) for item in status.epochs.unreleased if item.controller == controller]
    say(f"device {device}: {status.reason}")
    say(f"epochs of {controller} that would be released without proof: {', '.join(epochs) or 'none'}")
    say(f"if {controller} still reaches {device}, it writes beside its successor, and the data are lost")
    if not typer.confirm(f"Is {controller} switched off, or cut off from {device} for good?", err=True):
        say("nothing was changed")
        raise typer.Exit(exits.BROKEN)


def is_person() -> bool:
    """Whether there is somebody to be asked."""
    return sys.stdin.isatty()
