"""What an operator says of a device beside what it is: its labels, and when it changes hands.

What people write, and what the public contract calls it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self, TypeVar

from leasehold.client.errors import BadRequest

if TYPE_CHECKING:
    from leasehold.v1 import records_pb2

E = TypeVar("E", bound=StrEnum)


class Preemption(StrEnum):
    """Whether a client that has a device loses it to one that waits with a higher priority."""

    NEVER = "never"
    """Nobody loses it."""

    LOWER = "lower"
    """Who has it with a lower priority is told, and loses it after a while."""

    AT_SAFE_POINT = "at-safe-point"
    """As lower, but only when its client says that it has stopped."""


class FailBack(StrEnum):
    """What becomes of a device that nobody uses and that is not where it is best served."""

    STAY = "stay"
    """It stays where it is until somebody asks for it."""

    PREFERRED = "preferred"
    """It goes back to the first of its controllers that could serve it."""


class LostLease(StrEnum):
    """What its holder does when etcd does not answer."""

    STOP = "stop"
    """It stops at its deadline."""

    CONTINUE = "continue"
    """It goes on until the device itself refuses it, or etcd says that it is over. Takes a reservation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """All of it. The times are in seconds; a grace of 0 is the cluster's default."""

    labels: Mapping[str, str] = field(default_factory=dict)
    preemption: str = Preemption.NEVER.value
    preemption_grace: int = 0
    min_hold: int = 0
    cool_down: int = 0
    fail_back: str = FailBack.STAY.value
    on_lost_lease: str = LostLease.STOP.value

    @classmethod
    def of(cls, device: "records_pb2.Device") -> Self:
        """Those of a device that stands. A value that this client does not know is told as its number."""
        from leasehold.v1 import records_pb2  # noqa: PLC0415 - slow to load for who only reads a command line

        return cls(
            labels=dict(device.labels),
            preemption=_word(Preemption, records_pb2.PreemptionPolicy, device.preemption),
            preemption_grace=device.preemption_grace_seconds,
            min_hold=device.min_hold_seconds,
            cool_down=device.cool_down_seconds,
            fail_back=_word(FailBack, records_pb2.FailBackPolicy, device.fail_back),
            on_lost_lease=_word(LostLease, records_pb2.LostLeasePolicy, device.on_lost_lease),
        )

    def message_fields(self) -> dict[str, Any]:
        """The fields of the contract's `Device`. Raises `BadRequest` for a word that is none."""
        from leasehold.v1 import records_pb2  # noqa: PLC0415

        preemption = _known(Preemption, "preemption", self.preemption)
        fail_back = _known(FailBack, "fail_back", self.fail_back)
        lost_lease = _known(LostLease, "on_lost_lease", self.on_lost_lease)
        return {
            "labels": dict(self.labels),
            "preemption": records_pb2.PreemptionPolicy.Value(f"PREEMPTION_POLICY_{preemption.name}"),
            "preemption_grace_seconds": self.preemption_grace,
            "min_hold_seconds": self.min_hold,
            "cool_down_seconds": self.cool_down,
            "fail_back": records_pb2.FailBackPolicy.Value(f"FAIL_BACK_POLICY_{fail_back.name}"),
            "on_lost_lease": records_pb2.LostLeasePolicy.Value(f"LOST_LEASE_POLICY_{lost_lease.name}"),
        }

    def fields(self) -> dict[str, str]:
        """What they say, for people, by the field of a file of devices. Defaults are left out."""
        seconds = {
            "preemption_grace_seconds": self.preemption_grace,
            "min_hold_seconds": self.min_hold,
            "cool_down_seconds": self.cool_down,
        }
        return {
            **{f"labels.{name}": self.labels[name] for name in sorted(self.labels)},
            **({"preemption": self.preemption} if self.preemption != Preemption.NEVER else {}),
            **{name: str(value) for name, value in seconds.items() if value},
            **({"fail_back": self.fail_back} if self.fail_back != FailBack.STAY else {}),
            **({"on_lost_lease": self.on_lost_lease} if self.on_lost_lease != LostLease.STOP else {}),
        }


def spelled(policy: type[E], text: str) -> E | None:
    """The policy that `text` names as people, JSON or the contract write it; None if it is none."""
    word = text.lower().replace("_", "-")
    for prefix in ("preemption-policy-", "fail-back-policy-", "lost-lease-policy-"):
        word = word.removeprefix(prefix)
    if word == "unspecified":
        return next(iter(policy))
    return next((known for known in policy if known.value == word), None)


def _known(policy: type[E], name: str, text: str) -> E:
    found = spelled(policy, text)
    if found is None:
        message = f"{name} {text[:40]!r} is none that there is: it is one of {', '.join(policy)}"
        raise BadRequest(message, "INVALID_FIELD", {"field": name})
    return found


def _word(policy: type[E], numbers: Any, number: int) -> str:
    found = spelled(policy, numbers.Name(number)) if number in numbers.values() else None
    return found.value if found else str(number)
