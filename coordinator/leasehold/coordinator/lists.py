"""ControllerService, CoordinatorService and HistoryService: what can only be looked at."""

import logging
from collections.abc import Sequence
from typing import Any, cast

from leasehold.coordinator.admission import Admission
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.paging import page
from leasehold.runtime.api import answering
from leasehold.store.codec import Unreadable, decode, to_message
from leasehold.store.kv import MAX_OPERATIONS, KeyValue, get, get_prefix
from leasehold.store.records import (
    ControlChange,
    Controller,
    ControllerId,
    Coordinator,
    DeviceId,
    Drain,
    check_id,
)
from leasehold.v1 import (
    controllers_pb2,
    controllers_pb2_grpc,
    history_pb2,
    history_pb2_grpc,
    records_pb2,
)

_log = logging.getLogger(__name__)


TOGETHER = MAX_OPERATIONS // 2
"""Controllers that are read in one transaction, each with what it holds."""


class ControllerService(controllers_pb2_grpc.ControllerServiceServicer):
    """See `leasehold.v1.ControllerService`."""

    def __init__(self, ledger: Ledger, admission: Admission) -> None:
        self._keys = ledger.keys
        self._kv = ledger.kv
        self._cluster = ledger.cluster
        self._admission = admission

    async def ListControllers(  # noqa: N802
        self, request: controllers_pb2.ListControllersRequest, context: Any
    ) -> Any:
        async def handle() -> controllers_pb2.ListControllersResponse:
            with self._admission.reading():
                found = await page(self._kv, self._keys.controllers, request.page_size, request.page_token)
                names = [ControllerId(item.key.removeprefix(self._keys.controllers)) for item in found.items]
                statuses = []
                for start in range(0, len(names), TOGETHER):
                    statuses += await self._statuses(names[start : start + TOGETHER])
            return controllers_pb2.ListControllersResponse(statuses=statuses, next_page_token=found.token)

        return await answering(context, handle)

    async def _statuses(self, names: Sequence[ControllerId]) -> list[controllers_pb2.ControllerStatus]:
        """The registrations of those that still are, and what they hold, at one revision."""
        keys = self._keys
        reads = [
            read
            for name in names
            for read in (get(keys.controller(name)), get_prefix(keys.assignments(name), keys_only=True))
        ]
        _, ranges = await self._kv.read(*reads)
        statuses = []
        for name, items, assigned in zip(names, ranges[::2], ranges[1::2], strict=True):
            if not items:
                continue
            try:
                record = decode(Controller, items[0]).value
            except Unreadable as error:
                _log.error("it is not listed: %s", error)
                continue
            statuses.append(
                controllers_pb2.ControllerStatus(
                    controller=cast("records_pb2.Controller", to_message(record)),
                    devices=[item.key.removeprefix(keys.assignments(name)) for item in assigned],
                    failures=[
                        cast("records_pb2.Availability", to_message(lately))
                        for lately in self._cluster.failures(name)
                    ],
                    drain=_drain(self._cluster.drains.get(name)),
                )
            )
        return statuses


def _drain(drain: Drain | None) -> records_pb2.Drain | None:
    return cast("records_pb2.Drain", to_message(drain)) if drain else None


class CoordinatorService(controllers_pb2_grpc.CoordinatorServiceServicer):
    """See `leasehold.v1.CoordinatorService`."""

    def __init__(self, ledger: Ledger, admission: Admission) -> None:
        self._keys = ledger.keys
        self._kv = ledger.kv
        self._admission = admission

    async def ListCoordinators(  # noqa: N802
        self, request: controllers_pb2.ListCoordinatorsRequest, context: Any
    ) -> Any:
        async def handle() -> controllers_pb2.ListCoordinatorsResponse:
            with self._admission.reading():
                found = await page(self._kv, self._keys.coordinators, request.page_size, request.page_token)
            return controllers_pb2.ListCoordinatorsResponse(
                coordinators=map(_coordinator, found.items), next_page_token=found.token
            )

        return await answering(context, handle)


def _coordinator(item: KeyValue) -> records_pb2.Coordinator:
    """A registration; of one that can not be understood, its name."""
    try:
        return cast("records_pb2.Coordinator", to_message(decode(Coordinator, item).value))
    except Unreadable as error:
        _log.error("%s", error)
        return records_pb2.Coordinator(coordinator=item.key.rpartition("/")[2])


class HistoryService(history_pb2_grpc.HistoryServiceServicer):
    """See `leasehold.v1.HistoryService`."""

    def __init__(self, ledger: Ledger, admission: Admission) -> None:
        self._keys = ledger.keys
        self._kv = ledger.kv
        self._admission = admission

    async def ListControlChanges(  # noqa: N802
        self, request: history_pb2.ListControlChangesRequest, context: Any
    ) -> Any:
        async def handle() -> history_pb2.ListControlChangesResponse:
            if request.device:
                check_id("device", request.device)
                prefix = self._keys.history(DeviceId(request.device))
            else:
                prefix = self._keys.all_history
            with self._admission.reading():
                found = await page(
                    self._kv,
                    prefix,
                    request.page_size,
                    request.page_token,
                    changed_after=request.after_revision,
                )
            return history_pb2.ListControlChangesResponse(
                changes=map(recorded, found.items), next_page_token=found.token, revision=found.revision
            )

        return await answering(context, handle)


def recorded(item: KeyValue) -> history_pb2.RecordedChange:
    """A history entry; one that can not be understood is shown as just that, not left out."""
    try:
        change = cast("records_pb2.ControlChange", to_message(decode(ControlChange, item).value))
    except Unreadable as error:
        change = records_pb2.ControlChange(reason=str(error))
    return history_pb2.RecordedChange(change=change, revision=item.mod_revision)
