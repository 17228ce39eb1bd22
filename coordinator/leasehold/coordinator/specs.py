"""What operators say of devices: put, replaced, removed.

A spec is no part of who holds what, so it is not written by an ownership transaction. But a holder acts on
the spec that it has read, and a successor fences with the one that it reads; so what these transactions may
change depends on the holder and the epochs, and each compares both.

    while                      driver, parameters   controllers           path_template   ttl, takeover
                                                                                          and policies
    -----------------------------------------------------------------------------------------------------
    ACTIVATING or YIELDING     no                   no                    no              no
    ACTIVE                     no                   if the holder stays   if no client    yes, the first two
                                                                          has access      for the next epoch
    not held, but unreleased   no                   yes                   yes             yes
    free                       yes                  yes                   yes             yes

An epoch that is not proved to be over may still write to the device that the old driver and parameters name,
and a fence by the new ones would not stop it. A device on its way is activated under the spec its next holder
has read, and an activation that finds another one is given up: so the change waits rather than breaks it.
The paths of clients are made from the template whenever they are told, so it stays as it is under their feet.
Policies are the labels and what says when a device changes hands: only coordinators look at them, at each
decision.
"""

import logging
from collections.abc import Sequence

import grpc

from leasehold.coordinator.checking import Checker
from leasehold.coordinator.desk import no_device
from leasehold.coordinator.ledger import CATCH_UP, Ledger
from leasehold.coordinator.paths import check_template
from leasehold.coordinator.reading import Reader
from leasehold.coordinator.view import DeviceView
from leasehold.runtime.api import ApiError, require
from leasehold.store.codec import Stored, decode, encode, from_message
from leasehold.store.kv import Compare, absent, delete, empty, get, put, unchanged
from leasehold.store.leases import LEAST_TTL, LONGEST_TTL
from leasehold.store.ownership import DeviceState
from leasehold.store.records import VERSION, Device, DeviceId, HolderState, check_id
from leasehold.store.transaction import Applied, Transaction, new_change_id
from leasehold.v1 import records_pb2

_log = logging.getLogger(__name__)

LONGEST_PARAMETER = 4096
MOST_PARAMETERS = 64
MOST_CONTROLLERS = 256
MOST_LABELS = 16
LONGEST_LABEL = 63
LONGEST_GRACE = 3600
LONGEST_HOLD = 86400
CHECKED = frozenset({"driver", "parameters", "controllers"})
"""Fields about which the controllers are asked."""
ATTEMPTS = 5
"""How often an update is tried anew because the device changed hands meanwhile."""


class Specs:
    """See the module. Every method raises `ApiError`, and what the store raises."""

    def __init__(self, ledger: Ledger, reader: Reader, checker: Checker) -> None:
        self._ledger = ledger
        self._reader = reader
        self._checker = checker

    async def create(self, spec: Device, *, validate_only: bool = False, unchecked: bool = False) -> None:
        """Put it, unless it stands already; the same once more is accepted.

        Controllers are asked whether they could serve it, unless it is to be put `unchecked`.
        """
        key = self._ledger.keys.device(spec.device)
        found = await self._ledger.kv.get(key)
        if found is not None:
            if decode(Device, found).value != spec:
                raise _taken(spec.device)
            return
        if not unchecked:
            await self._checker.check(spec)
        if validate_only:
            return
        transaction = Transaction(
            # Two callers that create the same device are both right, so any proof that it stands will do.
            change=new_change_id(),
            proof_key=key,
            compares=(absent(key),),
            operations=(put(key, encode(spec)),),
        )
        outcome = await self._ledger.commit(transaction, (get(key),))
        if isinstance(outcome, Applied):
            _log.info("device %s created, driver %s", spec.device, spec.driver)
        elif decode(Device, outcome.ranges[0][0]).value != spec:
            raise _taken(spec.device)

    async def update(
        self, spec: Device, etag: str, *, validate_only: bool = False, unchecked: bool = False
    ) -> None:
        """Replace what stands by `spec`, if it still is what `etag` stands for; an empty one asks nothing.

        Controllers are asked as by `create`, if what they would have to serve, or who may, changes.

        Where `spec` stands already, nothing is changed, whatever the etag: a caller whose answer was lost
        asks again.
        """
        for _ in range(ATTEMPTS):
            view = await self._reader.device(spec.device)
            stands = _updatable(view, spec, etag)
            fields = changed(stands.value, spec)
            if not unchecked and CHECKED.intersection(fields):
                await self._checker.check(spec)
                # Once is enough, however often the device changes hands meanwhile.
                unchecked = True
            if validate_only or not fields:
                return
            state = view.state
            result = await self._ledger.kv.txn(
                (
                    unchanged(stands.key, stands.mod_revision),
                    *self._as_seen(state),
                    *self._without_clients(state, fields),
                ),
                (put(stands.key, encode(spec, stands.kv.value)),),
            )
            if result.succeeded:
                await self._ledger.cluster.reached(result.revision, CATCH_UP)
                _log.info("device %s updated: %s", spec.device, ", ".join(fields))
                return
        raise ApiError(
            grpc.StatusCode.ABORTED,
            "CONTENDED",
            f"device {spec.device} changed {ATTEMPTS} times meanwhile: try again",
            device=spec.device,
        )

    async def delete(self, view: DeviceView) -> None:
        """Remove the spec of a device that is free and that nobody asks for."""
        state = view.state
        refused = _in_use(view)
        if refused is not None:
            raise refused
        if state.spec is None:
            raise no_device(view.device)
        keys = self._ledger.keys
        outcome = await self._ledger.kv.txn(
            (
                unchanged(state.spec.key, state.spec.mod_revision),
                empty(keys.queue(view.device)),
                empty(keys.grants(view.device)),
                *self._as_seen(state),
            ),
            # The record of its epochs stays: a device of this id must never repeat one.
            (delete(state.spec.key),),
        )
        if not outcome.succeeded:
            raise _refused(view.device, "it came into use meanwhile: look at it again")
        _log.info("device %s deleted", view.device)

    def _without_clients(self, state: DeviceState, fields: Sequence[str]) -> tuple[Compare, ...]:
        """Where a client could have a path of the holder's, and paths are to become others: none has."""
        if state.holder is None or "path_template" not in fields:
            return ()
        # A grant where the device is leaves the holder's record as it was.
        return (empty(self._ledger.keys.grants(state.device)),)

    def _as_seen(self, state: DeviceState) -> tuple[Compare, ...]:
        """Neither the holder nor the epochs have changed."""
        keys, device = self._ledger.keys, state.device
        holder, epochs = state.holder, state.epochs
        return (
            unchanged(holder.key, holder.mod_revision) if holder else absent(keys.holder(device)),
            unchanged(epochs.key, epochs.mod_revision) if epochs else absent(keys.epoch(device)),
        )


def changed(before: Device, after: Device) -> list[str]:
    """The fields in which two specs differ."""
    fields = (
        "driver",
        "parameters",
        "controllers",
        "ttl_seconds",
        "takeover",
        "path_template",
        "labels",
        "preemption",
        "preemption_grace_seconds",
        "min_hold_seconds",
        "cool_down_seconds",
        "fail_back",
        "on_lost_lease",
    )
    return [name for name in fields if getattr(before, name) != getattr(after, name)]


def _updatable(view: DeviceView, spec: Device, etag: str) -> Stored[Device]:
    """The spec that stands, if `spec` may take its place. Raises `ApiError`."""
    state, stands = view.state, view.state.spec
    if state.unreadable:
        raise _not_updated(view, "spec", state.unreadable)
    if stands is None:
        raise no_device(view.device)
    fields = changed(stands.value, spec)
    if not fields:
        return stands
    if etag and etag != str(stands.mod_revision):
        raise ApiError(
            grpc.StatusCode.ABORTED,
            "ETAG_CHANGED",
            f"device {spec.device} was changed since it was read (etag {etag}, now {stands.mod_revision}): "
            "read it again, and decide anew",
            device=spec.device,
            etag=stands.mod_revision,
        )
    holder = state.holder.value if state.holder else None
    if holder is not None and holder.state is not HolderState.ACTIVE:
        doing = "it is on its way" if holder.state is HolderState.YIELDING else "it is being activated"
        raise _not_updated(view, fields[0], f"{doing}: try again once it is served")
    fixed = [name for name in fields if name in ("driver", "parameters")]
    if fixed and (holder is not None or state.unreleased):
        who = f"{holder.controller} holds" if holder else f"{state.unreleased[-1].controller} may still hold"
        raise _not_updated(
            view,
            fixed[0],
            f"{who} it as it was: only what is neither its driver nor its parameters may change until"
            " it is free",
        )
    if "path_template" in fields and holder is not None and state.grants:
        clients = ", ".join(grant.value.client for grant in state.grants)
        raise _not_updated(
            view,
            "path_template",
            f"{clients} has a path made by it: end that access first, or wait for its end",
        )
    if holder is not None and spec.controllers and holder.controller not in spec.controllers:
        raise _not_updated(
            view, "controllers", f"{holder.controller} holds it and is not among them: transfer it first"
        )
    return stands


def _in_use(view: DeviceView) -> ApiError | None:
    state = view.state
    if state.unreadable:
        return _refused(view.device, state.unreadable)
    if view.queue or state.grants:
        return _refused(view.device, "clients ask for it or have access: release their requests first")
    if state.holder:
        holder = state.holder.value
        return _refused(
            view.device,
            f"{holder.controller} holds it in epoch {holder.epoch}: stop that controller in order (SIGTERM), "
            "which gives up what it holds, and delete the device before it is asked for again",
        )
    if state.unreleased:
        last = state.unreleased[-1]
        return _refused(
            view.device,
            f"epoch {last.epoch} is not proved to be over: start controller {last.controller} again, which "
            "proves it, or have the device taken over",
        )
    return None


def _refused(device: DeviceId, why: str) -> ApiError:
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "DEVICE_IN_USE",
        f"device {device} can not be deleted: {why}",
        device=device,
    )


def _not_updated(view: DeviceView, field: str, why: str) -> ApiError:
    holder = view.state.holder.value if view.state.holder else None
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NOT_UPDATED",
        f"{field} of device {view.device} can not be changed now: {why}",
        device=view.device,
        field=field,
        holder=holder.controller if holder else "",
        epoch=view.state.epoch,
    )


def _taken(device: DeviceId) -> ApiError:
    return ApiError(
        grpc.StatusCode.ALREADY_EXISTS,
        "DEVICE_EXISTS",
        f"device {device} exists already with another spec: update or delete it, or choose another id",
        device=device,
    )


def checked_spec(message: records_pb2.Device) -> Device:
    """The spec an operator gives, checked field by field. Raises `InvalidId` and `ApiError`."""
    check_id("device", message.device)
    check_id("driver", message.driver)
    require(len(message.controllers) <= MOST_CONTROLLERS, "controllers", f"at most {MOST_CONTROLLERS}")
    for controller in message.controllers:
        check_id("controllers", controller)
    require(len(set(message.controllers)) == len(message.controllers), "controllers", "named once each")
    require(len(message.parameters) <= MOST_PARAMETERS, "parameters", f"at most {MOST_PARAMETERS}")
    for name, value in message.parameters.items():
        check_id("parameters", name)
        require(
            len(value) <= LONGEST_PARAMETER and value.isprintable(),
            f"parameters.{name}",
            f"printable and at most {LONGEST_PARAMETER} characters",
        )
    ttl = message.ttl_seconds
    require(
        ttl == 0 or LEAST_TTL <= ttl <= LONGEST_TTL,
        "ttl_seconds",
        f"0 for the default, or from {LEAST_TTL} to {LONGEST_TTL}",
    )
    require(message.version in (0, VERSION), "version", str(VERSION))
    check_template(message.path_template)
    known = records_pb2.TakeoverPolicy.values()
    require(message.takeover in known, "takeover", "HOLD_OFF or STRICT")
    _check_policies(message)
    complete = records_pb2.Device()
    complete.CopyFrom(message)
    complete.version = VERSION
    return from_message(Device, complete)


def _check_policies(message: records_pb2.Device) -> None:
    require(len(message.labels) <= MOST_LABELS, "labels", f"at most {MOST_LABELS}")
    for name, value in message.labels.items():
        check_id("labels", name)
        require(
            0 < len(value) <= LONGEST_LABEL and value.isprintable(),
            f"labels.{name}",
            f"printable, not empty and at most {LONGEST_LABEL} characters",
        )
    preemption = records_pb2.PreemptionPolicy.values()
    require(message.preemption in preemption, "preemption", "NEVER, LOWER or AT_SAFE_POINT")
    require(message.fail_back in records_pb2.FailBackPolicy.values(), "fail_back", "STAY or PREFERRED")
    lost_lease = records_pb2.LostLeasePolicy.values()
    require(message.on_lost_lease in lost_lease, "on_lost_lease", "STOP or CONTINUE")
    for name, seconds, longest in (
        ("preemption_grace_seconds", message.preemption_grace_seconds, LONGEST_GRACE),
        ("min_hold_seconds", message.min_hold_seconds, LONGEST_HOLD),
        ("cool_down_seconds", message.cool_down_seconds, LONGEST_HOLD),
    ):
        require(0 <= seconds <= longest, name, f"from 0 to {longest}")
