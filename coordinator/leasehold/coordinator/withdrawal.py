"""Access that is taken from a client for another of higher priority, once it has stopped or had its time."""

from leasehold.coordinator.cluster import Cluster
from leasehold.store import requests
from leasehold.store.codec import Stored
from leasehold.store.records import AccessRequest, Grant, PreemptedPolicy
from leasehold.store.transaction import Transaction


def marked(cluster: Cluster, request: AccessRequest) -> Grant | None:
    """The grant of `request` that is to be taken; None if none is."""
    for device in request.all_devices:
        for grant in cluster.state(device).grants:
            if grant.value.request == request.request and grant.value.preempted_by:
                return grant.value
    return None


def withdraw(cluster: Cluster, stored: Stored[AccessRequest], grant: Grant) -> Transaction:
    """The transaction by which a request loses what it has: it waits again or is over, as was asked.

    Its path is dead with the next grant even where the device stays: its session goes on, and it may err.
    """
    by = cluster.requests.get(grant.preempted_by)
    reason = f"{grant.device} was taken for request {grant.preempted_by}, which has a higher priority"
    states = [cluster.state(device) for device in stored.value.all_devices]
    if stored.value.on_preemption is PreemptedPolicy.REQUEUE and by is not None:
        return requests.requeue(cluster.keys, states, stored, after=by.value, reason=reason)
    return requests.end(cluster.keys, states, stored, reason=reason, path_exposed=True)
