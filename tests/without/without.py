"""Takes the guards away that LEASEHOLD_TEST_WITHOUT names, separated by commas.

For showing that the tests of what a guard keeps out do see it when the guard is not there. No program of ours
knows of this: it is imported by the interpreter before them.
"""

import os
from collections.abc import Callable
from typing import Any

NAME = "LEASEHOLD_TEST_WITHOUT"
_FAR = 3600 * 10**9
"""ns by which deadlines are put off."""


def gate() -> None:
    """The look at epoch and deadline before each request."""
    from leasehold.controller.gate import Gate  # noqa: PLC0415

    Gate.allows = lambda _self, _slot, _epoch: True  # type: ignore[assignment,method-assign]


def label() -> None:
    """The look at the label of the device before each write."""
    from leasehold.controller.label import Registration  # noqa: PLC0415

    Registration.stands = lambda _self: True  # type: ignore[assignment,method-assign]


def deadline() -> None:
    """That what a holder may do ends before its lease does."""
    from leasehold.controller.gate import Gate  # noqa: PLC0415

    def late(method: Callable[..., Any]) -> Callable[..., Any]:
        def put_off(self: Gate, *words: int, **more: bool) -> Any:
            *rest, when = words
            return method(self, *rest, when and when + _FAR, **more)

        return put_off

    Gate.open = late(Gate.open)  # type: ignore[method-assign]
    Gate.extend = late(Gate.extend)  # type: ignore[method-assign]
    Gate.set_session = late(Gate.set_session)  # type: ignore[method-assign]


def fencer() -> None:
    """Whatever the fencer does to those who are late."""
    from leasehold.controller.fencer.wards import Mount, Worker  # noqa: PLC0415

    Worker.kill = lambda _self, _now: None  # type: ignore[assignment,method-assign]
    Mount.ring = lambda _self, _now: None  # type: ignore[assignment,method-assign]


def hold_off() -> None:
    """A successor's wait after it has revoked the leases of earlier epochs."""
    from leasehold.controller.timing import Timing  # noqa: PLC0415

    Timing.wait_after_revocation = lambda _self, _policy, _lower, _ttl: 0.0  # type: ignore[assignment,method-assign]


def steward() -> None:
    """That the steward shuts a filesystem down at its deadline."""
    from leasehold.controller.filesystem.volume import Volume  # noqa: PLC0415

    Volume.ring = lambda _self: None  # type: ignore[assignment,method-assign]


def inside() -> None:
    """That an export is over only when nobody is inside."""
    from leasehold.controller.nbd.export import Export, State  # noqa: PLC0415

    def withdraw(self: Export, _drain: float) -> None:
        self._state = State.GONE

    Export.withdraw = withdraw  # type: ignore[assignment,method-assign]


def alone() -> None:
    """That a demount is proved by opening the block device alone."""
    from leasehold.controller.filesystem.volume import Volume  # noqa: PLC0415

    Volume._prove = lambda _self: None  # type: ignore[assignment,method-assign]


def session() -> None:
    """That a controller acts on no record of another instance or session of its name."""
    from leasehold.controller import activation, hold  # noqa: PLC0415
    from leasehold.store.records import Controller, Holder  # noqa: PLC0415

    def names(holder: Holder, me: Controller) -> bool:
        return holder.controller == me.controller

    hold.names = names
    activation.names = names  # type: ignore[attr-defined]


_ALL = (gate, label, deadline, fencer, hold_off, steward, inside, alone, session)
GUARDS = {guard.__name__: guard for guard in _ALL}

for name in filter(None, os.environ.get(NAME, "").split(",")):
    GUARDS[name]()
