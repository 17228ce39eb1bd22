"""What a coordinator writes: transactions, each followed by the mirror catching up with it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.planner import (
    Assign,
    Decision,
    Direct,
    Give,
    Preempt,
    PutBack,
    Ready,
    Reject,
    Spare,
    Wait,
)
from leasehold.coordinator.view import DeviceView, Waiting
from leasehold.store import ownership, requests
from leasehold.store.keys import Keys
from leasehold.store.kv import Get, Kv, Operation, absent, empty
from leasehold.store.ownership import Answering, Author
from leasehold.store.records import ANY, AccessRequest, RequestState
from leasehold.store.requests import QueueSeen, decided_for
from leasehold.store.transaction import Applied, Refused, Transaction, commit

_log = logging.getLogger(__name__)

COMMIT_TIMEOUT = 5.0
"""Seconds for one transaction, its retries included."""
CATCH_UP = 2.0
"""Seconds that the mirror may lag behind a transaction of our own before we go on regardless."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The one place from which a coordinator writes."""

    kv: Kv
    cluster: Cluster
    name: str

    @property
    def keys(self) -> Keys:
        return self.cluster.keys

    @property
    def author(self) -> Author:
        return Author(self.keys, self.name)

    async def commit(
        self, transaction: Transaction, otherwise: Sequence[Operation] = ()
    ) -> Applied | Refused:
        """Settle a transaction, and wait until the mirror shows its result, or why it was refused."""
        outcome = await commit(self.kv, transaction, timeout=COMMIT_TIMEOUT, otherwise=otherwise)
        if isinstance(outcome, Refused) and outcome.lease_gone:
            # The session that is gone is about to be seen; a read tells up to where to look.
            reached, _ = await self.kv.read(Get(self.keys.prefix))
        else:
            reached = outcome.revision
        if isinstance(outcome, Applied):
            await self.cluster.reached(reached, CATCH_UP)
        else:
            await self._passed(reached)
        return outcome

    async def _passed(self, revision: int) -> None:
        # The revision of a refusal may lie outside our prefix and never come by. What it was refused for lies
        # within, and comes at once or has come.
        await self.cluster.reached(revision, 0.05)

    def transaction(self, view: DeviceView, decision: Decision) -> Transaction | None:
        """The transaction that carries out a decision about requests that stand in the queue; None to wait.

        For one that has just arrived, its submission is part of it.
        """
        queue = _seen(view)
        match decision:
            case Wait() | Ready():
                return None
            case Assign(reason, target, waiting):
                if waiting is None:
                    return self._unpaused(
                        ownership.assign(self.author, view.state, target, reason=reason), view
                    )
                answering = _answering(waiting, view)
                made = ownership.assign(self.author, view.state, target, reason=reason, answering=answering)
                return self._unpaused(self._for(made, queue, waiting, answering), view)
            case Direct(reason, target, waiting):
                if waiting is None:
                    made = ownership.direct(self.author, view.state, target, reason=reason)
                    return self._unpaused(self._unused(made, view, queue), view)
                answering = _answering(waiting, view)
                made = ownership.direct(self.author, view.state, target, reason=reason, answering=answering)
                return self._unpaused(self._for(made, queue, waiting, answering), view)
            case Give(reason, waiting):
                return self._give(view, queue, waiting, reason)
            case Preempt(_, waiting, grace):
                return self._preempt(view, waiting, grace)
            case Spare():
                return requests.spare(view.state)
            case PutBack(_, waiting):
                return None if waiting.stored is None else requests.put_back(self.keys, waiting.stored)
            case Reject(reason, waiting):
                if waiting.stored is None:
                    return None
                return requests.refuse(self.keys, waiting.stored, RequestState.REJECTED, reason=reason)

    def together(self, views: Sequence[DeviceView], waiting: Waiting, reason: str) -> Transaction | None:
        """The transaction that grants a request all its devices, `views`, at each of which it is its turn."""
        if waiting.stored is None or waiting.client is None:
            return None
        first, *rest = views
        return requests.grant(
            self.keys,
            first.state,
            _seen(first),
            waiting.stored,
            waiting.client,
            reason=reason,
            others=[(view.state, _seen(view)) for view in rest],
        )

    def _give(self, view: DeviceView, queue: QueueSeen, waiting: Waiting, reason: str) -> Transaction | None:
        if waiting.stored is None:
            return requests.submit_granted(
                self.keys, view.state, queue, _allotted(waiting, view), reason=reason
            )
        if waiting.client is None:
            return None
        return requests.grant(self.keys, view.state, queue, waiting.stored, waiting.client, reason=reason)

    def _preempt(self, view: DeviceView, waiting: Waiting, grace: int) -> Transaction | None:
        if waiting.stored is None:
            return None
        made = requests.preempt(view.state, waiting.stored, grace_seconds=grace)
        if waiting.request.device:
            return made
        # It is not to be told at another device as well to stop for this request.
        return requests.allot(self.keys, made, waiting.stored, _allotted(waiting, view))

    def _unpaused(self, made: Transaction, view: DeviceView) -> Transaction:
        """Nothing changes hands by itself once somebody was told that it is paused."""
        pauses = (absent(self.keys.pause(view.device)), absent(self.keys.pause(ANY)))
        return replace(made, compares=(*made.compares, *pauses))

    def _unused(self, made: Transaction, view: DeviceView, queue: QueueSeen) -> Transaction:
        """What is moved because nobody uses it is not moved under somebody who has just been given it."""
        if view.state.grants:
            return made
        seen = (empty(self.keys.grants(view.device)), *queue.compares(self.keys))
        return replace(made, compares=(*made.compares, *seen))

    def _for(
        self, made: Transaction, queue: QueueSeen, waiting: Waiting, answering: Answering
    ) -> Transaction:
        if waiting.stored is None:
            # Its outcome is found by the change in the history, which only this transaction writes.
            made = made.with_(requests.submit(self.keys, answering.request))
        elif not waiting.request.device:
            made = requests.allot(self.keys, made, waiting.stored, answering.request)
        return decided_for(self.keys, made, queue, waiting.stored)


def _seen(view: DeviceView) -> QueueSeen:
    spec = view.state.spec
    return QueueSeen(view.device, view.state.revision, pooled=bool(spec and spec.value.labels))


def _allotted(waiting: Waiting, view: DeviceView) -> AccessRequest:
    """The request as one for this device, if any of a selector would do."""
    request = waiting.request
    return request if request.device else requests.allotted(request, view.device)


def _answering(waiting: Waiting, view: DeviceView) -> Answering:
    if waiting.stored is None:
        return Answering(requests.pending(_allotted(waiting, view)))
    if not waiting.request.device:
        return Answering(_allotted(waiting, view), waiting.stored.kv.value)
    return Answering(waiting.request, waiting.stored.kv.value, waiting.stored.mod_revision)
