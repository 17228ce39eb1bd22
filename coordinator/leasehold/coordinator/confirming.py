"""A person's word that a controller is dead, where nothing can prove it.

The word stands in for a fence, so it is taken only where nothing contradicts it: while the controller is
registered as the very start that was given the epoch, or its record as the holder stands, it is refused. What
was read is compared by the transaction, and the word is recorded in it.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from leasehold.coordinator.ledger import Ledger
from leasehold.runtime import caller
from leasehold.runtime.api import ApiError, require
from leasehold.store import ownership
from leasehold.store.codec import Unreadable, decode
from leasehold.store.kv import get
from leasehold.store.ownership import DeviceState, NotPossible, device_reads, device_state
from leasehold.store.records import ChangeKind, ControlChange, ControllerId, DeviceId, Epoch
from leasehold.store.transaction import Applied

_log = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often it is tried anew because the device or the registration changed meanwhile."""
LONGEST_NAME = 253


@dataclass(frozen=True, slots=True)
class Word:
    """Who says that which controller is dead, and how they know."""

    controller: ControllerId
    operator: str
    reason: str


def operator(name: str, context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    """The person, as they call themselves, and in parentheses who they are to `caller`. Raises ApiError."""
    name = name.strip()
    fits = 0 < len(name) <= LONGEST_NAME and name.isprintable() and not set("()") & set(name)
    require(fits, "operator", "the name of who says so, printable and without parentheses")
    known = caller.shown(context)
    return f"{name} ({known})" if known else name


class Confirming:
    """See the module."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def confirm(self, device: DeviceId, word: Word) -> list[Epoch]:
        """Release the controller's epochs. Which they were. Raises ApiError, StoreError."""
        keys, controller = self._ledger.keys, word.controller
        for _ in range(ATTEMPTS):
            reads = device_reads(keys, device)
            revision, ranges = await self._ledger.kv.read(*reads, get(keys.controller(controller)))
            state = device_state(device, revision, ranges)
            registered = ranges[len(reads)]
            try:
                made = ownership.confirm_dead(
                    self._ledger.author,
                    state,
                    controller,
                    registered[0] if registered else None,
                    operator=word.operator,
                    reason=word.reason,
                )
            except NotPossible as error:
                if earlier := await self._taken_before(device, word, state):
                    return earlier
                raise _refused(state, controller, error.reason) from error
            if isinstance(await self._ledger.commit(made), Applied):
                epochs = [item.epoch for item in state.unreleased if item.controller == controller]
                _log.warning(
                    "device %s: %s confirmed that %s is dead, epochs %s are released: %s",
                    device,
                    word.operator,
                    controller,
                    ", ".join(map(str, epochs)),
                    word.reason,
                )
                return epochs
        raise ApiError(
            grpc.StatusCode.ABORTED,
            "CONTENDED",
            f"device {device} or controller {controller} changed {ATTEMPTS} times meanwhile: look again",
            device=device,
            controller=controller,
        )

    async def _taken_before(self, device: DeviceId, word: Word, state: DeviceState) -> list[Epoch]:
        """The epoch released by this very word, if its answer was lost and it is given again."""
        if state.unreadable or any(item.controller == word.controller for item in state.unreleased):
            return []
        changes = await self._ledger.kv.get_prefix(self._ledger.keys.history(device))
        for item in reversed(changes.items):
            with suppress(Unreadable):
                change = decode(ControlChange, item).value
                # It may have been given again by another way, and be told with another certificate.
                said = (_called(change.operator), change.reason)
                if change.lost is not None and change.lost.controller == word.controller:
                    same = change.kind is ChangeKind.CONFIRMED_DEAD and said == (
                        _called(word.operator),
                        word.reason,
                    )
                    return [change.lost.epoch] if same else []
        return []


def _called(operator: str) -> str:
    """How the person calls themselves."""
    return operator.partition(" (")[0]


def _refused(state: DeviceState, controller: ControllerId, why: str) -> ApiError:
    holder = state.holder.value if state.holder else None
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NOT_CONFIRMED",
        f"that {controller} is dead for device {state.device} is not taken: {why}",
        device=state.device,
        controller=controller,
        holder=holder.controller if holder else "",
        epoch=state.epoch,
    )
