"""ControllerService, CoordinatorService and HistoryService: what can only be looked at."""

import logging
from collections import defaultdict
from typing import Any, cast

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.paging import page
from leasehold.coordinator.reading import Reader
from leasehold.runtime.api import answering
from leasehold.store.codec import Unreadable, decode, to_message
from leasehold.store.kv import KeyValue
from leasehold.store.records import ControlChange, ControllerId, Coordinator, DeviceId, check_id
from leasehold.v1 import (
    controllers_pb2,
    controllers_pb2_grpc,
    history_pb2,
    history_pb2_grpc,
    records_pb2,
)

_log = logging.getLogger(__name__)


class ControllerService(controllers_pb2_grpc.ControllerServiceServicer):
    """See `leasehold.v1.ControllerService`."""

    def __init__(self, cluster: Cluster, ledger: Ledger) -> None:
        self._reader = Reader(ledger.kv, cluster)

    async def ListControllers(  # noqa: N802
        self, request: controllers_pb2.ListControllersRequest, context: Any
    ) -> Any:
        async def handle() -> controllers_pb2.ListControllersResponse:
            now = await self._reader.everything()
            held: dict[ControllerId, list[str]] = defaultdict(list)
            for device in sorted(now.known_devices):
                holder = now.state(device).holder
                if holder:
                    held[holder.value.controller].append(device)
            failures = defaultdict(list)
            for device in sorted(now.known_devices):
                for name, lately in now.view(device).availability.items():
                    failures[name].append(cast("records_pb2.Availability", to_message(lately)))
            chosen, token = page(
                sorted(now.controllers), lambda name: name, request.page_size, request.page_token
            )
            statuses = [
                controllers_pb2.ControllerStatus(
                    controller=cast("records_pb2.Controller", to_message(now.controllers[name].value)),
                    devices=held[name],
                    failures=failures[name],
                )
                for name in chosen
            ]
            return controllers_pb2.ListControllersResponse(statuses=statuses, next_page_token=token)

        return await answering(context, handle)


class CoordinatorService(controllers_pb2_grpc.CoordinatorServiceServicer):
    """See `leasehold.v1.CoordinatorService`."""

    def __init__(self, cluster: Cluster, ledger: Ledger) -> None:
        self._keys = cluster.keys
        self._kv = ledger.kv

    async def ListCoordinators(  # noqa: N802
        self, request: controllers_pb2.ListCoordinatorsRequest, context: Any
    ) -> Any:
        async def handle() -> controllers_pb2.ListCoordinatorsResponse:
            snapshot = await self._kv.get_prefix(self._keys.coordinators)
            chosen, token = page(snapshot.items, lambda item: item.key, request.page_size, request.page_token)
            return controllers_pb2.ListCoordinatorsResponse(
                coordinators=[_coordinator(item) for item in chosen], next_page_token=token
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

    def __init__(self, cluster: Cluster, ledger: Ledger) -> None:
        self._keys = cluster.keys
        self._kv = ledger.kv

    async def ListControlChanges(  # noqa: N802
        self, request: history_pb2.ListControlChangesRequest, context: Any
    ) -> Any:
        async def handle() -> history_pb2.ListControlChangesResponse:
            if request.device:
                check_id("device", request.device)
                prefix = self._keys.history(DeviceId(request.device))
            else:
                prefix = self._keys.all_history
            snapshot = await self._kv.get_prefix(prefix)
            later = [item for item in snapshot.items if item.mod_revision > request.after_revision]
            chosen, token = page(later, lambda item: item.key, request.page_size, request.page_token)
            changes = [recorded(item) for item in chosen]
            return history_pb2.ListControlChangesResponse(
                changes=changes, next_page_token=token, revision=snapshot.revision
            )

        return await answering(context, handle)


def recorded(item: KeyValue) -> history_pb2.RecordedChange:
    """A history entry; one that can not be understood is shown as just that, not left out."""
    try:
        change = cast("records_pb2.ControlChange", to_message(decode(ControlChange, item).value))
    except Unreadable as error:
        change = records_pb2.ControlChange(reason=str(error))
    return history_pb2.RecordedChange(change=change, revision=item.mod_revision)
